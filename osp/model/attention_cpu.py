"""Causal attention for training in bf16 on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 64  # queries at a time; _BLOCK / 2 scores per query are wasted above the diagonal


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention that trains in bf16 on a CPU nearly twice as fast as torch's.

    Scores, softmax and their gradients are fp32 as in a flash kernel; all other products are bf16. The probabilities,
    T / 2 per query and head on average, are kept in bf16 for backward. N = B G; R = H / G query heads share a key.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length, _, size = q.shape
        q = q.transpose(1, 2).reshape(batch * k.shape[2], -1, length, size)  # (N, R, T, K)
        k, v = (x.transpose(1, 2).reshape(-1, length, size) for x in (k, v))  # (N, T, K)
        wide_q, wide_k = q.float() * size**-0.5, k.float()
        above_diagonal = torch.full((_BLOCK, _BLOCK), float("-inf")).triu(1)
        out, kept = torch.empty_like(q), []
        for start in range(0, length, _BLOCK):
            stop = min(start + _BLOCK, length)
            queries = wide_q[:, :, start:stop]
            scores = torch.bmm(queries.flatten(1, 2), wide_k[:, :stop].mT).view(*queries.shape[:3], stop)
            scores[..., start:] += above_diagonal[: stop - start, : stop - start]
            p = scores.softmax(-1).to(v.dtype).flatten(1, 2)  # (N, R queries, stop)
            out[:, :, start:stop] = torch.bmm(p, v[:, :stop]).view(queries.shape)
            kept.append(p)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(batch, -1, length, size).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        length, size = q.shape[2:]
        grad = grad_outputs[0].transpose(1, 2).reshape(q.shape)
        delta = (grad.float() * out).sum(-1, keepdim=True)  # per query: the sum over keys of p dp
        wide_v = v.float()
        # fp32 for sums over blocks
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(wide_v), torch.zeros_like(wide_v)
        for p, start in zip(kept, range(0, length, _BLOCK), strict=True):
            stop = min(start + _BLOCK, length)
            q_rows, grad_rows, delta_rows = (x[:, :, start:stop].flatten(1, 2) for x in (q, grad, delta))
            grad_v[:, :stop] += torch.bmm(p.mT, grad_rows)
            dp = torch.bmm(grad_rows.float(), wide_v[:, :stop].mT)
            ds = dp.sub_(delta_rows).mul_(p).to(q.dtype)
            grad_q[:, :, start:stop] = torch.bmm(ds, k[:, :stop]).view(grad_q[:, :, start:stop].shape)
            grad_k[:, :stop] += torch.bmm(ds.mT, q_rows)
        grads = (grad_q * size**-0.5, (grad_k * size**-0.5).to(k.dtype), grad_v.to(v.dtype))
        return tuple(x.view(len(grad_outputs[0]), -1, length, size).transpose(1, 2) for x in grads)
