"""The verdict at 4 bits: its evidence, its thresholds, which follow benchmarks/, and the sites it names."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from osp.config import Site
from osp.quant.spec import QuantSpec
from osp.run import verdict
from osp.run.read import Series, read_run
from osp.run.verdict import LIMITS, USUAL, judge, judge_run, judge_sites, measured_cost, over_usual
from tests.conftest import ROOT
from tests.made_run import small_run, write_evaluations, write_lines

FILE = yaml.safe_load((ROOT / "osp" / "run" / "verdict.yaml").read_text())


def benchmark_models() -> dict[str, dict[str, float]]:
    """Return the numbers of each model of the ablations, by the hash of its weights."""
    records = [json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()) for name in FILES]
    return {run["model_sha256"]: run["numbers"] for record in records for run in record["runs"]}


FILES = ("ablation_nano", "ablation_nano_past")


def run_with(tmp_path: Path, *lines: dict[str, Any], rate: float = 0.02, steps: int = 1000) -> Any:
    """Return a run with these lines of metrics.jsonl and a constant learning rate."""
    folder = small_run(tmp_path / "run", train={"steps": steps}, eval={"quant": {"tokens": 4096}})
    first, last = ({"step": step, "tokens": step, "train/lr/matrix": rate} for step in (1, steps))
    write_lines(folder / "metrics.jsonl", first, *({"tokens": line["step"], **line} for line in lines), last)
    return read_run(folder)


# ---- thresholds ------------------------------------------------------------------------------------------------------


def test_estimate_is_the_fit_to_the_benchmarks() -> None:
    models = benchmark_models().values()
    error, cost = (np.log([numbers[name] for numbers in models]) for name in ("R_L", "cost"))
    exponent, log_factor = np.polyfit(error, cost, 1)
    fit = FILE["estimate"]
    assert len(models) == 53
    assert fit["exponent"] == pytest.approx(exponent, abs=5e-4)
    assert fit["factor"] == pytest.approx(math.exp(log_factor), abs=5e-4)
    ratios = np.exp(cost - log_factor - exponent * error)
    assert (ratios.min(), ratios.max()) == (pytest.approx(0.75, abs=0.01), pytest.approx(1.53, abs=0.01))
    at = [
        math.exp((math.log(FILE["levels"][level]["below"]) - log_factor) / exponent) for level in ("safe", "noticeable")
    ]
    assert at == [pytest.approx(0.018, abs=5e-4), pytest.approx(0.111, abs=5e-4)]  # R_L, as the comment tells


def test_preset_is_the_quantization_of_the_training() -> None:
    assert FILE["preset"] == str(QuantSpec().at("4-4-4"))


def test_every_site_has_a_normal_range_below_its_alert() -> None:
    assert tuple(USUAL) == get_args(Site)
    assert all(USUAL[kind] < LIMITS[kind] for kind in USUAL)


def test_down_proj_is_judged_by_its_own_range() -> None:
    """The kurtosis of an untrained down_proj input, 15, would be raised at any other site."""
    assert judge("down_proj_in", 15.0) == judge("down_proj_in", 270.0) == "normal"
    assert judge("attn_in", 0.6) == "normal"
    assert judge("attn_in", 15.0) == "raised"
    assert judge("attn_in", 21.0) == judge("down_proj_in", 501.0) == "outlier"
    assert over_usual("layer_00/attn_in", 15.0) > over_usual("layer_00/down_proj_in", 150.0) > over_usual("q", math.nan)


# ---- evidence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "level"), [(20.3, "safe"), (19.0, "safe"), (21.0, "noticeable"), (24.0, "unsafe"), (60.0, "broken")]
)
def test_measured_cost_decides(after: float, level: str, tmp_path: Path) -> None:
    line = {"step": 1000, "quant/perplexity/16-16-16": 20.0, "quant/perplexity/4-4-4": after, "monitor/R_L": 0.9}
    found = judge_run(run_with(tmp_path, line))
    assert (found.level, found.basis) == (level, "measured")
    assert found.nats == pytest.approx(math.log(after / 20))
    assert f"{math.log(after / 20):.3f} nats per token: perplexity 20.00 becomes {after:.2f}" in found.rests_on
    assert any("on 4,096 tokens of the validation split, after step 1,000" in remark for remark in found.remarks)


def test_infinite_perplexity_at_4_bits_is_broken(tmp_path: Path) -> None:
    line = {"step": 1000, "quant/perplexity/16-16-16": 20.0, "quant/perplexity/4-4-4": None}
    assert judge_run(run_with(tmp_path, line)).level == "broken"


@pytest.mark.parametrize(("error", "level"), [(0.017, "safe"), (0.019, "noticeable"), (0.115, "unsafe")])
def test_without_a_cost_it_is_estimated_from_the_error_of_the_hidden_state(
    error: float, level: str, tmp_path: Path
) -> None:
    found = judge_run(run_with(tmp_path, {"step": 1000, "monitor/R_L": error}))
    assert (found.level, found.basis) == (level, "estimated")
    assert found.title.startswith("Probably ")
    assert "0.2 to 1.5 times as high" in found.remarks[0]
    assert f"`python scripts/evaluate.py {tmp_path / 'run'} quant=osp_paper` measures the cost." in found.remarks


def test_estimate_names_averaged_weights(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"step": 1000, "monitor/R_L": 0.019})
    assert judge_run(run).remarks[0].startswith("An estimate after step 1,000: ")
    run.config["monitor"] = {"weights": "averaged"}
    assert judge_run(run).remarks[0].startswith("An estimate for the averaged weights after step 1,000: ")


def test_error_in_another_format_decides_nothing(tmp_path: Path) -> None:
    """The estimate is fitted to 4-bit integers."""
    run = run_with(tmp_path, {"step": 1000, "monitor/R_L": 0.115})
    run.config["monitor"] = {"quant": "nvfp4"}
    assert judge_run(run).basis == "unknown"


def test_error_of_an_untrained_model_decides_nothing(tmp_path: Path) -> None:
    assert judge_run(run_with(tmp_path, {"step": 0, "monitor/R_L": 0.001})).level == "early"
    (tmp_path / "brief").mkdir()
    assert judge_run(run_with(tmp_path / "brief", {"step": 9, "monitor/R_L": 0.001}, steps=10)).level == "early"


def test_without_cost_and_error_the_sites_decide(tmp_path: Path) -> None:
    calm, loud = ({"step": 1000, "monitor/kurtosis/layer_01/attn_in": value} for value in (0.1, 80.0))
    assert judge_run(run_with(tmp_path / "calm", calm)).level == "quiet"
    found = judge_run(run_with(tmp_path / "loud", loud))
    assert found.level == "outliers"
    assert "attn_in" in found.rests_on
    assert judge_run(run_with(tmp_path / "none")).level == "unknown"


def test_cause_of_a_high_cost_is_outliers_or_rounding(tmp_path: Path) -> None:
    costly = {"quant/perplexity/16-16-16": 20.0, "quant/perplexity/4-4-4": 30.0}
    for name, kurtosis, words in (("a", 80.0, "outliers at attn_in"), ("b", 0.1, "rounding alone")):
        line = {"step": 1000, **costly, "monitor/kurtosis/layer_01/attn_in": kurtosis}
        assert words in judge_run(run_with(tmp_path / name, line)).remarks[0]


def test_short_run_says_that_a_longer_one_can_end_differently(tmp_path: Path) -> None:
    line = {"step": 1000, "monitor/R_L": 0.01}
    short = judge_run(run_with(tmp_path / "short", line, rate=0.009))
    assert "learning rate x steps is 9, and outliers form with it" in short.remarks[-1]
    long = judge_run(run_with(tmp_path / "long", line, rate=0.02))
    assert not any("The run is short" in remark for remark in long.remarks)


def test_raised_sites_are_an_early_sign(tmp_path: Path) -> None:
    line = {"step": 1000, "monitor/R_L": 0.01, "monitor/kurtosis/layer_01/mlp_in": 8.0}
    found = judge_run(run_with(tmp_path, line))
    assert found.level == "safe"
    assert "at mlp_in" in found.remarks[-1]


def test_old_measurement_names_the_steps_since(tmp_path: Path) -> None:
    line = {"step": 500, "quant/perplexity/16-16-16": 20.0, "quant/perplexity/4-4-4": 21.0}
    assert "The run has gone on to step 1,000 since." in judge_run(run_with(tmp_path, line)).remarks


def test_records_of_evaluations_are_evidence(tmp_path: Path) -> None:
    run = read_run(write_evaluations(small_run(tmp_path / "a")))
    cost = measured_cost(run)
    assert cost is not None
    assert (cost.before, cost.after, cost.step) == (4.0, 64.0, 1200)  # of the ablation: the preset
    assert judge_run(run).level == "broken"
    (record,) = run.evaluations
    (held_out, _) = record.results
    alone = replace(record, ablation=None, results=(replace(held_out, value=60.0),))
    losses = Series(np.array([1200]), np.array([4.0]))
    run = replace(run, evaluations=[alone], comparison=None, series=run.series | {"val/loss": losses})
    cost = measured_cost(run)  # against the validation loss of that step
    assert cost is not None
    assert cost.nats == pytest.approx(math.log(60) - 4)
    plain = replace(alone, quant={"text": "16-16-16 (not quantized)"}, results=(replace(held_out, value=50.0),))
    cost = measured_cost(replace(run, evaluations=[alone, plain]))
    assert cost is not None
    assert (cost.before, cost.after) == (50.0, 60.0)
    assert measured_cost(replace(run, evaluations=[replace(alone, results=(replace(held_out, value=0.0),))])) is None
    part = replace(held_out, what="held_out[len=32,first=64]", value=60.0)
    assert measured_cost(replace(run, evaluations=[replace(alone, results=(part,))])) is None


def test_averaged_weights_are_no_evidence_about_the_trained_ones(tmp_path: Path) -> None:
    """Neither as a cost nor as the perplexity at 16 bits of another cost; the validation can be of them too."""
    run = replace(read_run(write_evaluations(small_run(tmp_path / "a"))), comparison=None)
    (record,) = run.evaluations
    assert measured_cost(replace(run, evaluations=[replace(record, weights="averaged")])) is None
    alone = replace(record, ablation=None, results=(replace(record.results[0], value=60.0),))
    plain = replace(alone, quant={"text": "16-16-16"}, results=(replace(alone.results[0], value=50.0),))
    assert measured_cost(replace(run, evaluations=[alone, plain])) is not None
    assert measured_cost(replace(run, evaluations=[alone, replace(plain, weights="averaged")])) is None
    losses = {"val/loss": Series(np.array([1200]), np.array([4.0]))}
    validated = replace(run, evaluations=[alone], series=run.series | losses)
    assert measured_cost(validated) is not None
    assert measured_cost(replace(validated, config={"eval": {"weights": "averaged"}})) is None
    series = {f"quant/perplexity/{b}": Series(np.array([9]), np.array([v])) for b, v in (("16-16-16", 2), ("4-4-4", 4))}
    in_training = replace(run, evaluations=[], series=series, config={"eval": {"weights": "averaged"}})
    cost = measured_cost(in_training)
    assert cost is not None
    assert cost.where == "during training, averaged, on the validation split"


def test_comparison_names_the_quantization_of_its_4_bit_cell(tmp_path: Path) -> None:
    """Other columns are at 4-4-4 too; an older record has no hashes of columns."""
    run = replace(read_run(write_evaluations(small_run(tmp_path / "a"))), evaluations=[])
    assert run.comparison is not None
    specs = {"abc": "4-4-4 rtn + folded gains", "def": "4-4-4 rtn"}
    hashes = {"4-4-4 folded": "abc", "4-4-4": "def"}
    for known, words in ((hashes, "4-4-4 rtn"), ({}, "4-4-4 rtn + folded gains")):
        cost = measured_cost(replace(run, comparison=replace(run.comparison, specs=specs, hashes=known)))
        assert cost is not None
        assert cost.quant == words


# ---- sites -----------------------------------------------------------------------------------------------------------


def test_sites_tell_first_and_last_probe_of_the_worst_layer_and_since_when(tmp_path: Path) -> None:
    values = {0: (0.1, 0.2), 1: (30.0, 0.2), 2: (0.3, 0.2), 4: (5.0, 0.1), 8: (25.0, 0.1), 16: (22.0, 40.0)}
    lines = [
        {"step": step, **{f"monitor/kurtosis/layer_0{layer}/block_out": v for layer, v in enumerate(pair)}}
        for step, pair in values.items()
    ]
    lines[-1] |= {"monitor/kurtosis/layer_00/down_proj_in": 20.0, "monitor/kurtosis/max": 40.0}
    down, stream = judge_sites(run_with(tmp_path, *lines))
    assert (down.kind, down.word, down.since, down.first) == ("down_proj_in", "normal", None, (16, 20.0))
    assert (stream.first, stream.last, stream.layer) == ((0, 0.2), (16, 40.0), 1)
    assert (stream.word, stream.since) == ("outlier", 8)  # not step 1, after which it was normal again


def test_verdict_needs_every_word_of_its_file(tmp_path: Path) -> None:
    assert set(verdict.LEVELS) >= {
        "safe",
        "noticeable",
        "unsafe",
        "broken",
        *(set(FILE["rests_on"]) - {"measured", "estimated"}),
    }
    assert all({"mark", "title"} <= set(about) for about in verdict.LEVELS.values())
