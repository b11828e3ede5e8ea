"""Number formats: the sets of values that a tensor is rounded to. One class per format, listed in `FORMATS`.

A format rounds along the last axis: the input channels of a weight (out, in), the channels of an activation (..., D).
With `group_size` each group of consecutive channels is rounded by itself; a block format prescribes the size. Values
stay floating point (fake quantization): the arithmetic is fp32, the result has the dtype of the input.

To add a format, write a class with `name`, `widths` and `grid`, `nearest` or `round`, and enter it in `FORMATS`.
`quant.w_format=NAME`, `a_format` and `kv_format` then select it for weights, activations and the cache.

The defaults follow OSP's evaluation (arXiv 2506.19697; the quantizers of QuaRot, arXiv 2404.00456): weights
symmetric per output channel, activations asymmetric per token.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from osp.quant.grid import FloatGrid, Grid, clipped, grouped, ungrouped

E2M1_MAX, E4M3_MAX = 6, 448


class NumberFormat:
    """A format at a number of bits."""

    name: ClassVar[str]  # in configurations and in the description of a quantization
    widths: ClassVar[range] = range(2, 17)  # bits at which the format exists
    block_size: ClassVar[int | None] = None  # group size that the format prescribes; None: any
    tensor_scale: ClassVar[bool] = False  # a scale of the whole tensor comes on top of the block scales
    can_be_static: ClassVar[bool] = False  # `round` takes the extremes of the whole tensor as `bounds`
    has_grid: ClassVar[bool] = False  # `grid` is defined, which GPTQ and the clip search need

    def __init__(self, bits: int):
        if bits not in self.widths:
            raise ValueError(f"bits={bits}: choose from {self.widths.start} to {self.widths.stop - 1}")
        self.bits = bits

    def round(
        self, x: Tensor, *, group_size: int | None = None, clip_search: bool = False, bounds: Tensor | None = None
    ) -> Tensor:
        """Return `x`, of any shape, rounded to the format.

        Args:
            group_size: channels that share a scale; None: all channels, or `block_size`.
            clip_search: whether to clip where that makes the error smallest, if the format has a grid.
            bounds: (2,) the least and the largest value of the whole tensor, if `can_be_static`; None: of `x`.
        """
        groups = grouped(x, group_size=self.block_size or group_size)
        return ungrouped(self.nearest(groups, clip_search=clip_search, bounds=bounds), x)

    def nearest(self, groups: Tensor, *, clip_search: bool, bounds: Tensor | None) -> Tensor:
        """Return the values nearest to `groups` (..., group_size), fp32."""
        return self.grid(groups, clip_search=clip_search, bounds=bounds).nearest(groups)

    def grid(self, groups: Tensor, *, clip_search: bool = False, bounds: Tensor | None = None) -> Grid:
        """Return the values of the format for each group of `groups` (..., group_size)."""
        raise NotImplementedError(f"{self.name} has no grid")


class Integer(NumberFormat, ABC):
    """Integers times a scale; the classes below say where zero is. With `bounds` the whole tensor has one scale."""

    can_be_static = True
    has_grid = True

    def grid(self, groups: Tensor, *, clip_search: bool = False, bounds: Tensor | None = None) -> Grid:
        full = self.full_grid(groups.float() if bounds is None else bounds.float())
        return clipped(full, groups) if clip_search else full

    @abstractmethod
    def full_grid(self, groups: Tensor) -> Grid:
        """Return the grid that reaches the extremes of each group; its step is 1 where a group is all zero."""


class SymmetricInteger(Integer):
    """s clamp(round(x / s), -2^(b-1), 2^(b-1) - 1) with s = max|x| / (2^(b-1) - 1)."""

    name = "sym"

    def full_grid(self, groups: Tensor) -> Grid:
        scale = groups.abs().amax(-1, keepdim=True) / self.steps_to_extreme()
        scale = torch.where(scale == 0, 1.0, scale)
        high = 2 ** (self.bits - 1) - 1
        return Grid(scale, torch.zeros_like(scale), -high - 1, high)

    def steps_to_extreme(self) -> float:
        """Return max|x| / s."""
        return 2 ** (self.bits - 1) - 1


class HalfRangeInteger(SymmetricInteger):
    """Symmetric with s = max|x| / (2^b - 1) * 2, the convention of compressed-tensors.

    A positive extreme is rounded half a step down, and all 2^b integers are used.
    """

    name = "half"

    def steps_to_extreme(self) -> float:
        return (2**self.bits - 1) / 2


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


class NVFP4(NumberFormat):
    """E2M1 in blocks of 16: s e2m1(x / s) with s = e4m3(g max|x| / 6) / g and g = 448 * 6 / (max|x| of the tensor).

    NVIDIA's format of Blackwell (arXiv 2509.25149), rounded as compressed-tensors emulates it.
    """

    name = "nvfp4"
    widths = range(4, 5)
    block_size = 16
    tensor_scale = True
    can_be_static = True
    has_grid = True

    def grid(self, groups: Tensor, *, clip_search: bool = False, bounds: Tensor | None = None) -> Grid:
        g = self.scale_of_tensor(groups if bounds is None else bounds)

        def representable(scale: Tensor) -> Tensor:
            rounded = (g * scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
            return torch.where(rounded == 0, 0.125, rounded) / g  # 0 becomes 1/8 as in compressed-tensors

        scale = representable(groups.float().abs().amax(-1, keepdim=True) / E2M1_MAX)
        full = FloatGrid(scale, torch.zeros_like(scale), -E2M1_MAX, E2M1_MAX)
        return clipped(full, groups, representable) if clip_search else full

    @staticmethod
    def scale_of_tensor(x: Tensor) -> Tensor:
        """Return g of a tensor with the extremes of `x`, fp32."""
        largest = x.float().abs().amax()
        return E4M3_MAX * E2M1_MAX / largest.clamp(min=torch.finfo(torch.float32).tiny)


class MXFP4(NumberFormat):
    """E2M1 in blocks of 32: s e2m1(x / s) with s = 2^(floor(log2 max|x|) - 2), a power of two (E8M0).

    OCP Microscaling Formats 1.0. The standard leaves the rounding of the scale open; here, as in compressed-tensors
    and as "even" in torchao, the exponent is one higher if max|x| would be rounded above 6 s.
    """

    name = "mxfp4"
    widths = range(4, 5)
    block_size = 32
    has_grid = True

    def grid(self, groups: Tensor, *, clip_search: bool = False, bounds: Tensor | None = None) -> Grid:
        mantissa, exponent = torch.frexp(groups.float().abs().amax(-1, keepdim=True))  # mantissa in [0.5, 1)
        scale = power_of_two(exponent - 3 + (mantissa >= 0.875))
        full = FloatGrid(scale, torch.zeros_like(scale), -E2M1_MAX, E2M1_MAX)
        return clipped(full, groups, lambda s: power_of_two(torch.frexp(s)[1] - 1)) if clip_search else full


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent for an integer tensor, fp32 and exact; exponents stay within -126 and 127."""
    return ((exponent.clamp(-126, 127) + 127).int() << 23).view(torch.float32)


class Q4_0(NumberFormat):  # noqa: N801, the name in GGUF
    """GGUF's Q4_0, blocks of 32: d (clamp(trunc(x / d + 8.5), 0, 15) - 8), d = m / -8, m the x with the largest |x|.

    d is stored in fp16 and used in fp32 for rounding, as in the library `gguf`.
    """

    name = "q4_0"
    widths = range(4, 5)
    block_size = 32

    def nearest(self, groups: Tensor, *, clip_search: bool, bounds: Tensor | None) -> Tensor:
        d = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
        levels = (groups * _inverse(d) + 8.5).trunc().clamp(0, 15) - 8
        return levels * d.half().float()


class Q8_0(NumberFormat):  # noqa: N801
    """GGUF's Q8_0, blocks of 32: d round(x / d) with d = max|x| / 127, halves away from zero; d is stored in fp16."""

    name = "q8_0"
    widths = range(8, 9)
    block_size = 32

    def nearest(self, groups: Tensor, *, clip_search: bool, bounds: Tensor | None) -> Tensor:
        d = groups.abs().amax(-1, keepdim=True) / 127
        scaled = groups * _inverse(d)
        whole = scaled.abs().floor()
        levels = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())
        return levels * d.half().float()


def _inverse(d: Tensor) -> Tensor:
    """Return 1 / d, and 0 for 0."""
    return torch.where(d == 0, 0.0, 1 / d)


FORMATS: dict[str, type[NumberFormat]] = {
    cls.name: cls for cls in (SymmetricInteger, HalfRangeInteger, AsymmetricInteger, NVFP4, MXFP4, Q4_0, Q8_0)
}
