"""A training whose ranks die at chosen steps; the ranks of `test_faults.py` import this module."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from osp.config import from_dict
from osp.data.loader import Batch, Loader
from osp.errors import RunError, UserError
from osp.run import checkpoint
from osp.train.engine import Engine
from osp.train.setup import train

Death = tuple[Literal["tearing a file", "updating", "before publishing", "after publishing"], int]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_death(values: dict[str, Any], deaths: dict[int, Death]) -> None:
    """Train the configuration `values`. deaths: rank -> how it dies, and in which of these calls in its life"""
    if dist.get_rank() in deaths:
        _arm(*deaths[dist.get_rank()])
    train(from_dict(values))


def train_until_data_fails(values: dict[str, Any], *, unreadable: int) -> str:
    """Train `values`, where rank 1 cannot read the step `unreadable`, from 0; return the error of this rank."""
    read = Loader._read

    def fail(self: Loader, step: int) -> list[Batch]:
        if step >= unreadable and self.rank == 1:
            raise UserError("shard 7: no space left on device")
        return read(self, step)

    Loader._read = fail
    try:
        train(from_dict(values))
    except RunError as error:
        return str(error)
    return ""


def _arm(how: str, number: int) -> None:
    calls = itertools.count(1)
    write_tensors, step, rename = checkpoint.write_tensors, Engine.step, Path.rename

    def write_torn(path: Path, tensors: Any) -> Any:
        result = write_tensors(path, tensors)
        if path.name.startswith("rank_") and next(calls) == number:
            os.truncate(path, path.stat().st_size // 2)
            die()
        return result

    def step_or_die(self: Engine, *args: Any, **kwargs: Any) -> None:
        if next(calls) == number:
            die()
        step(self, *args, **kwargs)

    def publish_or_die(self: Path, target: Any) -> Any:
        deadly = target.name.startswith("step_") and next(calls) == number
        if deadly and how == "before publishing":
            die()
        renamed = rename(self, target)
        if deadly:
            die()
        return renamed

    if how == "tearing a file":
        checkpoint.write_tensors = write_torn
    elif how == "updating":
        Engine.step = step_or_die
    else:
        Path.rename = publish_or_die
