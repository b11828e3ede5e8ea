"""What a choice of `configs` says, for benchmarks that build their configuration without Hydra."""

from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def group(name: str, choice: str) -> dict[str, Any]:
    """The keys of configs/NAME/CHOICE.yaml."""
    return yaml.safe_load((CONFIGS / name / f"{choice}.yaml").read_text()) or {}
