"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded one input channel at a time, errors pushed to the rest.

The objective of a matrix is ||X (W - Q)^T||^2 = tr((W - Q) H (W - Q)^T), H = X^T X over the inputs X of calibration
text. Scales are those of round-to-nearest, taken from the weight as it was ("static groups"), so that they do not
depend on the order of the channels; with H a multiple of the identity GPTQ is round-to-nearest.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from osp.model.transformer import Block, Transformer
from osp.quant.grid import clipped_grid, full_grid, grouped
from osp.quant.spec import QuantSpec

# Matrices of a block that see the same input, in the order in which the block computes them.
STAGES = (("q_proj", "k_proj", "v_proj", "attention_gate"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
COLUMNS = 128  # channels whose errors reach the channels behind them in one product


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_search: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
) -> Tensor:
    """`weight` (out, in) on its grid, chosen for the inputs whose second moments are `hessian` (in, in).

    act_order: channels in the order of falling H_ii. damping: share of the mean of H_ii added to each.
    """
    groups = grouped(weight, bits=bits, group_size=group_size)
    grid = (clipped_grid if clip_search else full_grid)(groups, bits=bits, symmetric=symmetric)
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
    """Upper Cholesky factor of (H + damping mean(H_ii) I)^-1, fp32; computed in fp64, where H is nearly singular."""
    h = hessian.double()
    diagonal = h.diagonal()
    # an input that never occurred: nothing to correct
    h = h + torch.diag((diagonal == 0).double() + damping * diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float()


@torch.no_grad()
def quantize_weights_gptq(
    model: Transformer, spec: QuantSpec, calibration: Tensor, *, sites: Collection[str], progress: bool = False
) -> None:
    """Replace the weights of the blocks that `sites` names by quantized ones, block after block.

    Each matrix is fitted to what it sees in the model whose earlier matrices are quantized already. calibration:
    (N, T) token ids. Besides the model only the hidden states of one block and one (in, in) Hessian are kept.
    """
    device = model.embed_tokens.weight.device
    cos, sin = model.rotary(calibration.shape[1], device)

    def run(layer: nn.Module, rows: list[Tensor]) -> list[Tensor]:
        return [layer(row.to(device), cos, sin, None).to(row.device) for row in rows]

    # rows wait on the CPU: at 128 rows of 2048 tokens they are larger than a block
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
                    hessian(),
                    bits=spec.w_bits,
                    group_size=spec.w_group_size,
                    symmetric=spec.w_symmetric,
                    clip_search=spec.w_clip,
                    act_order=spec.act_order,
                    damping=spec.damping,
                )
        rows = run(layer, rows)


@contextmanager
def _second_moments(module: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """A function that returns X^T X (in, in), fp32, of all the inputs that `module` has seen inside the context."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    total = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)

    def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2).float()
        total.addmm_(x.T, x)

    handle = module.register_forward_pre_hook(add)
    try:
        yield lambda: total
    finally:
        handle.remove()
