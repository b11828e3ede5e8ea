"""Grids for fake quantization: values move to the nearest point and stay floating point. The arithmetic is fp32."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
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

    def round(self, x: Tensor, *, group_size: int | None) -> Tensor:
        """Return x (..., channels) with each group of channels at the nearest values of its grid, in its dtype."""
        groups = self.nearest(grouped(x, group_size=group_size))
        return ungrouped(groups, x)


class FloatGrid(Grid):
    """The values s * f for the floats f of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. z is 0."""

    def levels(self, x: Tensor) -> Tensor:
        """Return the floats f nearest to x (..., group), fp32; ties go to the one with an even mantissa."""
        y = (x.float() / self.scale).clamp_(self.low, self.high)
        power = (y.view(torch.int32) & 0x7F800000).view(torch.float32)  # the power of two at or below |y|
        step = power.clamp_(min=1).mul_(0.5)  # one bit of mantissa; 0.5 is subnormal
        return y.div_(step).round_().mul_(step)


def clipped(full: Grid, x: Tensor, representable: Callable[[Tensor], Tensor] = lambda scale: scale) -> Grid:
    """Return the grid `full` times the ratio of `CLIP_RATIOS` with the least error sum |q - x|^CLIP_NORM.

    Of equal errors the widest grid is taken. The search of GPTQ's and QuaRot's code ("w_clip", "mse"), which raises
    the error to 2.4 and not to 2. representable: rounds a scale to one that the format can store.
    """
    x = x.float()
    scale, least = full.scale, torch.full_like(full.scale, torch.inf)
    candidates = [representable(full.scale * ratio) for ratio in CLIP_RATIOS]
    for before, narrower in zip([None, *candidates], candidates, strict=False):
        if before is not None and torch.equal(before, narrower):
            continue  # powers of two
        candidate = full._replace(scale=narrower)
        error = candidate.nearest(x).sub_(x).abs_().pow_(CLIP_NORM).sum(-1, keepdim=True)
        scale = torch.where(error < least, candidate.scale, scale)
        least = torch.minimum(error, least)
    return full._replace(scale=scale)


def grouped(x: Tensor, *, group_size: int | None) -> Tensor:
    """Return x in fp32 as (..., groups, group_size). Zeros fill the last group if the size does not divide the axis."""
    size = x.shape[-1] if group_size is None else group_size
    return F.pad(x.float(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def ungrouped(groups: Tensor, x: Tensor) -> Tensor:
    """Return the groups of `x` (see `grouped`) in its shape and dtype."""
    return groups.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


class StraightThrough(torch.autograd.Function):
    """Return quantize(x) in the forward pass; the gradient passes through as if it were x."""

    @staticmethod
    def forward(ctx: object, quantize: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return quantize(x)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        return None, grad_outputs[0]
