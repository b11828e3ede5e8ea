"""Cross-entropy of a linear head in chunks of tokens, so that the (tokens, V) logits are never in memory at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # target of a token without a loss, as in torch.nn.functional.cross_entropy
CPU_BLOCK, GPU_BLOCK = 2**21, 2**26  # bytes of fp32 probabilities at a time: for the cache of a core; for a whole GPU


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, chunk_tokens: int, z_loss: float = 0.0,
    compiled: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return sums over tokens, fp32, 0-dim: -log softmax(x W^T + b)[target] in nats, and log(Z)^2, Z = sum(exp(logit)).

    Both are for one purpose, the gradient of first + `z_loss` * second, which is computed in the forward pass: other
    sums get a wrong one. PaLM (arXiv 2204.02311, section 5) keeps log Z near 0 with z_loss=1e-4:
    d log(Z)^2 / d logits = 2 log(Z) softmax.

    x: (N, D). weight, bias: (V, D) and (V,), cast to the dtype of x, in which the products are computed; all else is
    fp32. targets: (N,), `IGNORE` for tokens without a loss. chunk_tokens: tokens whose logits are in memory at a time.
    compiled: `fused_token_losses` by torch.compile, for passes with gradients; None: `token_losses`.
    """
    grad = torch.is_grad_enabled()
    losses = partial(token_losses, grad=grad) if compiled is None or not grad else compiled
    return _LinearCrossEntropy.apply(x, weight, bias, targets, chunk_tokens, partial(losses, z_loss=z_loss), grad)


def token_losses(logits: Tensor, targets: Tensor, z_loss: float, *, grad: bool) -> Tensor:
    """Return cross-entropy and log(Z) of each token (2, n), fp32, 0 where ignored. logits: (n, V). targets: (n,).

    With `grad`, the gradient of cross-entropy + `z_loss` log(Z)^2 with respect to the logits replaces them in memory.
    The fp32 probabilities exist for a block of tokens at a time, whose size changes no bit.
    """
    values = logits.new_empty((2, len(logits)), dtype=torch.float32)
    counted, index = targets != IGNORE, targets.clamp_min(0)[:, None]
    size = CPU_BLOCK * torch.get_num_threads() if logits.device.type == "cpu" else GPU_BLOCK
    step = max(1, size // (4 * logits.shape[1]))
    for rows in (slice(start, start + step) for start in range(0, len(logits), step)):
        p = F.softmax(logits[rows], dim=-1, dtype=torch.float32)
        # log sum exp from the largest p, which is at least 1/V; the p of the target may underflow
        values[1, rows] = log_sum = logits[rows].amax(-1).float() - p.amax(-1).log()
        values[0, rows] = log_sum - logits[rows].gather(1, index[rows])[:, 0]
        if grad:
            if z_loss:
                p *= (1 + 2 * z_loss * log_sum)[:, None]
            p.scatter_add_(1, index[rows], p.new_full((len(p), 1), -1.0))
            # softmax (1 + 2 z_loss log Z) - one_hot, rounded into the memory of the logits
            torch.mul(p, counted[rows, None], out=logits[rows])
    return torch.where(counted, values, 0.0)


def fused_token_losses(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Return `token_losses(grad=True)` by operations that torch.compile fuses into two passes over the logits.

    The first finds maxima and sums of exponentials, the second writes the gradient. No other (n, V) tensor is stored.
    """
    x, counted = logits.float(), targets != IGNORE
    top = x.amax(-1, keepdim=True)
    log_sum = top + (x - top).exp().sum(-1, keepdim=True).log()
    values = torch.cat((log_sum - x.gather(1, targets.clamp_min(0)[:, None]), log_sum), 1).T
    p = (x - log_sum).exp()  # other exponentials than above: with two uses they would be stored
    one_hot = torch.arange(x.shape[1], device=x.device) == targets[:, None]
    logits.copy_(torch.where(counted[:, None], p * (1 + 2 * z_loss * log_sum) - one_hot.float(), 0.0))
    return torch.where(counted, values, 0.0)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradient too, while the logits of a chunk are in memory; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, losses: Any, grad: bool
    ) -> tuple[Tensor, Tensor]:
        cast, cast_bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        total, squares = x.new_zeros(2, dtype=torch.float32)
        leaves = (x, weight, bias) if grad else (None, None, None)
        grad_x, grad_weight, grad_bias = (None if leaf is None else torch.zeros_like(leaf) for leaf in leaves)
        for rows in (slice(start, start + chunk) for start in range(0, len(x), chunk)):
            logits = F.linear(x[rows], cast, cast_bias)
            values = losses(logits, targets[rows])
            total += values[0].sum()
            squares += values[1].square().sum()
            if grad_x is not None and grad_weight is not None:
                torch.mm(logits, cast, out=grad_x[rows])  # they are d loss / d logits now
                if x.is_cuda and x.dtype != weight.dtype and torch.cuda.get_device_capability(x.device)[0] >= 8:
                    # the product adds in fp32, neither rounded to bf16 nor stored
                    torch.addmm(grad_weight, logits.T, x[rows], out_dtype=weight.dtype, out=grad_weight)
                else:
                    grad_weight += logits.T @ x[rows]
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=grad_bias.dtype)
            del logits  # before the next chunk allocates its own
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return total, squares

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]  # `z_loss` times it is the other one
        gradients = (None if kept is None else (kept * scale).to(kept.dtype) for kept in ctx.saved_tensors)
        return *gradients, None, None, None, None
