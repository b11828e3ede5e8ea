"""Work shared among ranks so that the result does not depend on their number.

The work is cut into batches first, rank r of W takes batches r, r + W, ...; every batch has a place of its own in a
vector of results, so that adding up the ranks' vectors adds zeros to every number, and rounds nothing.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of the rows of every batch: longest rows first, each batch at most `batch_tokens` with its padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def my_share(batches: Sequence[T], *, what: str, progress: bool) -> Iterator[tuple[int, T]]:
    """(number, batch) of this rank; with `progress`, rank 0 shows how far it is and the time left."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    numbers = range(rank, len(batches), world_size)
    for number in tqdm(numbers, desc=what, unit="batch", leave=False, disable=not progress or rank > 0):
        yield number, batches[number]


def add_up(results: Tensor) -> Tensor:
    """The sum over all ranks, on every rank; in place. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(results)
    return results


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model computes."""
    return next(model.parameters()).device
