"""A price on large activations: what `penalty.weight` adds to the loss of training.

    penalty of a token = mean over layers and channels of (|x| / s)^4,    loss + weight * mean over tokens of it

With a fixed `penalty.scale` s and x the output of each block this is TWEO (arXiv 2511.23225), which takes s between 2
and 5: values below s cost next to nothing. `site=down_proj_in` has the inputs of down_proj for x, where outliers are
largest in outlier-safe models. `scale=rms` divides by the token's own RMS: the penalty is then the kurtosis over
channels (uncentred, 3 for a Gaussian), which a smaller x does not lower.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from osp.config import PenaltyConfig

EPS = 1e-12  # added to the mean square of a token that is divided by it


def activation_penalty(x: Tensor, config: PenaltyConfig) -> Tensor:
    """Sum over tokens of mean over channels of (|x| / scale)^4, fp32, 0-dim. x: (..., D)

    Nothing but x is kept for backward, which computes the powers again.
    """
    penalty = checkpoint(_sum_of_fourth_powers, x, config.scale, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(penalty, Tensor)
    return penalty


def _sum_of_fourth_powers(x: Tensor, scale: float | str) -> Tensor:
    # fp32: a fourth power leaves bf16 no useful digits
    square = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    unit = square.mean(-1, keepdim=True) + EPS if scale == "rms" else float(scale) ** 2
    return (square / unit).square().mean(-1).sum()
