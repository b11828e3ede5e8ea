"""Changing norms leaves the function of a model unchanged: pairs, round trips and refusals, in float64."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osp.convert.change_norm import CONVERTIBLE, change_config, change_norms
from osp.errors import UserError
from osp.model.fold import fold_into_weights
from osp.model.norms import Norm
from osp.model.transformer import Block, Transformer, build_model
from osp.model_config import AttentionConfig, ModelConfig, NormConfig

IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def random_model(norm: dict[str, Any], **shape: Any) -> Transformer:
    """Return a float64 model with random gains, biases and scales, because ones and zeros hide mistakes."""
    model = build_model(ModelConfig(**{**SHAPE, **shape}, norm=NormConfig(**norm)), seed=1).double()
    model.compute_dtype = torch.float64
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            else:  # EmbProj no longer orthogonal
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def convert(model: Transformer, to: str) -> Transformer:
    return change_norms(model, to)[0]


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model(IDS).logits


def assert_same_function(converted: Transformer, expected: Transformer, atol: float = 1e-12) -> None:
    reference = logits(expected)
    assert reference.abs().max() > 0.5, "logits near 0 would prove nothing"
    torch.testing.assert_close(logits(converted), reference, rtol=0, atol=atol * reference.abs().max().item())


EVERYWHERE = CONVERTIBLE
NOT_CENTRED = ("rmsnorm", "ssnorm")
SOURCES: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({"name": "layernorm"}, {}, EVERYWHERE),
    ({"name": "layernorm", "affine": False, "eps": 1e-3}, {"embed_proj": True}, EVERYWHERE),
    ({"name": "layernorm", "bias": True}, {"embed_proj": True}, EVERYWHERE),
    ({"name": "layernorm", "bias": True, "lns": True}, {"attention_bias": True, "mlp_bias": True}, EVERYWHERE),
    ({"name": "layernorm"}, {"attention": AttentionConfig(gate=True)}, EVERYWHERE),
    ({"name": "layernorm", "eps": 1e-4}, {"qk_norm": True}, ("layernorm", "rmsnorm", "crmsnorm")),
    ({"name": "rmsnorm"}, {}, NOT_CENTRED),
    ({"name": "rmsnorm", "final": "ssnorm", "lns": True}, {"attention_bias": True}, NOT_CENTRED),
    ({"name": "rmsnorm", "embed_scale": True}, {"mlp_bias": True, "head_bias": True}, NOT_CENTRED),
    ({"name": "ssnorm", "lns": True}, {"embed_proj": True}, NOT_CENTRED),
    ({"name": "ssnorm"}, {"qk_norm": True}, NOT_CENTRED),
    ({"name": "ssnorm"}, {"ffn_norm": True, "attention": AttentionConfig(off_by_one=True)}, NOT_CENTRED),
    ({"name": "layernorm", "eps": 1e-4}, {"ffn_norm": True, "hidden_act": "relu2"}, ("layernorm", "rmsnorm")),
    ({"name": "layernorm", "bias": True}, {"tie_embeddings": True}, EVERYWHERE),
    ({"name": "ssnorm", "embed_scale": True}, {"tie_embeddings": True}, NOT_CENTRED),
    ({"name": "crmsnorm"}, {"hidden_size": 23, "head_dim": 6}, EVERYWHERE),
    ({"name": "crmsnorm", "affine": True}, {"attention": AttentionConfig(gate=True), "embed_proj": True}, EVERYWHERE),
]


@pytest.mark.parametrize(("norm", "shape", "targets"), SOURCES, ids=str)
def test_every_pair_is_exact_in_float64(norm: dict[str, Any], shape: dict[str, Any], targets: tuple[str, ...]) -> None:
    model = random_model(norm, **shape)
    before = {name: (p.data, p.detach().clone()) for name, p in model.named_parameters()}
    for to in targets:
        converted = convert(model, to)
        assert_same_function(converted, model)
        names = {
            type(m).__name__.lower() for n, m in converted.named_modules() if isinstance(m, Norm) and "_norm" not in n
        }
        assert names == {to}
        tied = {"tie_embeddings": converted.config.tie_embeddings}  # which depends on the weights
        assert converted.config == dataclasses.replace(change_config(model.config, to), **tied)
        assert (converted.config.embed_proj, converted.config.norm.lns) == (False, False)
        for name, parameter in model.named_parameters():  # the source is unchanged
            assert parameter.data is not None
            assert parameter.data_ptr() == before[name][0].data_ptr()
            assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize(
    ("norm", "to", "tied"),
    [
        ({"name": "ssnorm", "lns": True}, "rmsnorm", True),
        ({"name": "rmsnorm"}, "rmsnorm", True),
        ({"name": "rmsnorm"}, "ssnorm", False),  # the gains of the last norm move into the head
        ({"name": "layernorm"}, "rmsnorm", False),  # the mean is subtracted from the embedding
        ({"name": "ssnorm", "embed_scale": True}, "rmsnorm", False),
    ],
    ids=str,
)
def test_head_stays_tied_unless_it_differs_from_the_embedding(norm: dict[str, Any], to: str, tied: bool) -> None:
    model = random_model(norm, tie_embeddings=True)
    converted, steps = change_norms(model, to)
    assert_same_function(converted, model)
    assert converted.config.tie_embeddings == tied
    assert (converted.lm_head.weight is converted.embed_tokens.weight) == tied
    assert ("head untied from the embedding" in steps) == (not tied)


@pytest.mark.parametrize("bias", [False, True])
def test_round_trip_returns_the_same_weights(bias: bool) -> None:
    """LayerNorm -> RMSNorm -> CRMSNorm (d - 1) -> RMSNorm -> LayerNorm -> CRMSNorm: the same weights again."""
    model = random_model({"name": "layernorm", "bias": bias})
    rms = convert(model, "rmsnorm")
    crms = convert(rms, "crmsnorm")
    assert (crms.config.hidden_size, crms.config.head_dim) == (23, 6)
    assert crms.embed_tokens.weight.shape == (50, 23)
    back = convert(crms, "rmsnorm")
    assert (back.config.hidden_size, back.config.head_dim) == (24, None)
    torch.testing.assert_close(back.embed_tokens.weight, rms.embed_tokens.weight, rtol=0, atol=1e-14)
    ln = convert(back, "layernorm")
    again = convert(ln, "crmsnorm")
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, dict(crms.named_parameters())[name], rtol=0, atol=1e-13)
    for converted in (rms, crms, back, ln, again):
        assert_same_function(converted, model)


@torch.no_grad()
def test_converted_norm_equals_layer_norm_of_torch() -> None:
    """One norm and the matrix that reads it: layer_norm of torch against the CRMSNorm of the converted model."""
    model = random_model({"name": "layernorm", "bias": True, "eps": 1e-2})
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weights = dict(model.named_parameters())
    gain, bias = (weights[f"layers.1.post_attention_layernorm.{kind}"] for kind in ("weight", "bias"))
    expected = nn.functional.layer_norm(x, (24,), gain, bias, eps=1e-2) @ weights["layers.1.mlp.up_proj.weight"].T
    layer = convert(model, "crmsnorm").layers[1]
    assert isinstance(layer, Block)
    shorter = (x - x.mean(-1, keepdim=True))[:, :-1]
    torch.testing.assert_close(layer.mlp.up_proj(layer.post_attention_layernorm(shorter)), expected, rtol=0, atol=1e-12)


def test_gains_stay_if_both_norms_have_one_per_channel() -> None:
    def gains(model: Transformer) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in model.named_parameters() if "norm" in name}

    model, name = random_model({"name": "layernorm", "lns": True}), "layers.2.input_layernorm.weight"
    expected = gains(model)[name] / 3**0.5
    torch.testing.assert_close(gains(convert(model, "rmsnorm"))[name], expected, rtol=0, atol=1e-15)
    assert {gain.item() for gain in gains(convert(model, "ssnorm")).values()} == {1.0}
    ssnorm = random_model({"name": "ssnorm"})
    per_channel = gains(convert(ssnorm, "rmsnorm"))["norm.weight"]
    assert torch.equal(per_channel, gains(ssnorm)["norm.weight"].expand(24))
    assert torch.equal(gains(convert(ssnorm, "ssnorm"))["norm.weight"], gains(ssnorm)["norm.weight"])


def parameter_names(model: Transformer) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def test_model_without_biases_has_none_after_conversion() -> None:
    for to in CONVERTIBLE:
        names = parameter_names(convert(random_model({"name": "layernorm"}), to))
        assert not [name for name in names if "bias" in name]
    names = parameter_names(convert(random_model({"name": "layernorm", "bias": True}), "rmsnorm"))
    assert {"lm_head.bias", "layers.0.self_attn.o_proj.bias", "layers.0.mlp.up_proj.bias"} <= names


def test_recentred_model_stored_in_fp32_can_be_converted_again() -> None:
    """Rounding to fp32 leaves a small mean, which counts as zero."""
    model = random_model({"name": "layernorm"})
    stored = convert(convert(model, "rmsnorm").float(), "crmsnorm")
    assert_same_function(stored, model, atol=1e-5)


def test_large_eps_carries_over() -> None:
    """With eps of the size of the variance, every norm adds it to the same number."""
    model = random_model({"name": "layernorm", "eps": 1.0})
    for to in CONVERTIBLE:
        assert_same_function(convert(model, to), model)
        assert convert(model, to).config.norm.eps == 1.0


@pytest.mark.parametrize(
    ("norm", "shape", "to", "message"),
    [
        ({"name": "rmsnorm"}, {}, "batchnorm", r"to=batchnorm: choose from layernorm, rmsnorm, ssnorm, crmsnorm"),
        ({"name": "rmsnorm"}, {}, "crmsnorm", r"the residual stream has a mean \(embed_tokens.weight: "),
        ({"name": "ssnorm"}, {}, "layernorm", r"only models converted from layernorm have none"),
        ({"name": "dyt"}, {}, "rmsnorm", r"norm.name=dyt cannot be converted: it is a tanh without a statistic"),
        ({"name": "derf"}, {}, "ssnorm", r"norm.name=derf cannot be converted"),
        ({"name": "bhyt", "seq_len": 8}, {}, "ssnorm", r"norm.name=bhyt cannot be converted"),
        ({"name": "bhyt_star"}, {}, "ssnorm", r"norm.name=bhyt_star cannot be converted"),
        ({"name": "rmsnorm", "placement": "peri"}, {}, "ssnorm", r"norm.placement=peri cannot be converted: its norms"),
        (
            {"name": "rmsnorm", "final": "layernorm"},
            {},
            "ssnorm",
            r"rmsnorm keeps the mean and layernorm subtracts the mean",
        ),
        ({"name": "layernorm", "final": "crmsnorm"}, {}, "rmsnorm", r"crmsnorm counts a channel that is not stored"),
        (
            {"name": "rmsnorm", "final": "dyt"},
            {},
            "ssnorm",
            r"and dyt does not divide by a statistic",
        ),
        (
            {"name": "layernorm", "bias": True},
            {"attention": AttentionConfig(gate=True)},
            "rmsnorm",
            r"norm.bias=true with attention.gate=true cannot be converted: the gate has no bias",
        ),
        ({"name": "rmsnorm"}, {"qk_norm": True}, "ssnorm", r"q_norm.weight: its gains differ, and to=ssnorm has one"),
        (
            {"name": "layernorm"},
            {"qk_norm": True},
            "rmsnorm",
            r"qk_norm=true has eps=1e-06 and the other norms eps=1e-05",
        ),
        ({"name": "layernorm"}, {"ffn_norm": True}, "rmsnorm", r"ffn_norm=true has eps=1e-06 and the other norms eps"),
        ({"name": "rmsnorm"}, {"ffn_norm": True}, "ssnorm", r"mlp.ffn_norm.weight: its gains differ, and to=ssnorm"),
    ],
    ids=str,
)
def test_unsupported_conversion_is_refused_with_reason(
    norm: dict[str, Any], shape: dict[str, Any], to: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        convert(random_model(norm, **shape), to)
    assert "\n" not in str(error.value)


def test_conversion_steps_are_listed_in_order() -> None:
    model = random_model({"name": "layernorm", "bias": True, "lns": True, "embed_scale": True}, embed_proj=True)
    converted, steps = change_norms(model, "crmsnorm")
    assert steps == [
        "embedding projections absorbed",
        "scale of the embedding folded",
        "LayerNorm scaling folded",
        "biases of norms folded",
        "gains of norms folded",
        "residual stream recentred",
        "last channel dropped",
        "layernorm -> crmsnorm",
    ]
    assert change_norms(converted, "rmsnorm")[1] == ["last channel appended", "crmsnorm -> rmsnorm"]
    assert change_norms(random_model({"name": "rmsnorm"}), "rmsnorm")[1] == ["rmsnorm -> rmsnorm"]


def test_folding_leaves_a_plain_model_of_the_same_norm() -> None:
    model = random_model({"name": "rmsnorm", "embed_scale": True}, embed_proj=True, attention_bias=True)
    expected = logits(model)
    fold_into_weights(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    assert (model.config.embed_proj, model.config.norm.embed_scale) == (False, False)
    plain = Transformer(model.config)
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
