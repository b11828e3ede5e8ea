"""Draw docs/assets/ablation.svg, the sweep over learning rates in benchmarks/ablation_nano.json.

Run from the root of the repository: `python docs/sweep.py`.
"""

import json
import math
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "benchmarks" / "ablation_nano.json"
PICTURE = Path(__file__).parent / "assets" / "ablation.svg"
# quantity -> title, ticks, whether the axis is logarithmic
PANELS: dict[str, tuple[str, list[float], bool]] = {
    "loss": ("Validation loss, nats", [3.2, 3.6, 4.0], False),
    "cost": ("4-4-4 costs, nats", [0, 0.04, 0.08, 0.12], False),
    "kurtosis": ("Kurtosis of the residual stream", [0, 2, 4], False),
    "down_proj_max": ("Largest value at down_proj", [10, 100, 1000], True),
}
WIDTH, HEIGHT = 340, 230  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 50, 56, 36, 30  # its margins; on the right are the names of the curves
STYLE = """text { font: 14px system-ui, sans-serif; fill: #57606a; }
    .title { font-weight: 600; fill: #24292f; } .adam { fill: #b45309; } .osp { fill: #15803d; }
    line { stroke: #8b949e; stroke-opacity: 0.35; } polyline { fill: none; stroke-width: 2.5; }
    polyline.adam { stroke: #d9730d; fill: none; } polyline.osp { stroke: #16a34a; fill: none; }
    @media (prefers-color-scheme: dark) {
      text { fill: #9aa4af; } .title { fill: #e6edf3; } .adam { fill: #f0984a; } .osp { fill: #4ade80; }
    }"""


def scaled(value: float, low: float, high: float, *, log: bool) -> float:
    """Return the place of `value` between 0 (`low`) and 1 (`high`)."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def panel(runs: list[dict[str, Any]], quantity: str, x0: int, y0: int) -> list[str]:
    """Return the elements of one chart whose upper left corner is (x0, y0)."""
    title, ticks, log = PANELS[quantity]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    numbers = [run["numbers"][quantity] for run in runs]
    low, high = min(ticks[0], *numbers), max(ticks[-1], *numbers)

    def y(value: float) -> float:
        return round(y0 + TOP + height * (1 - scaled(value, low, high, log=log)), 1)

    def x(rate: float) -> float:
        return round(x0 + LEFT + width * scaled(rate, 1e-3, 1e-2, log=True), 1)

    right = x0 + LEFT + width
    elements = [f'<text class="title" x="{x0 + 8}" y="{y0 + 20}">{title}</text>']
    for tick in ticks:
        elements.append(f'<line x1="{x0 + LEFT}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        elements.append(f'<text x="{x0 + LEFT - 6}" y="{y(tick) + 5}" text-anchor="end">{tick:g}</text>')
    for rate in (1e-3, 2e-3, 5e-3, 1e-2):
        elements.append(f'<text x="{x(rate)}" y="{y0 + HEIGHT - 8}" text-anchor="middle">{rate:g}</text>')
    for row in ("adam", "osp"):
        points = [(x(run["value"]), y(run["numbers"][quantity])) for run in runs if run["row"] == row]
        elements.append(f'<polyline class="{row}" points="{" ".join(f"{px},{py}" for px, py in points)}"/>')
        elements.append(f'<text class="{row}" x="{right + 6}" y="{points[-1][1] + 5}">{row}</text>')
    return elements


def render() -> str:
    """Return the picture as SVG."""
    runs = [run for run in json.loads(DATA.read_text(encoding="utf-8"))["runs"] if run["value"] is not None]
    runs.sort(key=lambda run: run["value"])
    elements = [f"<style>{STYLE}</style>"]
    for i, quantity in enumerate(PANELS):
        elements += panel(runs, quantity, 20 + i % 2 * WIDTH, i // 2 * HEIGHT)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {2 * HEIGHT}" role="img">'
    return "\n".join([head, *(f"  {element}" for element in elements), "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(render(), encoding="utf-8")
