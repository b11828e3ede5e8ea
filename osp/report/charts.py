"""The data of a report's charts. charts.yaml says which metrics they draw and how to read them. No HTML here.

Titles, units and axes come from `osp.run.metrics.METRICS`. A `Lines` chart holds curves over optimizer steps. Charts of
sites (curves and a heatmap for each statistic) and histograms are grids of numbers; the user selects one.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from osp.config import ROLES, leaves
from osp.report.downsample import averaged, envelope, grid, rounded
from osp.run.history import growth, since
from osp.run.metrics import METRICS, Metric
from osp.run.read import FREE, Run, Series, Site, site_of

BUCKETS = 400  # stretches of a curve: about two pixels each on a wide screen
HISTOGRAMS = 40  # probes shown as histograms
MOST_OUTLIERS = 12  # sites in the table of outliers, for each run


@dataclass(frozen=True)
class Lines:
    """One chart of curves: metrics of one title, and what healthy and unhealthy curves look like."""

    name: str
    section: str
    keys: tuple[str, ...]
    says: str
    missing: str = ""  # why it can be empty, and what to set

    @property
    def metric(self) -> Metric:
        """The title, unit and axis of the chart."""
        return METRICS.get(self.keys[0]) or METRICS[f"{self.keys[0].rpartition('/')[0]}/<role>"]


@dataclass(frozen=True)
class Statistic:
    """How to read a statistic of sites, layers or weights."""

    says: str
    floor: float = 1e-3  # smaller values are drawn here: the axis is logarithmic


_FILE = yaml.safe_load(Path(__file__).with_name("charts.yaml").read_text(encoding="utf-8"))
LINES = tuple(
    Lines(**fields | {"keys": tuple(dict.fromkeys(key.replace("<role>", r) for key in fields["keys"] for r in ROLES))})
    for fields in _FILE["lines"]
)
STATISTICS, ATTENTION, WEIGHTS = (
    {name: Statistic(**fields) for name, fields in _FILE[table].items()}
    for table in ("statistics", "attention", "weights")
)
ALL_STATISTICS = STATISTICS | ATTENTION | WEIGHTS
STATISTIC_TITLES = {
    key.split("/")[1]: metric.title
    for key, metric in METRICS.items()
    if key.split("/")[1] in ALL_STATISTICS and key.endswith(("<site>", "<layer>", "<weight>"))
}


def differences_between(runs: list[Run]) -> dict[str, list[Any]]:
    """Return key -> its value in each run, for every configuration key in which the runs differ."""
    tables = [dict(leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    columns = {key: [table.get(key) for table in tables] for key in keys}
    return {key: column for key, column in columns.items() if any(value != column[0] for value in column)}


def labels(runs: list[Run]) -> list[str]:
    """Return the legend: for each run the values that set it apart, `optimizer.lr=0.01, norm.name=ssnorm`.

    Keys that change neither model nor learning (`FREE`) appear only if nothing else differs. Without any difference the
    label is the name of the run.
    """
    if len(runs) == 1:
        return [runs[0].name]
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


def lines_data(chart: Lines, runs: list[Run]) -> list[dict[str, Any]]:
    """Return the curves of a chart: run, key, name, x, y. A long curve becomes its envelope (`faint`) and its mean."""
    curves = []
    for index, run in enumerate(runs):
        for key in chart.keys:
            series = run.series.get(key)
            if series is None:
                continue
            about = {"run": index, "key": key, "name": curve_name(key) if len(chart.keys) > 1 else ""}
            noisy = len(series.steps) > 600 and key in ("train/loss", "train/grad_norm", "train/tokens_per_second")
            curves.append({**about, "faint": noisy, **_points(envelope(series, BUCKETS))})
            if noisy:
                curves.append({**about, "mean": True, "faint": False, **_points(averaged(series, 150))})
    return curves


def curve_name(key: str) -> str:
    """Return the name of a metric among others of its chart."""
    metric = METRICS.get(key)
    return metric.name if metric and metric.name else key.rpartition("/")[2]


def _points(series: Series) -> dict[str, list[Any]]:
    return {"x": series.steps.tolist(), "y": rounded(series.values, 5)}


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


def histogram_data(runs: list[Run]) -> dict[str, list[Any]]:
    """Return site -> for each run None or {"x": steps, "first": octave, "v": rows of 100 log10(share of the values)}.

    All runs have the same octaves, so that their pictures compare.
    """
    chosen = [_spread(run.probes, HISTOGRAMS) for run in runs]
    data: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for probes in chosen for probe in probes for name in probe["sites"]):
        measured: list[list[tuple[int, dict[str, Any]]]] = []
        for probes in chosen:
            sites = [(probe["step"], probe["sites"].get(name) or {}) for probe in probes]
            measured.append([(step, site["histogram"]) for step, site in sites if site.get("histogram")])
        histograms = [histogram for pairs in measured for _, histogram in pairs]
        if not histograms:
            continue
        first = min(h["edges_log2"][0] for h in histograms)
        last = max(h["edges_log2"][0] + len(h["counts"]) for h in histograms)
        cells = [
            {"x": [step for step, _ in pairs], "first": first, "v": [_shares(h, first, last) for _, h in pairs]}
            for pairs in measured
        ]
        data[name] = [cell if cell["x"] else None for cell in cells]
    return data


def _shares(histogram: dict[str, Any], first: int, last: int) -> list[int | None]:
    """Return 100 log10(share of the values) of the octaves from `first` to `last`, None for an empty octave."""
    counts = np.zeros(last - first)
    start = histogram["edges_log2"][0] - first
    counts[start : start + len(histogram["counts"])] = histogram["counts"]
    share = counts / max(counts.sum(), 1)
    return [round(100 * math.log10(s)) if s > 0 else None for s in share.tolist()]


def _spread(items: list[Any], count: int) -> list[Any]:
    """Return at most `count` of the items, evenly spread, the last one included."""
    if len(items) <= count:
        return items
    return [items[i] for i in sorted({round(k * (len(items) - 1) / (count - 1)) for k in range(count)})]


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
    since: int | None = None


def find_outliers(run: Run) -> list[Outlier]:
    """Return the sites of the last probe with the most extreme values, relative to their RMS where it is known."""
    if not run.probes:
        return []
    sites = []
    for name, site in run.probes[-1]["sites"].items():
        value, channel = _number(site.get("top_value")), site["channels"][0][0]
        rms = run.last(f"monitor/rms/{name}")
        sites.append(
            Outlier(
                site=name,
                value=value,
                times_rms=abs(value) / rms if rms else math.nan,
                channel=channel,
                strongest=site.get("top_channel", -1),
                share=_number(site.get("top_channel_share")),
                kurtosis=run.last(f"monitor/kurtosis/{name}"),
                text=str(site.get("top_text", "")),
                position=site.get("top_position", -1),
            )
        )
    relative = all(math.isfinite(o.times_rms) for o in sites)
    sites.sort(key=lambda o: -o.times_rms if relative else -abs(o.value))
    return [replace(o, since=since(growth(run.probes, o.site, o.channel))) for o in sites[:MOST_OUTLIERS]]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def worst_site(run: Run, stat: str) -> tuple[str, float]:
    """Return (site, value) of the largest last value of a statistic; ("", nan) if it was not measured."""
    last = {key.split("/", 2)[2]: s.last for key, s in run.series.items() if (t := site_of(key)) and t.stat == stat}
    finite = {name: value for name, value in last.items() if math.isfinite(value)}
    name = max(finite, key=lambda site: finite[site], default="")
    return name, finite.get(name, math.nan)
