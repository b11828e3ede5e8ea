"""The commands evaluate and compare: what they print and store equals the results of their parts."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.errors import UserError
from osp.evaluation.compare import COLUMNS, METHODS, compare, compare_one, markdown, script_kurtosis
from osp.evaluation.config import DEPLOYED_COLUMNS, CompareConfig, EvaluateConfig
from osp.evaluation.evaluate import (
    Measurement,
    evaluate,
    live_perplexity,
    read_calibration,
    results_table,
    store_record,
)
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.perplexity import perplexity
from osp.evaluation.texts import encode, read_text
from osp.model.transformer import build_model
from osp.model_config import NormConfig
from osp.quant.apply import draw_calibration, propagated_error, quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import INNER_SITES, QuantSpec
from osp.run.checkpoint import load_model
from osp.run.evaluations import (
    Comparison,
    Evaluation,
    Score,
    SiteAblation,
    SiteCost,
    read_comparison,
    read_evaluation,
    read_evaluations,
)
from tests.conftest import ROOT, made_text, run_in_process

sys.path.insert(0, str(ROOT / "scripts"))
import entry

FOUR = QuantSpec().at("4-4-4")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(made_text(2)))
    return path


@pytest.fixture
def config(text_file: Path) -> EvaluateConfig:
    return EvaluateConfig(texts=(str(text_file),), seq_len=32, max_tokens=256, progress=False)


def test_results_match_their_parts(llama: LanguageModel, config: EvaluateConfig, tmp_path: Path) -> None:
    text = read_text(config.texts[0], llama)
    with quantized(llama.model, FOUR):
        expected = perplexity(llama.model, text, seq_len=32, max_tokens=256)
    record = evaluate(llama, dataclasses.replace(config, quant=FOUR))
    assert [(r.what, r.metric, r.value) for r in record.results] == [
        ("text.txt[len=32,overlap=0,bos=no,first=256]", "perplexity", expected.perplexity),
        ("text.txt[len=32,overlap=0,bos=no,first=256]", "bits per byte", expected.bits_per_byte),
    ]
    assert record.ablation is None
    plain = evaluate(llama, config)
    unquantized = perplexity(llama.model, text, seq_len=32, max_tokens=256).perplexity
    assert plain.results[0].value == unquantized != record.results[0].value
    assert record.model["sha256"] == plain.model["sha256"] == llama.sha256(), "of the file, quantized or not"
    assert record.quant["hash"] == FOUR.hash != plain.quant["hash"]
    assert record.texts == [{"name": "text.txt", "sha256": text.sha256, "tokens": len(text.tokens)}]
    table = results_table(record)
    assert str(FOUR) in table
    assert FOUR.hash in table
    path = store_record(record, str(tmp_path / "new" / "a.json"))
    assert path is not None
    assert json.loads(path.read_text())["results"][0]["value"] == record.results[0].value
    assert read_evaluation(path).results == record.results
    assert store_record(record, None, llama.run, "name") is None
    names = {record.name, plain.name, dataclasses.replace(record, texts=[]).name}
    assert len(names) == 3  # an evaluation on other text or at other bits does not replace this one


def test_results_before_a_failure_are_kept(
    llama: LanguageModel, config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record so far is beside `out`, until the same command gets to its end."""
    asked = dataclasses.replace(config, texts=config.texts * 2, out=str(tmp_path / "a.json"), overlap=3)
    whole = evaluate(llama, asked)
    (incomplete,) = tmp_path.glob("incomplete-*.json")
    assert read_evaluation(incomplete).results == whole.results
    calls = []

    def fail_at_the_second(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return perplexity(*args, **options)

    monkeypatch.setattr("osp.evaluation.evaluate.perplexity", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(llama, asked)
    assert read_evaluation(incomplete).results == whole.results[:2]
    store_record(whole, asked.out)
    assert not incomplete.exists()
    assert read_evaluation(tmp_path / "a.json").results == whole.results


def test_disk_that_fills_up_leaves_the_results_on_the_terminal(
    llama: LanguageModel, config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("osp.files.write_text", full)
    asked = dataclasses.replace(config, out=str(tmp_path / "a.json"))
    record = evaluate(llama, asked)
    assert "No space left on device; the results so far are not kept" in caplog.text
    assert f"{record.results[1].value:.4f}" in results_table(record)
    with pytest.raises(UserError, match=r"out=.*a.json: cannot write there: No space left on device"):
        store_record(record, asked.out)
    assert list(tmp_path.glob("*.json")) == []


def test_tasks_of_one_name_are_told_apart(llama: LanguageModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    files = [tmp_path / language / "quiz.jsonl" for language in ("de", "en")]
    for path, word in zip(files, ("eins", "one"), strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps({"context": "a b", "continuation": word}) + "\n")
    asked = EvaluateConfig(tasks=tuple(map(str, files)), progress=False)
    record = evaluate(llama, asked)
    assert list(dict.fromkeys(result.what for result in record.results)) == [
        f"{path.with_suffix('')}[shots=0]" for path in files
    ]
    assert [task["name"] for task in record.tasks] == [str(path.with_suffix("")) for path in files]
    record = evaluate(llama, dataclasses.replace(asked, tasks=asked.tasks[:1] * 2))
    assert [result.what for result in record.results] == ["quiz[shots=0]"] * 2


def test_comparison_is_kept_cell_by_cell(
    llama: LanguageModel, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "c.json")
    config = CompareConfig(
        paths=(str(llama.folder),), texts=(str(text_file),), seq_len=32, max_tokens=64, methods="none", out=out
    )
    seen: list[Comparison] = []

    def fail_at_the_third(*args: Any, **options: Any) -> Any:
        seen.extend(read_comparison(path).models[0] for path in tmp_path.glob("incomplete-*.json"))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return perplexity(*args, **options)

    monkeypatch.setattr("osp.evaluation.evaluate.perplexity", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    first, second = ([score.perplexity for score in comparison.bits[""].values()] for comparison in seen)
    assert first[0] == second[0]
    assert (set(first[1:]), set(second[2:])) == ({None}, {None})
    assert second[1] is not None
    assert seen[1].kurtosis_text == "the first 64 tokens of text.txt"


def test_perplexity_that_is_not_finite_is_a_loud_result(
    overflowing: LanguageModel, config: EvaluateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = evaluate(overflowing, config)
    assert record.results[0].value == math.inf
    assert "text.txt[len=32,overlap=0,bos=no,first=256]: the perplexity is not finite" in caplog.text
    path = store_record(record, str(tmp_path / "a.json"))
    assert path is not None
    assert "NaN" not in path.read_text()
    assert read_evaluation(path).results[0].value == math.inf


def test_ablation_quantizes_each_site_alone_and_leaves_each_out(llama: LanguageModel, config: EvaluateConfig) -> None:
    text = read_text(config.texts[0], llama)

    def at(sites: Any) -> float:
        with quantized(llama.model, FOUR, sites=sites):
            return perplexity(llama.model, text, seq_len=32, max_tokens=64).perplexity

    asked = dataclasses.replace(config, quant=FOUR, ablate=True, max_tokens=64)
    record = evaluate(llama, asked)
    ablation = record.ablation
    assert ablation is not None
    names = [site for sites in INNER_SITES.values() for site in sites if site != "attention_gate"]
    assert [cost.site for cost in ablation.sites] == names
    assert ablation.unquantized == perplexity(llama.model, text, seq_len=32, max_tokens=64).perplexity
    assert ablation.quantized == at(names)
    for cost in ablation.sites:
        if cost.site in ("down_proj", "k"):
            assert cost.alone == at([cost.site])
            assert cost.left_out == at([site for site in names if site != cost.site])
    assert len(ablation.layer_errors) == 3
    assert min(ablation.layer_errors) > 0
    lines = results_table(record).split("\n")
    worst = max(ablation.sites, key=lambda cost: cost.alone)
    (line,) = [line for line in lines if line.startswith(worst.site + " ")]
    assert line.count("#") == max(other.count("#") for other in lines) == 40
    assert f"{math.log(worst.alone / ablation.unquantized):+.4f}" in line


def test_diverged_model_has_a_table() -> None:
    """Bars are full for an infinite perplexity, and empty if the unquantized one is infinite too."""

    def bars(ablation: SiteAblation) -> list[int]:
        quant = {"text": "4-4-4 rtn", "hash": "abc"}
        record = Evaluation(model={"name": "m"}, quant=quant, results=(), ablation=ablation)
        return [line.count("#") for line in results_table(record).split("\n")[3:6]]

    sites = (SiteCost("q_proj", math.inf, 3.0), SiteCost("k", 8.0, 2.0), SiteCost("v", 4.0, 2.0))
    assert bars(SiteAblation("t", 2.0, math.inf, sites, (math.nan,), math.nan)) == [40, 40, 20]
    assert bars(SiteAblation("t", math.inf, math.inf, sites, (), 0.0)) == [0, 0, 0]


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """An evaluation and a comparison in the format of the first versions; null is infinity."""
    (tmp_path / "evaluation" / "compare").mkdir(parents=True)
    result = {"what": "wikitext2[len=64]", "metric": "perplexity", "value": None, "stderr": None, "truncated": 0}
    ablation = {"text": "t", "unquantized": 2.0, "quantized": 8.0, "layer_errors": [0.1], "last_error": 0.2}
    site = {"site": "k", "alone": None, "left_out": 4.0}
    evaluation = {
        "model": {"name": "m", "path": "p", "sha256": "0", "step": 7},
        "quant": {"text": "4-4-4 rtn", "hash": "abc", "w_bits": 4, "a_static": False},
        "results": [result],
        "ablation": {**ablation, "sites": [site]},
    }
    cell = {"perplexity": 12.5, "accuracy": 0.25}
    model = {"name": "m", "sha256": "0", "kurtosis": 0.5, "what": "t", "specs": {}, "hashes": {}, "texts": {}}
    comparison = {"step": 7, "config": {}, "commit": None, "environment": {}}
    comparison["models"] = [{**model, "bits": {"": {"4-4-4": cell}}, "methods": {"RTN": cell}}]
    (tmp_path / "evaluation" / "step_00000007-abc-0.json").write_text(json.dumps(evaluation))
    (tmp_path / "evaluation" / "compare" / "step_00000007.json").write_text(json.dumps(comparison))
    notes: list[str] = []
    (record,), compared = read_evaluations(tmp_path, notes)
    assert notes == []
    assert (record.step, record.results[0].value, record.quant["hash"]) == (7, math.inf, "abc")
    assert record.ablation is not None
    (cost,) = record.ablation.sites
    assert record.ablation.cost_alone(cost) == math.inf
    assert record.ablation.saving_left_out(cost) == pytest.approx(math.log(2))
    assert record.weights == "trained"
    assert list(compared) == ["trained"]
    assert (compared["trained"].step, str(compared["trained"].methods["RTN"])) == (7, "25.0/12.50")
    assert compared["trained"].methods["RTN"].perplexities == {}


# --- averaged weights ---------------------------------------------------------------------------------------------


def test_record_of_averaged_weights_is_beside_the_record_of_the_trained_ones(
    averaged_run: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their perplexities are of these models, and neither record passes for the other."""
    run = tmp_path / "run"
    shutil.copytree(averaged_run, run)
    records: dict[str, Evaluation] = {}
    for weights in ("trained", "averaged"):
        keys = [f"texts=[{text_file}]", "seq_len=32", "max_tokens=256", "device=cpu", "progress=false"]
        run_in_process(monkeypatch, "evaluate", str(run), f"weights={weights}", *keys)
        subject = dataclasses.replace(open_model(run), model=load_model(run, weights=weights))
        (path,) = (run / "evaluation").glob(f"step_00000004{'_averaged' * (weights == 'averaged')}-*.json")
        records[weights] = record = read_evaluation(path)
        assert (record.weights, record.model["sha256"]) == (weights, subject.sha256())
        assert record.config["weights"] == json.loads(path.read_text())["weights"] == weights
        text = read_text(str(text_file), subject)
        assert record.results[0].value == perplexity(subject.model, text, seq_len=32, max_tokens=256).perplexity
    trained, averaged = records["trained"], records["averaged"]
    assert trained.results[0].value != averaged.results[0].value
    assert (trained.model["name"], averaged.model["name"]) == ("run", "run, averaged")
    assert results_table(averaged).startswith("run, averaged, ")
    assert len(list((run / "evaluation").glob("*.json"))) == 2


SCRIPTS = {
    "evaluate": (),
    "compare": (),
    "generate": ("some words",),
    "export": ("out=out",),
    "convert": ("to=rmsnorm", "out=out"),
    "inspect_outliers": ("out=out",),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_model_without_an_average_is_refused_in_one_line(
    script: str,
    plain_run: Path,
    llama_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Before any weight is read: a run that kept no average, and a Hugging Face folder, which has none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("osp.run.checkpoint.Checkpoint.verify", None)
    before = sorted(plain_run.rglob("*"))
    fix = "set weights=trained"
    reasons = {plain_run: f"{plain_run}/checkpoints/step_00000006: weights=averaged, but it has no average; {fix}"}
    if script != "inspect_outliers":  # which reads runs only
        reasons[llama_folder] = f"{llama_folder}: weights=averaged, but a Hugging Face folder has no average; {fix}"
    for folder, reason in reasons.items():
        with pytest.raises(SystemExit, match=r"^2$"):
            run_in_process(monkeypatch, script, str(folder), *SCRIPTS[script], "weights=averaged")
        assert capsys.readouterr().err == f"error: {reason}\n"
    assert not list(tmp_path.iterdir())
    assert sorted(plain_run.rglob("*")) == before


def test_live_perplexity_leaves_a_model_in_training_as_it_was(llama: LanguageModel) -> None:
    text = encode("made", ["".join(made_text(1))], llama)
    calibration = text.tokens[:64].view(2, 32)
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    llama.model.train()
    try:
        metrics = live_perplexity(llama.model, text, seq_len=32, formats={"nvfp4": (DEPLOYED["nvfp4"], calibration)})
        assert llama.model.training
    finally:
        llama.model.eval()
    assert list(metrics) == ["quant/perplexity/16-16-16", "quant/perplexity/4-4-4", "quant/perplexity/nvfp4"]
    assert metrics["quant/perplexity/16-16-16"] == perplexity(llama.model, text, seq_len=32).perplexity
    with quantized(llama.model, FOUR):
        assert metrics["quant/perplexity/4-4-4"] == perplexity(llama.model, text, seq_len=32).perplexity
    with quantized(llama.model, DEPLOYED["nvfp4"], calibration=calibration):
        assert metrics["quant/perplexity/nvfp4"] == perplexity(llama.model, text, seq_len=32).perplexity
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.model.state_dict().items())


def test_calibration_is_never_the_text_that_is_measured(
    llama: LanguageModel, config: EvaluateConfig, tmp_path: Path
) -> None:
    measurement = Measurement(llama, config)
    gptq = QuantSpec(w_bits=4, method="gptq", calibration=config.texts[0], calibration_tokens=64)
    assert measurement.calibration(FOUR) is None
    with pytest.raises(UserError, match=r"quant.calibration=.*text.txt is a text that is measured"):
        measurement.calibration(gptq)
    (tmp_path / "other.txt").write_text("a few words")
    with pytest.raises(UserError, match=r"quant.calibration=.*other.txt: \d+ tokens are too few"):
        measurement.calibration(dataclasses.replace(gptq, calibration=str(tmp_path / "other.txt")))
    with pytest.raises(UserError, match=r"quant.calibration=train: .* is no run"):
        measurement.calibration(dataclasses.replace(gptq, calibration="train"))


def test_text_of_sequences_is_read_in_its_rows(
    llama: LanguageModel, config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration and R_L see the sequences of a run that trains with a start token, each from its first token on."""
    text = read_text(config.texts[0], llama)
    rows = text.tokens[: 9 * 17].view(9, 17)
    rows[:, 0] = 0
    text = dataclasses.replace(text, tokens=rows.flatten(), token_bytes=text.token_bytes[: 9 * 17], row=17)
    monkeypatch.setattr("osp.evaluation.evaluate.read_text", lambda *_: text)
    monkeypatch.setattr("osp.evaluation.evaluate.read_texts", lambda *_, **__: [text])
    spec = QuantSpec(a_bits=8, static_activations=True, calibration="other", calibration_tokens=64)
    sequences = read_calibration(llama, spec, measured=[], seq_len=16)
    assert sequences is not None
    assert sequences.shape == (4, 16)
    assert {tuple(sequence) for sequence in sequences.tolist()} <= {tuple(row) for row in rows[:, :16].tolist()}
    record = evaluate(llama, dataclasses.replace(config, quant=FOUR, ablate=True, seq_len=32))
    assert record.ablation is not None
    expected = propagated_error(llama.model, FOUR, rows)
    assert [*record.ablation.layer_errors, record.ablation.last_error] == expected


def test_kurtosis_matches_the_papers_script(llama: LanguageModel, transformers_llama: Any, text_file: Path) -> None:
    """Hidden states of transformers, as in the script: every token is a sequence, without the last block."""
    config = CompareConfig(texts=(str(text_file),), seq_len=16, max_tokens=70)
    measurement = Measurement(llama, config)
    with torch.no_grad():
        states = transformers_llama(measurement.texts[0].tokens[:64, None], output_hidden_states=True).hidden_states
    expected = [((h**4).mean(-1) / h.std(-1) ** 4 - 3).relu().mean().item() for h in states]
    kurtosis, text = script_kurtosis(measurement, config)
    assert kurtosis == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert text == f"the first 64 tokens of {text_file.name}"
    assert script_kurtosis(measurement, dataclasses.replace(config, kurtosis_tokens=32))[1].startswith("the first 32 ")
    measurement.texts = []
    assert script_kurtosis(measurement, config) == (None, "")


def test_tables_of_a_model_that_cannot_be_rotated(llama: LanguageModel, text_file: Path, tmp_path: Path) -> None:
    """Rows with a rotation are empty; all others have scores."""
    (tmp_path / "other.txt").write_text("".join(made_text(3, seed=1)))
    spec = QuantSpec(calibration=str(tmp_path / "other.txt"), calibration_tokens=64)
    config = CompareConfig(texts=(str(text_file),), seq_len=32, max_tokens=64, quant=spec, progress=False)
    shape = dataclasses.replace(llama.model.config, norm=NormConfig(name="layernorm"))
    subject = dataclasses.replace(llama, model=build_model(shape, seed=0).eval())
    *_, comparison = compare_one(subject, dataclasses.replace(config, methods="all"))
    assert list(comparison.bits) == ["", "+Had", "+GPTQ", "+QuaRot"]
    empty = {bits: score.perplexity is None for bits, score in comparison.bits["+QuaRot"].items()}
    assert empty == {bits: bits != "16-16-16" for bits in COLUMNS}
    assert comparison.methods["+ QuaRot"] == Score(None, None)
    assert all(score.perplexity for row in ("", "+Had", "+GPTQ") for score in comparison.bits[row].values())
    assert comparison.bits["+GPTQ"]["4-4-4"] == comparison.methods["+ GPTQ"] != comparison.methods["+ FFN Had"]
    (line,) = [line for line in markdown([comparison]).split("\n") if line.startswith("| + QuaRot")]
    assert line == "| + QuaRot | - |"
    with pytest.raises(UserError, match=r"quant.w_group_size=5 does not divide"):
        next(compare_one(subject, dataclasses.replace(config, quant=dataclasses.replace(spec, w_group_size=5))))


def test_tables_of_the_paper(llama: LanguageModel, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("".join(made_text(3, seed=1)))
    spec = QuantSpec(calibration=str(tmp_path / "other.txt"), calibration_tokens=128)
    config = CompareConfig(texts=(str(text_file),), seq_len=32, max_tokens=128, quant=spec, progress=False)
    *_, comparison = compare_one(llama, config)
    assert comparison.bits[""]["16-16-16"] == comparison.bits["+Had"]["16-16-16"]
    text = read_text(str(text_file), llama)
    for row, bits in (("", "4-8-16"), ("+Had", "4-4-4")):
        with quantized(llama.model, dataclasses.replace(spec, ffn_hadamard=bool(row)).at(bits)):
            expected = perplexity(llama.model, text, seq_len=32, max_tokens=128).perplexity
        assert comparison.bits[row][bits].perplexity == expected
    assert comparison.methods["RTN"] == comparison.bits[""]["4-4-4"]
    assert comparison.methods["+ FFN Had"] == comparison.bits["+Had"]["4-4-4"]
    assert list(comparison.methods) == list(METHODS)
    lines = markdown([comparison, comparison]).split("\n")
    assert lines[0] == f"| model | ex. kurtosis | {' | '.join((*COLUMNS, *DEPLOYED_COLUMNS))} |"
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        f"| {llama.name} (1)",
        "| +Had",
        f"| {llama.name} (2)",
        "| +Had",
    ]
    assert comparison.kurtosis is not None
    assert lines[2].startswith(
        f"| {llama.name} (1) | {comparison.kurtosis:.2f} | {comparison.bits['']['16-16-16'].perplexity:.2f} | "
    )
    assert sum(line.startswith("| + QuaRot | ") for line in lines) == 1


def test_formats_of_engines_are_columns_of_the_first_row(
    llama: LanguageModel, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A column has one cell, which `quantized` and `quant=NAME` give too; static ranges are from quant.calibration."""
    (tmp_path / "other.txt").write_text("".join(made_text(3, seed=1)))
    other = str(tmp_path / "other.txt")
    spec = QuantSpec(calibration=other, calibration_tokens=96)
    config = CompareConfig(
        texts=(str(text_file),), seq_len=32, max_tokens=64, quant=spec, methods="none", progress=False
    )
    shape = dataclasses.replace(llama.model.config, hidden_size=128, head_dim=32, intermediate_size=72)
    wide = dataclasses.replace(llama, model=build_model(shape, seed=0).eval())
    *_, comparison = compare_one(wide, config)
    assert list(comparison.bits[""]) == [*COLUMNS, *DEPLOYED_COLUMNS]
    assert list(comparison.bits["+Had"]) == list(COLUMNS)
    calibrated = dataclasses.replace(DEPLOYED["nvfp4"], calibration=other, calibration_tokens=96)
    specs = {"W4A16": DEPLOYED["w4a16_g128"], "NVFP4": calibrated, "MXFP4": DEPLOYED["mxfp4"]}
    calibration = draw_calibration(read_text(other, wide).tokens, calibrated, seq_len=32)
    text, seen = read_text(str(text_file), wide), set()
    for column, expected in specs.items():
        assert comparison.specs[comparison.hashes[column]] == str(expected)
        assert comparison.hashes[column] == expected.hash
        with quantized(wide.model, expected, calibration=calibration):
            value = perplexity(wide.model, text, seq_len=32, max_tokens=64).perplexity
        assert comparison.bits[""][column].perplexity == value
        seen.add(value)
    assert len(seen) == 3
    lines = markdown([comparison, dataclasses.replace(comparison, bits={"": {}, "+Had": {}}, hashes={})]).split("\n")
    assert lines[3].endswith(" |  |  |  |"), "+Had has no such cells"
    assert lines[4].endswith(" | - | - | - |"), "a record of an earlier version"
    assert f"- NVFP4: {calibrated} [{calibrated.hash}]" in lines
    assert caplog.text == ""

    narrow = dataclasses.replace(llama, model=build_model(dataclasses.replace(shape, hidden_size=96), seed=0).eval())
    uncalibrated = dataclasses.replace(config, quant=QuantSpec())  # a Hugging Face folder has no training text
    *_, comparison = compare_one(narrow, uncalibrated)
    assert list(comparison.bits[""]) == [*COLUMNS, "MXFP4"]
    first, second = caplog.messages
    assert "the column W4A16 is left out, quant.w_group_size=128 does not divide model.hidden_size=96" in first
    assert "the column NVFP4 is left out, quant.calibration=train: " in second


@pytest.fixture
def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return the error line that `python scripts/NAME.py ARGUMENTS` prints."""

    def run(name: str, *arguments: str) -> str:
        import compare
        import evaluate as script

        main, kind, key = {
            "evaluate": (script.main, EvaluateConfig, "path"),
            "compare": (compare.main, CompareConfig, "paths"),
        }[name]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("osp.distributed.shutdown", lambda: None)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            entry.run(main, name, defaults=dataclasses.asdict(kind()), positional=key)
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error:")]
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"name the model: python scripts/evaluate.py RUN"),
        (["nowhere"], r"nowhere: no model; name a run with a checkpoint"),
        (["LLAMA"], r"nothing to measure; name texts=\[wikitext2\] or files"),
        (["LLAMA", "texts=[nowhere.txt]"], r"nowhere.txt does not exist"),
        (["LLAMA", "tasks=[nowhere]"], r"tasks: cannot read nowhere.jsonl"),
        (["LLAMA", "tasks=[paper]"], r"tasks_dir=. holds none of arc_easy"),
        (["LLAMA", "lm_eval=[piqa.jsonl]"], r"lm_eval=piqa.jsonl: local files are tasks="),
        (["LLAMA", "text=[a]"], r"unknown key 'text'; did you mean 'texts'\?"),
        (["LLAMA", "quant=osp"], r"Could not find 'quant/osp'"),
        (["LLAMA", "quant.a_static=true"], r"unknown key 'quant.a_static'; did you mean 'quant.static_activations'\?"),
        (["LLAMA", "quant.w_bits=1"], r"quant.w_bits=1: must be an integer from 2 to 16"),
        (
            ["LLAMA", "quant=osp_paper", "quant.w_group_size=5"],
            r"quant.w_group_size=5 does not divide model.hidden_size",
        ),
        (["LLAMA", "texts=[t.txt]", "ablate=true"], r"ablate=true needs a text .* and a quantization"),
        (["LLAMA", "texts=[t.txt]", "seq_len=65"], r"seq_len=65: a window has 2 to 64 tokens"),
        (["LLAMA", "texts=[t.txt]", "seq_len=0"], r"seq_len=0: must be at least 2"),
        (["LLAMA", "texts=[t.txt]", "max_tokens=-5"], r"max_tokens=-5: must be at least 2"),
        (["LLAMA", "texts=[t.txt]", "batch_tokens=0"], r"batch_tokens=0: must be at least 1"),
        (["LLAMA", "tasks=[nowhere]", "limit=0"], r"limit=0: must be at least 1"),
        (["LLAMA", "texts=t.txt"], r"texts='t.txt': must be a list; write texts=\[t.txt\]"),
        (["LLAMA", "texts=[t.txt]", "out=t.txt/x.json"], r"out=t.txt/x.json: t.txt is not a folder"),
        (["LLAMA", "texts=[t.txt]", "out=."], r"out=.: is a folder; name a JSON file"),
        (["LLAMA", "texts=[t.txt]", "quant=gptq"], r"quant.calibration=train: .* is no run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_on_the_command_line(
    arguments: list[str], message: str, error_of: Callable[..., str], llama_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("some words of a text that is long enough to be measured")
    line = error_of("evaluate", *(str(llama_folder) if a == "LLAMA" else a for a in arguments), "threads=1")
    assert re.search(message, line)


def test_compare_names_the_model_that_is_missing(error_of: Callable[..., str], llama_folder: Path) -> None:
    assert "name the models to compare" in error_of("compare")
    assert "one/two: no model" in error_of("compare", "one/two", "three")
    assert "columns[0]='4-4 folded': must be one of 16-16-16" in error_of("compare", "one/two", "columns=[4-4 folded]")
    assert "one/two: no model" in error_of("compare", str(llama_folder), "one/two"), "before the first is measured"


def test_paper_tasks_are_the_files_that_exist(llama: LanguageModel, config: EvaluateConfig, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    line = json.dumps({"query": "q", "choices": ["a", "b"], "gold": 0}) + "\n"
    for name in ("piqa", "triviaqa_sm_sub"):
        (tmp_path / f"{name}.jsonl").write_text(line * 9)
    tasks = Measurement(llama, dataclasses.replace(config, tasks=("paper",), tasks_dir=str(tmp_path))).tasks
    assert [(task.name, task.num_fewshot) for task in tasks] == [("piqa", 0), ("triviaqa_sm_sub", 5)]


def test_missing_harness_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, llama: LanguageModel, config: EvaluateConfig
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm-eval is not installed; pip install -e '.\[lm-eval\]'"):
        evaluate(llama, dataclasses.replace(config, tasks=("quiz",)))


def test_model_hash_tells_models_apart(llama: LanguageModel, llama_folder: Path) -> None:
    again = open_model(llama_folder)
    assert again.sha256() == llama.sha256()
    with torch.no_grad():
        again.model.lm_head.weight[0, 0] += 1e-3
    assert again.sha256() != llama.sha256()


def test_two_ranks_of_a_launcher_print_one_table(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Started by torchrun, the command prints the numbers of a single process, once."""
    (tmp_path / "other.txt").write_text("".join(made_text(3, seed=1)))
    quant = QuantSpec(calibration=str(tmp_path / "other.txt"), calibration_tokens=128)
    quant = dataclasses.replace(quant, static_activations=True).at("4-8-4")
    overrides = [f"quant.{key}={value}" for key, value in dataclasses.asdict(quant).items() if value is not None]
    arguments = [str(llama_folder), f"texts=[{text_file}]", "seq_len=32", *overrides, "progress=false"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    two = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "scripts" / "evaluate.py"), *arguments, "device=cpu", "threads=1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr
    torch.set_num_threads(1)
    subject = open_model(llama_folder)
    config = EvaluateConfig(texts=(str(text_file),), seq_len=32, quant=quant, progress=False)
    assert two.stdout == results_table(evaluate(subject, config))
    assert f"A asym/tensor static, KV asym/head (K Hadamard), calibration {tmp_path}/other.txt 128 tokens" in two.stdout
