"""Numbers and tables of an ablation with made-up runs."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from osp.ablation.config import AblationConfig
from osp.ablation.runs import Planned, plan
from osp.ablation.table import (
    PAPER,
    Cell,
    Line,
    Measured,
    Results,
    against_first,
    as_json,
    collect,
    contents,
    format_number,
    measure,
    summarize,
    verdict,
)
from osp.evaluation.config import COLUMNS, DEPLOYED_COLUMNS
from osp.run.evaluations import Comparison, ComparisonRecord, Score
from osp.schema import build
from osp.tables import render_text
from tests.ablation.test_ablation_runs import config, preset
from tests.conftest import ROOT
from tests.made_run import made_run

sys.path.insert(0, str(ROOT / "scripts"))
import entry

Ablation = tuple[AblationConfig, list[Planned], Results]

PERPLEXITY = {"adam": (20.0, 80.0), "osp": (21.0, 22.0)}  # at 16-16-16 and at 4-4-4


def made_record(row: str, seed: int) -> ComparisonRecord:
    """Return a record of scripts/compare.py; the second seed has twice the perplexities of the first."""
    first, last = PERPLEXITY[row]

    def score(value: float | None) -> Score:
        return Score(None if value is None else value * (1 + seed), None)

    cells = {bits: score(first if bits != "4-4-4" else last) for bits in COLUMNS}
    hadamard = {**cells, "4-4-4": score(None if row == "adam" else last)}
    deployed = dict.fromkeys(DEPLOYED_COLUMNS, score(first + 0.5)) if row == "osp" else {}
    comparison = Comparison(
        row,
        "f" * 64,
        kurtosis=None,
        what="held_out",
        bits={"": cells | deployed, "+Had": hadamard},
        methods={"RTN": score(last), "+ GPTQ": score(first)} if row == "osp" else {},
        specs={"abc123": "4-4-4 rtn", "def456": "4-4-4 gptq", "789abc": "4-4-16 rtn, W nvfp4/block 16"},
        hashes={"4-4-4": "abc123", "+ GPTQ": "def456", "NVFP4": "789abc"},
        texts={"held_out": "e" * 64},
    )
    return ComparisonRecord(commit="0123abcd", models=(comparison,))


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Ablation:
    """Two rows and two seeds; osp's second seed has failed."""
    folder = tmp_path_factory.mktemp("ablation")
    sweep = {"key": "optimizer.lr", "values": [0.1, 0.01], "rows": ["adam"]}
    wanted = config(folder, seeds=[0, 1], sweep=sweep)
    runs, records = plan(wanted, entry.compose), {}
    for run in runs:
        if (run.row, run.seed) != ("osp", 1):
            made_run(run.folder, steps=64, layers=2, outliers=run.row == "adam", seed=run.seed)
            records[run.label, "trained"] = made_record(run.row, run.seed)
    (failed,) = [run.label for run in runs if (run.label, "trained") not in records]
    return wanted, runs, collect(wanted, runs, records, {failed: "the disk is full"}, about=["trained here"])


def as_markdown(results: Results, wanted: AblationConfig) -> str:
    return render_text(ROOT / "osp" / "ablation" / "ablation.md", **contents(results, wanted))


def test_numbers_equal_the_run_folders(ablation: Ablation) -> None:
    _, runs, results = ablation
    events = [json.loads(line) for line in (runs[0].folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    last: dict[str, float] = {}
    for event in events:
        last |= event
    numbers = next(m for m in results.runs if m.label == runs[0].label).numbers
    layers = ("layer_00", "layer_01")
    assert numbers["kurtosis"] == pytest.approx(sum(last[f"monitor/kurtosis/{x}/block_out"] for x in layers) / 2)
    assert numbers["down_proj_max"] == max(last[f"monitor/max_abs/{x}/down_proj_in"] for x in layers)
    assert numbers["osp_script"] == last["monitor/kurtosis/osp_script"]
    assert numbers["R_L"] == last["monitor/R_L"]
    assert numbers["loss"] == last["val/loss"]
    assert numbers["4-4-4"] == 80.0
    assert numbers["4-4-4 +Had"] == math.inf  # null in the record
    assert numbers["cost"] == pytest.approx(math.log(4))


def test_numbers_that_a_run_lacks_are_unknown(tmp_path: Path) -> None:
    """A layer without the last probe, and a record without 4-4-4."""
    (run,) = plan(config(tmp_path, seeds=[0], rows=["adam"]), entry.compose)
    made_run(run.folder, steps=64, layers=2)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 65, "monitor/kurtosis/layer_00/block_out": 1.0}\n')
    (model,) = (record := made_record("adam", 0)).models
    cells = {bits: score for bits, score in model.bits[""].items() if bits != "4-4-4"}
    record = replace(record, models=(replace(model, bits={"": cells}),))
    measured = measure(run, record, config())
    assert measured.numbers["16-16-16"] == 20.0
    assert math.isnan(measured.numbers["cost"])
    wanted = config(tmp_path, seeds=[0], rows=["adam"])
    results = collect(wanted, [run], {(run.label, "trained"): record}, {}, about=[])
    assert "| adam |" in as_markdown(results, wanted)


def test_mean_and_spread_over_seeds(ablation: Ablation) -> None:
    _, _, results = ablation
    adam, osp = results.rows
    assert adam.cells["4-4-4"].mean == pytest.approx(120.0)  # of 80 and 160
    assert adam.cells["4-4-4"].deviation == pytest.approx(80 / math.sqrt(2))
    one_seed = osp.cells["4-4-4"]
    assert (one_seed.mean, one_seed.count, one_seed.quant) == (22.0, 1, "abc123")
    assert math.isnan(one_seed.deviation)
    assert [label.rpartition("-")[0] for label in osp.missing] == ["osp-seed1"]
    assert list(results.sweep) == ["adam"]
    assert [run.value for run in results.sweep["adam"]] == [0.01, 0.1]
    assert summarize([{"a": 1.0}, {"a": math.inf}], {})["a"].mean == math.inf
    assert Cell(5.0, 3.0, 2) - Cell(1.0, 4.0, 2) == Cell(4.0, 5.0, 2)


def test_better_row_loses_less_at_4_bits_and_not_more_at_16() -> None:
    def line(row: str, at_16: float, at_4: float, deviation: float = 0.03) -> Line:
        values = {"nats_16": at_16, "nats_4": at_4}
        return Line(row, "tuned", {name: Cell(value, deviation, 2) for name, value in values.items()}, ())

    first = line("osp", 3.0, 3.5, deviation=0.04)  # with 0.03 the spread is 0.05
    rows = [line("a", 3.05, 3.3), line("b", 3.2, 3.3), line("c", 2.9, 3.45), line("d", 2.0, 2.0, math.nan)]
    head, *rows_of_table = against_first([first, *rows, Line("e", "tuned", {}, ("e-seed0",))])
    assert head == ["row", "at 16-16-16", "at 4-4-4", "better than osp"]
    assert rows_of_table == [
        ["a", "+0.0500 ± 0.0500", "-0.2000 ± 0.0500", "yes"],
        ["b", "+0.2000 ± 0.0500", "-0.2000 ± 0.0500", "no"],
        ["c", "-0.1000 ± 0.0500", "-0.0500 ± 0.0500", "no"],
        ["d", "-1.0000", "-1.5000", "one seed"],
    ]


@pytest.mark.parametrize(
    ("adam", "osp", "sentence"),
    [
        (Cell(1.0, 0.1, 3), Cell(0.1, 0.1, 3), r"osp loses 0\.9000 less, 6\.4 times the spread over seeds"),
        (Cell(0.1, 0.1, 3), Cell(0.2, 0.1, 3), r"no difference beyond twice the spread over seeds \(0\.1414\)"),
        (Cell(0.1, math.nan, 1), Cell(0.4, math.nan, 1), r"osp loses 0\.3000 more; one seed, so the spread is unknown"),
    ],
)
def test_verdict_compares_the_difference_with_the_spread(adam: Cell, osp: Cell, sentence: str) -> None:
    lines = [Line("adam", "paper", {"cost": adam}, ()), Line("osp", "paper", {"cost": osp}, ())]
    assert re.search(sentence, verdict(lines[0], lines[1]))


def test_markdown_has_every_table_with_equal_columns(ablation: Ablation) -> None:
    wanted, _, results = ablation
    text = as_markdown(results, wanted)
    assert "- trained here" in text
    assert re.search(r"- osp-seed1-\w+: the disk is full", text)
    assert "120.00 ± 56.57 (8e4)" in text  # the paper's beside ours
    assert "| +Had | 30.00 ± 14.14 (11.40) |" in text
    assert "| row | 16-16-16 | 4-8-16 | 4-8-8 | 4-4-16 | 4-4-4 | W4A16 | NVFP4 | MXFP4 |" in text
    assert " | 120.00 ± 56.57 (8e4) | - | - | - |\n" in text, "a record of an earlier version"
    assert " | 22.00 (19.60) | 21.50 | 21.50 | 21.50 |\n| +Had |" in text
    assert " | 22.00 (13.50) |  |  |  |\n" in text
    assert "| NVFP4 | 789abc | 4-4-16 rtn, W nvfp4/block 16 |" in text
    assert "max \\|x\\| at down_proj" in text
    assert "| 4-4-4 | abc123 | 4-4-4 rtn |" in text
    assert f"text held_out: SHA-256 {'e' * 64}" in text
    assert "0123abcd" in text
    assert text.count("## Over optimizer.lr") == 1
    for line in text.split("\n"):  # every row of a table has as many cells as its heading
        if line.startswith("| ---"):
            cells = line.count("|")
        elif line.startswith("|") and not line.startswith(("| row", "| method", "| column")):
            assert len(re.findall(r"(?<!\\)\|", line)) == cells, line
    assert [format_number(x) for x in (0.0404, 1.8, 24.15, 1818.56, 8e4, math.inf, math.nan)] == [
        "0.0404", "1.800", "24.15", "1819", "8e4", "inf", "-",
    ]  # fmt: skip


def test_json_names_the_source_of_each_number(ablation: Ablation) -> None:
    _, _, results = ablation
    values = json.loads(json.dumps(as_json(results), allow_nan=False))
    cell = values["rows"][0]["cells"]["4-4-4"]
    assert (cell["mean"], cell["count"], cell["quant"]) == (pytest.approx(120.0), 2, "abc123")
    assert values["rows"][0]["cells"]["4-4-4 +Had"]["mean"] is None
    assert {run["commit"] for run in values["runs"]} == {"0123abcd"}
    assert values["data"] == {"held_out": "e" * 64}
    assert list(values["failures"].values()) == ["the disk is full"]


def from_json(values: dict[str, Any]) -> Results:
    """Return the results of a stored ablation.json."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    lines, columns = [], {}
    for row in values["rows"]:
        cells = {
            name: Cell(**cell | {key: number(cell[key]) for key in ("mean", "deviation")})
            for name, cell in row["cells"].items()
        }
        columns |= {name: cell.quant for name, cell in cells.items() if cell.quant}
        lines.append(Line(**row | {"cells": cells}))
    runs = [Measured(**run) for run in values["runs"]]
    return Results(**values | {"rows": lines, "runs": runs, "columns": columns})


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("ablation_nano", "nano"),
        ("ablation_nano_past", "nano_past"),
        ("backcopy", "backcopy"),
        ("nano_endings", "nano_endings"),
        ("nano_recipes", "nano_recipes"),
        ("nano_recipes_long", "nano_recipes"),
        ("nano_recipes_rates", "nano_recipes"),
        ("osp_weakness", "osp_weakness"),
        ("osp_weakness_long", "osp_weakness"),
        ("outliers", "outliers"),
        ("twice", "twice"),
        ("twice_wide", "twice_wide"),
    ],
)
def test_committed_json_renders_the_committed_tables(
    name: str, scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tables that were added after the file was committed are allowed."""
    folder = ROOT / "benchmarks"
    values = json.loads((folder / f"{name}.json").read_text())
    keys, measured = preset(scale, monkeypatch, tmp_path), {row["row"] for row in values["rows"]}
    compared = [pair for pair in keys["compared"] if measured.issuperset(pair)]
    seeds = sorted({run["seed"] for run in values["runs"]})
    wanted = build(AblationConfig, {**keys, "compared": compared, "seeds": seeds})
    rendered = as_markdown(from_json(values), wanted)

    def tables(text: str) -> list[str]:
        return [line for line in text.split("\n") if line.startswith(("|", "**"))]

    remaining = iter(tables(rendered))
    for line in tables((folder / f"{name}.md").read_text()):
        assert line in remaining, line  # in this order


def test_table_of_the_paper_is_complete() -> None:
    """Every row of the paper has a number for every cell."""
    for row in PAPER.values():
        assert set(row) == {"osp_script", *COLUMNS, *(f"{bits} +Had" for bits in COLUMNS)}
    assert PAPER["osp"]["4-4-4"] == 19.6
    assert PAPER["adam"]["4-4-4"] == 8e4
