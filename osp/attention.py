"""Rotary positions and causal attention. B batch, T tokens, H query heads, G key/value heads, K head size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_table(head_dim: int, length: int, theta: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (length, head_dim / 2) fp32: pair i at position t turns by t * theta^(-2 i / head_dim)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, T, H, K) rotated by position; pairs are (i, i + K/2), Hugging Face's half-split layout."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (T, 1, K/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def document_mask(document_ids: Tensor) -> Tensor:
    """(B, 1, T, T) bool, True where query t may see key s: s <= t and both in the same document.

    document_ids: (B, T).
    """
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None] & causal


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, T, H, K) softmax(q k^T / sqrt(K)) v over the tokens that each query may see.

    q: (B, T, H, K), k and v: (B, T, G, K) with H a multiple of G; mask as `document_mask` makes it, None: causal.
    """
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)
