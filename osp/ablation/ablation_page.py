"""The ablation as one self-contained HTML page: the sections of `osp.ablation.table`, and charts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osp.ablation.config import AblationConfig
from osp.ablation.table import HADAMARD, LAST, Line, Measured, Results, missing_lines, sections, source_lines
from osp.evaluation.compare import COLUMNS
from osp.report.charts import line_words
from osp.report.downsample import rounded
from osp.report.page import render

CHARTS_OF_SWEEP = {  # quantity -> title, unit, logarithmic axis
    "loss": ("Validation loss, 16 bits", "nats per token", False),
    "cost": (f"The cost of {LAST}", "nats per token", False),
    "kurtosis": ("Kurtosis of the residual stream", "", False),
    "down_proj_max": ("Largest value at down_proj", "|x|", True),
}
LOWEST_KURTOSIS = 0.01  # on a logarithmic axis
KURTOSIS_SAYS = "Mean over the layers, of the first seed. The paper's effect is a curve that rises."
BITS_SAY = (
    "Mean over seeds. Healthy: flat from left to right. Unhealthy: it rises where activations have 4 bits, because "
    "outliers take the levels."
)
Chart = dict[str, Any]  # of page.js, see `_chart`


def ablation_page(results: Results, config: AblationConfig, about: Sequence[str]) -> str:
    """Return the HTML document. about: lines on the training, its data and the command."""
    rows = list(dict.fromkeys(line.row for line in results.lines)) or list(results.sweep)
    charts = {"sweep": _sweep_charts(results, config, rows)}  # id of a section -> name -> chart
    for rates in dict.fromkeys(line.rates for line in results.lines):
        lines = [line for line in results.lines if line.rates == rates]
        runs = [m for m in results.runs if m.planned.rates == rates and m.planned.value is None]
        charts[f"rates-{rates}"] = {
            f"kurtosis-{rates}": _kurtosis_chart(runs, rows),
            f"bits-{rates}": _bits_chart(lines, rows, "", "Perplexity from 16 to 4 bits"),
            f"had-{rates}": _bits_chart(lines, rows, HADAMARD, "The same with the FFN's Hadamard transform"),
        }
    figures = {
        section: [
            {"name": name, "words": line_words(chart, rows), **chart}
            for name, chart in drawn.items()
            if chart["curves"]
        ]
        for section, drawn in charts.items()
    }
    lines = {name: chart for drawn in charts.values() for name, chart in drawn.items()}
    return render(
        Path(__file__).parent / "ablation.html",
        title="What outliers cost, by recipe",
        kind="ablation",
        data={"runs": rows, "lines": lines, "sites": {}, "stats": {}, "words": {}, "histograms": {}},
        legend=[(row, "") for row in rows],
        missing=missing_lines(results),
        sections=sections(results, config),
        figures=figures,
        columns=results.columns,
        about=[*about, *source_lines(results)],
        folder=config.dir,
    )


def _chart(title: str, curves: list[dict[str, Any]], *, x: str, **more: Any) -> Chart:
    """Return a chart over `x`, which is not a step. more: "logx", or "categories" (names of x = 0, 1, ...)."""
    texts = {"title": title, "unit": "", "says": "", "wide": False}
    return {**texts, "log": False, "curves": curves, "levels": [], "events": [], "x": x, **more}


def _curve(run: int, x: list[Any], y: list[Any], *, key: str = "") -> dict[str, Any]:
    return {"run": run, "key": key, "name": "", "faint": False, "x": x, "y": y}


def _sweep_charts(results: Results, config: AblationConfig, rows: list[str]) -> dict[str, Chart]:
    key = config.sweep.key or ""
    values = [value for points in results.sweep.values() for value, _ in points]
    numeric = all(isinstance(value, int | float) and value > 0 for value in values)
    names = list(dict.fromkeys(map(str, values)))
    axis = {"logx": True} if numeric else {"categories": names}
    charts = {}
    for name, (title, unit, log) in CHARTS_OF_SWEEP.items():
        curves = []
        for row, points in results.sweep.items():
            x = [value if numeric else names.index(str(value)) for value, _ in points]
            y = [_finite(numbers[name]) for _, numbers in points]
            curves.append(_curve(rows.index(row), x, y, key=name))
        chart = _chart(title, curves, x=key, log=log, unit=f"{unit}{', ' * bool(unit)}over {key}", **axis)
        charts[f"sweep-{name}"] = _log_if_needed(chart) if name == "kurtosis" else chart
    return charts


def _kurtosis_chart(runs: list[Measured], rows: list[str]) -> Chart:
    """Return the chart of the residual stream's kurtosis over tokens, of the first seed of each row."""
    curves = {}
    for m in runs:
        if m.kurtosis is not None and m.planned.row.name not in curves:
            x = (m.kurtosis.steps * m.planned.config.train.tokens_per_step).tolist()
            curve = _curve(rows.index(m.planned.row.name), x, rounded(m.kurtosis.values, 4))
            curves[m.planned.row.name] = curve
    chart = _chart("Kurtosis of the residual stream over tokens", list(curves.values()), x="tokens")
    return _log_if_needed(chart) | {"says": KURTOSIS_SAYS, "wide": True}


def _log_if_needed(chart: Chart) -> Chart:
    """Return a chart of kurtosis with a logarithmic axis if a value is above 20; it cannot show values below 0."""
    values = [y for curve in chart["curves"] for y in curve["y"] if y is not None]
    if max(values, default=0) <= 20:
        return chart
    curves = [
        curve | {"y": [None if y is None else max(y, LOWEST_KURTOSIS) for y in curve["y"]]} for curve in chart["curves"]
    ]
    return chart | {"log": True, "curves": curves}


def _bits_chart(lines: list[Line], rows: list[str], suffix: str, title: str) -> Chart:
    curves = []
    for line in lines:
        cells = [line.cells.get(bits + suffix) for bits in COLUMNS]
        y = [_finite(cell.mean) if cell else None for cell in cells]
        if any(value is not None for value in y):
            curves.append(_curve(rows.index(line.row), list(range(len(COLUMNS))), y))
    return _chart(title, curves, x="bits", log=True, unit="W-A-KV", says=BITS_SAY, categories=COLUMNS)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
