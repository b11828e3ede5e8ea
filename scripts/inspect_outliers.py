"""Find the outliers of a model and when they appeared: `python scripts/inspect_outliers.py RUN_OR_CHECKPOINT`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entry import launch

from osp.config import Weights
from osp.errors import UserError
from osp.schema import FilePath, build


@dataclass(frozen=True)
class InspectConfig:
    path: FilePath | None = None  # a run folder or one of its checkpoints
    weights: Weights = "trained"  # averaged: their running average, see the table `average` of a training
    text: FilePath | None = None  # a text file; None: the run's validation split
    out: FilePath | None = None  # folder of the bundle; None: forensics of the run
    debug: bool = False  # show tracebacks of user errors


def main(values: dict[str, Any]) -> None:
    config = build(InspectConfig, values)
    if config.path is None:
        raise UserError("usage: python scripts/inspect_outliers.py RUN_OR_CHECKPOINT [text=FILE] [out=DIR]")
    # imports torch, after the checks: a typing mistake is reported at once
    from osp.monitor.inspect import inspect

    text, out = (Path(name) if name else None for name in (config.text, config.out))
    table, bundle = inspect(Path(config.path), text, out, config.weights)
    print(f"{table}\n\nthe first line in full: {bundle} and .md beside it")


if __name__ == "__main__":
    launch(main, "inspect_outliers", defaults=dataclasses.asdict(InspectConfig()), positional="path")
