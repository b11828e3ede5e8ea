"""The metrics of a run: title, unit and direction of every logged number, and the W&B panels that draw them.

metrics.yaml is the only table of titles: the report, the panels and docs/metrics.md follow it. `PANELS` can be checked
without W&B and without a network; `wandb-workspaces` (extra `wandb`) makes it a workspace.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from osp.errors import as_user_error
from osp.model_config import ROLES


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


PLACEHOLDERS = {"<role>": r"\w+", "<statistic>": r"\w+", "<layer>": r"layer_\d+"}
PLACEHOLDERS |= {"<site>": r"(layer_\d+/)?\w+", "<weight>": r"(layer_\d+/)?\w+", "<format>": r"\w+"}
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


def expand_roles(keys: Iterable[str]) -> tuple[str, ...]:
    """Return `keys` with a key for each role in place of one with `<role>`."""
    return tuple(dict.fromkeys(key.replace("<role>", role) for key in keys for role in ROLES))


class Site(NamedTuple):
    """The parts of a key of the monitor: `monitor/kurtosis/layer_03/q` is ("kurtosis", 3, "q")."""

    stat: str
    layer: int | None
    kind: str


def site_of(key: str) -> Site | None:
    """Return the parts of a key of the monitor; None for other keys and for keys of the whole model."""
    prefix, _, rest = key.partition("/")
    stat, _, name = rest.partition("/")
    if prefix not in ("monitor", "bhyt") or name in ("", "max", "mean", "osp_script"):
        return None
    first, _, kind = name.partition("/")
    if layer := re.fullmatch("layer_([0-9]{1,9})", first):
        return Site(stat, int(layer[1]), kind)
    return Site(stat, None, name)


WORKSPACE = "Outliers and training"
HEATMAPS = ("kurtosis", "max_abs", "top_channel_share")  # statistics sent as heatmaps of layers over steps
_REPEATED = {  # in a key of metrics.yaml: one panel for each
    "<block_site>": [site for site in SITE_TITLES if site not in ("embed_out", "final_norm_out")],
    "<matrix>": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Panel:
    """One chart of the W&B workspace, of metrics of one title. A key with `<layer>` draws every layer."""

    section: str
    keys: tuple[str, ...]
    regex: str  # of the metrics; empty: `keys` are their names
    title: str
    log: bool  # on a logarithmic axis


def _panels() -> Iterator[Panel]:
    """Yield the panels of metrics.yaml."""
    for section, panels in _FILE["panels"].items():
        for panel in panels:
            word = next((word for word in _REPEATED if word in panel["keys"][0]), "")
            for name in _REPEATED.get(word, [""]):
                keys = tuple(key.replace(word, name) for key in expand_roles(panel["keys"]))
                metric = metric_of(keys[0].replace("<layer>", "layer_00"))
                assert metric is not None, keys
                title = ", ".join(filter(None, [metric.title, panel.get("detail", "").replace(word, name)]))
                regex = f"^{key_regex(keys[0])}$" if "<" in keys[0] else ""
                yield Panel(section, keys, regex, title, metric.log)


PANELS = tuple(_panels())


def build_workspace(entity: str, project: str) -> Any:
    """Return the `wandb_workspaces` workspace, which `save()` sends to W&B; raise `UserError` without that package."""
    with as_user_error("the W&B panels need wandb-workspaces; pip install -e '.[wandb]' (", ImportError, after=")"):
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    sections: dict[str, list[Any]] = {}
    for panel in PANELS:
        drawn: dict[str, Any] = {"metric_regex": panel.regex} if panel.regex else {"y": list(panel.keys)}
        # the minimum and the maximum survive this down-sampling
        drawn |= {"log_y": panel.log or None, "point_visualization_method": "bucketing-gorilla"}
        sections.setdefault(panel.section, []).append(wr.LinePlot(title=panel.title, x="step", **drawn))
    shown = [ws.Section(name=name, panels=plots, is_open=i < 2) for i, (name, plots) in enumerate(sections.items())]
    settings = ws.WorkspaceSettings(x_axis="step")
    return ws.Workspace(entity=entity, project=project, name=WORKSPACE, sections=shown, settings=settings)


def layer_grids(metrics: Mapping[str, float]) -> dict[str, list[float]]:
    """Return `heatmap/STATISTIC/SITE` -> one value per layer, from the metrics of a probe.

    W&B draws one histogram per step as a heatmap, so a histogram with one bin per layer shows layers over steps. Its
    colours are linear, so the values are log10(1 + value), except for shares.
    """
    grids: dict[str, dict[int, float]] = {}
    for key, value in metrics.items():
        site = site_of(key)
        if site and site.stat in HEATMAPS and site.layer is not None:
            grids.setdefault(f"heatmap/{site.stat}/{site.kind}", {})[site.layer] = value
    return {
        name: [math.log10(1 + max(v, 0.0)) if "share" not in name else v for _, v in sorted(layers.items())]
        for name, layers in grids.items()
        if all(map(math.isfinite, layers.values()))
    }
