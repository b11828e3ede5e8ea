"""The report: one HTML file that holds its data, its style, its script and the plotting library; it asks no network.

The library is Apache ECharts 6.1.0 (Apache-2.0, `dist/echarts.min.js` of the npm package, unchanged): of those with
curves, heatmaps and hover on touch screens it is the small one that draws all of them, a quarter of plotly's size; no
package on PyPI carries it without an application around it, so the file itself stands beside this one.
"""

import html
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from osp.config import FREE
from osp.errors import UserError
from osp.report import charts
from osp.report.charts import ATTENTION, KINDS, LINES, STATISTICS, WEIGHTS, Lines
from osp.run.evaluations import Comparison, Evaluation, SiteAblation
from osp.run.read import Run, read_run

HERE = Path(__file__).parent
SECTIONS = {
    "summary": "Summary",
    "loss": "Loss",
    "outliers": "Outliers",
    "quantized": "What 4 bits cost",
    "sites": "By site",
    "histograms": "Histograms",
    "attention": "Attention",
    "weights": "Gains and weights",
    "optimizer": "Optimizer",
    "speed": "Speed",
    "events": "Events",
    "config": "Configuration",
}
INTRODUCTIONS = {
    "loss": "Fine lines are the extremes of a stretch of steps, so that no spike is lost; the bold line is its mean.",
    "outliers": "An activation outlier is a value far beyond the others of its site. Four-bit quantization spreads 16 "
    "levels over the range from the smallest to the largest value: one outlier takes the precision of all.",
    "quantized": "Perplexities and accuracies that were measured on saved models, quantized and not.",
    "sites": "Curves and a heatmap of layers over steps for each place in a block where activations are quantized.",
    "histograms": "How many values have which size. Healthy: one hill whose upper edge stays where it is. Unhealthy: "
    "islands far above the hill, a few values hundreds of times larger than the rest.",
    "attention": "Attention sinks and large logits often come with outliers, and are harmless without.",
    "weights": "Where outliers are made: gains of the norms and single rows of the weights.",
    "optimizer": "Rates, updates and gradients: what changes the weights, and how steadily.",
    "speed": "How fast the machine trains, and what holds it up.",
}
NO_EVALUATIONS = (
    "No evaluation of these runs yet: <code>python scripts/evaluate.py RUN quant=osp_paper ablate=true</code> and "
    "<code>python scripts/compare.py RUN RUN</code> measure them, and the next report shows it here."
)
NO_PROBES = (
    "These runs were not probed, so nothing is known about their activations. Set <code>monitor=light</code> or "
    "<code>monitor=full</code> for the next run."
)


def write_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Write the page about these run folders to `out`; returns a line for every folder that had to be left out.

    Raises `UserError` if none of them can be drawn.
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
        temporary = out.with_suffix(".tmp")
        temporary.write_text(page(runs, left_out), encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"out={out}: cannot write there: {error.strerror}") from error
    return left_out


def page(runs: list[Run], left_out: Sequence[str] = ()) -> str:
    """The whole HTML document about `runs`."""
    labels, names = charts.labels(runs), charts.names(runs)
    payload = _payload(runs, names)
    bodies = {
        "summary": _summary(runs, labels, names, left_out),
        "quantized": _quantized(runs, names),
        "sites": _sites(payload, names),
        "histograms": _histograms(payload, runs, names),
        "attention": _site_figures(payload, ATTENTION),
        "weights": _site_figures(payload, WEIGHTS),
        "events": _events(runs, names),
        "config": _config(runs, names),
        **{section: _lines(payload, section) for section in ("loss", "optimizer", "speed")},
        "outliers": _lines(payload, "outliers") + _outlier_table(runs, names),
    }
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = "".join(
        f'<section id="{name}"><h2>{heading}</h2><p class="intro">{INTRODUCTIONS.get(name, "")}</p>'
        f"{bodies[name]}</section>"
        for name, heading in SECTIONS.items()
    )
    footer = f"Made from the run folder{'s' * (len(runs) > 1)} {_folders(runs)}."
    return document(title, "run report", _bar(runs, labels, names), sections, footer, payload)


def document(title: str, kind: str, bars: str, sections: str, footer: str, payload: dict[str, Any]) -> str:
    """A self-contained HTML page: style, plotting library and page.js, which draws the charts of `payload`.

    kind: what the page is. bars, sections, footer: HTML.
    """
    head = (HERE / "page.css").read_text(encoding="utf-8")
    library = (HERE / "echarts.min.js").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{_text(title)} - osp report</title>
<link rel="icon" href="data:,"><style>{head}</style></head>
<body><header class="top"><p class="eyebrow">osp {kind}, {datetime.now(UTC):%d %B %Y, %H:%M} UTC</p>
<h1>{_text(title)}</h1></header>
{bars}
<main>{sections}<footer>{footer}</footer></main>
<div id="announce" class="hidden" aria-live="polite"></div>
<noscript><p class="note">The charts need JavaScript; the figures in words and the tables do not.</p></noscript>
<script type="application/json" id="data">{_json(payload)}</script>
<script>{library}</script>
<script>{script}</script></body></html>
"""


def _payload(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """What page.js draws from."""
    sites = charts.site_data(runs)
    known = STATISTICS | ATTENTION | WEIGHTS
    sizes = {run.config.get("train", {}).get("tokens_per_step") for run in runs}
    return {
        "runs": names,
        "tokens_per_step": sizes.pop() if len(sizes) == 1 else None,
        "lines": _all_lines(runs),
        "sites": {stat: kinds for stat, kinds in sites.items() if stat in known},
        "stats": {
            stat: {
                "title": known[stat].title,
                "says": known[stat].says,
                "floor": known[stat].floor,
                "range": _range(kinds),
            }
            for stat, kinds in sites.items()
            if stat in known
        },
        "words": {
            stat: {kind: _site_words(cells, names) for kind, cells in kinds.items()} for stat, kinds in sites.items()
        },
        "histograms": charts.histogram_data(runs),
    }


def _all_lines(runs: list[Run]) -> dict[str, Any]:
    """name -> chart. Where several runs are compared, a chart of several keys becomes one chart for each key."""
    drawn = {}
    for chart in LINES:
        for key in chart.keys if len(runs) > 1 and len(chart.keys) > 1 else [None]:
            curves = [c for c in charts.lines_data(chart, runs) if key is None or c["key"] == key]
            if not curves and key is not None:
                continue
            name = chart.name if key is None else f"{chart.name}_{key.rpartition('/')[2]}"
            title = chart.title if key is None else f"{chart.title}: {charts.curve_name(key)}"
            drawn[name] = {
                "chart": chart.name,
                "title": title,
                "log": chart.log,
                "curves": [{**c, "name": ""} for c in curves] if key else curves,
                "levels": _levels(chart, runs),
                "events": _marks(runs) if chart.name in ("train_loss", "kurtosis") else [],
            }
    return drawn


def _levels(chart: Lines, runs: list[Run]) -> list[dict[str, Any]]:
    """Horizontal lines of comparison."""
    gzip = {run.summary.get("gzip_bits_per_byte") for run in runs}
    if chart.name == "bits_per_byte" and len(gzip) == 1 and (value := gzip.pop()):
        return [{"y": round(value, 4), "text": f"gzip -9: {value:.3f}"}]
    return []


def _marks(runs: list[Run]) -> list[dict[str, Any]]:
    """Steps at which something happened, the last 30 of each run."""
    return [
        {"run": i, "step": event["step"], "kind": str(event.get("kind", ""))}
        for i, run in enumerate(runs)
        for event in run.events[-30:]
    ]


def _range(kinds: dict[str, list[Any]]) -> list[float]:
    """Smallest and largest value of a statistic in all runs: every heatmap of it has the same colours."""
    values = np.array(
        [v for cells in kinds.values() for cell in cells if cell for row in cell["v"] for v in row if v is not None]
    )
    return [float(values.min()), float(values.max())] if len(values) else [0.0, 1.0]


# ---- sections --------------------------------------------------------------------------------------------------------


def _bar(runs: list[Run], labels: list[str], names: list[str]) -> str:
    """Navigation, legend and what holds for all charts. The legend names what sets each run apart."""
    last = max(run.step for run in runs)
    ranges = {0: "all", last // 2: "last half", last - last // 10: "last tenth"}
    choices = _select("x", "Step axis", {"linear": "linear", "log": "logarithmic"}) + _select("from", "Steps", ranges)
    apart = [(name, label if label != name else "") for label, name in zip(labels, names, strict=True)]
    return bars(SECTIONS, apart if len(runs) > 1 else [], shown="Runs shown", choices=choices)


def bars(sections: Mapping[str, str], legend: Sequence[tuple[str, str]], *, shown: str, choices: str = "") -> str:
    """The bars on top of a page: links to its sections, and the legend, which hides and shows curves in all charts.

    sections: id -> heading. legend: name of each of the payload's `runs`, and what sets it apart. shown: the legend for
    those who cannot see it. choices: HTML.
    """
    links = "".join(f'<a href="#{name}">{_text(heading)}</a>' for name, heading in sections.items())
    buttons = "".join(
        f'<button type="button" aria-pressed="true">{_swatch(i)}'
        f"<span><b>{_text(name)}</b> {_text(label)}</span></button>"
        for i, (name, label) in enumerate(legend)
    )
    shown_runs = f'<div class="legend" role="group" aria-label="{shown}">{buttons}</div>' if legend else ""
    return (
        f'<div class="bar"><div><nav aria-label="Sections">{links}</nav></div></div>'
        f'<div class="bar second"><div class="tools">{shown_runs}{choices}</div></div>'
    )


def _summary(runs: list[Run], labels: list[str], names: list[str], left_out: Sequence[str]) -> str:
    notes = [*left_out, *(f"{run.folder}: {note}" for run in runs for note in run.notes)]
    callouts = "".join(f'<p class="note">{_text(note)}</p>' for note in notes)
    if len(runs) == 1:
        figures = "".join(
            f'<div class="tile"><span>{name}</span><b>{value}</b><small>{_text(where)}</small></div>'
            for name, (value, where) in _key_figures(runs[0]).items()
        )
        return f'{callouts}<div class="tiles">{figures}</div><div class="card">{_facts(runs[0])}</div>'
    rows = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        cells = "".join(
            f'<td><b>{value}</b><br><small class="soft">{_text(where)}</small></td>'
            for value, where in _key_figures(run).values()
        )
        rows.append(f"<tr><td>{_swatch(i)} <b>{_text(name)}</b></td>{cells}</tr>")
    table = html_table(["run", *_key_figures(runs[0])], rows, caption="Closing figures of each run")
    facts = "".join(
        f'<div class="card"><h3>{_swatch(i)} {_text(names[i])}<span class="unit">{_text(labels[i])}</span></h3>'
        f"{_facts(run)}</div>"
        for i, run in enumerate(runs)
    )
    return f'{callouts}<div class="card scroll">{table}</div>{grid(facts, 2)}'


def _key_figures(run: Run) -> dict[str, tuple[str, str]]:
    """name -> (value, where or what it means): what one wants to know of a run first."""

    def site(stat: str) -> tuple[str, str]:
        name, value = charts.worst(run, stat)
        return _number(value), f"at {name}" if name else "not probed"

    alerts = [event for event in run.events if event.get("kind") == "alert"]
    gzip = run.summary.get("gzip_bits_per_byte")
    return {
        "Validation loss": (
            _number(run.last("val/loss")),
            "nats per token" if "val/loss" in run.series else "no validation yet",
        ),
        "Bits per byte": (_number(run.last("val/bits_per_byte")), f"gzip -9: {gzip:.3f}" if gzip else ""),
        "Largest kurtosis": site("kurtosis"),
        "Largest |x|": site("max_abs"),
        "4-bit error": (
            _number(run.last("monitor/R_L")),
            "of the last hidden state" if "monitor/R_L" in run.series else "not probed",
        ),
        "Alerts": (str(len(alerts)), f"first at step {alerts[0]['step']:,}" if alerts else ""),
        "Tokens per second": (_number(_speed(run)), "median"),
    }


def _speed(run: Run) -> float:
    series = run.series.get("train/tokens_per_second")
    values = [] if series is None else [v for v in series.values.tolist() if math.isfinite(v)]
    return statistics.median(values) if values else math.nan


def _facts(run: Run) -> str:
    """What the run is: state, size, recipe, machine, commit, command."""
    model, norm, optimizer = (run.config.get(key) or {} for key in ("model", "norm", "optimizer"))
    start = run.starts[-1] if run.starts else {}
    parameters = run.num_parameters()
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    train = run.config.get("train") or {}
    shape = [
        f"{parameters / 1e6:,.1f} M parameters" if parameters else "",
        f"{model['num_hidden_layers']} layers" if "num_hidden_layers" in model else "",
        f"hidden size {model['hidden_size']}" if "hidden_size" in model else "",
        "embedding projection" if model.get("embed_proj") else "",
    ]
    recipe = [
        f"norm {norm['name']}" if "name" in norm else "",
        f"matrices by {(optimizer.get('rules') or {}).get('matrix', '?')}" if optimizer else "",
        f"rate {optimizer['lr']:g}" if "lr" in optimizer else "",
        f"{train['tokens_per_step']:,} tokens a step" if "tokens_per_step" in train else "",
        f"rows of {train['seq_len']:,}" if "seq_len" in train else "",
        str(train.get("precision", "")),
    ]
    machine = [
        f"{start['world_size']} x {start['device']}" if "world_size" in start else "",
        str(start.get("host", "")),
        f"{start['cpus']} cores" if start.get("cpus") else "",
        f"torch {start['torch']}" if "torch" in start else "",
        f"Python {start['python']}" if "python" in start else "",
    ]
    facts = {
        "State": f'<span class="pill {run.state}">{run.state}</span> {run.step:,}{total} steps, {run.tokens:,} tokens',
        "Outliers": _outlier_words(run),
        "Model": _text(", ".join(filter(None, shape))),
        "Recipe": _text(", ".join(filter(None, recipe))),
        "Machine": _text(", ".join(filter(None, machine))),
        "Commit": f"<code>{_text(start.get('git') or 'unknown')}</code>",
        "Started": _text(", ".join(str(s.get("time", "?")) for s in run.starts[-3:]))
        + (f" (start {len(run.starts)})" if len(run.starts) > 1 else ""),
        "Command": f"<code>{_text(' '.join(map(str, start.get('command', []))))}</code>",
        "Folder": f"<code>{_text(run.folder)}</code>",
    }
    return '<dl class="facts">' + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items() if v) + "</dl>"


def _outlier_words(run: Run) -> str:
    """What the probes found, in one sentence."""
    found = charts.outliers(run)
    if not found:
        return "not probed"
    most, steps = found[0], [event["step"] for event in run.events if event.get("kind") == "alert"]
    alerts = f"{len(steps)} alert{'s' * (len(steps) > 1)}, the first at step {min(steps):,}" if steps else "no alert"
    times = f", {_number(most.times_rms)} times the RMS of that site" if math.isfinite(most.times_rms) else ""
    return (
        f"{alerts}; the most extreme value is {_number(most.value)} in channel {most.channel} of "
        f"<code>{_text(most.site)}</code>{times}"
    )


def _lines(payload: dict[str, Any], section: str) -> str:
    """The figures of a section, and a line for each that these runs have no numbers for."""
    figures, missing = [], []
    by_name = {chart.name: chart for chart in LINES if chart.section == section}
    for name, spec in payload["lines"].items():
        chart = by_name.get(spec["chart"])
        if chart is None:
            continue
        if not spec["curves"]:
            missing.append(chart.missing)
            continue
        figures.append(figure(name, spec, payload["runs"], unit=chart.unit, says=chart.says, wide=name == "train_loss"))
    if not figures and section == "outliers":
        return f'<p class="empty">{NO_PROBES}</p>'
    notes = "".join(f'<p class="soft">{_text(note)}</p>' for note in dict.fromkeys(filter(None, missing)))
    narrow = len(figures) - sum(" wide" in figure for figure in figures)
    return grid("".join(figures), 3 if narrow == 3 or narrow > 4 else 2) + notes


def figure(
    name: str, spec: dict[str, Any], runs: list[str], *, unit: str = "", says: str = "", wide: bool = False
) -> str:
    """The figure of the chart `spec` that stands under `name` in the payload's `lines`.

    spec: "title", "log" (y axis), "curves" (each {"run", "key", "name", "faint", "x", "y"}), "levels", "events"; and
    where x is no step, "x" (what it is), "logx", "categories" (names of x = 0, 1, ...).
    """
    words = _line_words(spec, runs)
    label = f"{spec['title']}: {words}"
    return (
        f'<figure class="card{" wide" if wide else ""}" data-lines="{name}"><h3>{spec["title"]}{_unit(unit)}</h3>'
        f"{_plot('lines', label)}{_caption(says, words)}</figure>"
    )


def _outlier_table(runs: list[Run], names: list[str]) -> str:
    rows = []
    for i, run in enumerate(runs):
        for o in charts.outliers(run):
            text = f'<code class="token">{_text(json.dumps(o.text, ensure_ascii=False)[1:-1])}</code>'
            cells = [
                f"{_swatch(i)} {_text(names[i])}" if len(runs) > 1 else None,
                f"<code>{_text(o.site)}</code>",
                *(_number(v) for v in (o.value, o.times_rms, o.kurtosis)),
                str(o.channel),
                "?" if o.since is None else f"step {o.since:,}",
                f"{text} at {_text(o.position)}",
                _percent(o.share) if o.strongest == o.channel else f"{_percent(o.share)}, channel {_text(o.strongest)}",
            ]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells if cell is not None) + "</tr>")
    if not rows:
        return ""
    head = ["site", "largest value", "times RMS", "kurtosis", "in channel", "large since", "text, up to the token"]
    head.append("energy of the strongest channel")
    return (
        '<div class="card below"><h3>Where the largest values are</h3><p class="soft">The last probe, '
        "the most extreme sites first. Large since: from that probe on, the largest value of this channel has been at "
        "least half of what it is now. "
        "A few times the RMS is ordinary; tens and more, in one channel for a long time, is an outlier. "
        "<code>scripts/inspect_outliers.py</code> tells more about one of them.</p>"
        f'<div class="scroll">{html_table((["run"] if len(runs) > 1 else []) + head, rows)}</div></div>'
    )


def _quantized(runs: list[Run], names: list[str]) -> str:
    """The records of evaluations: the paper's tables, every number measured, and the cost of each site."""
    if not any(run.evaluations for run in runs):
        return f'<p class="empty">{NO_EVALUATIONS}</p>'
    compared = [(i, run.evaluations.comparison) for i, run in enumerate(runs) if run.evaluations.comparison]
    ablations = "".join(
        _ablation(record, record.ablation, f"{_swatch(i)} {_text(names[i])}, " if len(runs) > 1 else "")
        for i, run in enumerate(runs)
        for record in run.evaluations.records
        if record.ablation
    )
    cards = [_comparison_tables(compared, names) if compared else "", _results_table(runs, names)]
    return grid("".join(cards), 1) + (f'<div class="below">{grid(ablations, 2)}</div>' if ablations else "")


def _comparison_tables(compared: list[tuple[int, Comparison]], names: list[str]) -> str:
    """Tables 2 and 4 of the paper for the runs that were compared."""
    columns = list(dict.fromkeys(bits for _, c in compared for cells in c.bits.values() for bits in cells))
    rows = []
    for i, c in compared:
        for row, cells in c.bits.items():
            kurtosis = "&ndash;" if c.kurtosis is None else _number(c.kurtosis)
            head = [_text(row), ""] if row else [f"{_swatch(i)} {_text(names[i])}", kurtosis]
            rows.append(html_row([*head, *(_text(str(cells.get(bits, ""))) for bits in columns)]))
    by_bits = html_table(
        ["run", "excess kurtosis", *columns], rows, caption="By bits of weights, activations, KV cache"
    )
    methods = dict.fromkeys(method for _, c in compared for method in c.methods)
    rows = [
        html_row([_text(method), *(_text(str(c.methods.get(method, ""))) for _, c in compared)]) for method in methods
    ]
    head = ["at 4-4-4", *(f"{_swatch(i)} {_text(names[i])}" for i, _ in compared)]
    by_method = html_table(head, rows, caption="By method at 4-4-4", escape=False) if rows else ""
    what = "; ".join(f"{names[i]}, step {c.step:,}: {c.what}" for i, c in compared)
    specs = {key: words for _, c in compared for key, words in c.specs.items()}
    hashes = html_table(
        ["hash", "quantization"], [html_row([f"<code>{_text(k)}</code>", _text(v)]) for k, v in specs.items()]
    )
    return (
        '<div class="card"><h3>By bits, and by method</h3><p class="soft">The rows of the paper\'s tables 2 and 4. '
        "Columns are bits of weights, activations and KV cache; +Had: with an online Hadamard transform before "
        "down_proj. A cell is perplexity, after the mean accuracy in percent where tasks were measured. "
        f'{_text(what)}.</p><div class="scroll">{by_bits}</div><br><div class="scroll">{by_method}</div>'
        f'<details><summary>Quantizations</summary><div class="scroll">{hashes}</div></details></div>'
    )


def _results_table(runs: list[Run], names: list[str]) -> str:
    """Every number of the records of `scripts/evaluate.py`."""
    rows = []
    for i, run in enumerate(runs):
        for record, r in run.evaluations.results():
            value = _number(r.value) if math.isfinite(r.value) else "infinite"
            error = "" if r.stderr is None else f" &plusmn; {_number(r.stderr)}"
            who = [f"{_swatch(i)} {_text(names[i])}"] if len(runs) > 1 else []
            quant = [_text(record.quant["text"]), f"<code>{_text(record.quant['hash'])}</code>"]
            cells = [f"{record.step:,}", *quant, _text(f"{r.what} {r.metric}")]
            rows.append(html_row([*who, *cells, f"<b>{value}</b>{error}"]))
    if not rows:
        return ""
    head = (["run"] if len(runs) > 1 else []) + ["step", "quantization", "hash", "measured", "value"]
    return f'<div class="card"><h3>All that was measured</h3><div class="scroll">{html_table(head, rows)}</div></div>'


def _ablation(record: Evaluation, ablation: SiteAblation, who: str) -> str:
    """A bar chart of sites in a table: what each costs alone, and what leaving it out saves. Most costly first."""
    costs = {s.site: (ablation.cost_alone(s), ablation.saving_left_out(s)) for s in ablation.sites}
    largest = max([*(nats for pair in costs.values() for nats in pair if math.isfinite(nats)), 1e-9])

    def bar(nats: float, colour: str) -> str:
        width = 100 * max(nats, 0.0) / largest if math.isfinite(nats) else 100 * (nats == math.inf)
        label = f"{nats:+.4f}" if math.isfinite(nats) else "infinite" if nats == math.inf else "&ndash;"
        style = f"width:{min(width, 100.0):.1f}%;background:var(--{colour})"
        return f'<div class="nats"><i style="{style}"></i></div><small>{label}</small>'

    rows = [
        html_row([f"<code>{_text(s.site)}</code>", bar(costs[s.site][0], "bad"), bar(costs[s.site][1], "good"),
              *(_number(v) if math.isfinite(v) else "infinite" for v in (s.alone, s.left_out))])
        for s in sorted(
            ablation.sites, key=lambda s: -1.0 if math.isnan(costs[s.site][0]) else costs[s.site][0], reverse=True
        )
    ]  # fmt: skip
    before, after = (_number(v) if math.isfinite(v) else "infinite" for v in (ablation.unquantized, ablation.quantized))
    head = ["site", "costs alone", "saved if left out", "perplexity alone", "left out"]
    return (
        f'<div class="card"><h3>What each site costs<span class="unit">nats per token</span></h3><p class="soft">{who}'
        f"step {record.step:,}, {_text(record.quant['text'])} <code>{_text(record.quant['hash'])}</code>, "
        f"{_text(ablation.text)}: "
        f'perplexity {before} unquantized, {after} with all sites quantized.</p><div class="scroll bars">'
        f"{html_table(head, rows, caption='Cost of each quantized site')}</div></div>"
    )


def html_row(cells: Sequence[str]) -> str:
    """A row of a table. cells: HTML."""
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _sites(payload: dict[str, Any], names: list[str]) -> str:
    stats = [stat for stat in STATISTICS if stat in payload["sites"]]
    if not stats:
        return f'<p class="empty">{NO_PROBES}</p>'
    kinds = {kind for stat in stats for kind in payload["sites"][stat]}
    controls = _select("stat", "Statistic", {stat: STATISTICS[stat].title for stat in stats})
    if len(names) > 1:
        controls += _select("heat-run", "Heatmaps of", dict(enumerate(names)))
        what = "Each curve is the largest value over the layers of a run; the heatmaps show the run chosen here."
    else:
        what = "One curve for each layer, the deeper the darker (in dark mode: the brighter)."
    figures = "".join(
        _site_figure(
            title, kind, payload["words"][stats[0]].get(kind, ""), layered=kind not in ("embed_out", "final_norm_out")
        )
        for kind, title in KINDS.items()
        if kind in kinds
    )
    return f'<div class="tools">{controls}</div><p class="intro"><span id="says"></span> {what}</p>' + grid(figures, 2)


def _site_figures(payload: dict[str, Any], statistics_: dict[str, charts.Statistic]) -> str:
    """Figures of statistics that are not chosen but always shown, a figure for each thing they are measured on."""
    figures = []
    for stat, about in statistics_.items():
        for kind, cells in payload["sites"].get(stat, {}).items():
            title = f"{about.title}: {kind}" if kind else about.title
            layered = not kind and any(cell and len(cell["layers"]) > 1 for cell in cells)
            figures.append(
                _site_figure(title, kind, payload["words"][stat][kind], layered=layered, stat=stat, says=about.says)
            )
    return grid("".join(figures), 3) if figures else f'<p class="empty">{NO_PROBES}</p>'


def _site_figure(title: str, kind: str, words: str, *, layered: bool, stat: str = "", says: str = "") -> str:
    """Curves and, where there are layers, the heatmap beside them."""
    fixed = f' data-stat="{stat}"' if stat else ""
    label = f"{title}: {words}"
    plots = _plot("curves", label) + (_plot("heat", label) if layered else "")
    code = "" if stat else f" <code>{kind}</code>"
    return (
        f'<figure class="card pair{" wide" if layered else ""}" data-kind="{_text(kind)}"{fixed}><h3>{title}'
        f'<span class="unit">{code}</span></h3><div class="plots">{plots}</div>{_caption(says, words)}</figure>'
    )


def _histograms(payload: dict[str, Any], runs: list[Run], names: list[str]) -> str:
    sites = list(payload["histograms"])
    if not sites:
        return f'<p class="empty">{NO_PROBES}</p>'
    worst = next((o.site for run in runs for o in charts.outliers(run) if o.site in sites), sites[0])
    choice = _select("histogram", "Site", {site: site for site in sites}, chosen=worst)
    figures = "".join(
        f'<figure class="card" data-run="{i}"><h3>{_swatch(i) if len(runs) > 1 else ""} {_text(name)}'
        f'<span class="unit">|x|, share of the values (logarithmic colour)</span></h3>'
        f"{_plot('histogram', f'Histogram of |x| over steps, {name}; the table holds its numbers')}"
        f"{_caption('', '')}</figure>"
        for i, name in enumerate(names)
        if any(cells[i] for cells in payload["histograms"].values())
    )
    return f'<div class="tools">{choice}</div>{grid(figures, 2)}'


def _events(runs: list[Run], names: list[str]) -> str:
    rows = []
    for i, run in enumerate(runs):
        for event in reversed(run.events[-200:]):
            kind = _text(event.get("kind", ""))
            who = f"<td>{_swatch(i)} {_text(names[i])}</td>" if len(runs) > 1 else ""
            rows.append(
                f'<tr>{who}<td class="n">{event["step"]:,}</td><td class="{kind}">{kind}</td>'
                f'<td>{_text(event.get("message", ""))}</td><td class="soft">{_text(event.get("time", ""))}</td></tr>'
            )
    if not rows:
        return '<p class="empty">No alerts, spikes, skipped steps or interruptions were recorded.</p>'
    head = (["run"] if len(runs) > 1 else []) + ["step", "what", "message", "time"]
    return f'<div class="card scroll">{html_table(head, rows)}</div>'


def _config(runs: list[Run], names: list[str]) -> str:
    parts = []
    if len(runs) > 1:
        different = charts.differences_between(runs)
        ordered = sorted(different, key=lambda key: (key.startswith(FREE), key))
        rows = [
            f"<tr{' class=soft' if key.startswith(FREE) else ''}><td><code>{_text(key)}</code></td>"
            + "".join(f"<td>{_text(charts.plain(value))}</td>" for value in different[key])
            + "</tr>"
            for key in ordered
        ]
        head = ["key", *(f"{_swatch(i)} {_text(name)}" for i, name in enumerate(names))]
        parts.append(
            '<div class="card"><h3>What differs</h3><p class="soft">Grey: changes neither the model nor what it learns.'
            f'</p><div class="scroll">{html_table(head, rows, escape=False)}</div></div>'
            if rows
            else '<p class="empty">The configurations of these runs are the same.</p><br>'
        )
    for i, run in enumerate(runs):
        rows = [
            f"<tr><td><code>{_text(key)}</code></td><td>{_text(charts.plain(value))}</td></tr>"
            for key, value in charts.leaves(run.config)
        ]
        parts.append(
            f"<details><summary>{_swatch(i) if len(runs) > 1 else ''} The whole configuration of {_text(names[i])}"
            f'</summary><div class="card scroll">{html_table(["key", "value"], rows)}</div></details>'
        )
    return "".join(parts)


# ---- words and pieces of HTML ----------------------------------------------------------------------------------------


def _line_words(spec: dict[str, Any], runs: list[str]) -> str:
    """The key numbers of a chart's curves, for captions and for those who cannot see the picture."""
    alike: dict[str, list[str]] = {}  # words -> the curves they hold for
    for run, key in dict.fromkeys((c["run"], c["key"]) for c in spec["curves"]):
        curve = next(c for c in spec["curves"] if (c["run"], c["key"]) == (run, key))  # the envelope has the extremes
        values = [v for v in curve["y"] if v is not None]
        if values:
            words = f"lowest {_number(min(values))}, highest {_number(max(values))}, last {_number(values[-1])}"
            name = " ".join(([runs[run]] if len(runs) > 1 else []) + ([curve["name"]] if curve["name"] else []))
            alike.setdefault(words, []).append(name)
    parts = [f"{', '.join(names)}: {words}" if names[0] else _sentence(words) for words, names in alike.items()]
    return "; ".join([*parts, *(level["text"] for level in spec["levels"])])  # a level may lie outside the picture


def _site_words(cells: list[Any], names: list[str]) -> str:
    """The last and the largest value at a kind of site, with layer and step."""
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
        words = (
            f"last {_number(last[0])}{_layer(last[1])}, largest {_number(top[0])}{_layer(top[1])} at step {top[2]:,}"
        )
        parts.append(f"{name}: {words}" if len(cells) > 1 else _sentence(words))
    return "; ".join(parts)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _layer(layer: int | None) -> str:
    return "" if layer is None else f" in layer {layer}"


def _plot(kind: str, label: str) -> str:
    return (
        f'<div class="plot" data-plot="{kind}" role="img" tabindex="0" aria-label="{_text(label)}" '
        'aria-description="Arrow keys walk along the steps"></div>'
    )


def _caption(says: str, words: str) -> str:
    return (
        f'<figcaption>{_text(says)}<span class="numbers">{_text(words)}</span></figcaption>'
        '<details><summary>Numbers</summary><div class="scroll" tabindex="0"></div></details>'
    )


def _select(name: str, label: str, options: dict[Any, str], chosen: Any = None) -> str:
    choices = "".join(
        f'<option value="{_text(value)}"{" selected" if value == chosen else ""}>{_text(text)}</option>'
        for value, text in options.items()
    )
    return f'<label class="choice">{label} <select id="{name}">{choices}</select></label>'


def html_table(head: Sequence[str], rows: Sequence[str], *, caption: str = "", escape: bool = True) -> str:
    """A table. head: text, or HTML if not `escape`. rows: `html_row`s. caption: for those who cannot see it."""
    show: Callable[[Any], str] = _text if escape else str
    cells = "".join(f'<th scope="col">{show(name)}</th>' for name in head)
    hidden = f'<caption class="hidden">{caption}</caption>' if caption else ""
    return f"<table>{hidden}<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def grid(figures: str, columns: int) -> str:
    """Cards side by side, as many as fit and at most `columns`."""
    return f'<div class="grid" style="--columns:{columns}">{figures}</div>'


def _swatch(run: int) -> str:
    return f'<span class="swatch" style="background:var(--run{run % 6})"></span>'


def _unit(unit: str) -> str:
    return f'<span class="unit">{unit}</span>' if unit else ""


def _folders(runs: list[Run]) -> str:
    return ", ".join(f"<code>{_text(run.folder)}</code>" for run in runs)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "&ndash;"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%" if math.isfinite(value) else "&ndash;"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever the text of a token is."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
