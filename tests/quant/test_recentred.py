"""Quantization and rotation treat weights as the forward pass uses them: recentred, and with their biases."""

from typing import Any

import pytest
import torch
from torch import Tensor

from osp.config import NormConfig
from osp.model.fold import bake_recentring, fold_norm_gains
from osp.model.transformer import Block, Transformer
from osp.quant.apply import quantized
from osp.quant.rotate import fuse_rotations, random_rotations
from osp.quant.spec import QuantSpec
from tests.quant.quant_oracle import outlier_model, some_tokens

SPECS = {
    "rtn": QuantSpec(4, 4, 4, embedding_and_head=True),
    "gptq": QuantSpec(4, 4, 16, method="gptq"),
    "quarot": QuantSpec(4, 4, 4, rotation="quarot", ffn_hadamard=True),
    "spinquant": QuantSpec(4, 16, 16, rotation="spinquant", rotation_steps=2),
}


@torch.no_grad()
def logits(model: Transformer, ids: Tensor) -> Tensor:
    return model(ids).logits


def with_random_biases(model: Transformer) -> Transformer:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def biased_model(**config: Any) -> Transformer:
    norm = NormConfig(name="rmsnorm")
    return with_random_biases(outlier_model(norm=norm, attention_bias=True, mlp_bias=True, head_bias=True, **config))


@pytest.mark.parametrize("embed_proj", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_recentred_weights_are_rounded_as_the_forward_pass_uses_them(name: str, embed_proj: bool) -> None:
    """The logits equal the ones of a model recentred beforehand, and the bits are restored afterwards."""
    model, baked = (biased_model(recentre=True, embed_proj=embed_proj) for _ in range(2))
    bake_recentring(baked)
    ids, sequences = some_tokens(1, 12), some_tokens(4, 12)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    clean = logits(model, ids)
    torch.testing.assert_close(logits(baked, ids), clean, rtol=0, atol=1e-12)
    with quantized(model, SPECS[name], calibration=sequences), quantized(baked, SPECS[name], calibration=sequences):
        torch.testing.assert_close(logits(model, ids), logits(baked, ids), rtol=0, atol=1e-9)
        assert (logits(model, ids) - clean).abs().max() > 1e-3
        assert model.config == baked.config
        for layer in model.layers:
            assert isinstance(layer, Block)
            if name == "rtn":
                values = layer.self_attn.o_proj.affine()[0]
                assert max(row.unique().numel() for row in values) <= 16
    assert model.config.recentre
    assert torch.equal(logits(model, ids), clean)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_rotations_transform_the_biases() -> None:
    model, ids = biased_model(), some_tokens(2, 12)
    expected = logits(model, ids)
    fold_norm_gains(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fuse_rotations(model, random_rotations(model, seed=0))
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-10)
    changed = {
        name.split(".", 2)[-1]
        for name, parameter in model.named_parameters()
        if name.endswith("bias") and not torch.equal(parameter, before[name])
    }
    assert changed == {"self_attn.v_proj.bias", "self_attn.o_proj.bias", "mlp.down_proj.bias"}
