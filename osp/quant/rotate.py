"""Rotations of a Llama that do not change its function (QuaRot, arXiv 2404.00456).

R1 (D, D) rotates the residual stream, h -> h R1: writers of the stream are multiplied by R1, readers by R1^T, and the
norms between see vectors of the same length. R2 (K, K), one per layer, rotates every value head, v -> v R2, and o_proj
rotates back. Both are fused into the weights, after norm gains are folded and projections absorbed. A gate multiplies
the input of o_proj element by element, which does not commute with R2, so a gated model has no R2.

Two Hadamard transforms cannot be fused and run online: of the input of down_proj, whose weight takes the inverse, and
of queries and keys after RoPE, which cancel in their product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from osp.model.fold import residual_norms
from osp.model.sites import hook_site, site_names
from osp.model.transformer import Transformer
from osp.quant.hadamard import hadamard_transform, random_hadamard


def random_rotations(model: Transformer, *, seed: int) -> list[Tensor]:
    """Return QuaRot's R1 and, without a gate, the R2 of each layer: Hadamard with random signs, float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    heads = [] if config.attention.gate else [config.head_size] * len(model.layers)
    return [random_hadamard(size, generator=generator) for size in (config.hidden_size, *heads)]


def rotated_weights(model: Transformer, rotations: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return each weight and bias that `rotations`, R1 and every R2, change by its name, in the dtype of R1.

    W (out, in) acts as x W^T + b: a reader becomes W R1, a writer R1^T W with b R1.
    """
    residual, *values = rotations
    parameters = dict(model.named_parameters())

    def old(name: str) -> Tensor:
        return parameters[name].to(residual.dtype)

    readers = [reader for _, _, readers in residual_norms(model) for reader in readers]
    new = {f"{name}.weight": old(f"{name}.weight") @ residual for name in ("embed_tokens", *readers)}
    for index in range(len(model.layers)):
        for writer in (f"layers.{index}.self_attn.o_proj", f"layers.{index}.mlp.down_proj"):
            new[f"{writer}.weight"] = residual.T @ old(f"{writer}.weight")
            if f"{writer}.bias" in parameters:
                new[f"{writer}.bias"] = old(f"{writer}.bias") @ residual
    for index, value in enumerate(values):
        v, o = f"layers.{index}.self_attn.v_proj", f"layers.{index}.self_attn.o_proj.weight"
        size = len(value)
        new[f"{v}.weight"] = (value.T @ new[f"{v}.weight"].unflatten(0, (-1, size))).flatten(0, 1)
        new[o] = (new[o].unflatten(1, (-1, size)) @ value).flatten(1)
        for name in (f"{v}.bias", f"layers.{index}.self_attn.value_gate.weight"):
            if name in parameters:
                new[name] = (old(name).unflatten(0, (-1, size)) @ value).flatten()
    return new


@torch.no_grad()
def fuse_rotations(model: Transformer, rotations: Sequence[Tensor]) -> None:
    """Put the rotations into the weights. Tensors are replaced, not written in place."""
    device = model.embed_tokens.weight.device
    for name, weight in rotated_weights(model, [rotation.to(device) for rotation in rotations]).items():
        parameter = model.get_parameter(name)
        parameter.data = weight.to(parameter.dtype)


@torch.no_grad()
def rotate_online(model: Transformer, *, ffn: bool, qk: bool) -> list[RemovableHandle]:
    """Transform the input of down_proj, queries and keys at every call until the returned handles are removed."""
    for layer in model.layers if ffn else ():
        weight = layer.get_parameter("mlp.down_proj.weight")
        weight.data = hadamard_transform(weight.double()).to(weight.dtype)
    kinds = (*(("down_proj_in",) if ffn else ()), *(("q", "k") if qk else ()))
    return [hook_site(model, name, hadamard_transform) for name in site_names(len(model.layers), kinds)]
