"""Reproduce the paper's table with new runs: `python scripts/ablation.py scale=nano seeds=[0,1]`.

Keys of a training, for instance `train.steps=500`, apply to all rows.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from entry import compose, launch

from osp.ablation.config import AblationConfig
from osp.config import AT_TOP, Config
from osp.schema import build

OF_A_TRAINING = {field.name for field in dataclasses.fields(Config)} - {"debug"} | set(AT_TOP)


def main(values: dict[str, Any]) -> None:
    config = build(AblationConfig, {**values, "overrides": OVERRIDES})
    from osp.ablation.execute import ablate

    ablate(config, compose, scripts=Path(__file__).parent, command=COMMAND)
    for name in ("ablation.md", "ablation.json"):
        print(Path(config.dir) / name)


def is_override(argument: str) -> bool:
    """Return whether an argument is a key of a training and not of this script."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.lstrip("+~").split(".")[0].split("@")[0] in OF_A_TRAINING


COMMAND = ["scripts/ablation.py", *sys.argv[1:]]
OVERRIDES = [argument for argument in sys.argv[1:] if is_override(argument)]

if __name__ == "__main__":
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in OVERRIDES]
    launch(main, "ablation", defaults=dataclasses.asdict(AblationConfig()))
