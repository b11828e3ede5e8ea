"""Number formats: the sets of values that a tensor is rounded to. One class per format, listed in `FORMATS`.

A format rounds along the last axis: the input channels of a weight (out, in), the channels of an activation (..., D).
With `group_size` each group of consecutive channels is rounded by itself. Values stay floating point (fake
quantization): the arithmetic is fp32, the result has the dtype of the input.

To add a format, write a class with `name`, `widths` and `round`, and enter it in `FORMATS`. `quant.w_format=NAME`,
`a_format` and `kv_format` then select it for weights, activations and the cache.

The defaults follow OSP's evaluation (arXiv 2506.19697; the quantizers of QuaRot, arXiv 2404.00456): weights
symmetric per output channel, activations asymmetric per token.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from osp.quant.grid import Grid, clipped, grouped


class NumberFormat(ABC):
    """A format at a number of bits."""

    name: ClassVar[str]  # in configurations and in the description of a quantization
    widths: ClassVar[range] = range(2, 17)  # bits at which the format exists
    block_size: ClassVar[int | None] = None  # group size that the format prescribes; None: any
    needs_calibration: ClassVar[bool] = False  # whether it can only be used with calibration text
    has_grid: ClassVar[bool] = False  # whether `grid` is defined, which GPTQ and the clip search need

    def __init__(self, bits: int):
        if bits not in self.widths:
            raise ValueError(f"bits={bits}: choose from {self.widths.start} to {self.widths.stop - 1}")
        self.bits = bits

    @abstractmethod
    def round(self, x: Tensor, *, group_size: int | None = None, clip_search: bool = False) -> Tensor:
        """Return `x`, of any shape, rounded to the format.

        Args:
            group_size: channels that share a scale; None: all channels, or `block_size`.
            clip_search: whether to clip where that makes the error smallest, if the format has a grid.
        """

    def grid(self, groups: Tensor, *, clip_search: bool = False) -> Grid:
        """Return the values of the format for each group of `groups` (..., group_size)."""
        raise NotImplementedError(f"{self.name} has no fixed grid")


class Integer(NumberFormat):
    """Integers times a scale; the classes below say where zero is."""

    has_grid = True

    def round(self, x: Tensor, *, group_size: int | None = None, clip_search: bool = False) -> Tensor:
        groups = grouped(x, group_size=group_size)
        return self.grid(groups, clip_search=clip_search).nearest(groups).reshape(x.shape).to(x.dtype)

    def grid(self, groups: Tensor, *, clip_search: bool = False) -> Grid:
        full = self.full_grid(groups.float())
        return clipped(full, groups) if clip_search else full

    @abstractmethod
    def full_grid(self, groups: Tensor) -> Grid:
        """Return the grid that reaches the extremes of each group; its step is 1 where a group is all zero."""


class SymmetricInteger(Integer):
    """s clamp(round(x / s), -2^(b-1), 2^(b-1) - 1) with s = max|x| / (2^(b-1) - 1)."""

    name = "sym"

    def full_grid(self, groups: Tensor) -> Grid:
        high = 2 ** (self.bits - 1) - 1
        scale = groups.abs().amax(-1, keepdim=True) / high
        scale = torch.where(scale == 0, 1.0, scale)
        return Grid(scale, torch.zeros_like(scale), -high - 1, high)


class AsymmetricInteger(Integer):
    """s (clamp(round(x / s) + z, 0, 2^b - 1) - z) with s = (max(x, 0) - min(x, 0)) / (2^b - 1).

    z = round(-min(x, 0) / s). The range includes 0, so that 0 is a level.
    """

    name = "asym"

    def full_grid(self, groups: Tensor) -> Grid:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**self.bits - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        return Grid(scale, (-low / scale).round(), 0, 2**self.bits - 1)


FORMATS: dict[str, type[NumberFormat]] = {cls.name: cls for cls in (SymmetricInteger, AsymmetricInteger)}
