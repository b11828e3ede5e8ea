"""Which charts a report has, what each of them says, and the numbers behind them. No HTML here.

A `Lines` chart is curves over optimizer steps; the site charts (curves and a heatmap for each statistic at each kind of
site) and the histograms are grids of numbers that the page draws for the statistic or site that is chosen.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from osp.config import FREE, leaves
from osp.report.downsample import averaged, envelope, grid, rounded
from osp.run.history import growth, since
from osp.run.read import Run, Series, Site, site_of

BUCKETS = 400  # stretches of a curve: about two pixels each on a wide screen
HISTOGRAMS = 40  # probes shown as histograms
ROWS = 12  # sites named in the table of outliers, for each run


@dataclass(frozen=True)
class Lines:
    """One chart of curves. `keys`: metrics drawn in it, `*` standing for a parameter role or nothing."""

    name: str
    section: str
    title: str
    keys: tuple[str, ...]
    unit: str
    says: str  # what a healthy and an unhealthy curve look like
    log: bool = False
    missing: str = ""  # why it can be empty, and what to set


@dataclass(frozen=True)
class Statistic:
    """A statistic of sites: how it is called and read."""

    title: str
    says: str
    floor: float = 1e-3  # smaller values are drawn here: the axis is logarithmic


ROLES = ("matrix", "embed_proj", "gain", "embedding", "head")

LINES = (
    Lines(
        "train_loss", "loss", "Training loss", ("train/loss",), "nats per token",
        "Healthy: falls fast, then slowly, in a narrow band. Unhealthy: spikes, or a band that rises or widens.",
    ),
    Lines(
        "val_loss", "loss", "Validation loss", ("val/loss",), "nats per token",
        "Healthy: follows the training loss. Unhealthy: turns upwards while the training loss falls (overfitting).",
        missing="No validation yet: it runs every eval.every steps and at the end.",
    ),
    Lines(
        "bits_per_byte", "loss", "Bits per byte", ("val/bits_per_byte",), "bits",
        "The validation loss in a unit that tokenizers do not change; the dashed line is what gzip -9 needs.",
        missing="No validation yet: it runs every eval.every steps and at the end.",
    ),
    Lines(
        "kurtosis", "outliers", "Excess kurtosis, whole model",
        ("monitor/kurtosis/max", "monitor/kurtosis/mean", "monitor/kurtosis/osp_script"), "",
        "Healthy: the mean stays near its start. Unhealthy: it grows by powers of ten; the paper's Adam model ends at "
        "1,800, its outlier-safe model at 0.04 (both by its script).",
        log=True,
    ),
    Lines(
        "max_abs", "outliers", "Largest activation", ("monitor/max_abs/max",), "|x|",
        "Healthy: flat, tens. Unhealthy: hundreds or more in a few channels, which leave 4 bits nothing for the rest.",
        log=True,
    ),
    Lines(
        "error", "outliers", "Error of 4-bit quantization", ("monitor/R_L",), "relative error",
        "What 4-bit weights and activations do to the last hidden state: 0 is no change, 1 is noise as large as it.",
    ),
    Lines(
        "quantized", "outliers", "Perplexity at 16 and 4 bits",
        ("quant/perplexity/16-16-16", "quant/perplexity/4-4-4"), "W-A-KV",
        "On a fixed held-out slice, round to nearest. Healthy: 4-4-4 stays close above 16-16-16 and falls with it. "
        "Unhealthy: it turns upwards while 16-16-16 falls, with the kurtosis: outliers take the 4 bits.",
        log=True,
        missing="No quantized perplexity of the model in training: set eval.quant.every for the next run.",
    ),
    Lines(
        "grad_norm", "optimizer", "Gradient norm", ("train/grad_norm",), "",
        "Before clipping. Healthy: falls, then flat. Unhealthy: spikes far above its usual level, or steady growth.",
        log=True,
    ),
    Lines(
        "lr", "optimizer", "Learning rate", tuple(f"train/lr/{role}" for role in ROLES), "",
        "The rate each group of parameters took: warm-up, plateau and decay as configured by schedule.",
    ),
    Lines(
        "update_rms", "optimizer", "Size of the updates", tuple(f"train/update_rms/{role}" for role in ROLES), "RMS",
        "Healthy: follows the rate. Unhealthy: one group moves much more than its rate says.",
        log=True,
    ),
    Lines(
        "param_norm", "optimizer", "Norm of the parameters", ("train/param_norm",), "L2",
        "Healthy: grows ever more slowly. Unhealthy: grows as fast at the end as at the start.",
    ),
    Lines(
        "speed", "speed", "Throughput", ("train/tokens_per_second",), "tokens/s",
        "Healthy: flat. Dips are waits for data, for the file system or for other users of the machine.",
    ),
    Lines(
        "mfu", "speed", "Model FLOPs utilization", ("train/mfu",), "share of peak",
        "The share of the hardware's peak that the model's own arithmetic takes.",
        missing="MFU is not measured: the peak of this hardware is unknown; set logger.peak_tflops.",
    ),
    Lines(
        "data_wait", "speed", "Waiting for data", ("train/data_wait_seconds",), "s per step",
        "Healthy: milliseconds. If it is a visible share of a step, raise data.num_workers or use a faster disk.",
    ),
    Lines(
        "memory", "speed", "Memory", ("train/memory_gib",), "GiB per rank",
        "Healthy: flat. Steady growth is a leak.",
    ),
    Lines(
        "cost", "speed", "Cost of monitoring", ("monitor/cost",), "share of the training time",
        "Dense probes at the start cost more; the share settles below one percent.",
    ),
)  # fmt: skip

CURVES = {  # whose metric's last part does not say it
    "monitor/kurtosis/max": "worst site",
    "monitor/kurtosis/mean": "mean of the sites",
    "monitor/kurtosis/osp_script": "the paper's script",
}

STATISTICS = {
    "kurtosis": Statistic(
        "Excess kurtosis, per token",
        "0 is a Gaussian; the input of down_proj, a product, starts above 10. Healthy: near its start, alike in all "
        "layers. Unhealthy: hundreds, growing; the ceiling, all energy in one channel, is the number of channels.",
        floor=0.01,
    ),
    "max_abs": Statistic(
        "Largest |x|", "Healthy: tens. Unhealthy: it leaves the rest behind and stays there.", floor=0.01
    ),
    "max_over_median": Statistic(
        "Largest |x| over the median |x|",
        "The range that quantization has to cover. Healthy: below about 20. Unhealthy: hundreds.",
        floor=1.0,
    ),
    "top_channel_share": Statistic(
        "Share of the energy in the top channel",
        "Healthy: near one over the number of channels. Unhealthy: one channel holds most of it.",
    ),
    "top_token_share": Statistic(
        "Share of the energy in the top token", "Unhealthy: a single token (often the first) holds most of it."
    ),
    "massive_count": Statistic(
        "Massive activations", "Values beyond six standard deviations. Healthy: none.", floor=0.5
    ),
    "few_channels": Statistic(
        "Kurtosis that comes from few channels",
        "1: all channels alike. Unhealthy: hundreds, the same channels for every token; its ceiling is their number.",
        floor=1.0,
    ),
    "few_tokens": Statistic(
        "Kurtosis that comes from few tokens",
        "1: all tokens alike. Large: a few tokens, often the first, hold most of the energy.",
        floor=1.0,
    ),
    "rms": Statistic("RMS", "The size of a typical value; the residual stream may grow with depth."),
    "kurtosis_pooled": Statistic("Excess kurtosis, all values at once", "As above, tokens and channels pooled.", 0.01),
    "kurtosis_channel": Statistic(
        "Excess kurtosis, per channel over tokens", "Large: a channel is quiet for most tokens, huge for a few.", 0.01
    ),
}
ATTENTION = {
    "attn_logit_max": Statistic("Largest attention logit", "Healthy: tens. Unhealthy: grows without end.", 0.1),
    "attn_sink": Statistic(
        "Attention on the first token",
        "The mean probability that the first token gets: a sink. Common, and harmless without massive activations.",
    ),
    "R_L": Statistic("4-bit error of the residual, by layer", "Where quantization does its damage.", 1e-3),
    "var_error": Statistic(
        "Error of BHyT's variance after attention",
        "Relative to the true one. Healthy: percents. Unhealthy: near 1 or above; norm.exact_layers measures instead.",
        1e-3,
    ),
}
WEIGHTS = {
    "gain_max": Statistic("Largest gain", "A few large gains of a norm are how a model builds outlier channels.", 1e-2),
    "weight_row_max": Statistic("Largest row norm", "The row of a weight that writes or reads an outlier.", 1e-2),
}
KINDS = {  # in the order of the page: where outliers show first stands first
    "block_out": "Residual stream after the block",
    "down_proj_in": "Input of down_proj",
    "attn_in": "Input of attention",
    "mlp_in": "Input of the MLP",
    "o_proj_in": "Input of o_proj",
    "q": "Queries (after RoPE)",
    "k": "Keys (after RoPE)",
    "v": "Values",
    "embed_out": "Embedding output",
    "final_norm_out": "Final norm output",
}


def differences_between(runs: list[Run]) -> dict[str, list[Any]]:
    """Key -> its value in each run, for every key of the configuration in which the runs differ."""
    tables = [dict(leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    columns = {key: [table.get(key) for table in tables] for key in keys}
    return {key: column for key, column in columns.items() if any(value != column[0] for value in column)}


def labels(runs: list[Run]) -> list[str]:
    """The legend: for each run the configuration that sets it apart, `optimizer.lr=0.01, norm.name=ssnorm`.

    What changes neither model nor learning (`FREE`) is named only where nothing else differs, and the name of
    the run where nothing differs at all.
    """
    if len(runs) == 1:
        return [runs[0].name]
    different = {k: v for k, v in differences_between(runs).items() if not k.startswith("run.")}
    telling = {k: v for k, v in different.items() if not k.startswith(FREE)} or different
    telling = dict(sorted(telling.items(), key=lambda item: not item[0].endswith(".name")))  # norm.name says most
    found = []
    for i, run in enumerate(runs):
        parts = [f"{key}={plain(values[i])}" for key, values in telling.items()]
        more = [f"and {len(parts) - 4} more"] if len(parts) > 4 else []
        found.append(", ".join(parts[: 4 if more else None] + more) or run.name)
    if len(set(found)) < len(found):
        found = [f"{label} ({run.folder})" for label, run in zip(found, runs, strict=True)]
    return found


def names(runs: list[Run]) -> list[str]:
    """A short name for each run: the run's own where these differ, else that of its folder, else a letter."""
    for candidate in ([run.name for run in runs], [run.folder.resolve().name for run in runs]):
        if len(set(candidate)) == len(runs):
            return candidate
    return [f"run {chr(ord('A') + i % 26)}{i // 26 or ''}" for i in range(len(runs))]


def plain(value: Any) -> str:
    """A configuration value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def lines_data(chart: Lines, runs: list[Run]) -> list[dict[str, Any]]:
    """The curves of a chart: run, key, x, y; behind a curve of many points also its envelope, marked `faint`."""
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
    """What a curve is called among others of its chart."""
    return CURVES.get(key) or key.rpartition("/")[2]


def _points(series: Series) -> dict[str, list[Any]]:
    return {"x": series.steps.tolist(), "y": rounded(series.values, 5)}


def site_data(runs: list[Run]) -> dict[str, dict[str, list[Any]]]:
    """statistic -> kind of site -> for each run None or {"x": [[first, last step], ...], "layers", "v"}."""
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
    """site -> for each run None or {"x": steps, "first": octave, "v": rows of 100 log10(share of the values)}.

    All runs have the same octaves, so that their pictures compare.
    """
    chosen = [_spread(run.probes, HISTOGRAMS) for run in runs]
    data: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for probes in chosen for probe in probes for name in probe["sites"]):
        found = [
            [
                (p["step"], p["sites"][name]["histogram"])
                for p in probes
                if (p["sites"].get(name) or {}).get("histogram")
            ]
            for probes in chosen
        ]
        every = [histogram for pairs in found for _, histogram in pairs]
        if every:
            first = min(h["edges_log2"][0] for h in every)
            last = max(h["edges_log2"][0] + len(h["counts"]) for h in every)
            data[name] = [
                {"x": [step for step, _ in pairs], "first": first, "v": [_shares(h, first, last) for _, h in pairs]}
                if pairs
                else None
                for pairs in found
            ]
    return data


def _shares(histogram: dict[str, Any], first: int, last: int) -> list[int | None]:
    """100 log10(share of the values) of the octaves from `first` to `last`, None where there are none."""
    counts = np.zeros(last - first)
    start = histogram["edges_log2"][0] - first
    counts[start : start + len(histogram["counts"])] = histogram["counts"]
    share = counts / max(counts.sum(), 1)
    return [round(100 * math.log10(s)) if s > 0 else None for s in share.tolist()]


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the last one among them."""
    if len(items) <= count:
        return items
    return [items[i] for i in sorted({round(k * (len(items) - 1) / (count - 1)) for k in range(count)})]


@dataclass(frozen=True)
class Outlier:
    """The largest value of a site in the last probe, its channel, and since when that has been large."""

    site: str
    value: float
    times_rms: float  # |value| over the RMS of the site; nan if that was not measured
    channel: int
    share: float  # of the site's energy, in its strongest channel
    strongest: int  # which is that one; often, not always, that of the value
    kurtosis: float
    text: str
    position: int
    since: int | None = None


def outliers(run: Run) -> list[Outlier]:
    """The sites of the last probe with the most extreme values, relative to their RMS where it is known."""
    if not run.probes:
        return []
    found = []
    for name, site in run.probes[-1]["sites"].items():
        value, channel = _number(site.get("top_value")), site["channels"][0][0]
        rms = run.last(f"monitor/rms/{name}")
        found.append(
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
    relative = all(math.isfinite(o.times_rms) for o in found)
    found.sort(key=lambda o: -o.times_rms if relative else -abs(o.value))
    return [replace(o, since=since(growth(run.probes, o.site, o.channel))) for o in found[:ROWS]]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def worst(run: Run, stat: str) -> tuple[str, float]:
    """(site, value) of the largest last value of a statistic over the sites; ("", nan) if it was not measured."""
    last = {key.split("/", 2)[2]: s.last for key, s in run.series.items() if (t := site_of(key)) and t.stat == stat}
    finite = {name: value for name, value in last.items() if math.isfinite(value)}
    name = max(finite, key=lambda site: finite[site], default="")
    return name, finite.get(name, math.nan)
