"""The charts of a report: which metrics they draw, how to read them, and their data. No HTML here.

Titles, units and axes come from `osp.run.metrics.METRICS`. A `Lines` chart holds curves over optimizer steps. Charts of
sites (curves and a heatmap for each statistic) and histograms are grids of numbers; the user selects one.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from osp.config import FREE, ROLES, leaves
from osp.report.downsample import averaged, envelope, grid, rounded
from osp.run.history import growth, since
from osp.run.metrics import METRICS, Metric
from osp.run.read import Run, Series, Site, site_of

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


NO_VALIDATION = "No validation yet: it runs every eval.every steps and at the end."
LINES = (
    Lines(
        "train_loss", "loss", ("train/loss",),
        "Healthy: falls fast, then slowly, in a narrow band. Unhealthy: spikes, or a band that rises or widens.",
    ),
    Lines(
        "val_loss", "loss", ("val/loss",),
        "Healthy: follows the training loss. Unhealthy: turns upwards while the training loss falls (overfitting).",
        missing=NO_VALIDATION,
    ),
    Lines(
        "bits_per_byte", "loss", ("val/bits_per_byte",),
        "The validation loss in a unit that does not depend on the tokenizer; the dashed line is gzip -9.",
        missing=NO_VALIDATION,
    ),
    Lines(
        "kurtosis", "outliers", ("monitor/kurtosis/max", "monitor/kurtosis/mean", "monitor/kurtosis/osp_script"),
        "Healthy: the mean stays near its start. Unhealthy: it grows by powers of ten; the paper's Adam model ends at "
        "1,800, its outlier-safe model at 0.04 (both by its script).",
    ),
    Lines(
        "max_abs", "outliers", ("monitor/max_abs/max",),
        "Healthy: flat, tens. Unhealthy: hundreds or more in a few channels; 4 bits then leave nothing for the rest.",
    ),
    Lines(
        "error", "outliers", ("monitor/R_L",),
        "The effect of 4-bit weights and activations on the last hidden state: 0 is no change, 1 is pure noise.",
    ),
    Lines(
        "quantized", "outliers", ("quant/perplexity/16-16-16", "quant/perplexity/4-4-4"),
        "On a fixed slice of the validation split, round to nearest. Healthy: 4-4-4 stays close above 16-16-16 and "
        "falls with it. Unhealthy: it turns upwards while 16-16-16 falls, with the kurtosis: outliers take the 4 bits.",
        missing="No quantized perplexity of the model in training: set eval.quant.every for the next run.",
    ),
    Lines(
        "grad_norm", "optimizer", ("train/grad_norm",),
        "Before clipping. Healthy: falls, then flat. Unhealthy: spikes far above its usual level, or steady growth.",
    ),
    Lines(
        "lr", "optimizer", tuple(f"train/lr/{role}" for role in ROLES),
        "The learning rate of each group of parameters: warm-up, plateau and decay as configured by schedule.",
    ),
    Lines(
        "update_rms", "optimizer", tuple(f"train/update_rms/{role}" for role in ROLES),
        "Healthy: follows the learning rate. Unhealthy: one group moves much more than its learning rate says.",
    ),
    Lines(
        "param_norm", "optimizer", ("train/param_norm",),
        "Healthy: grows ever more slowly. Unhealthy: grows as fast at the end as at the start.",
    ),
    Lines(
        "speed", "speed", ("train/tokens_per_second",),
        "Healthy: flat. Dips are waits for data, for the file system or for other users of the machine.",
    ),
    Lines(
        "mfu", "speed", ("train/mfu",),
        "The share of the hardware's peak that the model's own arithmetic takes.",
        missing="MFU is not measured: the peak of this hardware is unknown; set logger.peak_tflops.",
    ),
    Lines(
        "data_wait", "speed", ("train/data_wait_seconds",),
        "Healthy: milliseconds. If it is a visible share of a step, raise data.num_workers or use a faster disk.",
    ),
    Lines("memory", "speed", ("train/memory_gib",), "Healthy: flat. Steady growth is a leak."),
    Lines(
        "cost", "speed", ("monitor/cost",),
        "Dense probes at the start cost more; the share settles below one percent.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Statistic:
    """How to read a statistic of sites, layers or weights."""

    says: str
    floor: float = 1e-3  # smaller values are drawn here: the axis is logarithmic


STATISTICS = {  # of the site that the user selects
    "kurtosis": Statistic(
        "0 is a Gaussian; the input of down_proj, a product, starts above 10. Healthy: near its start, alike in all "
        "layers. Unhealthy: hundreds, growing; the ceiling, all energy in one channel, is the number of channels.",
        floor=0.01,
    ),
    "max_abs": Statistic("Healthy: tens. Unhealthy: it leaves the other values behind and stays there.", floor=0.01),
    "max_over_median": Statistic(
        "The range that quantization has to cover. Healthy: below about 20. Unhealthy: hundreds.", floor=1.0
    ),
    "top_channel_share": Statistic(
        "Healthy: near one over the number of channels. Unhealthy: one channel holds most of it."
    ),
    "top_token_share": Statistic("Unhealthy: a single token (often the first) holds most of it."),
    "massive_count": Statistic("Values beyond six standard deviations. Healthy: zero.", floor=0.5),
    "few_channels": Statistic(
        "1: all channels alike. Unhealthy: hundreds, the same channels for every token; its ceiling is their number.",
        floor=1.0,
    ),
    "few_tokens": Statistic(
        "1: all tokens alike. Large: a few tokens, often the first, hold most of the energy.", floor=1.0
    ),
    "rms": Statistic("The size of a typical value; the residual stream may grow with depth."),
    "kurtosis_pooled": Statistic("As above, tokens and channels pooled.", floor=0.01),
    "kurtosis_channel": Statistic("Large: a channel is quiet for most tokens, huge for a few.", floor=0.01),
}
ATTENTION = {  # always shown
    "attn_logit_max": Statistic("Healthy: tens. Unhealthy: grows without end.", floor=0.1),
    "attn_sink": Statistic(
        "The mean probability of the first token: a sink. Common, and harmless without massive activations."
    ),
    "R_L": Statistic("Where quantization does its damage."),
    "var_error": Statistic(
        "Relative to the true one. Healthy: percents. Unhealthy: near 1 or above; norm.exact_layers measures instead."
    ),
}
WEIGHTS = {
    "gain_max": Statistic("A few large gains of a norm are how a model builds outlier channels.", floor=1e-2),
    "weight_row_max": Statistic("The row of a weight that writes or reads an outlier.", floor=1e-2),
}
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
