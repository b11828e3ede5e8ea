"""LayerNorm equals RMSNorm on a residual stream of mean zero: the losses of every step agree."""

import dataclasses
import functools

import pytest
import torch

from osp.config import ModelConfig, NormConfig
from osp.model.transformer import Block, Transformer, build_model

STEPS = 200
LAYERNORM = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
    norm=NormConfig("layernorm", eps=1e-5),
)
RECENTRED = dataclasses.replace(LAYERNORM, norm=NormConfig("rmsnorm", eps=1e-5), recentre=True)
# largest difference of the mean loss of a step, in nats per token: rounding, accumulated over 200 steps of AdamW
FP32, BF16 = 1e-5, 0.1


def losses(model: Transformer, dtype: torch.dtype, *, steps: int = STEPS) -> torch.Tensor:
    """Return the mean loss of every AdamW step, on text whose next token mostly follows from the last one."""
    model.compute_dtype = dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    draw = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(steps):
        start, noise = (torch.randint(0, 24, shape, generator=draw) for shape in ((4, 1), (4, 13)))
        rows = (start + 5 * torch.arange(13)) % 24
        rows = torch.where(noise < 3, noise * 7, rows)
        loss = model(rows[:, :-1], rows[:, 1:].contiguous()).loss / 48
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve)


@functools.cache
def layernorm_losses(dtype: torch.dtype) -> torch.Tensor:
    curve = losses(build_model(LAYERNORM, seed=0), dtype)
    assert curve[-20:].mean() < 0.6 * curve[0], "there must be something to learn"
    return curve


def difference(dtype: torch.dtype, *, steps: int = STEPS, broken: bool = False) -> float:
    """Return the largest difference between the losses of the two models, which start from the same weights."""
    other = build_model(RECENTRED, seed=0)
    if broken:
        last = other.layers[-1]
        assert isinstance(last, Block)
        last.mlp.down_proj.zero_mean = False
    return float((losses(other, dtype, steps=steps) - layernorm_losses(dtype)[:steps]).abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)], ids=str)
def test_losses_equal_those_with_layernorm(dtype: torch.dtype, tolerance: float) -> None:
    assert difference(dtype) < tolerance


def test_losses_differ_when_one_matrix_is_not_recentred() -> None:
    assert difference(torch.float32, steps=20, broken=True) > 10 * FP32
