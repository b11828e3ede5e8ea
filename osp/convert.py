"""Conversions that leave the function of a model as it is. Every one replaces tensors and never writes into one, so
that who holds the old tensors can put them back."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from osp.model import Block, Transformer
from osp.norms import Norm, RMSNorm, SSNorm


@torch.no_grad()
def absorb_projections(model: Transformer) -> None:
    """Fold `embed_proj` into the embedding and `head_proj` into the head: E' = E W1^T and H' = H W2, products in fp64.

    What is left is a plain Llama (OSP, arXiv 2506.19697, section 3); `model.config` says so too.
    """
    if isinstance(model.embed_proj, nn.Identity):
        return
    assert isinstance(model.embed_proj.weight, Tensor)
    assert isinstance(model.head_proj.weight, Tensor)
    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    embedding.data = (embedding.double() @ model.embed_proj.weight.double().T).to(embedding.dtype)
    head.data = (head.double() @ model.head_proj.weight.double()).to(head.dtype)
    model.embed_proj = model.head_proj = nn.Identity()
    model.config = dataclasses.replace(model.config, embed_proj=False)


@torch.no_grad()
def fold_norm_gains(model: Transformer) -> None:
    """Fold the gains of RMSNorms and SSNorms into the matrices that read them, W' = W diag(g), and set them to 1.

    The projections must have been absorbed: the head reads the last norm.
    """
    assert isinstance(model.head_proj, nn.Identity)
    for layer in model.layers:
        assert isinstance(layer, Block)
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, attention.readers().values())
        _fold(layer.post_attention_layernorm, mlp.readers().values())
    _fold(model.norm, (model.lm_head,))


def _fold(norm: Norm, readers: Iterable[nn.Module]) -> None:
    assert isinstance(norm, RMSNorm | SSNorm)
    if norm.weight is None:
        return
    for reader in readers:
        assert isinstance(reader.weight, nn.Parameter)
        reader.weight.data = (reader.weight.double() * norm.weight.double()).to(reader.weight.dtype)
    norm.weight.data = torch.ones_like(norm.weight)
