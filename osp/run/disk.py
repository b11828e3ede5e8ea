"""Room and speed of the disk that a run writes its checkpoints to."""

import os
import shutil
import time
from pathlib import Path

import torch

from osp.errors import UserError
from osp.run.checkpoint import candidates, write_tensors


def checkpoint_bytes(shapes: dict[str, list[int]], states_per_weight: float) -> int:
    """Return the size of a checkpoint: fp32 weights, and `states_per_weight` fp32 optimizer values for each."""
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    return int(4 * numel * (1 + states_per_weight))


def check_disk(folder: Path, num_bytes: int, *, keep_last: int) -> None:
    """Raise `UserError` unless the checkpoints of `num_bytes` that a run keeps fit on the disk of its folder.

    Existing checkpoints need no more room. The next one is written before the oldest is removed.
    """
    copies = max(1, max(1, keep_last) + 1 - len(candidates(folder)))
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"run.dir={folder}: {place} is a file; choose another run.dir")
    free = shutil.disk_usage(place).free
    if free < num_bytes * copies:
        raise UserError(
            f"run.dir={folder}: {copies} more checkpoint{'s' * (copies > 1)} of {num_bytes / 1e9:.2f} GB, as "
            f"checkpoint.keep_last={keep_last} needs, do not fit into the {free / 1e9:.2f} GB free there; choose "
            "another run.dir or a smaller checkpoint.keep_last"
        )
    if not os.access(place, os.W_OK):
        raise UserError(f"run.dir={folder}: cannot write there")


def seconds_to_write(folder: Path, num_bytes: int, *, sample: int = 2**26) -> float:
    """Return the seconds to write, flush and hash `num_bytes` in `folder`, measured with `sample` bytes.

    All ranks measure at the same time, as they save at the same time. The test file is removed.
    """
    path = folder / f".write_test.{os.getpid()}.tmp"
    sample = max(1, min(sample, num_bytes))
    began = time.perf_counter()
    try:
        write_tensors(path, {"x": torch.zeros(sample, dtype=torch.uint8)})
    finally:
        path.unlink(missing_ok=True)
    return (time.perf_counter() - began) * num_bytes / sample
