"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded one input channel at a time, errors pushed to the rest.

The objective of a matrix is ||X (W - Q)^T||^2 = tr((W - Q) H (W - Q)^T), H = X^T X over the inputs X of calibration
text. Scales are computed as for round-to-nearest from the original weight ("static groups"), so they do not depend on
the order of the channels. If H is a multiple of the identity, GPTQ is round-to-nearest.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from osp.model.transformer import Block, Transformer
from osp.quant.formats import NumberFormat
from osp.quant.grid import grouped
from osp.quant.spec import QuantSpec

# Matrices of a block that see the same input, in the order in which the block computes them.
STAGES = (("q_proj", "k_proj", "v_proj", "attention_gate"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
COLUMNS = 128  # channels whose errors reach the later channels in one product


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    number_format: NumberFormat,
    group_size: int | None = None,
    clip_search: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
) -> Tensor:
    """Return `weight` (out, in) rounded for inputs with the second moments `hessian` (in, in).

    Args:
        number_format: Format with a grid.
        group_size: Input channels that share a scale; None: all.
        clip_search: Search for the clipping ratio with the smallest rounding error.
        act_order: Take the channels in the order of falling H_ii.
        damping: Share of the mean of H_ii that is added to each H_ii.
    """
    groups = grouped(weight, group_size=group_size)
    grid = number_format.grid(groups, clip_search=clip_search)
    scale, zero = (part[..., 0].repeat_interleave(groups.shape[-1], dim=1) for part in (grid.scale, grid.zero))
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian))
    order = order.to(weight.device)
    factor = _inverse_factor(hessian[order][:, order], damping)
    remaining, scale, zero = weight.float()[:, order], scale[:, order], zero[:, order]  # (out, in) each
    out = torch.empty_like(remaining)
    for start in range(0, len(order), COLUMNS):
        stop = min(start + COLUMNS, len(order))
        block, errors = remaining[:, start:stop].clone(), torch.empty_like(remaining[:, start:stop])
        for i in range(stop - start):
            column, here = block[:, i : i + 1], slice(start + i, start + i + 1)
            out[:, here] = grid._replace(scale=scale[:, here], zero=zero[:, here]).nearest(column)
            row = factor[start + i, start + i : stop]
            errors[:, i : i + 1] = (column - out[:, here]) / row[0]
            block[:, i:] -= errors[:, i : i + 1] * row
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
    return out[:, order.argsort()].to(weight.dtype)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of (H + damping mean(H_ii) I)^-1, fp32; H is nearly singular, hence fp64."""
    h = hessian.double()
    diagonal = h.diagonal()
    # 1 for an input that never occurred, which needs no correction
    h = h + torch.diag((diagonal == 0).double() + damping * diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float()


@torch.no_grad()
def quantize_weights_gptq(
    model: Transformer, spec: QuantSpec, calibration: Tensor, *, sites: Collection[str], progress: bool = False
) -> None:
    """Replace the weights of the blocks at `sites` by quantized ones, block after block.

    Each matrix is fitted to its inputs in the model whose earlier matrices are quantized already. Besides the model,
    the hidden states of one block and one (in, in) Hessian are kept in memory. calibration: (N, T) token ids.
    """
    device = model.embed_tokens.weight.device
    cos, sin = model.rotary(calibration.shape[1], device)

    def run(layer: nn.Module, rows: list[Tensor]) -> list[Tensor]:
        return [layer(row.to(device), cos, sin, None)[0].to(row.device) for row in rows]

    # kept on the CPU: 128 sequences of 2048 tokens are larger than a block
    rows = [
        model.embed_proj(model.embed_tokens(ids[None].to(device)).to(model.compute_dtype)).cpu() for ids in calibration
    ]
    for layer in tqdm(model.layers, desc="GPTQ", unit="block", leave=False, disable=not progress):
        assert isinstance(layer, Block)
        modules = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
        for stage in STAGES:
            chosen = [modules[name] for name in stage if name in modules and name in sites]
            if not chosen:
                continue
            with _second_moments(chosen[0]) as hessian:
                run(layer, rows)
            for module in chosen:
                weight = module.weight
                assert isinstance(weight, nn.Parameter)
                weight.data = gptq(
                    weight,
                    hessian,
                    number_format=spec.number_format("w"),
                    group_size=spec.w_group_size,
                    clip_search=spec.w_clip,
                    act_order=spec.act_order,
                    damping=spec.damping,
                )
        rows = run(layer, rows)


@contextmanager
def _second_moments(module: nn.Module) -> Iterator[Tensor]:
    """Yield X^T X (in, in), fp32, which every call of `module` inside the context adds its input to."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    total = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)

    def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2).float()
        total.addmm_(x.T, x)

    handle = module.register_forward_pre_hook(add)
    try:
        yield total
    finally:
        handle.remove()
