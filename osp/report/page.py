"""The report: one self-contained HTML file with its data, style, script and plotting library. It needs no network.

This module collects the data; the templates page.html and document.html lay it out and escape every text from a file.

The library is Apache ECharts 6.1.0 (Apache-2.0, `dist/echarts.min.js` of the npm package, unchanged). It draws curves
and heatmaps with hover on touch screens at a quarter of plotly's size. No package on PyPI carries it alone.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from osp.config import leaves
from osp.errors import UserError
from osp.files import write_text
from osp.report import charts
from osp.report.charts import ALL_STATISTICS, ATTENTION, LINES, STATISTIC_TITLES, STATISTICS, WEIGHTS, Lines
from osp.run.evaluations import SiteAblation
from osp.run.metrics import SITE_TITLES
from osp.run.read import FREE, Run, read_run

HERE = Path(__file__).parent
DASH = "\N{EN DASH}"  # in place of a number that is unknown


def write_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Write the page about these run folders to `out` and return one line for every folder that is left out.

    Raises:
        UserError: no folder can be drawn, or `out` cannot be written.
    """
    runs, left_out = [], []
    for folder in dict.fromkeys(folders):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out.append(str(error))
    if not runs:
        raise UserError("; ".join(left_out) or "name at least one run folder")
    if out.is_dir():
        raise UserError(f"out={out} is a folder; name the file to write")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page(runs, left_out))
    except OSError as error:
        raise UserError(f"out={out}: cannot write there: {error.strerror}") from error
    return left_out


def page(runs: list[Run], left_out: Sequence[str] = ()) -> str:
    """Return the HTML document about `runs`. left_out: notes on folders that could not be read."""
    labels, names = charts.labels(runs), charts.short_names(runs)
    data = _payload(runs, names)
    last = max(run.step for run in runs)
    differences = charts.differences_between(runs)
    abouts = [_about(run, i, names[i], labels[i]) for i, run in enumerate(runs)]
    return render(
        HERE / "page.html",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        kind="run report",
        data=data,
        runs=abouts,
        notes=[*left_out, *(f"{run.folder}: {note}" for run in runs for note in run.notes)],
        legend=[(n, x if x != n else "") for n, x in zip(names, labels, strict=True)] if len(runs) > 1 else [],
        ranges=[(0, "all"), (last // 2, "last half"), (last - last // 10, "last tenth")],
        lines={section: _line_section(data, section) for section in ("loss", "outliers", "optimizer", "speed")},
        compared=_compared(runs, names),
        has_results=any(run.evaluations.results() for run in runs),
        ablations=[
            (record, _site_costs(record.ablation, i))
            for i, run in enumerate(runs)
            for record in run.evaluations.records
            if record.ablation
        ],
        statistics=[(stat, STATISTIC_TITLES[stat]) for stat in STATISTICS if stat in data["sites"]],
        site_figures=_site_figures(data),
        histograms=_histogram_choice(data, abouts),
        attention=_fixed_figures(data, ATTENTION),
        weights=_fixed_figures(data, WEIGHTS),
        differences=[
            (key, [charts.plain(value) for value in differences[key]], key.startswith(FREE))
            for key in sorted(differences, key=lambda key: (key.startswith(FREE), key))
        ],
    )


def render(template: Path, **values: Any) -> str:
    """Return a self-contained page from a template that extends document.html.

    Args:
        template: its macros and base are found beside it or beside this module.
        values: `title`, `kind` (of page), `data` (for page.js) and what the template names. Text is escaped there.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = lambda share: f"{100 * share:.3g}%" if math.isfinite(share) else DASH
    # line ends and control characters as in a JSON string
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)[1:-1]
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.globals["source"] = lambda name: Markup((HERE / name).read_text(encoding="utf-8"))
    time = f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC"
    return environment.get_template(template.name).render(time=time, **values) + "\n"


def curves_figure(name: str, chart: dict[str, Any], runs: list[str]) -> dict[str, Any]:
    """Return the figure of `chart`, which is `data.lines[name]` of the page.

    Args:
        chart: "title", "log" (y axis), "curves" (each {"run", "key", "name", "faint", "x", "y"}), "levels", "events";
            optional "unit", "says", "wide"; if x is not a step also "x" (what it is), "logx" and "categories" (names of
            x = 0, 1, ...).
        runs: the names of the curves' runs.
    """
    figure = {key: chart.get(key, "") for key in ("title", "unit", "says", "wide")}
    return figure | {"name": name, "words": _line_words(chart, runs)}


# ---- data of the charts ----------------------------------------------------------------------------------------------


def _payload(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """Return the data that page.js draws."""
    sites = {stat: kinds for stat, kinds in charts.site_data(runs).items() if stat in ALL_STATISTICS}
    sizes = {run.config.get("train", {}).get("tokens_per_step") for run in runs}
    about = {
        stat: asdict(ALL_STATISTICS[stat]) | {"title": STATISTIC_TITLES[stat], "range": _range(kinds)}
        for stat, kinds in sites.items()
    }
    words = {stat: {kind: _site_words(cells, names) for kind, cells in kinds.items()} for stat, kinds in sites.items()}
    return {
        "runs": names,
        "tokens_per_step": sizes.pop() if len(sizes) == 1 else None,
        "lines": _all_lines(runs),
        "sites": sites,
        "stats": about,
        "words": words,
        "histograms": charts.histogram_data(runs),
    }


def _all_lines(runs: list[Run]) -> dict[str, Any]:
    """Return name -> chart. With several runs, a chart of several keys becomes one chart for each key."""
    last_events = [(i, event) for i, run in enumerate(runs) for event in run.events[-30:]]
    marks = [{"run": i, "step": event["step"], "kind": str(event.get("kind", ""))} for i, event in last_events]
    drawn = {}
    for chart in LINES:
        all_curves, metric = charts.lines_data(chart, runs), chart.metric
        better = f"{metric.better} is better" if metric.better else ""
        about = {
            "chart": chart.name,
            "title": metric.title,
            "unit": ", ".join(filter(None, [metric.unit, better])),
            "says": chart.says,
            "wide": chart.name == "train_loss",
            "log": metric.log,
            "levels": _levels(chart, runs),
            "events": marks if chart.name in ("train_loss", "kurtosis") else [],
        }
        if len(runs) == 1 or len(chart.keys) == 1:
            drawn[chart.name] = about | {"curves": all_curves}
            continue
        for key in chart.keys:
            if curves := [{**curve, "name": ""} for curve in all_curves if curve["key"] == key]:
                title = f"{metric.title}: {charts.curve_name(key)}"
                drawn[f"{chart.name}_{key.rpartition('/')[2]}"] = about | {"title": title, "curves": curves}
    return drawn


def _levels(chart: Lines, runs: list[Run]) -> list[dict[str, Any]]:
    """Return horizontal lines of comparison."""
    gzip = {run.summary.get("gzip_bits_per_byte") for run in runs}
    if chart.name == "bits_per_byte" and len(gzip) == 1 and (value := gzip.pop()):
        return [{"y": round(value, 4), "text": f"gzip -9: {value:.3f}"}]
    return []


def _range(kinds: dict[str, list[Any]]) -> list[float]:
    """Return the smallest and largest value of a statistic in all runs: its heatmaps share their colours."""
    cells = [cell for cells in kinds.values() for cell in cells if cell]
    values = np.array([v for cell in cells for row in cell["v"] for v in row if v is not None])
    return [float(values.min()), float(values.max())] if len(values) else [0.0, 1.0]


def _line_section(data: dict[str, Any], section: str) -> dict[str, Any]:
    """Return the figures of a section, the notes on charts without numbers, and the columns of its grid."""
    figures, missing = [], []
    by_name = {chart.name: chart for chart in LINES if chart.section == section}
    for name, spec in data["lines"].items():
        chart = by_name.get(spec["chart"])
        if chart and spec["curves"]:
            figures.append(curves_figure(name, spec, data["runs"]))
        elif chart and chart.missing:
            missing.append(chart.missing)
    narrow = sum(not figure["wide"] for figure in figures)
    columns = 3 if narrow == 3 or narrow > 4 else 2
    return {"figures": figures, "missing": list(dict.fromkeys(missing)), "columns": columns}


def _site_figures(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a figure for each kind of site; the user selects the statistic."""
    stats = [stat for stat in STATISTICS if stat in data["sites"]]
    kinds = {kind for stat in stats for kind in data["sites"][stat]}
    return [
        {"title": title, "kind": kind, "stat": "", "says": "", "words": data["words"][stats[0]].get(kind, "")}
        | {"layered": kind not in ("embed_out", "final_norm_out")}
        for kind, title in SITE_TITLES.items()
        if kind in kinds
    ]


def _fixed_figures(data: dict[str, Any], statistics_: dict[str, charts.Statistic]) -> list[dict[str, Any]]:
    """Return a figure for each of `statistics_` and each thing it is measured on."""
    figures = []
    for stat, about in statistics_.items():
        title = STATISTIC_TITLES[stat]
        for kind, cells in data["sites"].get(stat, {}).items():
            figure = {"title": f"{title}: {kind}" if kind else title, "kind": kind, "stat": stat, "says": about.says}
            layered = not kind and any(cell and len(cell["layers"]) > 1 for cell in cells)
            figures.append({**figure, "words": data["words"][stat][kind], "layered": layered})
    return figures


def _histogram_choice(data: dict[str, Any], abouts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sites to select from, the one with the most extreme value, and the runs that have histograms."""
    sites = list(data["histograms"])
    worst = [o.site for about in abouts for o in about["outliers"] if o.site in sites] or sites or [None]
    drawn = {i for cells in data["histograms"].values() for i, cell in enumerate(cells) if cell}
    return {"sites": [(site, site) for site in sites], "worst": worst[0], "runs": drawn}


# ---- data of the tables ----------------------------------------------------------------------------------------------


def _about(run: Run, index: int, name: str, label: str) -> dict[str, Any]:
    """Return what the page says about one run."""
    start = run.starts[-1] if run.starts else {}
    alerts = [event["step"] for event in run.events if event.get("kind") == "alert"]
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    some_alerts = f"{len(alerts)} alert{'s' * (len(alerts) > 1)}, the first at step {min(alerts, default=0):,}"
    events = [{"kind": "", "message": "", "time": "", **event} for event in reversed(run.events[-200:])]
    return {
        "index": index,
        "name": name,
        "label": label,
        "choice": (index, name),
        "folder": str(run.folder),
        "state": run.state,
        "progress": f"{run.step:,}{total} steps, {run.tokens:,} tokens",
        "outliers": charts.find_outliers(run),
        "alerts": some_alerts if alerts else "no alert",
        "facts": _facts(run, start),
        "commit": start.get("git") or "unknown",
        "command": " ".join(map(str, start.get("command", []))),
        "figures": _key_figures(run, alerts),
        "events": events,
        "evaluations": run.evaluations,
        "config": [(key, charts.plain(value)) for key, value in leaves(run.config)],
    }


def _key_figures(run: Run, alerts: list[int]) -> list[tuple[str, str, str]]:
    """Return (name, value, where or what it means) of the numbers that sum up a run."""

    def site(stat: str) -> tuple[str, str]:
        name, value = charts.worst_site(run, stat)
        return number(value), f"at {name}" if name else "not probed"

    gzip = run.summary.get("gzip_bits_per_byte")
    speeds = run.series["train/tokens_per_second"].values if "train/tokens_per_second" in run.series else np.array([])
    finite = speeds[np.isfinite(speeds)].tolist()
    validated, probed = "val/loss" in run.series, "monitor/R_L" in run.series
    return [
        ("Validation loss", number(run.last("val/loss")), "nats per token" if validated else "no validation yet"),
        ("Bits per byte", number(run.last("val/bits_per_byte")), f"gzip -9: {gzip:.3f}" if gzip else ""),
        ("Largest kurtosis", *site("kurtosis")),
        ("Largest |x|", *site("max_abs")),
        ("4-bit error", number(run.last("monitor/R_L")), "of the last hidden state" if probed else "not probed"),
        ("Alerts", str(len(alerts)), f"first at step {alerts[0]:,}" if alerts else ""),
        ("Tokens per second", number(statistics.median(finite) if finite else math.nan), "median"),
    ]


def _facts(run: Run, start: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, text) of model, recipe, machine and starts; an empty text is unknown."""
    model, norm, optimizer, train = (run.config.get(key) or {} for key in ("model", "norm", "optimizer", "train"))
    parameters = run.num_parameters()
    shape = [
        f"{parameters / 1e6:,.1f} M parameters" if parameters else "",
        f"{model['num_hidden_layers']} layers" if "num_hidden_layers" in model else "",
        f"hidden size {model['hidden_size']}" if "hidden_size" in model else "",
        "embedding projection" if model.get("embed_proj") else "",
    ]
    recipe = [
        f"norm {norm['name']}" if "name" in norm else "",
        f"matrices by {(optimizer.get('rules') or {}).get('matrix', '?')}" if optimizer else "",
        f"learning rate {optimizer['lr']:g}" if "lr" in optimizer else "",
        f"{train['tokens_per_step']:,} tokens a step" if "tokens_per_step" in train else "",
        f"sequences of {train['seq_len']:,}" if "seq_len" in train else "",
        str(train.get("precision", "")),
    ]
    machine = [
        f"{start['world_size']} x {start['device']}" if "world_size" in start else "",
        str(start.get("host", "")),
        f"{start['cpus']} cores" if start.get("cpus") else "",
        f"torch {start['torch']}" if "torch" in start else "",
        f"Python {start['python']}" if "python" in start else "",
    ]
    times = ", ".join(str(s.get("time", "?")) for s in run.starts[-3:])
    started = times + (f" (start {len(run.starts)})" if len(run.starts) > 1 else "")
    parts = {"Model": shape, "Recipe": recipe, "Machine": machine}
    return [(name, ", ".join(filter(None, texts))) for name, texts in parts.items()] + [("Started", started)]


def _compared(runs: list[Run], names: list[str]) -> dict[str, Any] | None:
    """Return tables 2 and 4 of the paper for the runs that were compared, or None."""
    compared = [(i, run.evaluations.comparison) for i, run in enumerate(runs) if run.evaluations.comparison]
    if not compared:
        return None
    columns = list(dict.fromkeys(bits for _, c in compared for cells in c.bits.values() for bits in cells))
    rows = []
    for i, c in compared:
        for row, cells in c.bits.items():
            kurtosis = number(math.nan if c.kurtosis is None else c.kurtosis)
            texts = [str(cells.get(bits, "")) for bits in columns]
            rows.append({"run": i, "row": row, "kurtosis": "" if row else kurtosis, "cells": texts})
    methods = dict.fromkeys(method for _, c in compared for method in c.methods)
    return {
        "runs": [i for i, _ in compared],
        "columns": columns,
        "rows": rows,
        "methods": [(method, [str(c.methods.get(method, "")) for _, c in compared]) for method in methods],
        "what": "; ".join(f"{names[i]}, step {c.step:,}: {c.what}" for i, c in compared),
        "specs": list({key: words for _, c in compared for key, words in c.specs.items()}.items()),
    }


def _site_costs(ablation: SiteAblation, run: int) -> dict[str, Any]:
    """Return the bars of an ablation: the cost of each site alone, and the saving of leaving it out; largest first."""
    costs = {s.site: (ablation.cost_alone(s), ablation.saving_left_out(s)) for s in ablation.sites}
    largest = max([*(nats for pair in costs.values() for nats in pair if math.isfinite(nats)), 1e-9])

    def bar(nats: float) -> dict[str, str]:
        width = 100 * max(nats, 0.0) / largest if math.isfinite(nats) else 100.0 * (nats == math.inf)
        label = f"{nats:+.4f}" if math.isfinite(nats) else "infinite" if nats == math.inf else DASH
        return {"width": f"{min(width, 100.0):.1f}", "label": label}

    rows = [
        {"site": s.site, "costs": bar(costs[s.site][0]), "saves": bar(costs[s.site][1])}
        | {"alone": s.alone, "left_out": s.left_out}
        for s in sorted(ablation.sites, key=lambda s: 1.0 if math.isnan(costs[s.site][0]) else -costs[s.site][0])
    ]
    return {"run": run, "rows": rows}


# ---- words and numbers -----------------------------------------------------------------------------------------------


def _line_words(spec: dict[str, Any], runs: list[str]) -> str:
    """Return the key numbers of a chart's curves, for the caption and for screen readers."""
    alike: dict[str, list[str]] = {}  # words -> the curves they hold for
    for run, key in dict.fromkeys((c["run"], c["key"]) for c in spec["curves"]):
        curve = next(c for c in spec["curves"] if (c["run"], c["key"]) == (run, key))  # the envelope has the extremes
        values = [v for v in curve["y"] if v is not None]
        if values:
            words = f"lowest {number(min(values))}, highest {number(max(values))}, last {number(values[-1])}"
            name = " ".join(([runs[run]] if len(runs) > 1 else []) + ([curve["name"]] if curve["name"] else []))
            alike.setdefault(words, []).append(name)
    parts = [f"{', '.join(names)}: {words}" if names[0] else _sentence(words) for words, names in alike.items()]
    return "; ".join([*parts, *(level["text"] for level in spec["levels"])])  # a level may lie outside the picture


def _site_words(cells: list[Any], names: list[str]) -> str:
    """Return the last and the largest value at a kind of site, with layer and step."""
    parts = []
    for cell, name in zip(cells, names, strict=True):
        if not cell:
            continue
        flat = [(v, layer, x[1]) for layer, row in zip(cell["layers"], cell["v"], strict=True)
                for x, v in zip(cell["x"], row, strict=True) if v is not None]  # fmt: skip
        if not flat:
            continue
        last_step = max(step for _, _, step in flat)
        last, top = max(f for f in flat if f[2] == last_step), max(flat)
        words = f"last {number(last[0])}{_layer(last[1])}, largest {number(top[0])}{_layer(top[1])} at step {top[2]:,}"
        parts.append(f"{name}: {words}" if len(cells) > 1 else _sentence(words))
    return "; ".join(parts)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _layer(layer: int | None) -> str:
    return "" if layer is None else f" in layer {layer}"


def number(value: float, otherwise: str = DASH) -> str:
    """Return four significant digits of a number, or `otherwise` if it is not finite."""
    if not math.isfinite(value):
        return otherwise
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
