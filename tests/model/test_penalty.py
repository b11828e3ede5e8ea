"""The penalty on large activations: formula, gradient, memory, and sums over batches and blocks."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from osp.config import Config, PenaltyConfig
from osp.model.penalty import activation_penalty
from osp.model.transformer import Block, Transformer, build_model
from osp.model_config import ModelConfig, NormConfig
from osp.train.setup import train
from tests.conftest import read_metrics

Site = Literal["block_out", "down_proj_in"]
SHAPE = ModelConfig(17, 16, 24, num_hidden_layers=3, num_attention_heads=4, norm=NormConfig("ssnorm"))
IDS = torch.randint(0, 17, (4, 9), generator=torch.Generator().manual_seed(0))


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def naive(x: Tensor, scale: Any) -> Tensor:
    """Return the penalty as a sum over one token and channel at a time."""
    total = x.new_zeros(())
    for token in x.flatten(0, -2):
        unit = torch.stack([v**2 for v in token]).mean().sqrt() if scale == "rms" else scale
        total = total + sum((v.abs() / unit) ** 4 for v in token) / len(token)
    return total


@pytest.mark.parametrize("scale", [3.0, 0.7, "rms"])
def test_penalty_and_gradient_equal_the_formula(scale: Any) -> None:
    x, twin = (normal(2, 3, 5).mul(2).requires_grad_() for _ in range(2))
    actual, expected = activation_penalty(x, PenaltyConfig(scale=scale)), naive(twin, scale)
    (actual * 0.3).backward()
    (expected * 0.3).backward()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-9, atol=1e-9)


def test_penalty_of_known_values() -> None:
    spike = torch.tensor([[6.0, 0.0, 0.0, 0.0], [3.0, -3.0, 3.0, -3.0]])
    assert activation_penalty(spike, PenaltyConfig(scale=3.0)).item() == pytest.approx(16 / 4 + 1)
    assert activation_penalty(spike, PenaltyConfig(scale="rms")).item() == pytest.approx(4 + 1)
    assert activation_penalty(1000 * spike, PenaltyConfig(scale="rms")).item() == pytest.approx(4 + 1)
    assert activation_penalty(0 * spike, PenaltyConfig(scale="rms")).item() == 0
    gaussian = activation_penalty(normal(50, 20_000), PenaltyConfig(scale="rms")) / 50
    assert gaussian.item() == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize("scale", [3.0, "rms"])
def test_penalty_of_bf16_equals_fp32_of_the_rounded_input(scale: Any) -> None:
    x = normal(64, 48).mul(3).bfloat16()
    actual, expected = activation_penalty(x, PenaltyConfig(scale=scale)), naive(x.double(), scale)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def test_only_the_input_is_kept_for_backward() -> None:
    x, kept = normal(8, 32, dtype=torch.bfloat16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        penalty = activation_penalty(x, PenaltyConfig())
    assert sum(t.numel() for t in kept if t.data_ptr() != x.data_ptr()) <= 8
    penalty.backward()
    assert x.grad is not None


def model_of(**changes: Any) -> Transformer:
    model = build_model(dataclasses.replace(SHAPE, **changes), seed=0).double()
    model.compute_dtype = torch.float64
    return model


def hooked(model: Transformer, site: Site) -> list[Tensor]:
    """Return a list that hooks fill with the activations of every block in the next forward pass."""
    seen: list[Tensor] = []
    for block in model.layers:
        assert isinstance(block, Block)
        if site == "block_out":
            block.register_forward_hook(lambda *call: seen.append(call[2][0]))
        else:
            block.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scale", [2.0, "rms"])
@pytest.mark.parametrize("site", ["block_out", "down_proj_in"])
def test_model_returns_loss_and_penalty_of_its_blocks(site: Site, scale: Any, checkpointing: bool) -> None:
    """Value and gradients against hooks on a copy; the loss is bit-identical to a model without a penalty."""
    model, twin = model_of(ffn_norm=site == "down_proj_in"), model_of(ffn_norm=site == "down_proj_in")
    model.activation_checkpointing = checkpointing
    model.set_penalty(PenaltyConfig(weight=0.5, site=site, scale=scale))
    loss, logits, penalty, *_ = model(IDS[:, :-1], IDS[:, 1:])
    assert logits is None
    (loss + 0.5 * penalty).backward()
    seen = hooked(twin, site)
    plain, _, none, *_ = twin(IDS[:, :-1], IDS[:, 1:])
    assert none is None
    assert torch.equal(loss, plain)
    assert len(seen) == SHAPE.num_hidden_layers
    expected = sum(naive(x, scale) for x in seen) / len(seen)
    assert isinstance(expected, Tensor)
    (plain + 0.5 * expected).backward()
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        scale_of_gradient = float(other.grad.abs().max())
        assert (parameter.grad - other.grad).abs().max() < 1e-9 * max(scale_of_gradient, 1), name


def test_compiled_blocks_return_the_same_penalty() -> None:
    """Blocks compile as one graph each."""
    results = []
    for compiled in (False, True):
        model = model_of(ffn_norm=True, num_hidden_layers=1)
        if compiled:
            model.layers[0].compile(backend="aot_eager", fullgraph=True)
        model.set_penalty(PenaltyConfig(weight=1.0, site="down_proj_in", scale="rms"))
        loss, _, penalty, *_ = model(IDS[:, :-1], IDS[:, 1:])
        (loss + penalty).backward()
        results.append([loss, penalty, *(p.grad for p in model.parameters())])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)


def test_penalty_of_a_step_does_not_depend_on_micro_batches(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Two trainings with 4 and 1 micro batches agree; the first loss equals the loss of a run without a penalty."""
    overrides = ("penalty.weight=0.5", "penalty.scale=1.0", "train.steps=3", "eval.every=0", "eval.sample_tokens=0")
    train(tiny(*overrides, name="four"))
    train(tiny(*overrides, "train.micro_batch_size=8", name="one"))
    train(tiny(*overrides[2:], name="without"))
    four, one, without = (
        [event for event in read_metrics(tmp_path / name) if "train/loss" in event]
        for name in ("four", "one", "without")
    )
    for key in ("train/loss", "train/penalty", "train/grad_norm"):
        assert [e[key] for e in four] == pytest.approx([e[key] for e in one], rel=1e-5)
    assert four[0]["train/loss"] == without[0]["train/loss"]
    assert abs(four[2]["train/loss"] - without[2]["train/loss"]) > 1e-4
    assert four[2]["train/penalty"] < 0.9 * four[0]["train/penalty"]
    assert "train/penalty" not in without[0]
    assert math.isfinite(four[2]["train/penalty"])
