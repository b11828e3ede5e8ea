"""The metrics of a run: title, unit and direction of every logged number, and the W&B panels that draw them.

`METRICS` is the only table of titles: the report, the panels and docs/metrics.md follow it. `PANELS` names metrics only
and can be checked without W&B and without a network; `wandb-workspaces` (extra `wandb`) turns it into a workspace.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from osp.config import ROLES
from osp.errors import UserError


@dataclass(frozen=True)
class Metric:
    """How a logged number is shown."""

    title: str
    unit: str = ""
    better: Literal["lower", "higher", ""] = ""
    name: str = ""  # among metrics of the same title; default: the last part of the key
    log: bool = False  # drawn on a logarithmic axis


SITE_TITLES = {  # <site> in a key, within a block as layer_00/<site>; sites where outliers show first come first
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
PLACEHOLDERS = {
    "<role>": r"\w+",
    "<layer>": r"layer_\d+",
    "<site>": r"(layer_\d+/)?\w+",
    "<weight>": r"(layer_\d+/)?\w+",
    "<statistic>": r"\w+",
}
_KURTOSIS, _PERPLEXITY = "Excess kurtosis, whole model", "Perplexity at 16 and 4 bits"
METRICS = {
    "train/loss": Metric("Training loss", "nats per token", "lower"),
    "train/penalty": Metric("Penalty", "", "lower"),
    "train/grad_norm": Metric("Gradient norm", "L2", log=True),
    "train/lr/<role>": Metric("Learning rate"),
    "train/update_rms/<role>": Metric("Size of the updates", "RMS", log=True),
    "train/param_norm": Metric("Norm of the parameters", "L2"),
    "train/param_norm/<role>": Metric("Norm of the parameters of a role", "L2"),
    "train/tokens_per_second": Metric("Throughput", "tokens/s", "higher"),
    "train/step_seconds": Metric("Time of a step", "s", "lower"),
    "train/data_wait_seconds": Metric("Waiting for data", "s per step", "lower"),
    "train/memory_gib": Metric("Memory", "GiB per rank", "lower"),
    "train/rows_checksum": Metric("Checksum of the sequences"),
    "train/mfu": Metric("Model FLOPs utilization", "share of peak", "higher"),
    "val/loss": Metric("Validation loss", "nats per token", "lower"),
    "val/bits_per_byte": Metric("Bits per byte", "bits", "lower"),
    "val/seconds": Metric("Time of a validation", "s", "lower"),
    "checkpoint/blocked_seconds": Metric("Training blocked by a checkpoint", "s", "lower"),
    "checkpoint/write_seconds": Metric("Time to write a checkpoint", "s", "lower"),
    "checkpoint/bytes": Metric("Size of a checkpoint", "bytes", "lower"),
    "quant/perplexity/16-16-16": Metric(_PERPLEXITY, "W-A-KV", "lower", log=True),
    "quant/perplexity/4-4-4": Metric(_PERPLEXITY, "W-A-KV", "lower", log=True),
    "quant/seconds": Metric("Time of the quantized perplexity", "s", "lower"),
    "monitor/kurtosis/<site>": Metric("Excess kurtosis, per token", "", "lower", log=True),
    "monitor/kurtosis_pooled/<site>": Metric("Excess kurtosis, all values at once", "", "lower", log=True),
    "monitor/kurtosis_channel/<site>": Metric("Excess kurtosis, per channel over tokens", "", "lower", log=True),
    "monitor/max_abs/<site>": Metric("Largest |x|", "", "lower", log=True),
    "monitor/max_over_median/<site>": Metric("Largest |x| over the median |x|", "", "lower", log=True),
    "monitor/rms/<site>": Metric("RMS"),
    "monitor/top_channel_share/<site>": Metric("Share of the energy in the top channel", "", "lower"),
    "monitor/top_token_share/<site>": Metric("Share of the energy in the top token", "", "lower"),
    "monitor/massive_count/<site>": Metric("Massive activations", "values", "lower", log=True),
    "monitor/few_channels/<site>": Metric("Kurtosis that comes from few channels", "factor", "lower", log=True),
    "monitor/few_tokens/<site>": Metric("Kurtosis that comes from few tokens", "factor", "lower", log=True),
    "monitor/kurtosis/max": Metric(_KURTOSIS, "", "lower", "worst site", log=True),
    "monitor/kurtosis/mean": Metric(_KURTOSIS, "", "lower", "mean of the sites", log=True),
    "monitor/kurtosis/osp_script": Metric(_KURTOSIS, "", "lower", "the paper's script", log=True),
    "monitor/max_abs/max": Metric("Largest activation", "|x|", "lower", log=True),
    "monitor/attn_logit_max/<layer>": Metric("Largest attention logit", "", "lower", log=True),
    "monitor/attn_sink/<layer>": Metric("Attention on the first token", "probability"),
    "monitor/gain_max/<weight>": Metric("Largest gain", "", "lower"),
    "monitor/weight_row_max/<weight>": Metric("Largest row norm", "L2", "lower"),
    "monitor/R_L": Metric("Error of 4-bit quantization", "relative error", "lower"),
    "monitor/R_L/<layer>": Metric("4-bit error of the residual, by layer", "relative error", "lower"),
    "bhyt/var_error/<layer>": Metric("Error of BHyT's variance after attention", "relative error", "lower"),
    "monitor/alerts": Metric("Alerts", "rules", "lower"),
    "monitor/seconds": Metric("Time of a probe", "s", "lower"),
    "monitor/cost": Metric("Cost of monitoring", "share of the training time", "lower"),
    "heatmap/<statistic>/<site>": Metric("Layers over steps"),
}


def metric_of(key: str) -> Metric | None:
    """Return the entry of `METRICS` for a logged key, or None."""
    if key in METRICS:
        return METRICS[key]
    return next((metric for pattern, metric in METRICS.items() if re.fullmatch(key_regex(pattern), key)), None)


def key_regex(pattern: str) -> str:
    """Return the regular expression of the keys that a key with placeholders stands for."""
    for placeholder, regex in PLACEHOLDERS.items():
        pattern = pattern.replace(placeholder, regex)
    return pattern


# ---- W&B -------------------------------------------------------------------------------------------------------------

WORKSPACE = "Outliers and training"
HEATMAPS = ("kurtosis", "max_abs", "top_channel_share")  # statistics sent as heatmaps of layers over steps
BLOCK_SITES = tuple(site for site in SITE_TITLES if site not in ("embed_out", "final_norm_out"))
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Panel:
    """One chart of the W&B workspace, of metrics of one title. A key with `<layer>` draws every layer."""

    section: str
    keys: tuple[str, ...]
    detail: str = ""  # in the title, after the title of the metric

    @property
    def metric(self) -> Metric:
        metric = metric_of(self.keys[0].replace("<layer>", "layer_00"))
        assert metric is not None, self.keys
        return metric

    @property
    def title(self) -> str:
        return ", ".join(filter(None, [self.metric.title, self.detail]))

    @property
    def regex(self) -> str:
        """The regular expression of the metrics, empty if `keys` are their names."""
        return f"^{key_regex(self.keys[0])}$" if "<" in self.keys[0] else ""


def _panels(section: str, *keys: str) -> tuple[Panel, ...]:
    return tuple(Panel(section, (key,)) for key in keys)


def _by_site(section: str, statistic: str) -> Iterator[Panel]:
    for site in BLOCK_SITES:
        yield Panel(section, (f"monitor/{statistic}/<layer>/{site}",), f"{site} by layer")
    ends = (f"monitor/{statistic}/embed_out", f"monitor/{statistic}/final_norm_out")
    yield Panel(section, ends, "embedding and final norm")


PANELS = (
    *_panels("Summary", "val/loss", "val/bits_per_byte", "train/loss"),
    Panel("Summary", ("monitor/kurtosis/max", "monitor/kurtosis/mean", "monitor/kurtosis/osp_script")),
    *_panels("Summary", "monitor/max_abs/max", "monitor/R_L"),
    Panel("Summary", ("quant/perplexity/16-16-16", "quant/perplexity/4-4-4")),
    *_panels("Summary", "monitor/alerts"),
    *_by_site("Kurtosis", "kurtosis"),
    *(Panel("Layers over steps", (f"heatmap/{s}/{site}",), f"{s}, {site}") for s in HEATMAPS for site in BLOCK_SITES),
    *_by_site("Largest |x|", "max_abs"),
    *_by_site("Share of the top channel", "top_channel_share"),
    *_panels("Attention", "monitor/attn_logit_max/<layer>", "monitor/attn_sink/<layer>", "monitor/R_L/<layer>"),
    Panel("Gains and weights", ("monitor/gain_max/<layer>/input_layernorm",), "before attention"),
    Panel("Gains and weights", ("monitor/gain_max/<layer>/post_attention_layernorm",), "before the MLP"),
    Panel("Gains and weights", ("monitor/gain_max/norm",), "final norm"),
    *(Panel("Gains and weights", (f"monitor/weight_row_max/<layer>/{name}",), name) for name in MATRICES),
    Panel("Optimizer", tuple(f"train/lr/{role}" for role in ROLES)),
    Panel("Optimizer", tuple(f"train/update_rms/{role}" for role in ROLES)),
    *_panels("Optimizer", "train/grad_norm", "train/param_norm"),
    *_panels("Speed", "train/tokens_per_second", "train/mfu", "train/data_wait_seconds", "train/memory_gib"),
    *_panels("Speed", "monitor/cost"),
)


def build_workspace(entity: str, project: str, panels: Iterable[Panel] = PANELS) -> Any:
    """Return the unsaved `wandb_workspaces` workspace; raise `UserError` without that package."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError("the W&B panels need wandb-workspaces; pip install 'osp[wandb]'") from error
    sections: dict[str, list[Any]] = {}
    for panel in panels:
        plot = wr.LinePlot(
            title=panel.title,
            x="step",
            y=[] if panel.regex else list(panel.keys),
            metric_regex=panel.regex or None,
            log_y=panel.metric.log or None,
            point_visualization_method="bucketing-gorilla",  # minimum and maximum survive the down-sampling
        )
        sections.setdefault(panel.section, []).append(plot)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=WORKSPACE,
        sections=[
            ws.Section(name=name, panels=plots, is_open=i < 2) for i, (name, plots) in enumerate(sections.items())
        ],
        settings=ws.WorkspaceSettings(x_axis="step"),
    )


def create_workspace(entity: str, project: str) -> str:
    """Save the workspace to W&B and return its address. Needs the network and a key."""
    return build_workspace(entity, project).save().url


def layer_grids(metrics: Mapping[str, float]) -> dict[str, list[float]]:
    """Return `heatmap/STATISTIC/SITE` -> one value per layer, from the metrics of a probe.

    W&B draws one histogram per step as a heatmap, so a histogram with one bin per layer shows layers over steps. Its
    colours are linear, so the values are log10(1 + value), except for shares.
    """
    grids: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        parts = key.split("/")
        if len(parts) == 4 and parts[0] == "monitor" and parts[1] in HEATMAPS and parts[2].startswith("layer_"):
            grids.setdefault(f"heatmap/{parts[1]}/{parts[3]}", {})[parts[2]] = value
    return {
        name: [math.log10(1 + max(v, 0.0)) if "share" not in name else v for _, v in sorted(layers.items())]
        for name, layers in grids.items()
        if all(math.isfinite(v) for v in layers.values())
    }
