"""Read choices of `configs/` for benchmarks that build their configuration without Hydra."""

from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NO_CHECKPOINTS = {"every": 0, "keep_last": 1}  # else a run asks for room on the disk, 43 GB at osp_1b


def group(name: str, choice: str) -> dict[str, Any]:
    """Return the keys of configs/NAME/CHOICE.yaml."""
    return yaml.safe_load((CONFIGS / name / f"{choice}.yaml").read_text()) or {}


def osp_values(model: str, *, threads: int | None) -> dict[str, Any]:
    """Return OSP's recipe for a choice of configs/model, without W&B and progress bar, as part of a configuration."""
    return {
        "model": {**group("model", model), "embed_proj": True},
        "norm": group("norm", "ssnorm"),
        "optimizer": {**group("optimizer", "muon"), "lr": 1e-3},
        "engine": {"threads": threads},
        "logger": {"wandb": "disabled", "progress": False},
    }
