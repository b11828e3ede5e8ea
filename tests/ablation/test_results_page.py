"""The tables and the picture of docs/results.md have the numbers of benchmarks/ablation_*.json."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch

from osp.config import Weights
from osp.monitor.statistics import compute_moments, excess_kurtosis
from osp.quant.formats import FORMATS
from osp.run.evaluations import label
from tests.conftest import ROOT
from tests.documents import read_page, section, tables

PAGE, README = read_page("docs/results.md"), read_page("README.md")
Ending = tuple[str, str, Weights]  # last learning rate in percent of the peak, weight decay, weights
# column of the page -> quantity of the ablation
QUANTITIES = {
    "max abs at `down_proj`": "down_proj_max",
    "at 16-16-16": "16-16-16",
    "at 4-4-4": "4-4-4",
    "4-4-4 costs": "cost",
    "kurtosis, paper's script": "osp_script",
    "here, 1.5 M tokens": "osp_script",
}
PAST = {  # row of the page -> row of the ablation, where they differ
    "`osp`, `norm.placement=peri`": "osp_peri",
    "`adam`, penalty 0.01": "adam_penalty",
    "`osp`, weight decay 0.5": "osp_decay",
}


def cells_of(file: str, rates: str) -> dict[str, dict[str, Any]]:
    rows = json.loads((ROOT / "benchmarks" / file).read_text(encoding="utf-8"))["rows"]
    return {row["row"]: row["cells"] for row in rows if row["rates"] == rates}


def runs_of(file: str) -> dict[tuple[str, int], dict[str, float]]:
    """Return (row, seed) -> numbers of each run."""
    runs = json.loads((ROOT / "benchmarks" / file).read_text(encoding="utf-8"))["runs"]
    return {(run["row"], run["seed"]): run["numbers"] for run in runs}


def assert_written(cell: str, *numbers: float) -> None:
    """Check `1.23±0.45` against a mean and a deviation, or `1.2 / 3.4` against two numbers, to the written digits."""
    for text, number in zip(re.split("±| / ", cell), numbers, strict=True):
        digits = len(text.partition(".")[2])
        assert abs(float(text) - number) <= 0.5001 * 10**-digits, (cell, numbers)


def assert_cells(row: dict[str, str], measured: dict[str, dict[str, Any]], names: dict[str, str]) -> None:
    """Check the cells of a row of the page; `names` maps its columns to quantities of the ablation."""
    for column, name in names.items():
        cell = measured[row["row"].strip("`")][name]
        assert_written(row[column], cell["mean"], cell.get("interval", cell["deviation"]))


def assert_costs(table: list[dict[str, str]], measured: dict[str, dict[str, Any]], text: str, **others: str) -> None:
    """Check a table with a row for each row of the ablation: loss at 16 bits, costs on `text`, and `others`."""
    assert [row["row"].strip("`") for row in table] == list(measured)
    names = {"at 16 bits": f"{text} loss"} | others
    for row in table:
        columns = row.keys() - {"row"}
        assert_cells(row, measured, {column: names.get(column, f"{text} cost {column}") for column in columns})


@pytest.mark.parametrize(
    ("title", "rates"), [("At the best learning rates", "tuned"), ("At the paper's learning rates", "paper")]
)
def test_tables_of_the_papers_rows(title: str, rates: str) -> None:
    measured = cells_of("ablation_nano.json", rates)
    for table in tables(section(PAGE, title), "row"):
        assert [row["row"].strip("`") for row in table] == [
            "adam", "muon_all", "muon", "muon_ssnorm", "muon_embproj", "osp",
        ]  # fmt: skip
        for row in table:
            assert_cells(row, measured, {column: QUANTITIES[column] for column in QUANTITIES.keys() & row.keys()})


def test_table_past_the_paper() -> None:
    measured = cells_of("ablation_nano_past.json", "tuned")
    (table,) = tables(section(PAGE, "Past the paper"), "row")
    assert len(table) == len(measured) - 2  # osp is the reference, adam is in brackets
    for row in table:
        cells = measured[PAST.get(row["row"], row["row"].strip("`"))]
        for column, quantity in (("at 16-16-16", "nats_16"), ("at 4-4-4", "nats_4")):
            ours, reference = cells[quantity], measured["osp"][quantity]
            deviation = math.hypot(ours["deviation"], reference["deviation"])
            assert_written(row[column], ours["mean"] - reference["mean"], deviation)
        largest = re.findall(r"\d+", row["max abs at `down_proj`"])[0]
        assert int(largest) == round(cells["down_proj_max"]["mean"])


WHY = read_page("docs/why-outliers.md")
OUTLIERS = {
    "largest kurtosis": "norm_kurtosis",
    "top channel before the gain": "share_before_gain",
    "after it": "share_after_gain",
    "attention sink": "attn_sink",
    "largest block output": "block_out_max",
    "largest input of `down_proj`": "down_proj_max",
}


@pytest.mark.parametrize(
    ("title", "file"),
    [
        ("What 4 bits pay for it", "twice.json"),
        ("At twice the width", "twice_wide.json"),
        ("Bigram-Backcopy", "backcopy.json"),
    ],
)
def test_tables_of_the_copy_tasks(title: str, file: str) -> None:
    """First the costs on copied tokens, then those on all tokens if the page has them, last the outliers."""
    measured = cells_of(file, "best")
    *costs, outliers = tables(section(WHY, title), "row")
    for text, table in zip(("copied", "held_out"), costs, strict=False):
        assert_costs(table, measured, text)
    assert_costs(outliers, measured, "", **OUTLIERS)


def test_table_of_the_heads() -> None:
    measured = json.loads((ROOT / "benchmarks" / "heads.json").read_text(encoding="utf-8"))
    (table,) = tables(section(WHY, "Bigram-Backcopy"), "recipe")
    for row in table:
        last = measured[row["recipe"].strip("`")][-1]
        for column, key in (
            ("at triggers, attention to the token before", "triggers: the token before"),
            ("at other symbols, to the start token", "other symbols: the start token"),
        ):
            assert row[column] == ", ".join(f"{100 * share:.0f}%" for share in last[key])


def test_tables_of_the_remedies() -> None:
    """First 1.5 M tokens, then 8.2 M."""
    short, long = tables(section(WHY, "What helps `down_proj`"), "row")
    for table, file in ((short, "osp_weakness.json"), (long, "osp_weakness_long.json")):
        assert_costs(table, cells_of(file, "tuned"), "held_out", kurtosis="down_proj_kurtosis")


# a change of the second table on endings -> its pairs: an ending, and the same with the change
LAST_RATES, DECAYS = ("0", "10", "30"), ("0.01", "0.1")
BOTH: tuple[Weights, Weights] = ("trained", "averaged")
TOTAL = "4-4-4 in total, against `osp`"
CHANGES: dict[str, list[tuple[Ending, Ending]]] = {
    "averaged weights": [((f, d, "trained"), (f, d, "averaged")) for f in LAST_RATES for d in DECAYS],
    "last rate 10%": [(("0", d, "trained"), ("10", d, "trained")) for d in DECAYS],
    "last rate 30%": [(("0", d, "trained"), ("30", d, "trained")) for d in DECAYS],
    "last rate 30%, averaged": [(("0", d, "averaged"), ("30", d, "averaged")) for d in DECAYS],
    "weight decay 0.1": [((f, "0.01", "trained"), (f, "0.1", "trained")) for f in LAST_RATES],
    "weight decay 0.1, averaged": [((f, "0.01", "averaged"), (f, "0.1", "averaged")) for f in LAST_RATES],
}


def test_tables_of_endings() -> None:
    """First the mean of each ending as trained and averaged, then mean changes and how many pairs of runs fell."""
    numbers = runs_of("nano_endings.json")
    seeds = {seed for _, seed in numbers}

    def read(recipe: str, ending: Ending, seed: int, column: str) -> float:
        last_rate, decay, weights = ending
        row = label(f"{recipe}_final{last_rate}_wd{decay}", weights)
        return numbers[row, seed]["held_out loss" if column == "at 16 bits" else f"held_out cost {column}"]

    means, changes = (tables(section(PAGE, "How a training ends"), title)[0] for title in ("recipe", "change"))
    assert len(means) == 3 * len(LAST_RATES) * len(DECAYS)
    for row in means:
        recipe, last_rate, decay, *columns = row
        for column in columns:
            endings: list[Ending] = [(row[last_rate].strip("%"), row[decay], weights) for weights in BOTH]
            means_of_seeds = [
                statistics.fmean(read(row[recipe].strip("`"), ending, seed, column) for seed in seeds)
                for ending in endings
            ]
            assert_written(row[column], *means_of_seeds)
    for recipe in ("osp", "osp_plus", "adam"):
        averaged, trained = (
            statistics.fmean(
                read(recipe, (f, d, w), seed, "4-4-4") for f in LAST_RATES for d in DECAYS for seed in seeds
            )
            for w in BOTH[::-1]
        )
        assert f"`{recipe}` {averaged:.3f} instead of {trained:.3f}" in README
    assert [(row["change"], row["recipe"].strip("`")) for row in changes] == [
        (change, recipe) for change in CHANGES for recipe in ("adam", "osp", "osp_plus")
    ]
    for row in changes:
        _, recipe, *columns = row
        for column in columns:
            gaps = [
                read(row[recipe].strip("`"), after, seed, column) - read(row[recipe].strip("`"), before, seed, column)
                for before, after in CHANGES[row["change"]]
                for seed in seeds
            ]
            assert row[column] == f"{statistics.fmean(gaps):+.4f}, {sum(gap < 0 for gap in gaps)} of {len(gaps)}"


def test_tables_of_switches() -> None:
    """As trained / averaged: loss and costs, then the loss at 4-4-4 minus osp's, with a * beyond twice the spread.

    First 1.5 M tokens, then 8.2 M.
    """
    short, long = tables(section(PAGE, "Which switch helps at 4 bits"), "row")
    for table, file in ((short, "nano_recipes.json"), (long, "nano_recipes_long.json")):
        cells = cells_of(file, "tuned")
        assert [row["row"].strip("`") for row in table] == [name for name in cells if not name.endswith(", averaged")]
        for row in table:
            columns = row.keys() - {"row", "switch", TOTAL}
            pairs = [[cells[label(one, weights)] for weights in BOTH] for one in (row["row"].strip("`"), "osp")]
            for column in columns:
                quantity = "held_out loss" if column == "at 16 bits" else f"held_out cost {column}"
                assert_written(row[column], *(ours[quantity]["mean"] for ours in pairs[0]))
            for text, ours, osp in zip(row[TOTAL].split(" / "), *pairs, strict=True):
                a, b = ours["nats_4"], osp["nats_4"]
                gap, spread = a["mean"] - b["mean"], math.hypot(a["deviation"], b["deviation"])
                assert text == f"{gap:+.3f}" + " *" * (abs(gap) > 2 * spread)


def test_readme_has_the_gains_at_both_budgets() -> None:
    """At 4-4-4: of osp_penalty, averaged, in total; of averaging, in the cost."""
    short, long = (cells_of(f"nano_recipes{length}.json", "tuned") for length in ("", "_long"))
    first, last = (
        cells["osp, averaged"]["nats_4"]["mean"] - cells["osp_penalty, averaged"]["nats_4"]["mean"]
        for cells in (short, long)
    )
    assert f"{first:.2f} nats less at 4-4-4 after 1.5 M tokens, {last:.2f} after 8.2 M" in README
    trained, averaged = (long[label("osp", weights)]["cost"]["mean"] for weights in BOTH)
    assert f"after 8.2 M tokens `osp` {averaged:.3f} instead of {trained:.3f}" in README


def test_averaging_lowers_the_cost_of_this_many_models() -> None:
    gaps = []
    for file in ("nano_recipes.json", "nano_recipes_long.json"):
        costs = {run: numbers["cost"] for run, numbers in runs_of(file).items()}
        gaps += [costs[label(row, "averaged"), seed] - cost for (row, seed), cost in costs.items() if "," not in row]
    assert f"in {sum(gap < 0 for gap in gaps)} of {len(gaps)} models**" in section(PAGE, "Which switch helps at 4 bits")


def test_table_of_penalties_and_learning_rates() -> None:
    """With seed 0: the loss at 4-4-4 as trained / averaged."""
    numbers = runs_of("nano_recipes_long.json") | runs_of("nano_recipes_rates.json")
    (table,) = tables(section(PAGE, "Which switch helps at 4 bits"), "penalty")
    rows = {"0.01": ("osp_penalty", "osp_penalty_1e-2"), "0.1": ("osp_plus_5e-3", "osp_plus")}
    assert [row["penalty"] for row in table] == list(rows)
    for row in table:
        for column, name in zip(("5e-3", "1e-2"), rows[row["penalty"]], strict=True):
            assert_written(
                row[column].partition(" (")[0], *(numbers[label(name, weights), 0]["nats_4"] for weights in BOTH)
            )


def test_gain_of_osp_plus_with_more_tokens() -> None:
    cells = cells_of("nano_recipes_long.json", "tuned")
    (table,) = tables(section(PAGE, "Past the paper"), "`osp_plus` against `osp`")
    (row,) = [row for row in table if "8.2 M" in row["`osp_plus` against `osp`"]]
    for column, quantity in (("gain at 16-16-16, nats", "nats_16"), ("gain at 4-4-4, nats", "nats_4")):
        assert_written(row[column], cells["osp"][quantity]["mean"] - cells["osp_plus"][quantity]["mean"])


def test_table_of_quantization_aware_endings() -> None:
    """The loss after rounding, of osp and of the row that was trained with it, by seeds."""
    files = {"1.5 M": "nano_recipes.json", "8.2 M": "nano_recipes_long.json"}
    (table,) = tables(section(PAGE, "Which switch helps at 4 bits"), "scheme")
    assert len(table) == 8
    for row in table:
        scheme, tokens, rounding, *columns = row.values()
        runs = runs_of(files[tokens])
        rows = [label(name, weights) for name in ("osp", f"osp_qat_{scheme.strip('`')}") for weights in BOTH]
        for text, wanted in zip(columns, rows, strict=True):
            numbers = [values for (name, _), values in runs.items() if name == wanted]
            losses = [values["held_out loss"] + values[f"held_out cost {rounding}"] for values in numbers]
            assert_written(text, statistics.fmean(losses), statistics.stdev(losses))


def test_tables_of_planted_outliers() -> None:
    results = json.loads((ROOT / "benchmarks" / "retrofit.json").read_text(encoding="utf-8"))["results"]
    names = ("before", "adam, RMSNorm", "muon, RMSNorm", "ssnorm, before", "muon, SSNorm")
    keys = [f"as trained: {name}" for name in names]
    for table, wanted in zip(
        tables(section(WHY, "What a planted outlier costs"), "model"),
        ([keys[0], *(key.replace("as trained", "planted") for key in keys)], keys),
        strict=True,
    ):
        for row, key in zip(table, wanted, strict=True):
            _, share, kurtosis, loss, cost, folded = row.values()
            numbers = results[key]
            assert share == f"{100 * numbers['top_channel_share']:.0f}%"
            assert kurtosis == f"{numbers['kurtosis']:.1f}"
            assert loss == f"{numbers['copied 16-16-16']:.3f}"
            assert cost == f"{numbers['copied 4-4-4 costs']:.3f}"
            assert folded == f"{numbers['copied 4-4-4 folded costs']:.3f}"


def test_table_of_the_strength_of_an_outlier() -> None:
    """One channel is `a` times the others, which are normal: the error that 4-bit rounding of a token adds to them."""
    (table,) = tables(section(WHY, "How strong an outlier must be"), "one channel is *a* times the others")
    title, *strengths = table[0]
    rows = {row[title]: [row[a] for a in strengths] for row in table}
    for i, a in enumerate(map(float, strengths)):
        for width in (128, 2048):
            x = torch.randn(300, width, generator=torch.Generator().manual_seed(0))
            x[:, 0] = a
            others = x[:, 1:]
            if width == 128:
                error = (FORMATS["asym"](4).round(x, group_size=None) - x)[:, 1:].square().mean() / others.var()
                assert error.item() == pytest.approx(
                    float(rows["error of the others, relative to their energy"][i]), abs=0.012
                )
            share = a**2 / (a**2 + width - 1)
            assert rows[f"share of the energy, {width} channels"][i] == f"{100 * share:.0f}%"
            kurtosis = excess_kurtosis(compute_moments(x, 1)).mean().item()
            written = float(rows[f"excess kurtosis, {width} channels"][i])
            assert kurtosis == pytest.approx(written, rel=0.02, abs=0.7)


@pytest.mark.parametrize("file", pictures.PICTURES, ids=lambda file: file.name)
def test_picture_is_what_the_generator_draws(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == pictures.render(pictures.PICTURES[file]()), (
        "run `python docs/pictures.py`"
    )


def test_table_of_the_first_outliers() -> None:
    measured = cells_of("outliers.json", "paper")
    curves = json.loads(pictures.CURVES.read_text(encoding="utf-8"))
    (table,) = tables(section(PAGE, "Where outliers form first"), "row")
    assert [row["row"].strip("`") for row in table] == list(measured)
    for row in table:
        name = row["row"].strip("`")
        for column in QUANTITIES.keys() & row.keys():
            assert_written(
                row[column], measured[name][QUANTITIES[column]]["mean"], measured[name][QUANTITIES[column]]["deviation"]
            )
        for column, statistic in (("largest kurtosis", "kurtosis"), ("largest value", "max_abs")):
            for text, curve in zip(row[column].split(", "), curves[name], strict=True):
                digits = len(text.partition(".")[2])
                assert abs(float(text.replace(",", "")) - curve[statistic][-1]) <= 0.5001 * 10**-digits, (name, text)
