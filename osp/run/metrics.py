"""The W&B workspace of a project as code: which panels, of which metrics. Made with `wandb-workspaces` (extra `wandb`).

`PANELS` only names metrics (docs/metrics.md says what they are), so it can be checked without W&B or network.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from osp.errors import UserError

NAME = "Outliers and training"  # of the workspace
HEATMAPS = ("kurtosis", "max_abs", "top_channel_share")  # statistics sent as layer x step heatmaps
SITES = ("block_out", "down_proj_in", "attn_in", "mlp_in", "o_proj_in", "q", "k", "v")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BITS = ("16-16-16", "4-4-4")  # W-A-KV of the perplexities taken during training
ROLES = ("matrix", "embed_proj", "gain", "embedding", "head")


@dataclass(frozen=True)
class Panel:
    """One panel. Exactly one of `keys` and `regex` says which metrics it draws."""

    section: str
    title: str
    keys: tuple[str, ...] = ()
    regex: str = ""
    log: bool = False


def _by_site(section: str, stat: str, *, log: bool) -> Iterator[Panel]:
    for site in SITES:
        yield Panel(section, f"{site}, by layer", regex=rf"^monitor/{stat}/layer_\d+/{site}$", log=log)
    yield Panel(section, "embedding and final norm", (f"monitor/{stat}/embed_out", f"monitor/{stat}/final_norm_out"))


PANELS = (
    Panel("Summary", "Validation loss", ("val/loss",)),
    Panel("Summary", "Bits per byte", ("val/bits_per_byte",)),
    Panel("Summary", "Training loss", ("train/loss",)),
    Panel("Summary", "Kurtosis", tuple(f"monitor/kurtosis/{k}" for k in ("max", "mean", "osp_script")), log=True),
    Panel("Summary", "Largest activation", ("monitor/max_abs/max",), log=True),
    Panel("Summary", "4-bit error R_L", ("monitor/R_L",)),
    Panel("Summary", "Perplexity at 16 and 4 bits", tuple(f"quant/perplexity/{b}" for b in BITS), log=True),
    Panel("Summary", "Alerts", ("monitor/alerts",)),
    *_by_site("Kurtosis", "kurtosis", log=True),
    *(Panel("Layer x step", f"{s}, {site}", (f"heatmap/{s}/{site}",)) for s in HEATMAPS for site in SITES),
    *_by_site("Largest |x|", "max_abs", log=True),
    *_by_site("Share of the top channel", "top_channel_share", log=False),
    Panel("Attention", "Largest logit", regex=r"^monitor/attn_logit_max/layer_\d+$", log=True),
    Panel("Attention", "Attention on the first token", regex=r"^monitor/attn_sink/layer_\d+$"),
    Panel("Attention", "4-bit error by layer", regex=r"^monitor/R_L/layer_\d+$"),
    Panel("Gains and weights", "Gains before attention", regex=r"^monitor/gain_max/layer_\d+/input_layernorm$"),
    Panel("Gains and weights", "Gains before the MLP", regex=r"^monitor/gain_max/layer_\d+/post_attention_layernorm$"),
    Panel("Gains and weights", "Gain of the final norm", ("monitor/gain_max/norm",)),
    *(Panel("Gains and weights", f"Row norm, {m}", regex=rf"^monitor/weight_row_max/layer_\d+/{m}$") for m in MATRICES),
    Panel("Optimizer", "Learning rates", tuple(f"train/lr/{role}" for role in ROLES)),
    Panel("Optimizer", "Update RMS", tuple(f"train/update_rms/{role}" for role in ROLES), log=True),
    Panel("Optimizer", "Gradient norm", ("train/grad_norm",), log=True),
    Panel("Optimizer", "Parameter norm", ("train/param_norm",)),
    Panel("Speed", "Tokens per second", ("train/tokens_per_second",)),
    Panel("Speed", "MFU", ("train/mfu",)),
    Panel("Speed", "Waiting for data", ("train/data_wait_seconds",)),
    Panel("Speed", "Memory", ("train/memory_gib",)),
    Panel("Speed", "Cost of monitoring", ("monitor/cost",)),
)  # fmt: skip


def workspace(entity: str, project: str, panels: Iterable[Panel] = PANELS) -> Any:
    """The `wandb_workspaces` workspace, not yet saved. `UserError` if that package is not installed."""
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
            y=list(panel.keys),
            metric_regex=panel.regex or None,
            log_y=panel.log or None,
            point_visualization_method="bucketing-gorilla",  # minimum and maximum survive the down-sampling
        )
        sections.setdefault(panel.section, []).append(plot)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(name=name, panels=plots, is_open=i < 2) for i, (name, plots) in enumerate(sections.items())
        ],
        settings=ws.WorkspaceSettings(x_axis="step"),
    )


def create(entity: str, project: str) -> str:
    """Save the workspace to W&B; its address. Needs the network and a key."""
    return workspace(entity, project).save().url


def layer_grids(metrics: Mapping[str, float]) -> dict[str, list[float]]:
    """`heatmap/STAT/SITE` -> one value per layer, from the metrics of a probe.

    W&B draws a histogram per step as a heatmap, so a histogram with one bin per layer is the picture layer x step. Its
    colours are linear; the values sent are therefore log10(1 + value), shares as they are.
    """
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        parts = key.split("/")
        if len(parts) == 4 and parts[0] == "monitor" and parts[1] in HEATMAPS and parts[2].startswith("layer_"):
            found.setdefault(f"heatmap/{parts[1]}/{parts[3]}", {})[parts[2]] = value
    return {
        name: [math.log10(1 + max(v, 0.0)) if "share" not in name else v for _, v in sorted(layers.items())]
        for name, layers in found.items()
        if all(math.isfinite(v) for v in layers.values())
    }
