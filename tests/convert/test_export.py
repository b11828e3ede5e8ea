"""Export writes files that compute what was measured, or nothing and one line."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

from osp.config import Config
from osp.convert.export import FORMATS, TOLERANCE_OF_ACTIVATIONS, export
from osp.convert.file_format import Client, FileFormat, LlamaSource
from osp.errors import UserError
from osp.evaluation.language_model import model_sha256, open_model
from osp.evaluation.perplexity import perplexity
from osp.evaluation.texts import read_text
from osp.model.fold import pad_ffn
from osp.model.hf_llama import load_hf
from osp.model.transformer import Transformer, build_model, meta_model
from osp.quant.apply import Quantized, quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec
from osp.run.checkpoint import load_model
from osp.run.evaluations import Evaluation, Result, write_evaluation

Tiny = Callable[..., Config]
GROUPED = QuantSpec(w_bits=4, w_group_size=16)


class Pickle(FileFormat):
    """A file that torch writes, with the weights as they are inside `quantized`."""

    name = "pickle"
    schemes: ClassVar[Mapping[str, QuantSpec]] = {
        "int4": GROUPED,
        "Int4_G64": dataclasses.replace(GROUPED, w_group_size=64),
        "whole": QuantSpec(),
        "block": DEPLOYED["q4_0"],
    }
    suffix = ".pt"
    tolerance = 1e-6

    def ffn_multiple(self, scheme: str) -> int:
        return 32

    def write(self, source: LlamaSource, state: Quantized, scheme: str, path: Path) -> None:
        assert (scheme == "whole") == (not state.grids)
        torch.save({"config": source.model.config, "weights": source.model.state_dict()}, path)

    def open(self, path: Path, device: torch.device) -> Client:
        stored = torch.load(path, weights_only=False)
        model = meta_model(stored["config"])
        model.load_state_dict(stored["weights"], assign=True)
        return Loaded(model.eval())

    def above_four_bits(self, path: Path) -> list[str]:
        return ["layers.0.norm", "layers.1.norm", "head"]


class Loaded:
    name = "torch"

    def __init__(self, model: Transformer):
        self.model = model

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        logits = self.model(ids).logits
        assert logits is not None
        return logits

    def encode(self, text: str) -> list[int] | None:
        return None


@pytest.fixture(autouse=True)
def _pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "pickle", Pickle())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what is written ----------------------------------------------------------------------------------------------


def test_three_files_of_a_made_up_format_appear_together(plain_run: Path, tmp_path: Path) -> None:
    certificate = export(plain_run, tmp_path / "m.pt", format="pickle", scheme="int4")
    assert names(tmp_path) == {"m.pt", "m.certificate.json", "m.certificate.md"}
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    stored = json.loads((tmp_path / "m.certificate.json").read_text())
    assert stored["scheme"] == "int4"
    assert stored["quantization"] == f"{GROUPED} [{GROUPED.hash}]"
    assert stored["files"]["m.pt"]["bytes"] == (tmp_path / "m.pt").stat().st_size
    assert stored["ffn_width"] == [48, 64]
    assert stored["context"] == stored["window"] == 32
    assert stored["above_four_bits"] == ["layers.0.norm", "layers.1.norm", "head"]
    subject = open_model(plain_run)
    with quantized(subject.model, GROUPED):
        expected = perplexity(subject.model, read_text("held_out", subject), seq_len=32).perplexity
    assert certificate.fake.perplexity == pytest.approx(expected, rel=1e-4)
    assert certificate.trained.perplexity != pytest.approx(expected, rel=1e-3)
    assert "| above 4 bits | 3 tensors: layers.*.norm (2), head |" in (tmp_path / "m.certificate.md").read_text()
    assert f"| quantization | pickle int4: {GROUPED} [{GROUPED.hash}]; " in (tmp_path / "m.certificate.md").read_text()
    assert f"| file | m.pt: {stored['files']['m.pt']['bytes']:,} bytes |" in (tmp_path / "m.certificate.md").read_text()


def test_weights_in_the_file_are_the_rounded_ones(plain_run: Path, tmp_path: Path) -> None:
    export(plain_run, tmp_path / "m.pt", format="pickle", scheme="int4")
    stored = torch.load(tmp_path / "m.pt", weights_only=False)["weights"]
    groups = stored["layers.1.self_attn.q_proj.weight"].unflatten(1, (-1, 16))
    assert max(len(group.unique()) for group in groups.flatten(0, 1)) <= 16
    assert len(stored["lm_head.weight"].unique()) > 1000


def test_averaged_weights_are_exported_and_named(averaged_run: Path, tmp_path: Path) -> None:
    """In the certificate and in the card; an evaluation of them is marked in the card."""
    run, averaged = tmp_path / "run", load_model(averaged_run, weights="averaged")
    shutil.copytree(averaged_run, run)
    record = Evaluation(
        model={"name": "run", "step": 4},
        weights="averaged",
        quant={"text": "4-4-4", "hash": "abc"},
        results=(Result("piqa", "acc", 0.5),),
    )
    write_evaluation(run / "evaluation" / "a.json", record)
    export(run, tmp_path / "out", weights="averaged")
    ids = torch.arange(60).view(2, 30)
    assert torch.allclose(load_hf(tmp_path / "out")(ids).logits, averaged(ids).logits, atol=1e-5)
    stored = json.loads((tmp_path / "out" / "certificate.json").read_text())["model"]
    assert (stored["name"], stored["weights"]) == ("run, averaged", "averaged")
    assert stored["sha256"] == model_sha256(averaged)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("| weights | the running average of the trained ones |") == 2, "of the recipe and the certificate"
    assert "| 4, averaged | piqa acc |" in card


@pytest.mark.parametrize("bias", ["false", "true"])
def test_padding_leaves_the_function_as_it_is(bias: str, tiny: Tiny) -> None:
    model, ids = build_model(tiny(f"model.mlp_bias={bias}").model, seed=3).double(), torch.arange(60).view(2, 30)
    model.compute_dtype = torch.float64
    for parameter in model.parameters():
        parameter.data += 0.01  # biases begin at 0
    expected = model(ids).logits
    pad_ffn(model, multiple=32)
    assert model.config.intermediate_size == 64
    assert {model.get_parameter(f"layers.1.mlp.{name}_proj.weight").shape for name in ("gate", "up")} == {(64, 32)}
    assert model.get_parameter("layers.1.mlp.down_proj.weight").shape == (32, 64)
    assert torch.allclose(model(ids).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("multiple", "width"), [(None, 64), (1, 48), (48, 48), (25, 50)])
def test_width_of_the_ffn_is_chosen(multiple: int | None, width: int, plain_run: Path, tmp_path: Path) -> None:
    certificate = export(plain_run, tmp_path / "m.pt", format="pickle", scheme="whole", ffn_multiple=multiple)
    assert certificate.ffn_width == (48, width)


def test_without_transformers_our_own_reader_is_the_client(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    certificate = export(plain_run, tmp_path / "out")
    assert certificate.client.reader == "osp, because transformers is not installed"
    assert certificate.same_tokens == 100
    assert "by osp, because transformers is not installed; " in (tmp_path / "out" / "README.md").read_text()


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "hf", "scheme": "INT4"}, r"scheme=INT4: format=hf has no schemes; leave scheme out"),
        ({"format": "hf", "scheme": "int4"}, r"scheme=int4: format=hf has no such scheme; set format=pickle"),
        ({}, r"format=pickle: choose a scheme from int4, Int4_G64, whole, block$"),
        ({"scheme": "INT4"}, r"scheme=INT4: format=pickle has int4, Int4_G64, whole, block; did you mean int4\?"),
        ({"scheme": "int4_g46"}, r"; did you mean Int4_G64\?"),
        ({"scheme": "int4", "dtype": "bf16"}, r"dtype=bf16: format=pickle has the dtypes of its scheme; leave dtype"),
        (
            {"scheme": "whole", "quant": QuantSpec(w_clip=False)},
            r"quant: format=pickle with scheme=whole rounds",
        ),
        ({"format": "hf", "quant": GROUPED}, r"quant: format=hf rounds no weights; leave quant out"),
        ({"scheme": "int4", "quant": QuantSpec(w_bits=8)}, r"quant.w_bits=8: fixed by scheme=int4; quant says how"),
        (
            {"scheme": "int4", "quant": QuantSpec(rotation="quarot")},
            r"quant.rotation=quarot: fixed by scheme=int4; quant says how weights are rounded, method, w_clip, ",
        ),
        ({"scheme": "int4", "quant": DEPLOYED["w4a16_g32"]}, r"quant.w_group_size=32: fixed by scheme=int4"),
        ({"scheme": "block", "quant": QuantSpec(method="gptq")}, r"pickle with scheme=block rounds weights in one way"),
        ({"scheme": "int4", "out": "m.gguf"}, r"m.gguf: format=pickle writes a file whose name ends in .pt"),
        ({"format": "hf", "out": "m.gguf"}, r"m.gguf: format=hf writes a folder; format=gguf writes such a file"),
        (
            {"scheme": "Int4_G64"},
            r"scheme=Int4_G64: groups of 64 channels do not divide model.hidden_size=32; choose from int4, wh",
        ),
        (
            {"scheme": "int4", "ffn_multiple": 50},
            r"scheme=int4: groups of 16 channels do not divide model.intermediate_size=50; set ffn_multiple=null",
        ),
        (
            {"scheme": "int4", "quant": QuantSpec(method="gptq", calibration="nowhere.txt")},
            r"nowhere.txt: no such file|nowhere.txt does not exist",
        ),
        (
            {"scheme": "int4", "quant": QuantSpec(method="gptq", calibration="held_out")},
            r"quant.calibration=held_out is a text that is measured; name another one",
        ),
        ({"scheme": "int4", "text": "nowhere.txt"}, r"nowhere.txt"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_any_work(
    arguments: dict[str, Any], message: str, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osp.convert.export.observe_function", None)
    with pytest.raises(UserError, match=message) as error:
        export(plain_run, tmp_path / arguments.pop("out", "m.pt"), **{"format": "pickle", **arguments})
    assert "\n" not in str(error.value)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("existing", ["m.pt", "m.certificate.json", "m.certificate.md"])
def test_no_file_is_replaced(existing: str, plain_run: Path, tmp_path: Path) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(UserError, match=rf"out=\S+{existing} exists; name a file that does not"):
        export(plain_run, tmp_path / "m.pt", format="pickle", scheme="int4")
    assert names(tmp_path) == {existing}
    assert (tmp_path / existing).read_text() == "precious"


def test_methods_round_a_scheme(plain_run: Path, tmp_path: Path) -> None:
    """Presets with a method choose it; the calibration of a scheme stays."""
    gptq = QuantSpec(w_bits=4, a_bits=4, kv_bits=4, ffn_hadamard=True, method="gptq", damping=0.1, seed=3)
    expected = dataclasses.replace(GROUPED, method="gptq", damping=0.1, seed=3)
    assert Pickle().quantization("int4", gptq) == expected
    assert Pickle().quantization("int4", QuantSpec()) == GROUPED
    few = dataclasses.replace(gptq, calibration_tokens=256)
    certificate = export(plain_run, tmp_path / "m.pt", format="pickle", scheme="int4", quant=few)
    assert certificate.quantization.startswith("4-16-16 gptq damping 0.1, W sym/group 16 clip, calibration train 256 ")


def test_a_text_shorter_than_a_window_is_a_warning(
    plain_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.txt").write_text("abc")
    certificate = export(plain_run, tmp_path / "m.pt", format="pickle", scheme="whole", text=str(tmp_path / "text.txt"))
    assert re.search(r"text=text.txt: \d tokens are less than a window of 32", caplog.text)
    assert certificate.text["tokens"] < 32
    assert len(certificate.client.continuation) > 20


class Wrong(Loaded):
    """A client whose logits are off."""

    def logits(self, ids: Tensor) -> Tensor:
        return 1.001 * super().logits(ids)


class OtherTokens(Loaded):
    def encode(self, text: str) -> list[int] | None:
        return [len(text)]


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (
            Wrong,
            r"perplexity of held_out is \S+ by fake quantization and \S+ by torch, more than 1e-06 apart",
        ),
        (OtherTokens, r"torch splits '' into \[0\], not \[\]; not written"),
    ],
)
def test_file_that_computes_something_else_is_not_written(
    client: type[Loaded], message: str, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Pickle.open
    monkeypatch.setattr(Pickle, "open", lambda *arguments: client(cast(Loaded, right(*arguments)).model))
    with pytest.raises(UserError, match=message):
        export(plain_run, tmp_path / "m.pt", format="pickle", scheme="int4")
    assert names(tmp_path) == set()


def test_matrix_that_silently_stayed_wide_is_not_written(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pickle, "above_four_bits", lambda *_: ["norm", "blk.3.ffn_down.weight"])
    with pytest.raises(UserError, match=r"blk.3.ffn_down.weight has more than 4 bits; not written"):
        export(plain_run, tmp_path / "m.pt", format="pickle", scheme="int4")
    export(plain_run, tmp_path / "m.pt", format="pickle", scheme="whole")


@pytest.mark.parametrize("target", ["m.certificate.md", "m.pt"])
def test_failed_rename_takes_the_earlier_ones_back(
    target: str, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if to.name == target:
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match=r"out=\S+m.pt: cannot write there: No space left on device"):
        export(plain_run, tmp_path / "m.pt", format="pickle", scheme="int4")
    assert names(tmp_path) == set()


def test_rounded_activations_have_a_wider_tolerance(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of this test rounds no activations, and 8 bits of them cost less than the tolerance."""
    eight_bits = dataclasses.replace(GROUPED, a_bits=8)
    monkeypatch.setattr(Pickle, "schemes", {"int4": GROUPED, "int4_a8": eight_bits})
    certificate = export(plain_run, tmp_path / "m.pt", format="pickle", scheme="int4_a8")
    assert Pickle.tolerance < certificate.relative <= certificate.tolerance == TOLERANCE_OF_ACTIVATIONS
