"""Draw the charts of README and docs/results.md as SVG, from the measurements in benchmarks/.

Run from the root of the repository:

    python docs/pictures.py                       # draws them again
    python docs/pictures.py ablations/outliers    # first reads the curves of `scripts/ablation.py scale=outliers`
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from osp.run.read import read_run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CURVES = BENCHMARKS / "outliers_curves.json"
ASSETS = Path(__file__).parent / "assets"
SITES = ("attn_in", "mlp_in", "block_out")  # the inputs of attention and MLP, and the residual stream
WIDTH, HEIGHT = 340, 230  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 50, 56, 36, 30  # its margins; on the right are the names of the curves
# mid-tones, legible on white and on black: a page may be dark while the system is light
STYLE = """text { font: 14px system-ui, sans-serif; fill: #717984; } .title { font-weight: 600; }
    .adam { fill: #d9730d; } .muon { fill: #8b5cf6; } .osp { fill: #16a34a; }
    line { stroke: #8b949e; stroke-opacity: 0.35; } polyline { stroke-width: 2.5; } .thin { stroke-width: 1.2; }
    polyline.adam { stroke: #d9730d; } polyline.muon { stroke: #8b5cf6; } polyline.osp { stroke: #16a34a; }
    polyline.adam, polyline.muon, polyline.osp { fill: none; }"""


@dataclass(frozen=True)
class Curve:
    """A curve named and coloured after its row. thin: of another seed, without the name."""

    row: str
    x: list[float]
    y: list[float]
    thin: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart. Axes end at the outer ticks or values, whichever is further out."""

    title: str
    x_ticks: list[float]
    y_ticks: list[float]
    log_x: bool = False
    log_y: bool = False
    curves: list[Curve] = field(default_factory=list)


# ---- what the pictures show ------------------------------------------------------------------------------------------


def collect(folder: Path) -> dict[str, list[dict[str, list[float]]]]:
    """Return steps, kurtosis and largest value of each run by row: the largest over SITES and layers at each probe."""
    curves: dict[str, list[dict[str, list[float]]]] = {}
    for path in sorted(folder.glob("runs/*-seed*/config.yaml")):
        sites = read_run(path.parent).sites()
        curve: dict[str, list[float]] = {}
        for statistic in ("kurtosis", "max_abs"):
            series = [s for site, s in sites.items() if site.stat == statistic and site.kind in SITES]
            curve["steps"] = series[0].steps.tolist()
            curve[statistic] = [round(value, 3) for value in np.max([s.values for s in series], axis=0).tolist()]
        curves.setdefault(path.parent.name.partition("-seed")[0], []).append(curve)
    if not curves:
        sys.exit(f"{folder} holds no runs; make them with: python scripts/ablation.py scale=outliers")
    return curves


def outliers() -> list[Panel]:
    """Return kurtosis and largest values over the steps of three recipes at the same learning rate."""
    rows = json.loads(CURVES.read_text(encoding="utf-8"))
    steps: list[float] = [0, 500, 1000, 1500, 2000]
    panels = {
        "kurtosis": Panel("Excess kurtosis over training steps", steps, [0, 5, 10, 15]),
        "max_abs": Panel("Largest activation", steps, [10, 100, 1000], log_y=True),
    }
    for statistic, panel in panels.items():
        for row in ("adam", "muon", "osp"):
            for seed, curve in enumerate(rows[row]):
                panel.curves.append(Curve(row, curve["steps"], curve[statistic], thin=seed > 0))
    return list(panels.values())


def sweep() -> list[Panel]:
    """Return four quantities of adam and osp over the learning rate."""
    runs: list[Any] = json.loads((BENCHMARKS / "ablation_nano.json").read_text(encoding="utf-8"))["runs"]
    runs = sorted((run for run in runs if run["value"] is not None), key=lambda run: run["value"])
    rates = [1e-3, 2e-3, 5e-3, 1e-2]
    panels = {
        "loss": Panel("Validation loss, nats", rates, [3.2, 3.6, 4.0], log_x=True),
        "cost": Panel("4-4-4 costs, nats", rates, [0, 0.04, 0.08, 0.12], log_x=True),
        "kurtosis": Panel("Kurtosis of the residual stream", rates, [0, 2, 4], log_x=True),
        "down_proj_max": Panel("Largest value at down_proj", rates, [10, 100, 1000], log_x=True, log_y=True),
    }
    for quantity, panel in panels.items():
        for row in ("adam", "osp"):
            of_row = [run for run in runs if run["row"] == row]
            panel.curves.append(
                Curve(row, [run["value"] for run in of_row], [run["numbers"][quantity] for run in of_row])
            )
    return list(panels.values())


def mechanism() -> list[Panel]:
    """Return the share of the top channel before and after the gain, its gain, and what 4 bits cost, over the steps."""
    rows = json.loads((BENCHMARKS / "mechanism.json").read_text(encoding="utf-8"))
    steps: list[float] = [0, 300, 600, 900, 1200]
    panels = {
        "before": Panel("Share of the channel before the gain", steps, [0, 0.2, 0.4, 0.6]),
        "after": Panel("Share of it after the gain", steps, [0, 0.2, 0.4, 0.6]),
        "gain": Panel("Its gain, in medians", steps, [1, 2, 3]),
        "copied_cost": Panel("4-4-4 costs, nats per copied token", steps, [0, 0.1, 0.2]),
    }
    for name, panel in panels.items():
        for row in ("muon", "osp"):
            for seed, curve in enumerate(rows[row]):
                x = curve["checkpoints" if name.endswith("cost") else "steps"]
                panel.curves.append(Curve(row, x, curve[name], thin=seed > 0))
    return list(panels.values())


PICTURES = {ASSETS / "outliers.svg": outliers, ASSETS / "ablation.svg": sweep, ASSETS / "mechanism.svg": mechanism}


# ---- drawing ---------------------------------------------------------------------------------------------------------


def scaled(value: float, ends: list[float], *, log: bool) -> float:
    """Return the place of `value` between 0 (the smallest of `ends`) and 1 (the largest)."""
    low, high = min(ends), max(ends)
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def draw(panel: Panel, x0: int, y0: int) -> list[str]:
    """Return the elements of one chart whose upper left corner is (x0, y0)."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    all_y = panel.y_ticks + [value for curve in panel.curves for value in curve.y]

    def y(value: float) -> float:
        return round(y0 + TOP + height * (1 - scaled(value, all_y, log=panel.log_y)), 1)

    def x(value: float) -> float:
        return round(x0 + LEFT + width * scaled(value, panel.x_ticks, log=panel.log_x), 1)

    right = x0 + LEFT + width
    elements = [f'<text class="title" x="{x0 + 8}" y="{y0 + 20}">{panel.title}</text>']
    for tick in panel.y_ticks:
        elements.append(f'<line x1="{x0 + LEFT}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        elements.append(f'<text x="{x0 + LEFT - 6}" y="{y(tick) + 5}" text-anchor="end">{tick:g}</text>')
    for tick in panel.x_ticks:
        elements.append(f'<text x="{x(tick)}" y="{y0 + HEIGHT - 8}" text-anchor="middle">{tick:g}</text>')
    for curve in panel.curves:
        points = [(x(px), y(py)) for px, py in zip(curve.x, curve.y, strict=True)]
        name = f"{curve.row} thin" if curve.thin else curve.row
        elements.append(f'<polyline class="{name}" points="{" ".join(f"{px},{py}" for px, py in points)}"/>')
        if not curve.thin:
            elements.append(f'<text class="{curve.row}" x="{right + 6}" y="{points[-1][1] + 5}">{curve.row}</text>')
    return elements


def render(panels: list[Panel]) -> str:
    """Return panels, two in a row, as SVG."""
    elements = [f"<style>{STYLE}</style>"]
    for i, panel in enumerate(panels):
        elements += draw(panel, 20 + i % 2 * WIDTH, i // 2 * HEIGHT)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {len(panels) // 2 * HEIGHT}" role="img">'
    return "\n".join([head, *(f"  {element}" for element in elements), "</svg>\n"])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        CURVES.write_text(json.dumps(collect(Path(sys.argv[1]))) + "\n", encoding="utf-8")
    for file, panels in PICTURES.items():
        file.write_text(render(panels()), encoding="utf-8")
