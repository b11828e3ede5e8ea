"""The tables and the picture of docs/results.md have the numbers of benchmarks/ablation_*.json."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pictures
import pytest

from tests.conftest import ROOT
from tests.documents import read_page, section, tables

PAGE = read_page("docs/results.md")
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


def assert_written(cell: str, mean: float, deviation: float) -> None:
    """Check `1.23±0.45` against a mean and a deviation, to the digits that are written."""
    for text, number in zip(cell.split("±"), (mean, deviation), strict=True):
        digits = len(text.partition(".")[2])
        assert abs(float(text) - number) <= 0.5001 * 10**-digits, (cell, mean, deviation)


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
            for column in QUANTITIES.keys() & row.keys():
                cell = measured[row["row"].strip("`")][QUANTITIES[column]]
                assert_written(row[column], cell["mean"], cell["deviation"])


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
