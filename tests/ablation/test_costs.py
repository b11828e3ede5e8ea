"""Tables of an ablation that names its columns: costs by text, intervals, brackets, rows that do not solve a task."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from osp.ablation.config import AblationConfig
from osp.ablation.execute import Execution
from osp.ablation.runs import Planned, plan
from osp.ablation.table import Cell, Results, as_json, bracket_table, collect, contents, half_interval
from osp.evaluation.config import CompareConfig
from osp.run.evaluations import Comparison, ComparisonRecord, Score, write_evaluation
from osp.tables import render_text
from tests.ablation.test_ablation_runs import config
from tests.conftest import ROOT
from tests.made_run import made_run

sys.path.insert(0, str(ROOT / "scripts"))
import entry

COLUMNS = ("16-16-16", "4-4-4", "4-4-4 +Had", "static 8-8")
# nats on `copied`: at 16 bits and what 4-4-4 adds, by row and seed
COPIED = {
    "adam": [(0.020, 0.014), (0.018, 0.012), (0.019, 0.016)],
    "muon": [(0.013, 0.076), (0.011, 0.050), (0.012, 0.060)],
    "osp": [(0.010, 0.011), (0.008, 0.008), (0.009, 0.010)],
    "slow": [(0.050, 0.001), (0.300, 0.002), (0.050, 0.003)],  # one seed has not learned the task
}


def made_record(run: Planned) -> ComparisonRecord:
    """Return a record with two texts. In the sweep the loss has its minimum at 1e-3 on `copied`, nowhere else."""
    loss, cost = COPIED[run.row][run.seed]
    from_best = abs(math.log(run.config.optimizer.lr / 1e-3))

    def score(quantized: float) -> Score:
        nats = {"held_out": 2.0 + 10 * run.config.optimizer.lr + quantized, "copied": loss + from_best + quantized}
        perplexities = {text: math.exp(value) for text, value in nats.items()}
        return Score(perplexities["held_out"], None, perplexities)

    cells = {"16-16-16": score(0), "4-4-4": score(cost), "4-4-4 +Had": score(cost / 2), "static 8-8": score(math.inf)}
    cells["static 8-8"] = Score(None, None, {"held_out": math.inf, "copied": math.inf})
    comparison = Comparison(
        run.label,
        "f" * 64,
        kurtosis=None,
        what="held_out, copied",
        bits={"": cells},
        methods={},
        specs={"abc123": "4-4-4 rtn"},
        hashes={"4-4-4": "abc123"},
        texts={"held_out": "a" * 64, "copied": "b" * 64},
    )
    return ComparisonRecord(commit="0123abcd", models=(comparison,))


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> tuple[AblationConfig, Results]:
    """Four rows and three seeds, each row at three learning rates; one run is missing."""
    folder = tmp_path_factory.mktemp("ablation")
    settings = {"best": {row: ["optimizer.lr=1e-3"] for row in ("adam", "muon", "osp")} | {"slow": []}}
    wanted = config(
        folder,
        rows=["adam", "muon", "osp", "slow: +experiment=osp optimizer.lr=1e-3"],
        seeds=[0, 1, 2],
        settings=settings,
        rates=["best"],
        sweep={"key": "optimizer.lr", "factors": [0.5, 2.0]},
        texts=["held_out", "copied"],
        columns=COLUMNS,
        quantities=["norm_kurtosis", "loss"],
        interval=True,
        compared=[["adam", "osp"], ["muon", "osp"], ["adam", "slow"], ["gone", "osp"]],
        guard={"copied": 0.1},
    )
    runs, records = plan(wanted, entry.compose), {}
    for run in runs:
        if (run.row, run.value) != ("muon", 2e-3):
            made_run(run.folder, steps=64, layers=2, outliers=run.row == "adam", seed=run.seed)
            records[run.label, "trained"] = made_record(run)
    return wanted, collect(wanted, runs, records, {}, about=["trained here"])


def table(wanted: AblationConfig, results: Results, title: str) -> dict[str, dict[str, str]]:
    """Return row -> heading -> cell of the table with this title."""
    cards = [card for _, _, cards in contents(results, wanted)["sections"] for card in cards]
    ((heading, *rows),) = [rows for name, _, rows in cards if name == title]
    return {row[0]: dict(zip(heading, row, strict=True)) for row in rows}


def test_interval_of_a_mean_is_students() -> None:
    for seeds in range(2, 12):
        values = np.random.default_rng(seeds).normal(size=seeds)
        low, high = scipy.stats.t.interval(0.95, seeds - 1, values.mean(), scipy.stats.sem(values))
        cell = Cell(values.mean(), values.std(ddof=1), seeds)
        assert half_interval(cell) == pytest.approx((high - low) / 2, rel=1e-4)
    assert math.isnan(half_interval(Cell(1.0, math.nan, 1)))
    assert half_interval(Cell(1.0, 0.0, 3)) == 0


def test_interval_of_a_difference_is_welchs_with_whole_degrees_of_freedom() -> None:
    for seed, spread in enumerate((1.0, 1.5, 3.0, 20.0)):
        draw = np.random.default_rng(seed)
        a, b = draw.normal(size=3), spread * draw.normal(size=4)
        exact: Any = scipy.stats.ttest_ind(a, b, equal_var=False)
        cells = [Cell(x.mean(), x.std(ddof=1), len(x), interval=0.0) for x in (a, b)]
        difference = cells[0] - cells[1]
        low, high = exact.confidence_interval(0.95)
        assert difference.mean == pytest.approx((low + high) / 2)
        wider = scipy.stats.t.ppf(0.975, int(exact.df)) / scipy.stats.t.ppf(0.975, exact.df)
        assert difference.interval == pytest.approx((high - low) / 2 * wider, rel=1e-4)
        assert wider >= 1


def test_costs_are_in_nats_on_each_text(ablation: tuple[AblationConfig, Results]) -> None:
    wanted, results = ablation
    numbers = {run.label: run.numbers for run in results.runs if (run.row, run.seed) == ("muon", 1)}
    for values in numbers.values():
        assert values["copied loss"] == pytest.approx(0.011)
        assert values["copied cost 4-4-4"] == pytest.approx(0.050)
        assert values["copied cost 4-4-4 +Had"] == pytest.approx(0.025)
        assert values["copied cost static 8-8"] == math.inf
        assert values["held_out loss"] == pytest.approx(2.01)
    costs = table(wanted, results, "Costs on copied")
    assert list(costs) == ["adam", "muon", "osp", "slow (unsolved)"]
    assert list(costs["osp"]) == ["row", *COLUMNS]
    half = scipy.stats.sem([0.076, 0.050, 0.060]) * scipy.stats.t.ppf(0.975, 2)
    assert costs["muon"]["4-4-4"] == f"0.0620 ± {half:.4f}"
    assert costs["muon"]["static 8-8"] == "inf"
    assert costs["osp"]["16-16-16"].startswith("0.0090 ± ")
    assert table(wanted, results, "Costs on held_out")["osp"]["16-16-16"] == "2.010 ± 0.0000"


def test_differences_name_the_row_and_mark_what_exceeds_the_interval(ablation: tuple[AblationConfig, Results]) -> None:
    wanted, results = ablation
    from_muon = table(wanted, results, "Costs on copied minus the costs of muon")
    assert list(from_muon) == ["adam", "osp", "slow (unsolved)"]
    osp, muon = (np.array([cost for _, cost in COPIED[row]]) for row in ("osp", "muon"))
    exact: Any = scipy.stats.ttest_ind(osp, muon, equal_var=False)
    by = osp.mean() - muon.mean()
    half = scipy.stats.t.ppf(0.975, int(exact.df)) * by / exact.statistic
    assert from_muon["osp"]["4-4-4"] == f"{by:+.4f} ± {half:.4f} *"
    assert half < abs(by)
    assert from_muon["osp"]["16-16-16"].endswith(" *")
    from_adam = table(wanted, results, "Costs on copied minus the costs of adam")
    assert from_adam["osp"]["16-16-16"].endswith(" *")
    assert from_adam["osp"]["static 8-8"] == "-"  # both are infinite


def test_row_that_does_not_solve_the_task_is_marked_and_left_out(ablation: tuple[AblationConfig, Results]) -> None:
    """`slow` has the lowest cost of all rows."""
    wanted, results = ablation
    (says,) = [says for name, says, _ in contents(results, wanted)["sections"] if name == "Learning rates: best"]
    assert re.fullmatch(
        r"4-4-4 costs adam 0\.0140 ± \S+ and osp 0\.0097 ± \S+ nats per token on copied: \S.*\. "
        r"4-4-4 costs muon 0\.0620 ± \S+ and osp 0\.0097 ± \S+ nats per token on copied: \S.*\.",
        says,
    )
    assert list(table(wanted, results, "Outliers and quality"))[-1] == "slow (unsolved)"
    everywhere = replace(wanted, guard={"copied": 0.4})
    assert "and slow 0.0020" in contents(results, everywhere)["sections"][0][1]
    assert list(table(everywhere, results, "Outliers and quality"))[-1] == "slow"


def test_a_row_is_bracketed_if_both_neighbours_lose_more(ablation: tuple[AblationConfig, Results]) -> None:
    """The loss on held_out falls with the learning rate; muon lacks its upper neighbour."""
    wanted, results = ablation
    rows = table(wanted, results, "Numbers")
    assert [(row, cells["bracketed on"]) for row, cells in rows.items()] == [
        ("adam", "copied"), ("muon", "no text"), ("osp", "copied"), ("slow", "copied"),
    ]  # fmt: skip
    assert rows["osp"]["optimizer.lr"] == "0.0010"
    assert rows["osp"]["held_out, 0.5 x"] == "2.005"
    assert rows["osp"]["copied, 1 x"] == "0.0100"
    assert rows["osp"]["copied, 2 x"] == rows["osp"]["copied, 0.5 x"] == f"{math.log(2) + 0.01:.4f}"
    assert rows["muon"]["copied, 2 x"] == "-"
    above = replace(wanted, sweep=replace(wanted.sweep, factors=(2.0,)))
    assert {row[-1] for row in bracket_table(results, above)[1:]} == {"no text"}


def test_row_without_numbers_leaves_the_others_alone(ablation: tuple[AblationConfig, Results]) -> None:
    wanted, results = ablation
    lines = [replace(line, cells={}) if line.row == "muon" else line for line in results.rows]
    broken = replace(results, rows=lines, runs=[run for run in results.runs if run.row != "muon"])
    assert set(table(wanted, broken, "Costs on copied")["muon"].values()) == {"muon", "-"}
    assert set(table(wanted, broken, "Costs on copied minus the costs of adam")["muon"].values()) == {"muon", "-"}
    titles = [title for _, _, cards in contents(broken, wanted)["sections"] for title, _, _ in cards]
    assert "Costs on copied minus the costs of muon" not in titles
    assert contents(broken, wanted)["sections"][0][1].count("4-4-4 costs") == 1


def test_record_with_other_columns_is_measured_again(tmp_path: Path) -> None:
    """A record of an earlier version has no columns in its configuration: it measured the default ones."""
    wanted = config(tmp_path, rows=["osp"])
    (run,) = plan(wanted, entry.compose)
    former = {"texts": [], "max_tokens": None, "methods": "last", "quant": {"calibration_tokens": 262_144}}
    file = run.folder / "evaluation" / "compare" / "step_00000004.json"
    for more, is_measured in (({}, True), ({"columns": list(CompareConfig().columns)}, True), ({"columns": []}, False)):
        write_evaluation(file, replace(made_record(run), config=former | more))
        assert Execution(wanted, [run], scripts=ROOT / "scripts").measured(run) == is_measured
    own = replace(wanted, columns=COLUMNS)
    assert not Execution(own, [run], scripts=ROOT / "scripts").measured(run)
    write_evaluation(file, replace(made_record(run), config=former | {"columns": list(COLUMNS)}))
    assert Execution(own, [run], scripts=ROOT / "scripts").measured(run)
    file.rename(file.with_name("incomplete-0123456789ab.json"))  # of a measurement that was stopped
    assert not Execution(own, [run], scripts=ROOT / "scripts").measured(run)


def test_pages_and_json_have_the_costs(ablation: tuple[AblationConfig, Results]) -> None:
    wanted, results = ablation
    text = render_text(ROOT / "osp" / "ablation" / "ablation.md", **contents(results, wanted))
    assert "mean ± 95% interval (Student's t) over 3 seeds" in text
    assert "unsolved lose more than 0.1 nats on copied at 16 bits" in text
    free = render_text(ROOT / "osp" / "ablation" / "ablation.md", **contents(results, replace(wanted, guard={})))
    assert "unsolved" not in free
    assert "| row | largest kurtosis | validation loss |\n" in text
    assert "In brackets the paper's" not in text
    assert "Perplexity by bits" not in text
    values: dict[str, Any] = json.loads(json.dumps(as_json(results), allow_nan=False))
    cell = values["rows"][1]["cells"]["copied cost 4-4-4"]
    assert cell["quant"] == "abc123"
    assert cell["interval"] == pytest.approx(4.3027 * cell["deviation"] / math.sqrt(3), rel=1e-4)
    plain = as_json(replace(results, rows=[replace(line, cells={"a": Cell(1.0, 0.1, 2)}) for line in results.rows]))
    assert set(plain["rows"][0]["cells"]["a"]) == {"mean", "deviation", "count", "quant"}
