"""`scripts/convert.py`: converted folders can be evaluated, trained and exported, and have a certificate."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import osp.convert.change_norm
from osp.config import Config, from_dict
from osp.convert.change_norm import convert_folder
from osp.convert.config import ConvertConfig
from osp.convert.export import export
from osp.convert.hf_export import check_exportable
from osp.convert.same_function import read_certificate
from osp.errors import UserError
from osp.evaluation.config import EvaluateConfig
from osp.evaluation.evaluate import evaluate
from osp.evaluation.language_model import open_model
from osp.files import read_lines
from osp.model.hf_llama import load_hf
from osp.model.transformer import Transformer
from osp.model_config import AttentionConfig, ModelConfig, NormConfig
from osp.run.checkpoint import load_model
from osp.train.setup import train
from tests.conftest import ROOT, made_text
from tests.hf_models import edit_json

sys.path.insert(0, str(ROOT / "scripts"))
import entry

Tiny = Callable[..., Config]
IDS = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LayerNorm and projections."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    shorter = {"train": {**tiny_values["train"], "steps": 2}, "eval": {"tokens": 512, "sample_tokens": 0}}
    train(from_dict({**tiny_values, **shorter, "norm": {"name": "layernorm"}, "run": {"dir": str(folder)}}))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(made_text(5, seed=1)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted_llama(llama_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert_folder(llama_folder, out, to="ssnorm", text=str(text))
    return out


@torch.no_grad()
def relative_error(model: Any, expected: Any) -> float:
    return ((model(IDS).logits - expected(IDS).logits).abs().max() / expected(IDS).logits.abs().max()).item()


def test_layernorm_run_loads_in_transformers(run: Path, tmp_path: Path) -> None:
    """LayerNorm -> RMSNorm -> stock Llama: the same logits, and a card with every step."""
    from transformers import LlamaForCausalLM

    certificate = convert_folder(run, tmp_path / "rms", to="rmsnorm")
    ours = load_model(run)
    assert relative_error(load_model(tmp_path / "rms"), ours) < 1e-5
    exported = export(tmp_path / "rms", tmp_path / "out")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert relative_error(theirs, ours) < 1e-5
    assert exported.trained.perplexity == pytest.approx(certificate.perplexity.before, rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Converted from layernorm (32 channels) to rmsnorm (32 channels): embedding projections absorbed, " in card
    assert "| training tokens | 512 in 2 steps of 256 |" in card


def test_averaged_weights_are_converted_and_named(averaged_run: Path, tmp_path: Path) -> None:
    certificate = convert_folder(averaged_run, tmp_path / "rms", to="rmsnorm", weights="averaged")
    averaged = open_model(averaged_run, weights="averaged")
    assert certificate.before.sha256 == averaged.sha256()
    assert certificate.steps[0] == "average of the weights read"
    assert relative_error(load_model(tmp_path / "rms"), averaged.model) < 1e-5
    with pytest.raises(UserError, match="weights=averaged, but it has no average"):
        open_model(tmp_path / "rms", weights="averaged")


def test_certificate_holds_the_measurements(run: Path, tmp_path: Path) -> None:
    certificate = convert_folder(run, tmp_path / "rms", to="rmsnorm")
    subject = open_model(tmp_path / "rms")
    assert certificate.before.sha256 == open_model(run).sha256()
    assert certificate.after.sha256 == subject.sha256()
    assert certificate.fp64.relative < 1e-12
    assert certificate.fp64.relative < certificate.stored.relative < 1e-6
    assert 1e-4 < certificate.bf16.relative < 0.1
    assert {certificate.fp64.parts_at, certificate.stored.parts_at, certificate.bf16.parts_at} == {None}
    assert certificate.perplexity.text == "held_out"
    assert certificate.perplexity.after == pytest.approx(certificate.perplexity.before, rel=1e-5)
    assert certificate.versions["torch"]
    assert read_certificate(subject) == certificate
    table = str(certificate).split("\n")
    assert table[0].endswith(
        "layernorm of 32 channels -> rmsnorm of 32: embedding projections absorbed, residual stream recentred, "
        "layernorm -> rmsnorm"
    )
    assert re.match(r"fp64 +\d\.\de-1\d +\d\.\de-1\d +none$", table[3])


def test_converted_model_can_be_converted_again(run: Path, tmp_path: Path) -> None:
    """RMSNorm stored in fp32 -> CRMSNorm on 31 channels -> LayerNorm, evaluated like any model."""
    for source, to in (("run", "rmsnorm"), ("rmsnorm", "crmsnorm"), ("crmsnorm", "layernorm")):
        certificate = convert_folder(run if source == "run" else tmp_path / source, tmp_path / to, to=to)
    assert certificate.earlier is not None
    assert certificate.earlier["earlier"]["before"]["norm"] == "layernorm"
    ours = load_model(run)
    crms = load_model(tmp_path / "crmsnorm")
    assert (crms.config.hidden_size, crms.config.head_dim) == (31, 8)
    for to in ("crmsnorm", "layernorm"):
        assert relative_error(load_model(tmp_path / to), ours) < 1e-5
    values = [
        evaluate(open_model(path), EvaluateConfig(max_tokens=128, progress=False)).results[0].value
        for path in (run, tmp_path / "crmsnorm")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    with pytest.raises(
        UserError, match=r"crmsnorm: .* convert it first: python scripts/convert.py \S+ to=rmsnorm out="
    ):
        export(tmp_path / "crmsnorm", tmp_path / "out")


def test_converted_llama_computes_the_same(llama_folder: Path, converted_llama: Path) -> None:
    theirs, ours = open_model(llama_folder), open_model(converted_llama)
    assert relative_error(ours.model, theirs.model) < 1e-5
    assert (ours.bos_id, ours.eos_id, ours.step) == (theirs.bos_id, theirs.eos_id, 0)
    assert ours.tokenizer.to_str() == theirs.tokenizer.to_str()
    assert ours.model.config.norm == NormConfig(name="ssnorm", eps=1e-5)
    assert {p.name for p in converted_llama.iterdir()} == {
        "certificate.json",
        "checkpoints",
        "config.yaml",
        "tokenizer.json",
    }


def test_converted_llama_exports(llama_folder: Path, converted_llama: Path, text: Path, tmp_path: Path) -> None:
    export(converted_llama, tmp_path / "out", text=str(text))
    assert relative_error(load_hf(tmp_path / "out"), load_hf(llama_folder)) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Recipe" not in card
    assert "Converted from rmsnorm (32 channels) to ssnorm (32 channels)" in card
    with pytest.raises(UserError, match=r"held_out: .* is no run; name the run folder whose split you mean, or a file"):
        export(converted_llama, tmp_path / "again")


def test_several_ends_of_text_survive_conversion_and_export(llama_folder: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "llama")
    edit_json(folder / "generation_config.json", eos_token_id=[7, 0, 9])
    convert_folder(folder, tmp_path / "out", to="rmsnorm", text=str(text))
    export(tmp_path / "out", tmp_path / "hf", text=str(text))
    for path in (folder, tmp_path / "out", tmp_path / "hf"):
        assert (open_model(path).eos_id, open_model(path).stop_ids) == (0, (7, 0, 9))


@pytest.mark.parametrize(("bos_id", "bos_token"), [(5, None), (None, None)])
def test_bos_token_of_a_llama_is_kept(
    bos_id: int | None, bos_token: str | None, llama_folder: Path, text: Path, tmp_path: Path
) -> None:
    """Our own models have one token for begin and end of text; a Llama keeps its two on conversion and export."""
    folder = shutil.copytree(llama_folder, tmp_path / "llama")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "bos_token_id": bos_id}))
    convert_folder(folder, tmp_path / "out", to="rmsnorm", text=str(text))
    assert (open_model(tmp_path / "out").bos_id, open_model(tmp_path / "out").eos_id) == (bos_id, 0)
    export(tmp_path / "out", tmp_path / "hf", text=str(text))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["bos_token_id"] == bos_id


def test_training_starts_from_a_converted_folder(tiny: Tiny, converted_llama: Path, tmp_path: Path) -> None:
    """With weights, shape and tokenizer of the folder, a new optimizer and step 0."""
    start = [f"checkpoint.init_from={converted_llama}", "eval.sample_tokens=0"]
    train(tiny("train.steps=1", "optimizer.lr=0", *start, name="frozen"))
    frozen, ours = load_model(tmp_path / "frozen"), load_model(converted_llama)
    assert frozen.config == ours.config
    for name, parameter in frozen.named_parameters():
        assert torch.equal(parameter, dict(ours.named_parameters())[name])
    config = tiny("train.steps=3", "checkpoint.every=1", "train.stop_at=1", *start, name="trained")
    train(config)
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, stop_at=None)))
    steps = [event for event in read_lines(tmp_path / "trained" / "metrics.jsonl") if "train/loss" in event]
    assert [event["step"] for event in steps] == [1, 2, 3]
    trained = open_model(tmp_path / "trained")
    assert trained.config is not None
    assert trained.config.checkpoint.init_from == str(converted_llama)
    assert trained.conversion is None
    assert relative_error(trained.model, ours) > 1e-3
    with pytest.raises(UserError, match=r"checkpoint.init_from: \S+ -> None"):
        train(tiny("train.steps=3", "eval.sample_tokens=0", name="trained"))


def test_training_starts_from_another_run(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    train(tiny("train.steps=1", "optimizer.lr=0", "eval.sample_tokens=0", f"checkpoint.init_from={run}"))
    for name, parameter in load_model(tmp_path / "run").named_parameters():
        assert torch.equal(parameter, dict(load_model(run).named_parameters())[name])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.init_from=nowhere"], r"checkpoint.init_from=nowhere: no model there; name a run, a checkpoint"),
        (["checkpoint.init_from=HERE", "train.seq_len=128", "model.max_position_embeddings=128"], r"train.seq_len=128"),
        (["resume=HERE", "model.embed_proj=false"], r"a converted model, .*checkpoint.init_from|other parameters"),
    ],
    ids=str,
)
def test_unsuitable_initial_model_is_refused(
    overrides: list[str], message: str, tiny: Tiny, converted_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny(*(override.replace("HERE", str(converted_llama)) for override in overrides)))
    assert not list(tmp_path.iterdir())


def test_live_quantization_leaves_training_bit_identical(tiny: Tiny, tmp_path: Path) -> None:
    """Weights are rounded during the measurement only."""
    shared = ("norm.name=rmsnorm", "train.steps=2", "eval.sample_tokens=0", "eval.quant.tokens=256")
    for every in (0, 1):
        train(tiny(*shared, f"eval.quant.every={every}", name=f"every_{every}"))
    unmeasured, measured = (dict(load_model(tmp_path / f"every_{every}").named_parameters()) for every in (0, 1))
    assert all(torch.equal(parameter, measured[name]) for name, parameter in unmeasured.items())
    events = read_lines(tmp_path / "every_1" / "metrics.jsonl")
    assert [event["step"] for event in events if "quant/perplexity/4-4-4" in event] == [1, 2]


def test_converted_llama_has_no_validation_split(converted_llama: Path) -> None:
    with pytest.raises(UserError, match=r"held_out: .* is no run"):
        evaluate(open_model(converted_llama), EvaluateConfig(progress=False))


def test_export_requires_the_certificate(run: Path, tmp_path: Path) -> None:
    convert_folder(run, tmp_path / "rms", to="rmsnorm")
    path = tmp_path / "rms" / "certificate.json"
    certificate = json.loads(path.read_text())
    for content, message in (
        (None, r"a converted model without its certificate.json; convert the model again"),
        ("{", r"certificate.json: not a certificate"),
        (json.dumps({"after": 1}), r"certificate.json: not a certificate"),
        (
            json.dumps({**certificate, "after": {**certificate["after"], "sha256": "0"}}),
            r"certificate.json: belongs to other weights than",
        ),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=message) as error:
            export(tmp_path / "rms", tmp_path / "out")
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["rms"]


def damaged(name: str, change: float) -> Callable[..., tuple[Transformer, list[str]]]:
    def convert_wrongly(model: Transformer, to: str) -> tuple[Transformer, list[str]]:
        converted, steps = change_norms(model, to)
        dict(converted.named_parameters())[name].data[0] *= 1 + change
        return converted, steps

    change_norms = osp.convert.change_norm.change_norms
    return convert_wrongly


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "embed_tokens.weight",
            1e-2,
            r"converting layernorm to rmsnorm changes the logits by \S+ of the largest, .*, first in layer_00/o_",
        ),
        ("layers.0.mlp.up_proj.weight", 1e-2, r"changes .*first in layer_00/down_proj_in; not written"),
        ("layers.1.self_attn.v_proj.weight", 1e-5, r"changes .*first in layer_01/o_proj_in; not written"),
        ("lm_head.weight", float("nan"), r"changes the logits by nan .*first in logits; not written"),
    ],
)
def test_inexact_conversion_writes_nothing(
    name: str, change: float, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(osp.convert.change_norm, "change_norms", damaged(name, change))
    with pytest.raises(UserError, match=message):
        convert_folder(run, tmp_path / "new" / "out", to="rmsnorm")
    assert not list((tmp_path / "new").iterdir())


def test_failure_while_writing_leaves_no_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(osp.convert.change_norm.shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"out=\S+: cannot write there: No space left on device"):
        convert_folder(run, tmp_path / "out", to="rmsnorm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"name the model, its norm and the folder"),
        (["nowhere", "to=rmsnorm", "out=x"], r"nowhere: no model; name a run with a checkpoint"),
        (["LLAMA", "to=rmsnorm", "out=."], r"out=. exists; name a folder that does not"),
        (["LLAMA", "to=rmsnrm", "out=x"], r"to=rmsnrm: choose from layernorm, rmsnorm, ssnorm, crmsnorm"),
        (
            ["LLAMA", "to=crmsnorm", "out=x", "text=TEXT"],
            r"norm.name=rmsnorm to=crmsnorm: the residual stream has a mean",
        ),
        (
            ["LLAMA", "to=ssnorm", "out=x"],
            r"held_out: .* is no run; name the run folder whose split you mean, or a file",
        ),
        (["LLAMA", "to=ssnorm", "out=x", "text=no.txt"], r"no.txt does not exist"),
        (["LLAMA", "to=ssnorm", "oot=x"], r"unknown key 'oot'; did you mean 'out'\?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_command_line_is_a_one_line_error(
    arguments: list[str],
    message: str,
    llama_folder: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from tests.convert.test_hf_export import load_script

    monkeypatch.chdir(tmp_path)
    words = [word.replace("LLAMA", str(llama_folder)).replace("TEXT", str(text)) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["convert.py", *words])
    defaults = dataclasses.asdict(ConvertConfig())
    with pytest.raises(SystemExit) as stop:
        entry.run(load_script("convert").main, "convert", defaults=defaults, positional="path")
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line]
    assert re.search(message, line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["norm=bhyt", "model.hidden_size=64", "tokenizer.vocab_size=300", "+model.x=1"])
def test_model_keys_beside_init_from_are_refused(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.convert.test_hf_export import load_script

    values = {"train": {"steps": 1}, "checkpoint": {"init_from": "somewhere"}}
    monkeypatch.setattr(sys, "argv", ["train.py", "checkpoint.init_from=somewhere", argument])
    message = rf"{re.escape(argument)}: model and tokenizer come from checkpoint.init_from=somewhere; leave it out"
    with pytest.raises(UserError, match=message):
        load_script("train").main(values)


def test_llama_without_eos_token_is_refused(llama_folder: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "llama")
    values = json.loads((folder / "config.json").read_text())
    for end in (None, 299_999):
        (folder / "config.json").write_text(json.dumps({**values, "eos_token_id": end}))
        with pytest.raises(UserError, match=r"config.json has no eos_token_id that the tokenizer knows"):
            convert_folder(folder, tmp_path / "out", to="ssnorm", text=str(text))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm": NormConfig(name="bhyt_star")}, r"norm.name=bhyt_star: .* norm=ssnorm and norm=rmsnorm export$"),
        ({"norm": NormConfig(name="derf")}, r"norm.name=derf: .* norm=ssnorm and norm=rmsnorm export$"),
        (
            {"norm": NormConfig(name="layernorm")},
            r"it subtracts the mean; convert it first: python scripts/convert.py RUN",
        ),
        (
            {"norm": NormConfig(name="crmsnorm")},
            r"model.hidden_size=257 is no multiple of model.num_attention_heads=4, which transformers requires",
        ),
        (
            {"norm": NormConfig(name="crmsnorm"), "hidden_size": 255, "head_dim": 64},
            r"that is not stored; convert it first: python scripts/convert.py RUN to=",
        ),
        (
            {"norm": NormConfig(name="layernorm", bias=True)},
            r"export \(model.head_bias=true: a stock Llama has no bias of",
        ),
        ({"norm": NormConfig(name="layernorm"), "qk_norm": True}, r"rmsnorm export \(qk_norm=true has eps="),
        ({"norm": NormConfig(name="rmsnorm", final="layernorm")}, r"norm.final=layernorm: .* it subtracts the mean"),
        (
            {"norm": NormConfig(name="rmsnorm", placement="peri")},
            r"norm.placement=peri: a stock Llama has no norm after",
        ),
        ({"norm": NormConfig(name="ssnorm"), "qk_norm": True}, r"qk_norm=true: a stock Llama has no norm of queries"),
        ({"attention": AttentionConfig(gate=True)}, r"attention.gate=true: a stock Llama has no gate"),
        ({"ffn_norm": True}, r"ffn_norm=true: a stock Llama has no norm inside its MLP"),
        ({"attention": AttentionConfig(off_by_one=True)}, r"attention.off_by_one=true: a stock Llama has no 1 in the"),
        ({"hidden_act": "relu2"}, r"model.hidden_act=relu2: a stock Llama has no other activation than silu"),
        ({"head_bias": True}, r"model.head_bias=true: a stock Llama has no bias of the head"),
        ({"attention": AttentionConfig(value_gate=True)}, r"attention.value_gate=true: a stock Llama has no gate of"),
        ({"attention": AttentionConfig(logit_cap=50.0)}, r"attention.logit_cap=50.0: a stock Llama has no cap of"),
    ],
    ids=str,
)
def test_export_refuses_a_model_with_reason(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_exportable(ModelConfig(**config), path="RUN")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["norm.name=rmsnorm", "norm.embed_scale=true"],
        ["norm.name=ssnorm", "norm.lns=true", "model.attention_bias=true", "model.mlp_bias=true"],
        ["norm.name=rmsnorm", "norm.affine=false", "norm.lns=true", "model.head_dim=16", "model.embed_proj=false"],
    ],
    ids=str,
)
def test_model_that_folds_is_exported_without_conversion(overrides: list[str], tiny: Tiny, tmp_path: Path) -> None:
    """LayerNorm scaling, the scale of the embedding, biases, a separate head size."""
    from transformers import LlamaForCausalLM

    train(tiny("train.steps=2", "eval.sample_tokens=0", "optimizer.lr=0.1", *overrides))
    export(tmp_path / "run", tmp_path / "out")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert relative_error(theirs, load_model(tmp_path / "run")) < 1e-5
    assert relative_error(load_hf(tmp_path / "out"), load_model(tmp_path / "run")) < 1e-5
