"""Cross-entropy of a linear head, chunk by chunk: the (tokens, V) logits never exist whole, in either direction."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that counts nothing, as in torch.nn.functional.cross_entropy


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, chunk_tokens: int
) -> Tensor:
    """Sum over tokens of -log softmax(x W^T + b)[target] in nats, fp32, 0-dim.

    x: (N, D), weight: (V, D) and bias: (V,) cast to the dtype of x, targets: (N,) with `IGNORE` for tokens that count
    nothing. The products run in the dtype of x, everything after them in fp32. chunk_tokens: rows of logits that exist
    at a time.
    """
    return _LinearCrossEntropy.apply(x, weight, bias, targets, chunk_tokens, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is made together with the loss, while a chunk's logits are there; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_tokens: int,
        differentiate: bool,
    ) -> Tensor:
        cast, cast_bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        total = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if differentiate else None
        grad_weight = torch.zeros_like(weight) if differentiate else None
        grad_bias = torch.zeros_like(bias) if differentiate and bias is not None else None
        for start in range(0, x.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            counted = targets[rows] != IGNORE
            index = targets[rows].clamp_min(0)[:, None]
            logits = F.linear(x[rows], cast, cast_bias)
            p = F.softmax(logits, dim=-1, dtype=torch.float32)
            # log sum exp by way of the largest p, which is at least 1/V: the target's own may underflow
            log_sum = logits.amax(-1).float() - p.amax(-1).log()
            total += torch.where(counted, log_sum - logits.gather(1, index)[:, 0], 0.0).sum()
            if grad_x is not None and grad_weight is not None:
                p.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=p.dtype))
                # d loss / d logits = softmax - one_hot, rounded as it is written over the logits
                grad = torch.mul(p, counted[:, None], out=logits)
                grad_x[rows] = grad @ cast
                grad_weight += grad.T @ x[rows]
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=grad_bias.dtype)
                del grad
            del logits, p  # before the next chunk's are made
        if grad_x is not None and grad_weight is not None:
            ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        of_bias = None if grad_bias is None else grad_bias * scale
        return (grad_x * scale).to(grad_x.dtype), grad_weight * scale, of_bias, None, None, None
