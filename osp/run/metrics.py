"""The metrics of a run: title, unit and direction of every logged number, and the W&B panels that draw them.

`METRICS`, read from metrics.yaml, is the only table of titles: the report, the panels and docs/metrics.md follow it.
`PANELS` can be checked without W&B and without a network; `wandb-workspaces` (extra `wandb`) makes it a workspace.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from osp.config import ROLES
from osp.errors import UserError


@dataclass(frozen=True)
class Metric:
    """How a logged number is shown."""

    title: str
    unit: str = ""
    better: Literal["lower", "higher", ""] = ""
    name: str = ""  # among metrics of the same title
    log: bool = False  # drawn on a logarithmic axis

    @property
    def full_title(self) -> str:
        return ": ".join(filter(None, [self.title, self.name]))


PLACEHOLDERS = {
    "<role>": r"\w+",
    "<layer>": r"layer_\d+",
    "<site>": r"(layer_\d+/)?\w+",
    "<weight>": r"(layer_\d+/)?\w+",
    "<statistic>": r"\w+",
}
_FILE = yaml.safe_load(Path(__file__).with_name("metrics.yaml").read_text(encoding="utf-8"))
SITE_TITLES: dict[str, str] = _FILE["sites"]
METRICS = {key: Metric(**fields) for key, fields in _FILE["metrics"].items()}


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
