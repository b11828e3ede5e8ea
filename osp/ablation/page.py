"""The ablation as one self-contained HTML page: the tables of `markdown`, and its charts."""

import html
import math
from collections.abc import Sequence
from typing import Any

from osp.ablation.config import AblationConfig
from osp.ablation.markdown import (
    METHODS,
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
from osp.ablation.paper import SCALE, TEXT
from osp.ablation.results import HADAMARD, LAST, QUANTITIES, Line, Measured, Results
from osp.evaluation.compare import COLUMNS
from osp.report.downsample import rounded
from osp.report.page import bars, document, figure, grid, html_row, html_table

CHARTS_OF_SWEEP = {
    "loss": ("Validation loss, 16 bits", "nats per token", False),
    "cost": (f"What {LAST} costs", "nats per token", False),
    "kurtosis": ("Kurtosis of the residual stream", "", False),
    "down_proj_max": ("Largest value at down_proj", "|x|", True),
}
LOWEST_KURTOSIS = 0.01  # on a logarithmic axis
BITS_SAY = (
    "Mean over seeds. Healthy: flat from left to right. Unhealthy: it rises where activations have 4 bits, for "
    "outliers take the levels."
)


def page(results: Results, config: AblationConfig, about: Sequence[str]) -> str:
    """The HTML document. about: lines on what was trained where, and by which command."""
    rows = list(dict.fromkeys(line.row for line in results.lines)) or list(results.sweep)
    payload = {"runs": rows, "lines": {}, "sites": {}, "stats": {}, "words": {}, "histograms": {}}
    titles = {f"rates-{rates}": f"Rates: {rates}" for rates in dict.fromkeys(line.rates for line in results.lines)}
    sections = {
        f"rates-{rates}": _rates(rates, results, config, rows, payload)
        for rates in dict.fromkeys(line.rates for line in results.lines)
    }
    if results.sweep:
        titles["sweep"] = f"Over {config.sweep.key}"
        sections["sweep"] = _sweep(results, config, rows, payload)
    titles["provenance"], sections["provenance"] = "Where the numbers are from", _provenance(results, about)
    missing = missing_lines(results)
    notes = "".join(f'<p class="note">{html.escape(line)}</p>' for line in ["Missing: " + m for m in missing])
    body = "".join(
        f'<section id="{name}"><h2>{html.escape(titles[name])}</h2>{content}</section>'
        for name, content in sections.items()
    )
    return document(
        "What outliers cost, by recipe",
        "ablation",
        bars(titles, [(row, "") for row in rows], shown="Rows shown"),
        f"{notes}{body}",
        f"Made from the runs in <code>{html.escape(config.dir)}/runs</code>.",
        payload,
    )


def _rates(rates: str, results: Results, config: AblationConfig, rows: list[str], payload: dict[str, Any]) -> str:
    """Tables and charts of the rows at one set of rates."""
    lines = [line for line in results.lines if line.rates == rates]
    runs = [m for m in results.runs if m.planned.rates == rates and m.planned.value is None]
    seeds = seeds_words(config)
    charts = {
        f"kurtosis-{rates}": _kurtosis(runs, rows),
        f"bits-{rates}": _bits(lines, rows, "", "Perplexity from 16 to 4 bits"),
        f"had-{rates}": _bits(lines, rows, HADAMARD, "The same with the FFN's Hadamard transform"),
    }
    payload["lines"] |= charts
    says = {f"kurtosis-{rates}": "Mean over the layers, of the first seed. The paper's effect is a curve that rises."}
    figures = "".join(
        figure(name, spec, rows, unit=spec["unit"], says=says.get(name, BITS_SAY), wide=name.startswith("kurtosis"))
        for name, spec in charts.items()
        if spec["curves"]
    )
    methods = ""
    if any(method in line.cells for line in lines for method in METHODS):
        methods = _card(f"Perplexity at {LAST} by method", methods_rows(lines), results)
    return (
        f'<p class="intro">{html.escape(verdict(lines).strip("*"))}</p>'
        + _card(
            "Outliers and quality",
            outlier_rows(lines),
            results,
            says=f"Ours: {seeds}. In brackets the paper's: {SCALE}. "
            + "; ".join(f"{quantity.title}: {quantity.says}" for quantity in QUANTITIES.values())
            + ".",
        )
        + (
            _card(f"Against {lines[0].row}", against_rows(lines), results, says=against_words(lines))
            if lines[1:]
            else ""
        )
        + _card(
            "Perplexity by bits of weights, activations and KV cache",
            bits_rows(lines),
            results,
            says=f"Ours: {', '.join(results.texts)}, {seeds}. In brackets the paper's, of {TEXT}: {SCALE}. "
            "+Had: with an online Hadamard transform before down_proj.",
        )
        + methods
        + f'<div class="below">{grid(figures, 2)}</div>'
    )


def _sweep(results: Results, config: AblationConfig, rows: list[str], payload: dict[str, Any]) -> str:
    """Charts over the swept key, and their numbers."""
    values = [value for points in results.sweep.values() for value, _ in points]
    numeric = all(isinstance(value, int | float) and value > 0 for value in values)
    figures = []
    for name, (title, unit, log) in CHARTS_OF_SWEEP.items():
        names = sorted(set(values)) if numeric else list(dict.fromkeys(map(str, values)))
        curves = []
        for row, points in results.sweep.items():
            x = [value if numeric else names.index(str(value)) for value, _ in points]
            y = [numbers[name] if math.isfinite(numbers[name]) else None for _, numbers in points]
            curves.append({"run": rows.index(row), "key": name, "name": "", "faint": False, "x": x, "y": y})
        key = config.sweep.key or ""
        spec = _kurtosis_spec(title, curves, x=key) if name == "kurtosis" else _spec(title, log, curves, x=key)
        spec |= {"logx": True} if numeric else {"categories": names}
        payload["lines"][f"sweep-{name}"] = spec
        figures.append(figure(f"sweep-{name}", spec, rows, unit=f"{unit}{', ' * bool(unit)}over {key}"))
    charts = grid("".join(figures), 2)
    intro = f'<p class="intro">Every row at each value, all else equal, with seed {config.seeds[0]}.</p>'
    return intro + charts + _card("Numbers", sweep_rows(results, config), results)


def _provenance(results: Results, about: Sequence[str]) -> str:
    lines = [*about, *(f"text {name}: SHA-256 {digest}" for name, digest in results.texts.items())]
    lines.append(f"commit {', '.join(results.commits) or 'unknown'}")
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<div class="card"><ul>{listed}</ul></div>' + _card("Quantizations", provenance_rows(results), results)


def _kurtosis(runs: list[Measured], rows: list[str]) -> dict[str, Any]:
    """The residual stream's kurtosis over tokens, of the first seed of each row."""
    curves = []
    for row in rows:
        m = next((m for m in runs if m.planned.row.name == row and m.kurtosis is not None), None)
        if m is not None and m.kurtosis is not None:
            per_step = m.planned.config.train.tokens_per_step
            x = (m.kurtosis.steps * per_step).tolist()
            y = rounded(m.kurtosis.values, 4)
            curves.append({"run": rows.index(row), "key": "", "name": "", "faint": False, "x": x, "y": y})
    return _kurtosis_spec("Kurtosis of the residual stream over tokens", curves, x="tokens")


def _kurtosis_spec(title: str, curves: list[dict[str, Any]], *, x: str) -> dict[str, Any]:
    """A logarithmic axis if the values need it; there a kurtosis below 0 has no place."""
    log = _spread(curves)
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
            curves.append({"run": rows.index(line.row), "key": "", "name": "", "faint": False, "x": x, "y": y})
    return _spec(title, True, curves, x="bits", unit="W-A-KV") | {"categories": list(COLUMNS)}


def _spread(curves: list[dict[str, Any]]) -> bool:
    """Whether the values need a logarithmic axis."""
    values = [y for curve in curves for y in curve["y"] if y is not None]
    return bool(values) and max(values) > 20


def _spec(title: str, log: bool, curves: list[dict[str, Any]], *, x: str, unit: str = "") -> dict[str, Any]:
    return {"title": title, "log": log, "curves": curves, "levels": [], "events": [], "x": x, "unit": unit}


def _card(title: str, table: Table, results: Results, *, says: str = "") -> str:
    """A table; a column of a quantization has its hash in the heading."""
    head, rows = table
    hashes = {name: f"<br><small><code>{key}</code></small>" for name, key in results.columns.items()}
    headings = [html.escape(name) + hashes.get(name, "") for name in head]
    body = [html_row([html.escape(cell) for cell in row]) for row in rows]
    return (
        f'<div class="card below"><h3>{html.escape(title)}</h3><p class="soft">{html.escape(says)}</p>'
        f'<div class="scroll whole">{html_table(headings, body, escape=False)}</div></div>'
    )
