"""Folds: changes of weights in place that leave the function of a model unchanged.

All compute in fp64 and round once.
"""

import dataclasses
from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp.model.norms import Norm
from osp.model.sites import SITES
from osp.model.transformer import Block, Linear, Transformer

STREAM = ("attn_in", "mlp_in", "head_in")  # what the norms of the residual stream write


def fold_into_weights(model: Transformer) -> None:
    """Move everything that a plain Llama lacks into the weights: projections and the scale of the embedding."""
    absorb_projections(model)
    fold_embedding_scale(model)


@torch.no_grad()
def untie(model: Transformer) -> None:
    """Give the head of a tied model a copy of the embedding, and update `model.config`: one of them will change."""
    if model.config.tie_embeddings:
        model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.detach().clone())
        model.config = dataclasses.replace(model.config, tie_embeddings=False)


@torch.no_grad()
def absorb_projections(model: Transformer) -> None:
    """Fold `embed_proj` into the embedding and `head_proj` into the head: E' = E W1^T and H' = H W2, products in fp64.

    The result is a plain Llama (OSP, arXiv 2506.19697, section 3), and `model.config` is updated.
    """
    if not isinstance(model.embed_proj, Linear) or not isinstance(model.head_proj, Linear):
        return
    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    embedding.data = (embedding.double() @ model.embed_proj.weight.double().T).to(embedding.dtype)
    head.data = (head.double() @ model.head_proj.weight.double()).to(head.dtype)
    model.embed_proj = model.head_proj = nn.Identity()
    model.config = dataclasses.replace(model.config, embed_proj=False)


@torch.no_grad()
def fold_embedding_scale(model: Transformer) -> None:
    """Multiply the embedding by its learned scale (`norm.embed_scale`)."""
    embedding = model.embed_tokens
    if embedding.scale is None:
        return
    untie(model)
    embedding.weight.data = (embedding.weight.double() * embedding.scale.double()).to(embedding.weight.dtype)
    embedding.scale = None
    norm = dataclasses.replace(model.config.norm, embed_scale=False)
    model.config = dataclasses.replace(model.config, norm=norm)


@torch.no_grad()
def pad_ffn(model: Transformer, *, multiple: int) -> None:
    """Append channels of zeros to every FFN until its width is a multiple: silu(0) * 0 = 0, times a column of 0."""
    config = model.config
    added = -config.intermediate_size % multiple
    for layer in model.layers if added else ():
        assert isinstance(layer, Block)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data = F.pad(linear.weight.data, (0, 0, 0, added))
            if linear.bias is not None:
                linear.bias.data = F.pad(linear.bias.data, (0, added))
        layer.mlp.down_proj.weight.data = F.pad(layer.mlp.down_proj.weight.data, (0, added))
    model.config = dataclasses.replace(config, intermediate_size=config.intermediate_size + added)


@torch.no_grad()
def fold_norm_gains(model: Transformer, sites: Collection[str] = STREAM, *, for_rotation: bool = True) -> None:
    """Fold the gains g of y = g n(x) + b into the matrices that read y: W' = W diag(g), g' = 1 and b' = b / g.

    Norms after a sublayer and of heads keep their gains: no matrix reads them. So do, unless `for_rotation`, norms with
    one gain and channels with a gain of 0, where nothing is gained.

    sites: the inputs of matrices whose norms are folded; `head_in`, which unties the head, once the projections are
    absorbed.
    """
    assert isinstance(model.head_proj, nn.Identity) or "head_in" not in sites, "the head must read the last norm"
    if "head_in" in sites:
        untie(model)
    for _, norm, readers in residual_norms(model, sites):
        if norm.weight is not None and (for_rotation or not norm.one_gain):
            gain = norm.weight.double()
            factor = gain if for_rotation else gain.where(gain != 0, 1.0)
            for weight in (model.get_parameter(f"{reader}.weight") for reader in readers):
                weight.data = (weight.double() * factor).to(weight.dtype)
            norm.weight.data = (gain / factor).nan_to_num(1.0).to(norm.weight.dtype)
            if norm.bias is not None:
                norm.bias.data = (norm.bias.double() / factor).to(norm.bias.dtype)


def norm_gain(norm: Norm, hidden_size: int) -> Tensor:
    """Return the factor of each channel after the division of a norm, (D,) fp64, with the scale of `norm.lns`."""
    weight = torch.ones(1) if norm.weight is None else norm.weight
    return weight.detach().double().expand(hidden_size) * norm.output_scale


def residual_norms(model: Transformer, sites: Collection[str] = STREAM) -> Iterator[tuple[str, Norm, list[str]]]:
    """Yield (name, module, names of the matrices that read it) for the norms that write `sites`, block by block."""
    modules = dict(model.named_modules())
    for i in range(len(model.layers)):
        for site in (SITES[kind] for kind in sites if SITES[kind].in_block):
            name = f"layers.{i}.{site.writers[-1]}"
            norm = modules[name]
            if isinstance(norm, Norm):
                readers = [f"layers.{i}.{path}" for path in site.readers]
                yield name, norm, [reader for reader in readers if reader in modules]
    if "head_in" in sites:
        yield "norm", model.norm, ["lm_head"]  # once the projections are absorbed
