"""The data of a report's charts. charts.yaml says which metrics they draw and how to read them. No HTML here.

Titles, units and axes come from `osp.run.metrics.METRICS`. A `Lines` chart holds curves over optimizer steps. Charts of
sites (curves and a heatmap for each statistic) are grids of numbers; the user selects one.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from osp.config import leaves
from osp.run.metrics import METRICS, Site, expand_roles, metric_of
from osp.run.read import FREE, Run, Series, growth, since
from osp.run.verdict import over_usual

BUCKETS = 400  # stretches of a curve: about two pixels each on a wide screen
NOISY = 600  # points from which a noisy curve is drawn with its means
MEANS = 150  # of such a curve
MOST_OUTLIERS = 12  # sites in the table of outliers, for each run
DASH = "\N{EN DASH}"  # in place of a number that is unknown


@dataclass(frozen=True)
class Lines:
    """One chart of curves: metrics of one title, and what healthy and unhealthy curves look like."""

    name: str
    section: str
    keys: tuple[str, ...]
    says: str
    missing: str = ""  # why it can be empty, and what to set
    wide: bool = False
    noisy: bool = False  # of a long curve, draw the mean too
    marked: bool = False  # with the events of the runs
    gzip: bool = False  # with the bits per byte of gzip


@dataclass(frozen=True)
class Statistic:
    """How to read a statistic of sites, layers or weights."""

    section: str
    title: str
    says: str
    floor: float = 1e-3  # smaller values are drawn here: the axis is logarithmic


_FILE = yaml.safe_load(Path(__file__).with_name("charts.yaml").read_text(encoding="utf-8"))
TERMS: dict[str, str] = _FILE["terms"]
LINES = tuple(Lines(**fields | {"keys": expand_roles(fields["keys"])}) for fields in _FILE["lines"])
STATISTICS = {
    name: Statistic(section, next(metric.title for key, metric in METRICS.items() if f"/{name}/<" in key), **fields)
    for section, statistics in _FILE["statistics"].items()
    for name, fields in statistics.items()
}


def differences_between(runs: list[Run]) -> dict[str, list[Any]]:
    """Return key -> its value in each run, for every configuration key in which the runs differ."""
    tables = [dict(leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    columns = {key: [table.get(key) for table in tables] for key in keys}
    return {key: column for key, column in columns.items() if any(value != column[0] for value in column)}


def labels(runs: list[Run]) -> list[str]:
    """Return the legend: for each run the values that set it apart, `optimizer.lr=0.01, norm.name=ssnorm`.

    Keys that change neither model nor learning (`FREE`) appear only if nothing else differs, the name if nothing does.
    """
    different = {k: v for k, v in differences_between(runs).items() if not k.startswith("run.")}
    telling = {k: v for k, v in different.items() if not k.startswith(FREE)} or different
    telling = dict(sorted(telling.items(), key=lambda item: not item[0].endswith(".name")))  # norm.name says most
    texts = []
    for i, run in enumerate(runs):
        parts = [f"{key}={plain(values[i])}" for key, values in telling.items()]
        if len(parts) > 4:
            parts = [*parts[:4], f"and {len(parts) - 4} more"]
        texts.append(", ".join(parts) or run.name)
    if len(set(texts)) < len(texts):
        texts = [f"{label} ({run.folder})" for label, run in zip(texts, runs, strict=True)]
    return texts


def short_names(runs: list[Run]) -> list[str]:
    """Return the names of the runs if they differ, else the names of their folders, else letters."""
    for candidate in ([run.name for run in runs], [run.folder.resolve().name for run in runs]):
        if len(set(candidate)) == len(runs):
            return candidate
    return [f"run {chr(ord('A') + i % 26)}{i // 26 or ''}" for i in range(len(runs))]


def plain(value: Any) -> str:
    """Return a configuration value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def chart_data(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """Return the data that page.js draws. names: of the runs, in the charts."""
    sizes = {run.config.get("train", {}).get("tokens_per_step") for run in runs}
    measured = site_data(runs)
    sites = {stat: measured[stat] for stat in STATISTICS if stat in measured}
    stats = {}
    for stat, kinds in sites.items():
        rows = [row for cells in kinds.values() for cell in cells if cell for row in cell["v"]]
        values = [value for row in rows for value in row if value is not None]
        # the heatmaps of all runs share their colours
        stats[stat] = asdict(STATISTICS[stat]) | {"range": [min(values, default=0), max(values, default=1)]}
    return {
        "runs": names,
        "tokens_per_step": sizes.pop() if len(sizes) == 1 else None,
        "lines": lines_data(runs),
        "sites": sites,
        "stats": stats,
    }


def lines_data(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Return name -> chart. With several runs, a chart of several keys becomes one chart for each key."""
    last_events = [(i, event) for i, run in enumerate(runs) for event in run.events[-30:]]
    events = [{"run": i, "step": event["step"], "kind": str(event.get("kind", ""))} for i, event in last_events]
    sizes = {run.summary.get("gzip_bits_per_byte") for run in runs}
    levels = [{"y": round(size, 4), "text": f"gzip -9: {size:.3f}"} for size in sizes if size and len(sizes) == 1]
    charts = {}
    for lines in LINES:
        metric = metric_of(lines.keys[0])
        assert metric is not None, lines.keys
        better = f"{metric.better} is better" if metric.better else ""
        split = len(runs) > 1 and len(lines.keys) > 1
        for keys in [[key] for key in lines.keys] if split else [list(lines.keys)]:
            curves = [curve for i, run in enumerate(runs) for curve in _curves(run, i, keys, noisy=lines.noisy)]
            chart = asdict(lines) | {
                "name": f"{lines.name}_{keys[0].rpartition('/')[2]}" if split else lines.name,
                "title": f"{metric.title}: {curve_name(keys[0])}" if split else metric.title,
                "unit": ", ".join(filter(None, [metric.unit, better])),
                "log": metric.log,
                "levels": levels if lines.gzip else [],
                "events": events if lines.marked else [],
                "curves": curves,
            }
            if curves or not split:
                charts[chart["name"]] = chart
    return charts


def _curves(run: Run, index: int, keys: Sequence[str], *, noisy: bool) -> list[dict[str, Any]]:
    """Return the curves of one run. A long noisy curve becomes its envelope (`faint`) and its mean."""
    curves = []
    for key in keys:
        if key in run.series:
            series = run.series[key]
            about = {"run": index, "key": key, "name": curve_name(key) if len(keys) > 1 else ""}
            faint = noisy and len(series.steps) > NOISY
            drawn = [({"faint": faint}, envelope(series, BUCKETS))]
            if faint:
                drawn.append(({"faint": False, "mean": True}, averaged(series, MEANS)))
            curves += [{**about, **look, "x": s.steps.tolist(), "y": rounded(s.values, 5)} for look, s in drawn]
    return curves


def curve_name(key: str) -> str:
    """Return the name of a metric among others of its chart."""
    metric = metric_of(key)
    return metric.name if metric and metric.name else key.rpartition("/")[2]


def site_data(runs: list[Run]) -> dict[str, dict[str, list[Any]]]:
    """Return statistic -> kind of site -> for each run None or {"x": [[first, last step], ...], "layers", "v"}."""
    buckets = max(32, 96 // len(runs))
    data: dict[str, dict[str, list[Any]]] = {}
    for index, run in enumerate(runs):
        groups: dict[tuple[str, str], dict[Site, Series]] = {}
        for site, series in run.sites().items():
            groups.setdefault((site.stat, site.kind), {})[site] = series
        for (stat, kind), sites in groups.items():
            columns, layers, values = grid(sites, buckets)
            cell = {"x": columns, "layers": layers, "v": [rounded(row, 3) for row in values]}
            data.setdefault(stat, {}).setdefault(kind, [None] * len(runs))[index] = cell
    return data


def number(value: float | None, otherwise: str = DASH) -> str:
    """Return four significant digits of a number, or `otherwise` if it is unknown or not finite."""
    if value is None or not math.isfinite(value):
        return otherwise
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Outlier:
    """The largest value of a site in the last probe, its channel, and the step since which that channel is large."""

    site: str
    value: float
    times_rms: float  # |value| over the RMS of the site; nan if that was not measured
    channel: int
    share: float  # of the site's energy, in its strongest channel
    strongest: int  # the channel with the most energy; often, not always, `channel`
    kurtosis: float
    text: str
    position: int
    since: int | None


def find_outliers(run: Run) -> list[Outlier]:
    """Return the sites of the last probe whose kurtosis is highest for their kind, then those without a kurtosis."""
    sites = run.probes[-1]["sites"] if run.probes else {}
    kurtoses = {name: run.last(f"monitor/kurtosis/{name}") for name in sites}
    outliers = []
    for name in sorted(sites, key=lambda name: -over_usual(name, kurtoses[name]))[:MOST_OUTLIERS]:
        site, channel, value = sites[name], sites[name]["channels"][0][0], _number(sites[name].get("top_value"))
        outliers.append(
            Outlier(
                site=name,
                value=value,
                times_rms=abs(value) / (run.last(f"monitor/rms/{name}") or math.nan),
                channel=channel,
                share=_number(site.get("top_channel_share")),
                strongest=site.get("top_channel", -1),
                kurtosis=kurtoses[name],
                text=str(site.get("top_text", "")),
                position=site.get("top_position", -1),
                since=since(growth(run.probes, name, channel)),
            )
        )
    return outliers


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def envelope(series: Series, buckets: int) -> Series:
    """Return the smallest and the largest value of each of `buckets` stretches with equal numbers of points.

    Also keep the first and the last point, and one non-finite point per stretch (a gap in the curve). Drawn as a line,
    the result covers the same pixels as the whole curve, however narrow a spike is.
    """
    if len(series.steps) <= 2 * buckets:
        return series
    kept = {0, len(series.steps) - 1}
    for stretch in np.array_split(np.arange(len(series.steps)), buckets):
        values = series.values[stretch]
        finite = stretch[np.isfinite(values)]
        if len(finite):
            kept |= {int(finite[np.argmin(series.values[finite])]), int(finite[np.argmax(series.values[finite])])}
        if len(finite) < len(stretch):
            kept.add(int(stretch[~np.isfinite(values)][0]))
    chosen = np.array(sorted(kept))
    return Series(series.steps[chosen], series.values[chosen])


def averaged(series: Series, buckets: int) -> Series:
    """Return the mean of each of `buckets` stretches with equal numbers of points, at the middle step of each."""
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    stretches = [s for s in np.array_split(np.arange(len(steps)), buckets) if len(s)]
    return Series(np.array([steps[s[len(s) // 2]] for s in stretches]), np.array([values[s].mean() for s in stretches]))


def grid(sites: dict[Site, Series], buckets: int) -> tuple[list[list[int]], list[int | None], np.ndarray]:
    """Return (stretches of steps, layers, values (layers, stretches)) of one statistic at one kind of site.

    With more probes than `buckets`, neighbours share a column, which holds the largest of their values.
    """
    ordered = sorted(sites.items(), key=lambda item: -1 if item[0].layer is None else item[0].layer)
    steps = np.unique(np.concatenate([series.steps for _, series in ordered]))
    whole = np.full((len(ordered), len(steps)), math.nan)
    for row, (_, series) in enumerate(ordered):
        whole[row, np.searchsorted(steps, series.steps)] = series.values
    stretches = [s for s in np.array_split(np.arange(len(steps)), buckets) if len(s)]
    values = np.stack([np.fmax.reduce(whole[:, s], axis=1) for s in stretches], axis=1)  # nan where all are
    columns = [[int(steps[s[0]]), int(steps[s[-1]])] for s in stretches]
    return columns, [site.layer for site, _ in ordered], values


def rounded(values: np.ndarray, digits: int) -> list[float | int | None]:
    """Return JSON numbers with `digits` significant digits, None for values that are not finite."""
    short = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [None if not math.isfinite(v) else int(v) if v.is_integer() and abs(v) < 1e15 else v for v in short]
