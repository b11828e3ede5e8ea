"""Cross-entropy of a linear head in chunks of tokens, so that the (tokens, V) logits are never in memory at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # target of a token without a loss, as in torch.nn.functional.cross_entropy


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, chunk_tokens: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return sums over tokens, fp32, 0-dim: -log softmax(x W^T + b)[target] in nats, and log(Z)^2, Z = sum(exp(logit)).

    Both are for one purpose, the gradient of first + `z_loss` * second, which is computed in the forward pass: other
    sums get a wrong one. PaLM (arXiv 2204.02311, section 5) keeps log Z near 0 with z_loss=1e-4. It costs one more
    elementwise product of (tokens, V): d log(Z)^2 / d logits = 2 log(Z) softmax.

    x: (N, D). weight, bias: (V, D) and (V,), cast to the dtype of x, in which the products are computed; all else is
    fp32. targets: (N,), `IGNORE` for tokens without a loss. chunk_tokens: tokens whose logits are in memory at a time.
    """
    return _LinearCrossEntropy.apply(x, weight, bias, targets, chunk_tokens, z_loss, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradient too, while the logits of a chunk are in memory; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, z_loss: float, grad: bool
    ) -> tuple[Tensor, Tensor]:
        cast, cast_bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        total, squares = x.new_zeros(2, dtype=torch.float32)
        grad_x = torch.empty_like(x) if grad else None
        grad_weight = torch.zeros_like(weight) if grad else None
        grad_bias = torch.zeros_like(bias) if grad and bias is not None else None
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            counted = targets[rows] != IGNORE
            index = targets[rows].clamp_min(0)[:, None]
            logits = F.linear(x[rows], cast, cast_bias)
            p = F.softmax(logits, dim=-1, dtype=torch.float32)
            # log sum exp from the largest p, which is at least 1/V; the p of the target may underflow
            log_sum = logits.amax(-1).float() - p.amax(-1).log()
            total += torch.where(counted, log_sum - logits.gather(1, index)[:, 0], 0.0).sum()
            squares += torch.where(counted, log_sum.square(), 0.0).sum()
            if grad_x is not None and grad_weight is not None:
                if z_loss:
                    p *= (1 + 2 * z_loss * log_sum)[:, None]
                p.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=p.dtype))
                # d loss / d logits = softmax (1 + 2 z_loss log Z) - one_hot, rounded into the memory of the logits
                delta = torch.mul(p, counted[:, None], out=logits)
                grad_x[rows] = delta @ cast
                grad_weight += delta.T @ x[rows]
                if grad_bias is not None:
                    grad_bias += delta.sum(0, dtype=grad_bias.dtype)
                del delta
            del logits, p  # before the next chunk allocates its own
        if grad_x is not None and grad_weight is not None:
            ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return total, squares

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]  # `z_loss` times it is the other one
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        grad_bias = None if grad_bias is None else grad_bias * scale
        return (grad_x * scale).to(grad_x.dtype), grad_weight * scale, grad_bias, None, None, None, None
