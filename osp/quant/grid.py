"""Grids for fake quantization: values move to the nearest point and stay floating point. The arithmetic is fp32."""

from typing import NamedTuple

import torch
from torch import Tensor

CLIP_RATIOS = tuple(1 - i / 100 for i in range(80))  # of the clip search, from the whole range downwards
CLIP_NORM = 2.4  # power of the error that the clip search minimizes


class Grid(NamedTuple):
    """The values s * (n - z) for the integers n from `low` to `high`."""

    scale: Tensor  # (..., 1) s, fp32, above 0
    zero: Tensor  # (..., 1) z, integer-valued fp32: the n of the value 0
    low: int
    high: int

    def levels(self, x: Tensor) -> Tensor:
        """Return the integers n nearest to x (..., group), fp32; ties go to the even one before z is added."""
        return (x.float() / self.scale).round_().add_(self.zero).clamp_(self.low, self.high)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the values of the grid nearest to x (..., group), fp32."""
        return self.levels(x).sub_(self.zero).mul_(self.scale)


def clipped(full: Grid, x: Tensor) -> Grid:
    """Return the grid `full` times the ratio of `CLIP_RATIOS` with the least error sum |q - x|^CLIP_NORM.

    Of equal errors the widest grid is taken. The search of GPTQ's and QuaRot's code ("w_clip", "mse"), which raises
    the error to 2.4 and not to 2.
    """
    x = x.float()
    scale, least = full.scale, torch.full_like(full.scale, torch.inf)
    for ratio in CLIP_RATIOS:
        candidate = full._replace(scale=full.scale * ratio)
        error = candidate.nearest(x).sub_(x).abs_().pow_(CLIP_NORM).sum(-1, keepdim=True)
        scale = torch.where(error < least, candidate.scale, scale)
        least = torch.minimum(error, least)
    return full._replace(scale=scale)


def grouped(x: Tensor, *, group_size: int | None) -> Tensor:
    """Return x in fp32 as (..., groups, group_size); raise `ValueError` if groups do not divide the last axis."""
    size = x.shape[-1] if group_size is None else group_size
    if size < 1 or x.shape[-1] % size:
        raise ValueError(f"group_size={group_size} does not divide the {x.shape[-1]} channels")
    return x.float().unflatten(-1, (-1, size))
