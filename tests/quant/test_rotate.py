"""Rotations, folds and online transforms keep the logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from osp.model.fold import absorb_projections, fold_norm_gains
from osp.model.transformer import Transformer
from osp.model_config import AttentionConfig, NormConfig
from osp.quant.grid import StraightThrough
from osp.quant.rotate import fuse_rotations, random_rotations, rotate_online
from tests.quant.quant_oracle import outlier_model, some_tokens


def online_ffn(model: Transformer) -> None:
    rotate_online(model, ffn=True, qk=False)


def online_qk(model: Transformer) -> None:
    rotate_online(model, ffn=False, qk=True)


def fuse(model: Transformer) -> None:
    fuse_rotations(model, random_rotations(model, seed=0))


STEPS: list[Callable[[Transformer], None]] = [absorb_projections, fold_norm_gains, online_ffn, online_qk, fuse]


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (NormConfig(name="rmsnorm"), {}),
        (NormConfig(name="rmsnorm", affine=False), {"num_key_value_heads": None}),
        (NormConfig(name="ssnorm"), {"intermediate_size": 48}),  # 4 x 12: Paley
        (NormConfig(name="ssnorm", final="rmsnorm"), {"hidden_size": 48, "intermediate_size": 86}),  # 86 = 2 x 43
        (NormConfig(name="ssnorm", placement="peri", lns=True), {"qk_norm": True}),
        (NormConfig(name="rmsnorm"), {"attention_bias": True, "mlp_bias": True}),
        (NormConfig(name="rmsnorm"), {"attention": AttentionConfig(gate=True), "attention_bias": True}),
        (NormConfig(name="ssnorm"), {"attention": AttentionConfig(off_by_one=True), "ffn_norm": True}),
        (NormConfig(name="ssnorm"), {"attention": AttentionConfig(value_gate=True, logit_cap=0.5)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("embed_proj", [False, True])
def test_logits_do_not_change(norm: NormConfig, shape: dict[str, Any], embed_proj: bool) -> None:
    model, ids = outlier_model(embed_proj=embed_proj, norm=norm, **shape), some_tokens(2, 12)
    if embed_proj:
        with torch.no_grad():  # not orthogonal, as after training
            for projection in (model.embed_proj, model.head_proj):
                assert isinstance(projection.weight, nn.Parameter)
                projection.weight.add_(0.3 * torch.randn(projection.weight.shape, dtype=torch.float64))
    with torch.no_grad():
        expected = model(ids).logits
        for step in STEPS:
            before = {name: p.clone() for name, p in model.named_parameters()}
            step(model)
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-10, msg=step.__name__)
            if step is fuse:
                changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
                turned = ("o_proj.bias", "down_proj.bias") + (() if model.config.attention.gate else ("v_proj.bias",))
                assert "layers.0.self_attn.value_gate.weight" in changed or not model.config.attention.value_gate
                assert changed == {
                    n for n in before if "norm" not in n and (n.endswith("weight") or n.endswith(turned))
                }
    if embed_proj:
        assert model.config.embed_proj is False
        assert "embed_proj.weight" not in dict(model.named_parameters())


def test_tensors_are_replaced_and_not_written_in_place() -> None:
    """`quantized` restores the old tensors, so they must keep their values."""
    model = outlier_model(embed_proj=True)
    old = {name: (p.data, p.data.clone()) for name, p in model.named_parameters()}
    for step in STEPS:
        step(model)
    for name, (data, copy) in old.items():
        assert torch.equal(data, copy), name


def test_rotation_spreads_the_outlier_channel() -> None:
    model = outlier_model()

    def peak() -> float:
        """Return the energy of the largest channel of the embedding over the mean."""
        energy = model.embed_tokens.weight.detach().square().mean(0)
        return float(energy.max() / energy.mean())

    assert peak() > 15
    length = model.embed_tokens.weight.detach().norm(dim=1)
    fold_norm_gains(model)
    fuse(model)
    assert peak() < 3
    torch.testing.assert_close(model.embed_tokens.weight.detach().norm(dim=1), length, rtol=1e-12, atol=0)


def test_gradients_pass_straight_through() -> None:
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    y = StraightThrough.apply(torch.round, x)
    assert torch.equal(y, x.detach().round())
    (y * torch.arange(9.0)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(9.0))
