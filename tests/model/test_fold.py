"""Folding the gains of norms into the matrices that read them leaves the function as it is."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml

from osp.model.fold import absorb_projections, fold_embedding_scale, fold_into_weights, fold_norm_gains
from osp.model.norms import Norm
from osp.model.transformer import Transformer
from osp.model_config import AttentionConfig, NormConfig
from tests.conftest import ROOT
from tests.quant.quant_oracle import outlier_model, some_tokens

SITES = ("attn_in", "mlp_in", "down_proj_in", "head_in")
NORMS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / "configs" / "norm").glob("*.yaml")}
OPTIONS: dict[str, dict[str, Any]] = {
    "layernorm": {"bias": True},
    "crmsnorm": {"affine": True},
    "bhyt": {"seq_len": 12},
    "dyt": {"lns": True},
}


def model_with(norm: dict[str, Any], **shape: Any) -> Transformer:
    """Return a model in fp64 whose gains and biases are random, some negative and some 0."""
    model = outlier_model(norm=NormConfig(**norm), ffn_norm=True, attention=AttentionConfig(gate=True), **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.numel() > 1:
                parameter[3] *= -1
        for module in model.modules():
            if isinstance(module, Norm) and module.weight is not None and not module.one_gain:
                module.weight[5] = 0
    model.refresh_norms()
    return model


def outputs(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(some_tokens(2, 12)).logits


@pytest.mark.parametrize("embed_proj", [False, True])
@pytest.mark.parametrize(
    ("name", "placement"), [pair for pair in itertools.product(NORMS, ["pre", "peri"]) if pair != ("bhyt", "peri")]
)
def test_folded_gains_leave_the_logits(name: str, placement: str, embed_proj: bool) -> None:
    """Of every norm in configs/norm; the projections are absorbed only if the norm before the head is folded."""
    norm = {"placement": placement, **NORMS[name], **OPTIONS.get(name, {})}
    model = model_with(norm, embed_proj=embed_proj)
    before = outputs(model)
    fold_norm_gains(model, SITES[:3], for_rotation=False)
    torch.testing.assert_close(outputs(model), before, rtol=1e-12, atol=1e-12)
    absorb_projections(model)
    fold_norm_gains(model, SITES[3:], for_rotation=False)
    torch.testing.assert_close(outputs(model), before, rtol=1e-12, atol=1e-12)
    for path, module in model.named_modules():
        if isinstance(module, Norm) and module.weight is not None and not module.one_gain:
            stays = path.endswith(("output_layernorm", "q_norm", "k_norm"))
            ones = torch.ones_like(module.weight)
            ones[5] = 0
            assert torch.equal(module.weight, ones) != stays, path


def test_single_gain_is_not_folded() -> None:
    model = model_with({"name": "ssnorm"})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fold_norm_gains(model, SITES, for_rotation=False)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    fold_norm_gains(model)
    assert model.get_parameter("layers.0.input_layernorm.weight") == 1


@pytest.mark.parametrize("fold", [fold_into_weights, fold_embedding_scale])
def test_tied_head_gets_a_matrix_of_its_own_when_the_embedding_is_folded(fold: Callable[[Transformer], None]) -> None:
    model = outlier_model(norm=NormConfig("rmsnorm", embed_scale=True), tie_embeddings=True)
    before, embedding = outputs(model), model.embed_tokens.weight.detach().clone()
    fold(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-12, atol=1e-12)
    assert not model.config.tie_embeddings
    assert torch.equal(model.lm_head.weight, embedding)
    assert not torch.equal(model.embed_tokens.weight, embedding)
    plain = outlier_model(norm=NormConfig("ssnorm"), tie_embeddings=True)
    fold(plain)
    assert plain.lm_head.weight is plain.embed_tokens.weight, "nothing was folded"


def test_rotation_needs_gains_of_1_everywhere() -> None:
    """A channel with gain 0 is 0 for every reader, so that its gain is free."""
    model = model_with({"name": "rmsnorm"})
    before = outputs(model)
    fold_norm_gains(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-12, atol=1e-12)
    for module in (model.norm, *(layer.get_submodule("input_layernorm") for layer in model.layers)):
        assert torch.equal(module.get_parameter("weight"), torch.ones(32, dtype=torch.float64))
