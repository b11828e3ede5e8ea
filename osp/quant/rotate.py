"""Rotations of a Llama that do not change its function (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

R1 (D, D) rotates the residual stream, h -> h R1: writers of the stream are multiplied by R1, readers by R1^T, and the
norms between see vectors of the same length. R2 (K, K), one per layer, rotates every value head, v -> v R2, and o_proj
rotates back. Both are fused into the weights, after norm gains are folded and projections absorbed. A gate multiplies
the input of o_proj element by element, which does not commute with R2, so a gated model has no R2.

Two Hadamard transforms cannot be fused and run online: of the input of down_proj, whose weight takes the inverse, and
of queries and keys after RoPE, which cancel in their product.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from osp.model.fold import residual_norms
from osp.model.transformer import Attention, Block, Transformer
from osp.quant.hadamard import hadamard_transform, random_hadamard


def random_rotations(model: Transformer, *, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Return QuaRot's (R1, [R2 of each layer], empty with a gate): Hadamard with random signs, float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    residual = random_hadamard(config.hidden_size, generator=generator)
    turned = [] if config.attention.gate else model.layers
    return residual, [random_hadamard(config.head_size, generator=generator) for _ in turned]


def rotated_weights(model: Transformer, residual: Tensor, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return each weight and bias that R1 = `residual` and R2 = `values` change by its name, in the dtype of R1.

    Differentiable in the rotations. W (out, in) acts as x W^T + b: a reader becomes W R1, a writer R1^T W with b R1.
    values: one R2 per layer, or none.
    """
    dtype = residual.dtype
    parameters = dict(model.named_parameters())
    new = {"embed_tokens.weight": model.embed_tokens.weight.to(dtype) @ residual}
    for _, _, readers in residual_norms(model):
        new |= {f"{reader}.weight": parameters[f"{reader}.weight"].to(dtype) @ residual for reader in readers}
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        attention, size, of_layer = layer.self_attn, layer.self_attn.head_dim, f"layers.{index}."
        for name, writer in (("self_attn.o_proj", attention.o_proj), ("mlp.down_proj", layer.mlp.down_proj)):
            new[f"{of_layer}{name}.weight"] = residual.T @ writer.weight.to(dtype)
            if writer.bias is not None:
                new[f"{of_layer}{name}.bias"] = writer.bias.to(dtype) @ residual
        if values:
            value, v_name, o_name = values[index], f"{of_layer}self_attn.v_proj", f"{of_layer}self_attn.o_proj.weight"
            v, o = new[f"{v_name}.weight"], new[o_name]
            new[f"{v_name}.weight"] = (value.T @ v.unflatten(0, (-1, size))).flatten(0, 1)
            new[o_name] = (o.unflatten(1, (-1, size)) @ value).flatten(1)
            if attention.v_proj.bias is not None:
                bias = attention.v_proj.bias.to(dtype).unflatten(0, (-1, size))
                new[f"{v_name}.bias"] = (bias @ value).flatten()
    return new


@torch.no_grad()
def fuse_rotations(model: Transformer, residual: Tensor, values: Sequence[Tensor]) -> None:
    """Put the rotations into the weights. Tensors are replaced, not written in place."""
    parameters = dict(model.named_parameters())
    device = model.embed_tokens.weight.device
    rotated = rotated_weights(model, residual.to(device), [value.to(device) for value in values])
    for name, weight in rotated.items():
        parameters[name].data = weight.to(parameters[name].dtype)


@torch.no_grad()
def rotate_ffn_online(down_proj: nn.Module) -> Any:
    """Transform the input of down_proj at every call and its weight once; return the handle of the hook."""
    assert isinstance(down_proj.weight, nn.Parameter)
    weight = down_proj.weight
    weight.data = hadamard_transform(weight.double()).to(weight.dtype)
    return down_proj.register_forward_pre_hook(lambda _, arguments: (hadamard_transform(arguments[0]),))


def rotate_qk_online(attention: Attention) -> Any:
    """Transform queries and keys after RoPE at every call; return the handle of the hook."""

    def transform(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        q, k, *rest = arguments
        return (hadamard_transform(q), hadamard_transform(k), *rest)

    return attention.attend.register_forward_pre_hook(transform)
