"""Rotation transforms the biases of matrices."""

from typing import Any

import torch
from torch import Tensor

from osp.model.fold import fold_norm_gains
from osp.model.transformer import Transformer
from osp.model_config import NormConfig
from osp.quant.rotate import fuse_rotations, random_rotations
from tests.quant.quant_oracle import outlier_model, some_tokens


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
