"""The table of metrics and the W&B panels: complete, documented, and drawn from keys that a run logs."""

import json
import re
from pathlib import Path

import pytest

from osp.run import metrics as panels
from osp.run.metrics import METRICS, metric_of
from osp.run.read import read_run
from tests.conftest import ROOT
from tests.made_run import made_run


def unknown_metrics(metrics: set[str]) -> list[str]:
    """Return the logged keys that the table of metrics lacks."""
    return sorted(key for key in metrics - {"tokens"} if metric_of(key) is None)


def test_documentation_has_key_title_unit_and_direction_of_every_metric() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|(.+)\|$", text, flags=re.MULTILINE)
    cells = {key: [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", rest)] for key, rest in rows}
    assert {key: row[:3] for key, row in cells.items()} == {
        key: [metric.full_title, metric.unit, metric.better] for key, metric in METRICS.items()
    }
    assert all(len(row) == 4 and row[3] for row in cells.values())


def test_panels_draw_metrics_that_exist(tmp_path: Path) -> None:
    """Every key and pattern of the panels matches a metric of a run, and every metric of a run is in the table."""
    folder = made_run(tmp_path / "run", steps=60, layers=2)
    metrics = set(read_run(folder).series) | {"monitor/alerts"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics |= set(panels.layer_grids(next(line for line in lines if "monitor/cost" in line)))
    for panel in panels.PANELS:
        matched = [m for m in metrics if (re.match(panel.regex, m) if panel.regex else m in panel.keys)]
        assert len(matched) >= len(panel.keys), (panel, matched)
    assert len({(panel.section, panel.title) for panel in panels.PANELS}) == len(panels.PANELS)
    assert not unknown_metrics(metrics)
    assert unknown_metrics({"train/loss", "train/losses", "monitor/kurtosis/layer_00/q", "monitor/kurtoses/q"}) == [
        "monitor/kurtoses/q", "train/losses",
    ]  # fmt: skip


def test_names_of_sites_follow_the_model() -> None:
    from osp.model.sites import SITES

    assert set(panels.SITE_TITLES) == set(SITES) - {"head_in"}  # which is quantized and not measured


def test_workspace_is_built_from_the_panels() -> None:
    pytest.importorskip("wandb_workspaces")
    workspace = panels.build_workspace("entity", "project")
    spec = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    sections = spec["section"]["panelBankConfig"]["sections"]
    plots = [panel["config"] for section in sections for panel in section["panels"]]
    assert [plot["chartTitle"] for plot in plots] == [panel.title for panel in panels.PANELS]
    assert [plot.get("metricRegex", "") for plot in plots] == [panel.regex for panel in panels.PANELS]
    assert [tuple(plot["metrics"]) for plot in plots] == [() if panel.regex else panel.keys for panel in panels.PANELS]
    assert {plot["xAxis"] for plot in plots} == {"step"}


def test_layers_of_a_probe_become_one_heatmap_column() -> None:
    metrics = {
        "monitor/kurtosis/layer_01/q": 999.0,
        "monitor/kurtosis/layer_00/q": -1.0,
        "monitor/top_channel_share/layer_00/q": 0.25,
        "monitor/rms/layer_00/q": 2.0,
        "monitor/kurtosis/embed_out": 1.0,
        "train/loss": 3.0,
    }
    assert panels.layer_grids(metrics) == {"heatmap/kurtosis/q": [0.0, 3.0], "heatmap/top_channel_share/q": [0.25]}
