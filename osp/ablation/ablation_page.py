"""The ablation as one self-contained HTML page: the sections of `osp.ablation.table`, and charts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osp.ablation.config import AblationConfig
from osp.ablation.table import HADAMARD, WORDS, Results, contents
from osp.evaluation.compare import COLUMNS
from osp.report.charts import line_words
from osp.report.downsample import rounded
from osp.report.page import render

LARGE_KURTOSIS, SMALLEST_KURTOSIS = 20, 0.01  # an axis is logarithmic above the first, and begins at the second
Chart = dict[str, Any]  # of page.js and macros.html, see `_chart`


def ablation_page(results: Results, config: AblationConfig) -> str:
    """Return all tables with charts, as HTML."""
    rows = list(dict.fromkeys(line.row for line in results.rows)) or list(results.sweep)
    charts = {"sweep": _sweep_charts(results, config.sweep.key or "", rows)}  # id of a section -> charts
    for rates in dict.fromkeys(line.rates for line in results.rows):
        charts[f"rates-{rates}"] = _rates_charts(results, rates, rows)
    lines = {chart["name"]: chart for drawn in charts.values() for chart in drawn}
    return render(
        Path(__file__).with_name("ablation.html"),
        kind="ablation",
        data={"runs": rows, "lines": lines, "sites": {}, "stats": {}, "words": {}, "histograms": {}},
        legend=[(row, "") for row in rows],
        figures={section: [chart for chart in drawn if chart["curves"]] for section, drawn in charts.items()},
        columns=results.columns,
        folder=config.dir,
        **contents(results, config),
    )


def _sweep_charts(results: Results, key: str, rows: list[str]) -> list[Chart]:
    values = [run.value for runs in results.sweep.values() for run in runs]
    numeric = all(isinstance(value, int | float) and value > 0 for value in values)
    names = list(dict.fromkeys(map(str, values)))
    axis = {"x": key} | ({"logx": True} if numeric else {"categories": names})
    charts = []
    for name, words in WORDS["charts"]["sweep"].items():
        curves = []
        for row, runs in results.sweep.items():
            x = [run.value if numeric else names.index(str(run.value)) for run in runs]
            curves.append(_curve(rows.index(row), x, [run.numbers[name] for run in runs], key=name))
        unit = ", ".join(filter(None, [words.get("unit"), f"over {key}"]))
        charts.append(_chart(f"sweep-{name}", curves, rows, **words | {"unit": unit} | axis))
    return charts


def _rates_charts(results: Results, rates: str, rows: list[str]) -> list[Chart]:
    """Return the kurtosis over tokens of the first seed of each row, and perplexity by bits."""
    words, kurtosis = WORDS["charts"], {}
    for run in results.runs:
        if (run.rates, run.value) == (rates, None) and run.kurtosis is not None and run.row not in kurtosis:
            x, y = run.kurtosis.steps.tolist(), rounded(run.kurtosis.values, 4)
            kurtosis[run.row] = _curve(rows.index(run.row), x, y)
    charts = [_chart(f"kurtosis-{rates}", list(kurtosis.values()), rows, **words["kurtosis"])]
    for name, suffix in {"bits": "", "had": HADAMARD}.items():
        curves = []
        for line in results.rows:
            cells = [line.cells.get(bits + suffix) for bits in COLUMNS]
            y = [cell.mean if cell else None for cell in cells]
            curve = _curve(rows.index(line.row), list(range(len(COLUMNS))), y)
            if line.rates == rates and any(curve["y"]):
                curves.append(curve)
        charts.append(_chart(f"{name}-{rates}", curves, rows, categories=COLUMNS, **words[name]))
    return charts


def _curve(run: int, x: list[Any], y: Sequence[float | None], *, key: str = "") -> dict[str, Any]:
    values = [None if value is None or not math.isfinite(value) else value for value in y]
    return {"run": run, "key": key, "name": "", "faint": False, "x": x, "y": values}


def _chart(name: str, curves: list[dict[str, Any]], rows: list[str], **more: Any) -> Chart:
    """Return a chart over `x`, not a step. more: its words, "logx", or "categories" (names of x = 0, 1, ...)."""
    texts = {"name": name, "unit": "", "says": "", "wide": False}
    chart = {**texts, "log": False, "curves": curves, "levels": [], "events": [], **more}
    if chart["log"] == "auto":
        values = [y for curve in curves for y in curve["y"] if y is not None]
        chart["log"] = max(values, default=0) > LARGE_KURTOSIS
        for curve in curves if chart["log"] else []:  # a logarithmic axis cannot show values below 0
            curve["y"] = [None if y is None else max(y, SMALLEST_KURTOSIS) for y in curve["y"]]
    return chart | {"words": line_words(chart, rows)}
