"""Rotary position embedding, causal attention and the key-value cache.

Dimensions: B batch, T tokens, S slots of the cache, H query heads, G key/value heads, K head size, L layers.
"""

import functools
import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, create_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from osp.model.norm_function import upcast
from osp.model_config import RopeScaling

_BLOCK = 64  # queries at a time; _BLOCK / 2 scores per query are wasted above the diagonal
_compile = functools.cache(lambda function: torch.compile(function))  # eager flex attention holds all T^2 pairs
Mask = Tensor | BlockMask | None  # as returned by `document_mask`, or for flex attention by `block_mask`; None: causal
# Kernels by `train.attention`; the first that takes the inputs runs. FlashAttention-3 replaces torch's flash kernel.
KERNELS = {"flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]}
KERNELS |= {"cudnn": [SDPBackend.CUDNN_ATTENTION, *KERNELS["flash"]], "fa3": KERNELS["flash"]}


def rotary_frequencies(
    head_dim: int, theta: float, device: torch.device | str = "cpu", scaling: RopeScaling | None = None
) -> Tensor:
    """Return the angle per position of each pair, (head_dim / 2,) fp32: theta^(-2 i / head_dim), scaled."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is None:
        return frequency
    kept: Tensor | float = 0.0  # share of a frequency that is not lowered; with llama3 1 for high ones
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * ((1 - kept) / scaling.factor + kept)


def rotary_table(
    head_dim: int, length: int, theta: float, device: torch.device | str, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (length, head_dim / 2), fp32, of t * theta^(-2 i / head_dim) at position t for the pair i."""
    frequency = rotary_frequencies(head_dim, theta, device, scaling)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, T, H, K) rotated by position. Pairs are (i, i + K/2), Hugging Face's half-split layout."""
    # (T, K/2), or (B, T, K/2) if the sequences are at different positions -> (..., T, 1, K/2)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def document_mask(document_ids: Tensor) -> Tensor:
    """Return (B, 1, T, T) bool, True where query t may see key s: s <= t and the same of the `document_ids` (B, T)."""
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None] & causal


def block_mask(ids: Tensor) -> BlockMask:
    """Return `document_mask` for flex attention, which skips blocks of 128 x 128 pairs in which no query sees a key."""
    build, (batch, length) = _compile(create_block_mask) if ids.is_cuda else create_block_mask, ids.shape
    return build(lambda b, _, t, s: (s <= t) & (ids[b, t] == ids[b, s]), batch, None, length, length, ids.device)


def visible_logits(
    q: Tensor, k: Tensor, mask: Tensor | None, rows: tuple[int, int], cap: float | None = None
) -> Tensor:
    """Return q k^T / sqrt(K) of the queries rows[0] to rows[1] - 1, (B, H, n, S) fp32; -inf for hidden keys.

    q: (B, T, H, K); k: (B, S, G, K). mask: (..., T, S) bool; None: causal, and only the first rows[1] keys. cap: of
    each logit s becomes cap tanh(s / cap), before the mask (Gemma 2, arXiv 2408.00118).
    """
    (start, stop), groups = rows, k.shape[2]
    queries = upcast(q[:, start:stop]).unflatten(2, (groups, -1)) * q.shape[-1] ** -0.5
    logits = torch.einsum("btgrk,bsgk->bgrts", queries, upcast(k if mask is not None else k[:, :stop])).flatten(1, 2)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    if mask is not None:
        return logits.masked_fill(~mask[..., start:stop, :], -math.inf)
    return logits + torch.full(logits.shape[-2:], -math.inf, device=q.device).triu(start + 1)


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Return the rows of at most 16 blocks of queries; the logits of one block are in memory at a time."""
    size = max(_BLOCK, -(-length // 16))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, off_by_one: bool = False,
    logit_cap: float | None = None, largest: Tensor | None = None, kernel: str = "sdpa",
) -> Tensor:  # fmt: skip
    """Return softmax(q k^T / sqrt(K)) v (B, T, H, K) over the tokens that each query may see.

    q: (B, T, H, K); k, v: (B, T, G, K), with H a multiple of G. off_by_one: use exp(s_i) / (1 + sum_j exp(s_j)) instead
    of softmax. A head can then attend to nothing, without an attention sink (Miller 2023, evanmiller.org; arXiv
    2410.17174). logit_cap: the cap of `visible_logits`. Only flex attention has it fused; otherwise blocks of queries
    are computed again in the backward pass. largest: (H,) fp32, raised in place to the largest logit of each head,
    before the cap. kernel: a key of `KERNELS`; others leave the choice to torch.
    """
    wide = q.dtype != torch.bfloat16 or q.device.type != "cpu" or not torch.is_grad_enabled()
    blockwise = mask is None and logit_cap is None and not (off_by_one or wide)
    if largest is not None and not blockwise:
        with torch.no_grad():
            dense = create_mask(mask.mask_mod, *mask.shape, device=q.device) if isinstance(mask, BlockMask) else mask
            found = [visible_logits(q, k, dense, rows).amax((0, 2, 3)) for rows in query_blocks(q.shape[1])]
            largest.copy_(torch.stack([largest, *found]).amax(0))
    if isinstance(mask, BlockMask):
        return _flex_attention(q, k, v, mask, off_by_one, logit_cap)
    if logit_cap is not None:

        def attend(start: int, stop: int) -> Tensor:
            logits = F.pad(visible_logits(q, k, mask, (start, stop), logit_cap), (0, int(off_by_one)))
            p = logits.softmax(-1)[..., : logits.shape[-1] - off_by_one].unflatten(1, (k.shape[2], -1)).to(v.dtype)
            return torch.einsum("bgrts,bsgk->btgrk", p, v[:, : p.shape[-1]]).flatten(2, 3)

        again = functools.partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        run = again if torch.is_grad_enabled() else attend
        return torch.cat([run(*rows) for rows in query_blocks(q.shape[1])], 1)
    if off_by_one:
        # The 1 is exp(0) for a zero key with a zero value before the first token. A zero query is added too, and its
        # output dropped, because SDPA's fast causal kernels need as many queries as keys.
        q, k, v = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (q, k, v))
        mask = None if mask is None else F.pad(mask, (1, 0, 1, 0), value=True)
        return causal_attention(q, k, v, mask, kernel=kernel)[:, 1:]
    if blockwise:
        return BlockwiseAttention.apply(q, k, v, largest)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    # chosen here, not around the model: a checkpointed block runs again in the backward pass, and the disk cache of
    # torch.compile does not see a choice outside of compiled code
    with sdpa_kernel(KERNELS[kernel], set_priority=True) if kernel in KERNELS else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return out.transpose(1, 2)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, off_by_one: bool, cap: float | None) -> Tensor:
    """Return `causal_attention` by torch's flex attention (arXiv 2412.05496), which has no backward pass on a CPU."""
    attend = _compile(flex_attention) if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    capped = None if cap is None else lambda score, *_: cap * torch.tanh(score / cap)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"enable_gqa": q.shape[1] != k.shape[1], "return_aux": AuxRequest(lse=off_by_one)}
    out, extra = attend(q, k, v, capped, mask, **options)
    if off_by_one:  # S / (1 + S), with S the denominator of softmax
        out = out * torch.sigmoid(extra.lse)[..., None].to(out.dtype)
    return out.transpose(1, 2)


class KVCache:
    """Keys and values (L, B, S, G, K) of the preceding tokens; slot s holds position s.

    The cache is allocated once: a pass of one token always has the same shapes and addresses, as CUDA graphs need. The
    first pass (`positions` None) reads all prompts from slot 0. Padding after a shorter prompt is later than each query
    of its sequence, and the next tokens overwrite it. So prompts need neither padding masks nor shifted positions.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], *, dtype: torch.dtype, device: torch.device):
        # zeros: unwritten slots have the attention weight 0, and 0 times uninitialized memory may be nan
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.sequences = torch.arange(shape[1], device=device)[:, None]
        self.positions: Tensor | None = None  # (B, T) of the tokens of the next pass; None: 0 to T - 1
        self.width = shape[2]  # slots that the next pass reads: all, or as many as its largest position needs

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, T, G, K) of the new tokens and return the keys and values that their queries attend to."""
        keys, values = self.keys[layer], self.values[layer]
        if self.positions is None:
            keys[:, : k.shape[1]], values[:, : v.shape[1]] = k, v
            return k, v
        keys[self.sequences, self.positions], values[self.sequences, self.positions] = k, v
        return keys[:, : self.width], values[:, : self.width]

    def mask(self, positions: Tensor) -> Tensor:
        """Return (B, 1, T, width) bool, True where the query at a position (B, T) may see a slot."""
        return (torch.arange(self.width, device=self.keys.device) <= positions[..., None])[:, None]


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention that trains in bf16 on a CPU nearly twice as fast as torch's.

    Scores, softmax and their gradients are fp32 as in a flash kernel; all other products are bf16. The probabilities,
    T / 2 per query and head on average, are kept in bf16 for backward. N = B G; R = H / G query heads share a key.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, largest: Tensor | None = None) -> Tensor:
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
            if largest is not None:
                torch.maximum(largest, scores.amax((-2, -1)).view(batch, -1).amax(0), out=largest)
            p = scores.softmax(-1).to(v.dtype).flatten(1, 2)  # (N, R queries, stop)
            out[:, :, start:stop] = torch.bmm(p, v[:, :stop]).view(queries.shape)
            kept.append(p)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(batch, -1, length, size).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
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
        return *(x.view(len(grad_outputs[0]), -1, length, size).transpose(1, 2) for x in grads), None
