"""A penalty on large activations, which `penalty.weight` adds to the training loss.

    penalty of a token = mean over layers and channels of (|x| / s)^4,    loss + weight * mean over tokens of it

With x the output of each block and a fixed scale s (`penalty.scale`) this is TWEO (arXiv 2511.23225). Its authors use s
from 2 to 5; values far below s hardly count. With `site=down_proj_in` x is the input of down_proj, where outliers are
largest in outlier-safe models. With `scale=rms` s is the RMS of the token: the penalty is the kurtosis over channels
(uncentred, 3 for a Gaussian), and scaling x down does not lower it.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from osp.config import PenaltyConfig

EPS = 1e-12  # added to the mean square of a token before the division


def activation_penalty(x: Tensor, config: PenaltyConfig) -> Tensor:
    """Return the sum over tokens of the mean over channels of (|x| / scale)^4, fp32, 0-dim. x: (..., D)"""
    # autograd keeps only x; backward recomputes the powers
    return checkpoint(_sum_of_fourth_powers, x, config.scale, use_reentrant=False, preserve_rng_state=False)


def _sum_of_fourth_powers(x: Tensor, scale: float | str) -> Tensor:
    # fp32: a fourth power leaves bf16 no useful digits
    square = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    unit = square.mean(-1, keepdim=True) + EPS if scale == "rms" else float(scale) ** 2
    return (square / unit).square().mean(-1).sum()
