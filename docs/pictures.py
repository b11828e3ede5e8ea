"""Draw the README's picture, docs/assets/outliers.svg, from the runs of `python scripts/ablation.py scale=outliers`.

Run from the root of the repository: `python docs/pictures.py ablations/outliers`.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

from osp.run.read import Run, read_run

matplotlib.use("svg")
import matplotlib.pyplot as plt
import matplotlib.ticker

ROWS = {"adam": ("AdamW, RMSNorm", "#d9730d"), "muon": ("Muon, RMSNorm", "#8b5cf6"), "osp": ("OSP", "#16a34a")}
PANELS = {"kurtosis": "Excess kurtosis (normal distribution: 0)", "max_abs": "Largest activation"}
SITES = ("attn_in", "mlp_in", "block_out")  # the inputs of attention and MLP, and the residual stream
GREY = "#7d8590"  # legible on white and on black


def largest(run: Run, statistic: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of the probes and the largest value of a statistic at each, over SITES and all layers."""
    series = [s for site, s in run.sites().items() if site.stat == statistic and site.kind in SITES]
    return series[0].steps, np.max([s.values for s in series], axis=0)


def draw(folder: Path, file: Path) -> None:
    """Draw kurtosis and the largest value over the steps, one line for each seed of each row, into `file`."""
    plt.rcParams.update({"svg.hashsalt": "osp", "font.size": 11, "text.color": GREY, "axes.labelcolor": GREY})
    plt.rcParams.update({"axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY})
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.5), layout="constrained")
    panels = zip(
        axes,
        ("kurtosis", "max_abs"),
        ("Excess kurtosis (of a normal distribution: 0)", "Largest activation"),
        strict=True,
    )
    for panel, statistic, title in panels:
        for row, (label, color) in ROWS.items():
            paths = sorted(folder.glob(f"runs/{row}-seed*/config.yaml"))
            if not paths:
                sys.exit(f"{folder} holds no run of {row}; make it with: python scripts/ablation.py scale=outliers")
            for seed, path in enumerate(paths):
                steps, values = largest(read_run(path.parent), statistic)
                panel.plot(
                    steps, values, color=color, linewidth=2.2 if seed == 0 else 1.2, label=None if seed else label
                )
        panel.set_title(title, color=GREY, loc="left")
        panel.set_xlabel("training step")
        panel.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(500))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, color=GREY, linewidth=0.6)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False, loc="upper left")
    figure.savefig(file, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder of the ablation: python docs/pictures.py ablations/outliers")
    draw(Path(sys.argv[1]), Path(__file__).parent / "assets" / "outliers.svg")
