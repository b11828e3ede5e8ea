"""Division by a root mean square with a hand-written backward pass, shared by the norms."""

from typing import Any

import torch
from torch import Tensor


class Divided(torch.autograd.Function):
    """(y, v): y = x * slope / sqrt(v + eps) * gain in the dtype of x (..., D), v (..., 1) fp32 (fp64 of fp64).

    v is an argument, or None to compute mean(x^2), which is then returned. slope (1,) and gain (1,) or (D,) may be None
    for 1. y is rounded to the dtype of x before the multiplication by the gain. With r = 1 / sqrt(v + eps) and
    a = sum over channels of dy gain x, where dslope and dgain are summed over tokens,

        dslope = sum(r a)    dgain = sum(slope r dy x)    dv = -slope r^3 a / 2    dx = slope r gain dy

    and if v is computed from x, dx gets 2 dv x / D in addition. Autograd needs up to three times as many passes over
    memory, which bound the speed of an eager norm, and keeps the normalized x and an fp32 copy of x besides x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, variance: Tensor | None, slope: Tensor | None, gain: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        wide = upcast(x)
        ctx.measured = variance is None
        used = wide.square().mean(-1, keepdim=True) if variance is None else variance
        rstd = torch.rsqrt(used + eps)
        y = (wide * (rstd if slope is None else rstd * slope)).to(x.dtype)
        ctx.save_for_backward(x, rstd, slope, gain)
        return y if gain is None else y * gain.to(x.dtype), used if ctx.measured else None

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, slope, gain = ctx.saved_tensors
        wide, dy = upcast(x), upcast(grad_outputs[0])
        scale = rstd if slope is None else rstd * slope
        product, dgain = dy * wide, None  # sums, not products of matrices: torch.compile fuses them
        if gain is None or gain.numel() == 1:
            a = product.sum(-1, keepdim=True)
            dx = dy * (scale if gain is None else scale * gain)
            if gain is not None:
                dgain, a = (scale * a).sum().view(1), a * gain
        else:
            a = (product * gain).sum(-1, keepdim=True)
            dx = (dy * gain).mul_(scale)
            dgain = (product * scale).flatten(0, -2).sum(0)
        dslope = None if slope is None else (rstd * a).sum().view(1)
        dvariance = scale * rstd.square() * a / -2
        if ctx.measured:
            dx.addcmul_(wide, (dvariance + grad_outputs[1]) * (2 / x.shape[-1]))
        return dx.to(x.dtype), None if ctx.measured else dvariance, dslope, dgain, None


def upcast(x: Tensor) -> Tensor:
    """Return x in the dtype of statistics: fp64 for fp64, fp32 otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
