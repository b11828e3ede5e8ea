"""Exported models loaded by `transformers` have the same logits, perplexity and tokens as our own."""

import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

import osp.convert.export
import osp.convert.hf_export
from osp.config import Config, from_dict
from osp.convert.export import export
from osp.convert.hf_export import write_llama
from osp.data.tokenizer import load_tokenizer
from osp.errors import UserError
from osp.evaluation.config import EvaluateConfig
from osp.evaluation.evaluate import Measurement, evaluate, store_record
from osp.evaluation.language_model import open_model
from osp.evaluation.perplexity import perplexity
from osp.evaluation.texts import read_text
from osp.model.generate import generate, prepare_for_generation
from osp.model.hf_llama import load_hf
from osp.quant.apply import quantized
from osp.quant.spec import QuantSpec
from osp.run.checkpoint import load_model
from osp.train.setup import train
from tests.conftest import ROOT, made_text
from tests.hf_models import STORIES, write_stories260k

sys.path.insert(0, str(ROOT / "scripts"))
import entry

Tiny = Callable[..., Config]
IDS = torch.randint(0, 320, (2, 50), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(from_dict({**tiny_values, "run": {"name": "run", "dir": str(folder)}}))
    return folder


def load_in_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert type(model) is LlamaForCausalLM
    return model.eval()


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_exported_run_equals_the_trained_model_in_transformers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OSP with SSNorm and projections: same logits, same perplexity of the validation split."""
    folder = tmp_path / "new" / "out"
    monkeypatch.setattr("osp.convert.hf_export.SHARD_BYTES", 30_000)
    certificate = export(run, folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert {path.stat().st_mode for path in folder.iterdir()} == {(run / "config.yaml").stat().st_mode}
    assert max(p.stat().st_size for p in folder.glob("*.safetensors")) < 45_000  # the largest tensor: 41 kB
    theirs, ours = load_in_transformers(folder), load_model(run)
    assert relative_error(theirs(IDS).logits, ours(IDS).logits) < 1e-5
    subject = open_model(run)
    text = read_text("held_out", subject)
    ours_on_text = perplexity(subject.model, text, seq_len=32)
    rows = text.tokens[: len(text.tokens) // 32 * 32].view(-1, 32)
    nats = sum(F.cross_entropy(theirs(row[None]).logits[0, :-1], row[1:], reduction="sum").item() for row in rows)
    theirs_on_text = math.exp(nats / (len(rows) * 31))
    assert ours_on_text.perplexity == pytest.approx(theirs_on_text, rel=1e-4)
    assert certificate.client.perplexity == pytest.approx(theirs_on_text, rel=1e-6)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("overrides", [["norm.name=rmsnorm"], ["norm.name=rmsnorm", "norm.affine=false"]], ids=str)
def test_rmsnorm_without_projections_is_exported(overrides: list[str], tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.steps=2", "model.embed_proj=false", "norm.eps=1e-4", "model.rope_theta=500", *overrides))
    export(tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "out")
    with torch.no_grad():
        theirs, ours = load_in_transformers(tmp_path / "out")(IDS).logits, load_model(tmp_path / "run")(IDS).logits
    assert relative_error(theirs, ours) < 1e-5


@pytest.mark.parametrize(("norm", "tied"), [({}, True), ({"name": "rmsnorm"}, True), ({"embed_scale": True}, False)])
def test_tied_run_is_exported_tied_unless_the_embedding_changes(
    norm: dict[str, Any], tied: bool, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [f"norm.{key}={json.dumps(value)}" for key, value in norm.items()]
    train(tiny("train.steps=2", "model.embed_proj=false", "model.tie_embeddings=true", *overrides))
    with caplog.at_level("INFO"):
        export(tmp_path / "run", tmp_path / "out")
    lines = [message for message in caplog.messages if "two matrices" in message]
    assert len(lines) == (not tied)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not tied)
    theirs, ours = load_in_transformers(tmp_path / "out"), load_model(tmp_path / "run")
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert relative_error(theirs(IDS).logits, ours(IDS).logits) < 1e-5
    assert load_hf(tmp_path / "out").config.tie_embeddings == tied


@torch.no_grad()
def test_exported_folder_loads_as_our_model(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    ours = load_hf(tmp_path / "out")
    assert ours.config.norm.name == "rmsnorm"
    assert not ours.config.embed_proj
    assert relative_error(ours(IDS).logits, load_model(run)(IDS).logits) < 1e-5
    gains = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert gains.shape == (32,)
    assert gains.unique().numel() == 1
    with pytest.raises(UserError, match=r"is a Hugging Face folder already"):
        export(tmp_path / "out", tmp_path / "again")


@pytest.mark.skipif(not STORIES.exists(), reason="the shared checkpoint is not here")
@torch.no_grad()
def test_public_model_is_bit_identical_after_round_trip(tmp_path: Path) -> None:
    """Tied head, 8 query heads on 4 key heads: read, written and read again, by us and by transformers."""
    write_stories260k(tmp_path / "first")
    ours = load_hf(tmp_path / "first")
    (tmp_path / "second").mkdir()
    write_llama(ours, tmp_path / "second", dtype="fp32", bos_id=1, eos_id=2)
    assert torch.equal(load_hf(tmp_path / "second")(IDS).logits, ours(IDS).logits)
    theirs = [load_in_transformers(tmp_path / name)(IDS).logits for name in ("first", "second")]
    assert torch.equal(*theirs)
    assert relative_error(ours(IDS).logits, theirs[0]) < 1e-5


@torch.no_grad()
def test_bf16_export_rounds_the_weights(run: Path, tmp_path: Path) -> None:
    certificate = export(run, tmp_path / "out", dtype="bf16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    theirs = load_in_transformers(tmp_path / "out")
    assert 1e-5 < relative_error(theirs(IDS).logits, load_model(run)(IDS).logits) < 2e-2
    assert certificate.folding.relative < 1e-5
    assert certificate.trained.perplexity != pytest.approx(certificate.fake.perplexity, rel=1e-5)
    assert certificate.fake.perplexity == pytest.approx(certificate.client.perplexity, rel=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tokenizer_of_the_run_is_exported(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export(run, tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(run / "tokenizer.json")
    for text in (*made_text(2), "caf\xe9 \u2028  two  spaces \n", " .", "don't !"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.token_to_id("<|endoftext|>")
    assert theirs.model_max_length == 32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 32


def test_model_trained_with_a_start_token_reads_one_everywhere(tiny: Tiny, tmp_path: Path) -> None:
    import gguf
    from transformers import AutoTokenizer

    config = tiny("data.bos=true")
    train(config)
    run = Path(config.run.dir)
    (tmp_path / "text.txt").write_text("".join(made_text(40)))
    measured = EvaluateConfig(path=str(run), texts=(str(tmp_path / "text.txt"),), max_tokens=256, progress=False)
    subject = open_model(run)
    words = [evaluate(subject, dataclasses.replace(measured, bos=bos)).results for bos in (None, True, False)]
    assert words[0] == words[1] != words[2]
    assert "bos=yes" in words[0][0].what
    export(run, tmp_path / "out")
    theirs, ids = AutoTokenizer.from_pretrained(tmp_path / "out"), subject.encode("def main():")
    assert theirs("def main():")["input_ids"] == [subject.bos_id, *ids]
    assert theirs("def main():", add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == "def main():"
    exported = open_model(tmp_path / "out")
    assert torch.equal(read_text(str(run), exported).tokens, read_text("held_out", subject).tokens)
    export(run, tmp_path / "out.gguf", format="gguf", scheme="f32")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_transformers_generates_the_same_tokens(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    model = load_in_transformers(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.generation_config.bos_token_id == 0
    generated = model.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    ours = prepare_for_generation(load_model(run), torch.float32)
    assert generate(ours, IDS[:1, :5].tolist(), 6) == generated[:, 5:].tolist()


def test_card_shows_recipe_curves_and_evaluations(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "copy")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "tokens": 768, "quant/perplexity/4-4-4": 321.5}) + "\n")
    (run / "evaluation").mkdir()
    result = {"what": "wikitext2", "metric": "perplexity", "value": 19.6, "stderr": None}
    stored = {"model": {"step": 6}, "quant": {"text": "4-4-4 rtn"}, "results": [result]}
    (run / "evaluation" / "a.json").write_text(json.dumps(stored))
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| training tokens | 1,536 in 6 steps of 256 |" in card
    assert "| norm | ssnorm |" in card
    assert "\n| step | tokens | Validation loss | Bits per byte | Perplexity at 16 and 4 bits: 4-4-4 |\n" in card
    assert re.search(r"^\| 3 \| 768 \| 5\.\d+ \| \d\.\d+ \| 321.5 \|$", card, flags=re.MULTILINE)
    exported, text = load_hf(tmp_path / "out"), read_text("held_out", open_model(run))
    with quantized(exported, QuantSpec().at("4-4-4")):
        four_bits = perplexity(exported, text, seq_len=32).perplexity
    assert "\nFake-quantized to 4-4-4 rtn, W sym/channel clip" in card
    assert f" the perplexity of the same text is {four_bits:.4f}.\n" in card
    assert "| 6 | wikitext2 perplexity | 4-4-4 rtn | 19.6 |" in card
    (run / "evaluation" / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a.json: not a record of scripts/evaluate.py"):
        export(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["norm.name=bhyt"], r"norm.name=bhyt: a stock Llama has no such norm, .* norm=ssnorm and norm=rmsnorm export"),
        (["norm.name=dyt"], r"norm.name=dyt: .* it is a tanh"),
        (["norm.name=ssnorm", "norm.final=layernorm"], r"norm.final=layernorm: .* it subtracts the mean"),
        (["norm.name=crmsnorm"], r"norm.name=crmsnorm"),
    ],
)
def test_norm_that_a_llama_lacks_is_refused(overrides: list[str], message: str, tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.steps=1", "eval.sample_tokens=0", *overrides))
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk_is_one_line_and_leaves_no_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("osp.convert.hf_export.save_torch_state_dict", full)
    with pytest.raises(UserError, match=r"out=.*new: cannot write there: .*No space left on device"):
        export(run, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_wrong_weights_are_not_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong folding, wrong files and a wrong perplexity are noticed before the folder gets its name."""
    before = {path.name for path in tmp_path.iterdir()}
    fold = osp.convert.hf_export.fold_into_weights

    def fold_wrongly(model: Any) -> None:
        fold(model)
        model.lm_head.weight.data[3] *= 1.01

    monkeypatch.setattr(osp.convert.hf_export, "fold_into_weights", fold_wrongly)
    with pytest.raises(UserError, match=r"folding projections and scales changes the logits by \S+ of the largest"):
        export(run, tmp_path / "out")
    monkeypatch.setattr(osp.convert.hf_export, "fold_into_weights", fold)
    save = osp.convert.hf_export.save_torch_state_dict

    def save_wrongly(tensors: Any, *args: Any, **options: Any) -> None:
        save({name: 1.001 * tensor for name, tensor in tensors.items()}, *args, **options)

    monkeypatch.setattr(osp.convert.hf_export, "save_torch_state_dict", save_wrongly)
    with pytest.raises(UserError, match=r"reading back the files changes the logits"):
        export(run, tmp_path / "out")
    monkeypatch.setattr(osp.convert.hf_export, "save_torch_state_dict", save)
    check = osp.convert.export.check_same_perplexity
    monkeypatch.setattr(
        osp.convert.export, "check_same_perplexity", lambda text, a, b, **kwargs: check(text, 20.0, 20.1, **kwargs)
    )
    with pytest.raises(UserError, match=r"perplexity of held_out is 20.00000 before and 20.10000 after; not written"):
        export(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"name the run and the folder to write"),
        (["nowhere", "out=x"], r"nowhere: no model; name a run with a checkpoint"),
        (["one", "two", "out=x"], r"one path at a time, not 2: one two"),
        (["it's (a) run", "out=x"], r"it's \(a\) run: no model"),
        (["nowhere", "ouf=x"], r"unknown key 'ouf'; did you mean 'out'\?"),
        (["nowhere", "out=x", "dtype=fp16"], r"dtype='fp16': must be 'fp32' or 'bf16'"),
        (["nowhere", "out=."], r"out=. exists; name a folder that does not"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_command_line_is_a_one_line_error(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from osp.convert.config import ExportConfig

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    main = load_script("export").main
    with pytest.raises(SystemExit) as stop:
        entry.run(main, "export", defaults=dataclasses.asdict(ExportConfig()), positional="path")
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line]
    assert re.search(message, line)
    assert not list(tmp_path.iterdir())


def load_script(name: str) -> Any:
    """Import a script by its path, because `export` may be the name of an installed module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_validation_split_of_another_tokenizer_is_refused(run: Path) -> None:
    subject = open_model(run)
    assert read_text(str(run), subject).sha256 == read_text("held_out", subject).sha256
    spec = json.loads(subject.tokenizer.to_str())
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    other = dataclasses.replace(subject, tokenizer=Tokenizer.from_str(json.dumps(spec)))
    for name in ("held_out", str(run)):
        with pytest.raises(UserError, match=r"held_out: .* holds the tokens of another tokenizer than the model's"):
            read_text(name, other)


def test_run_is_evaluated_on_its_validation_split_and_calibrated_on_its_training_split(run: Path) -> None:
    subject = open_model(run)
    spec = QuantSpec(w_bits=4, method="gptq", calibration_tokens=256)
    config = EvaluateConfig(quant=spec, max_tokens=128, progress=False)
    record = evaluate(subject, config)
    assert record.results[0].what == "held_out[len=32,overlap=0,bos=no,first=128]"
    assert record.step == 6
    rows = Measurement(subject, config).calibration(spec)
    assert rows is not None
    assert rows.shape == (8, 32)
    path = store_record(record, config.out, subject.run, "name")
    assert path == run.resolve() / "evaluation" / "name.json"
    (run / "evaluation" / "name.json").unlink()
