"""The ablation as one self-contained HTML page: the tables of `osp.ablation.table`, and charts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osp.ablation.config import AblationConfig
from osp.ablation.paper import SCALE, TEXT
from osp.ablation.table import (
    HADAMARD,
    LAST,
    QUANTITIES,
    Line,
    Measured,
    Results,
    Table,
    against_rows,
    against_words,
    bits_rows,
    methods_rows,
    missing_lines,
    outlier_rows,
    provenance_rows,
    seeds_words,
    sweep_rows,
    verdict,
)
from osp.evaluation.compare import COLUMNS
from osp.report.downsample import rounded
from osp.report.page import curves_figure, render

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


def ablation_page(results: Results, config: AblationConfig, about: Sequence[str]) -> str:
    """Return the HTML document. about: lines on the training, its data and the command."""
    rows = list(dict.fromkeys(line.row for line in results.lines)) or list(results.sweep)
    data = {"runs": rows, "lines": {}, "sites": {}, "stats": {}, "words": {}, "histograms": {}}
    names = dict.fromkeys(line.rates for line in results.lines)
    headings = {f"rates-{rates}": f"Learning rates: {rates}" for rates in names}
    if results.sweep:
        headings["sweep"] = f"Over {config.sweep.key}"
    texts = [f"text {name}: SHA-256 {digest}" for name, digest in results.texts.items()]
    return render(
        Path(__file__).parent / "ablation.html",
        title="What outliers cost, by recipe",
        kind="ablation",
        data=data,
        headings={**headings, "provenance": "Where the numbers are from"},
        legend=[(row, "") for row in rows],
        missing=missing_lines(results),
        rates={f"rates-{rates}": _rates(rates, results, config, data) for rates in names},
        sweep=_sweep(results, config, data) if results.sweep else None,
        about=[*about, *texts, f"commit {', '.join(results.commits) or 'unknown'}"],
        quantizations=_card("Quantizations", provenance_rows(results), results),
        folder=config.dir,
    )


def _rates(rates: str, results: Results, config: AblationConfig, data: dict[str, Any]) -> dict[str, Any]:
    """Return verdict, tables and figures of the rows at one set of learning rates; their charts go into `data`."""
    lines, rows = [line for line in results.lines if line.rates == rates], data["runs"]
    runs = [m for m in results.runs if m.planned.rates == rates and m.planned.value is None]
    seeds = seeds_words(config)
    charts = {
        f"kurtosis-{rates}": _kurtosis(runs, rows),
        f"bits-{rates}": _bits(lines, rows, "", "Perplexity from 16 to 4 bits"),
        f"had-{rates}": _bits(lines, rows, HADAMARD, "The same with the FFN's Hadamard transform"),
    }
    data["lines"] |= charts
    figures = []
    for name, spec in charts.items():
        wide = name.startswith("kurtosis")
        says = KURTOSIS_SAYS if wide else BITS_SAY
        if spec["curves"]:
            figures.append(curves_figure(name, spec, rows, unit=spec["unit"], says=says, wide=wide))
    explained = "; ".join(f"{quantity.title}: {quantity.says}" for quantity in QUANTITIES.values())
    ours = f"Ours: {seeds}. In brackets the paper's: {SCALE}. {explained}."
    tables = [_card("Outliers and quality", outlier_rows(lines), results, says=ours)]
    if lines[1:]:
        tables.append(_card(f"Against {lines[0].row}", against_rows(lines), results, says=against_words(lines)))
    says = f"Ours: {', '.join(results.texts)}, {seeds}. In brackets the paper's, of {TEXT}: {SCALE}. "
    says += "+Had: with an online Hadamard transform before down_proj."
    title = "Perplexity by bits of weights, activations and KV cache"
    tables.append(_card(title, bits_rows(lines), results, says=says))
    if (methods := methods_rows(lines))[1]:
        tables.append(_card(f"Perplexity at {LAST} by method", methods, results))
    return {"verdict": verdict(lines).strip("*"), "tables": tables, "figures": figures}


def _sweep(results: Results, config: AblationConfig, data: dict[str, Any]) -> dict[str, Any]:
    """Return seed, figures and table of the sweep; its charts go into `data`."""
    rows, key = data["runs"], config.sweep.key or ""
    values = [value for points in results.sweep.values() for value, _ in points]
    numeric = all(isinstance(value, int | float) and value > 0 for value in values)
    names = sorted(set(values)) if numeric else list(dict.fromkeys(map(str, values)))
    figures = []
    for name, (title, unit, log) in CHARTS_OF_SWEEP.items():
        curves = []
        for row, points in results.sweep.items():
            x = [value if numeric else names.index(str(value)) for value, _ in points]
            y = [numbers[name] if math.isfinite(numbers[name]) else None for _, numbers in points]
            curves.append(_curve(rows.index(row), x, y, key=name))
        spec = _kurtosis_spec(title, curves, x=key) if name == "kurtosis" else _spec(title, log, curves, x=key)
        spec |= {"logx": True} if numeric else {"categories": names}
        data["lines"][f"sweep-{name}"] = spec
        figures.append(curves_figure(f"sweep-{name}", spec, rows, unit=f"{unit}{', ' * bool(unit)}over {key}"))
    table = _card("Numbers", sweep_rows(results, config), results)
    return {"seed": config.seeds[0], "figures": figures, "table": table}


def _curve(run: int, x: list[Any], y: list[Any], *, key: str = "") -> dict[str, Any]:
    return {"run": run, "key": key, "name": "", "faint": False, "x": x, "y": y}


def _kurtosis(runs: list[Measured], rows: list[str]) -> dict[str, Any]:
    """Return the chart of the residual stream's kurtosis over tokens, of the first seed of each row."""
    curves = []
    for row in rows:
        m = next((m for m in runs if m.planned.row.name == row and m.kurtosis is not None), None)
        if m is not None and m.kurtosis is not None:
            per_step = m.planned.config.train.tokens_per_step
            x = (m.kurtosis.steps * per_step).tolist()
            y = rounded(m.kurtosis.values, 4)
            curves.append(_curve(rows.index(row), x, y))
    return _kurtosis_spec("Kurtosis of the residual stream over tokens", curves, x="tokens")


def _kurtosis_spec(title: str, curves: list[dict[str, Any]], *, x: str) -> dict[str, Any]:
    """Return a chart with a logarithmic axis if the values need it; it cannot show a kurtosis below 0."""
    log = _needs_log(curves)
    if log:
        curves = [{**c, "y": [None if y is None else max(y, LOWEST_KURTOSIS) for y in c["y"]]} for c in curves]
    return _spec(title, log, curves, x=x)


def _bits(lines: list[Line], rows: list[str], suffix: str, title: str) -> dict[str, Any]:
    curves = []
    for line in lines:
        cells = [line.cells.get(bits + suffix) for bits in COLUMNS]
        y = [cell.mean if cell and math.isfinite(cell.mean) else None for cell in cells]
        if any(value is not None for value in y):
            x = list(range(len(COLUMNS)))
            curves.append(_curve(rows.index(line.row), x, y))
    return _spec(title, True, curves, x="bits", unit="W-A-KV") | {"categories": list(COLUMNS)}


def _needs_log(curves: list[dict[str, Any]]) -> bool:
    """Return whether the values need a logarithmic axis."""
    values = [y for curve in curves for y in curve["y"] if y is not None]
    return bool(values) and max(values) > 20


def _spec(title: str, log: bool, curves: list[dict[str, Any]], *, x: str, unit: str = "") -> dict[str, Any]:
    return {"title": title, "log": log, "curves": curves, "levels": [], "events": [], "x": x, "unit": unit}


def _card(title: str, table: Table, results: Results, *, says: str = "") -> dict[str, Any]:
    """Return a table whose headings have the hash of the column's quantization."""
    head, rows = table
    return {
        "title": title,
        "says": says,
        "head": [(name, results.columns.get(name, "")) for name in head],
        "rows": rows,
    }
