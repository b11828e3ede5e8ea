"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded one input channel at a time, errors pushed to the rest.

The objective of a matrix is ||X (W - Q)^T||^2 = tr((W - Q) H (W - Q)^T), H = X^T X over the inputs X of calibration
text. Scales are computed as for round-to-nearest from the original weight ("static groups"), so they do not depend on
the order of the channels. If H is a multiple of the identity, GPTQ is round-to-nearest.
"""

import functools
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from osp.model.sites import SITES, hook_site, layer_name
from osp.model.transformer import Transformer
from osp.quant.grid import Grid, grouped
from osp.quant.spec import INNER_SITES, QuantSpec

COLUMNS = 128  # channels whose errors reach the later channels in one product


def gptq(weight: Tensor, hessian: Tensor, spec: QuantSpec, grid: Grid | None = None) -> Tensor:
    """Return `weight` (out, in) rounded to `grid`, for inputs with the second moments `hessian` (in, in).

    grid: of the groups of `weight`; None: as `spec` says.
    """
    number_format = spec.number_format("w")
    size = number_format.block_size or spec.w_group_size or weight.shape[1]
    if grid is None:
        grid = number_format.grid(grouped(weight, group_size=size), clip_search=spec.w_clip)
    scale, zero = (part[..., 0].repeat_interleave(size, dim=1) for part in (grid.scale, grid.zero))
    order = hessian.diagonal().argsort(descending=True, stable=True) if spec.act_order else torch.arange(len(hessian))
    order = order.to(weight.device)
    h = hessian[order][:, order].double()  # nearly singular, hence fp64
    # 1 for an input that never occurred, which needs no correction
    h = h + torch.diag((h.diagonal() == 0).double() + spec.damping * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
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


@torch.no_grad()
def quantize_weights_gptq(
    model: Transformer,
    spec: QuantSpec,
    calibration: Tensor,
    *,
    sites: Collection[str],
    grid_of: Callable[[str, Tensor], Grid] | None = None,
    progress: bool = False,
) -> None:
    """Replace the weights of the blocks at `sites` by quantized ones, block after block.

    Each matrix is fitted to its inputs in the model whose earlier matrices are quantized already. Besides the model,
    the hidden states of one block, on the host where the device has no room, and one (in, in) Hessian are kept.

    Args:
        calibration: (N, T) token ids.
        grid_of: returns the grid of a parameter by its name and value; None: as `spec` says.
    """
    device = model.embed_tokens.weight.device
    cos, sin = model.rotary(calibration.shape[1], device)

    def outputs(layer: nn.Module) -> Iterator[Tensor]:
        return (layer(x.to(device), cos, sin, None)[0] for x in hidden)

    size = calibration.numel() * model.config.hidden_size * model.compute_dtype.itemsize
    fit = device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] / 2  # blocks and GPTQ take memory too
    place = device if fit else "cpu"
    hidden = [
        model.embed_proj(model.embed_tokens(ids[None].to(device)).to(model.compute_dtype)).to(place)
        for ids in calibration
    ]
    for index, layer in enumerate(tqdm(model.layers, desc="GPTQ", unit="block", leave=False, disable=not progress)):
        weights = dict(layer.named_parameters())
        for site in INNER_SITES["a"]:
            readers = [f"{reader}.weight" for reader in SITES[site].readers if reader.split(".")[-1] in sites]
            chosen = {name: weights[name] for name in readers if name in weights}
            if not chosen:
                continue
            width = next(iter(chosen.values())).shape[1]
            hessian = torch.zeros(width, width, device=device)
            add = functools.partial(_add_second_moments, hessian)
            with hook_site(model, f"{layer_name(index)}/{site}", add):  # removed at the end
                for _ in outputs(layer):
                    pass
            for name, weight in chosen.items():
                grid = grid_of(f"layers.{index}.{name}", weight) if grid_of else None
                weight.data = gptq(weight, hessian, spec, grid)
        for i, x in enumerate(outputs(layer)):
            hidden[i] = x.to(place)


def _add_second_moments(hessian: Tensor, x: Tensor) -> None:
    """Add X^T X of the inputs x (..., in) to `hessian` (in, in), fp32."""
    x = x.flatten(0, -2).float()
    hessian.addmm_(x.T, x)
