"""GPTQ equals optimal brain quantization by its formula, and has a smaller objective than round-to-nearest."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from osp.model.transformer import Linear, Transformer
from osp.quant.gptq import gptq, quantize_weights_gptq
from osp.quant.spec import INNER_SITES, QuantSpec
from tests.quant.integers import round_weight
from tests.quant.quant_oracle import naive_levels, outlier_model, some_tokens


def gptq_spec(bits: int, **options: Any) -> QuantSpec:
    return QuantSpec(w_bits=bits, method="gptq", **options)


def correlated(rows: int, channels: int, *, seed: int = 0) -> Tensor:
    """Return inputs with correlated channels of very different size, as in a model."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=draw) / channels**0.5 + torch.eye(channels)
    return torch.randn(rows, channels, generator=draw) @ mixing * torch.logspace(-1, 1, channels)


def weight_and_hessian(rows: int, channels: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = correlated(4 * channels, channels, seed=seed)
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed + 1)), x.T @ x


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    error = (weight - quantized).double()
    return float((error @ hessian.double() * error).sum())


def naive_gptq(
    weight: np.ndarray, hessian: np.ndarray, bits: int, group_size: int, symmetric: bool, clip: bool, act_order: bool
) -> list[list[int]]:
    """Return integers by the formula of optimal brain surgery: after each channel, invert H of the remaining ones."""
    channels = weight.shape[1]
    h = hessian + 0.01 * np.diag(hessian).mean() * np.eye(channels)
    order = sorted(range(channels), key=lambda c: -hessian[c, c]) if act_order else list(range(channels))
    out = []
    for row in weight:
        grids = [
            naive_levels(row[c : c + group_size].tolist(), bits, symmetric, clip)[1:]
            for c in range(0, channels, group_size)
        ]
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        w, levels = row.copy(), [0] * channels
        for position, c in enumerate(order):
            rest = order[position:]
            inverse = np.linalg.inv(h[np.ix_(rest, rest)])
            scale, zero = grids[c // group_size]
            levels[c] = min(max(round(w[c] / scale) + zero, low), high)
            w[rest] -= (w[c] - scale * (levels[c] - zero)) / inverse[0, 0] * inverse[0]
        out.append(levels)
    return out


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("symmetric", "clip", "group_size"), [(True, True, 24), (False, False, 8)])
def test_integers_match_optimal_brain_surgery(
    symmetric: bool, clip: bool, group_size: int, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osp.quant.gptq.COLUMNS", 7)  # blocks that divide neither channels nor groups
    weight, hessian = weight_and_hessian(5, 24)
    spec = gptq_spec(4, w_symmetric=symmetric, w_group_size=group_size, w_clip=clip, act_order=act_order)
    got = gptq(weight, hessian, spec)
    expected = naive_gptq(weight.double().numpy(), hessian.double().numpy(), 4, group_size, symmetric, clip, act_order)
    for row, values, levels in zip(weight.tolist(), got.tolist(), expected, strict=True):
        for c in range(0, 24, group_size):
            _, scale, zero = naive_levels(row[c : c + group_size], 4, symmetric, clip)
            assert [round(v / scale) + zero for v in values[c : c + group_size]] == levels[c : c + group_size]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_identity_hessian_is_round_to_nearest_bit_for_bit(clip: bool, act_order: bool) -> None:
    weight, _ = weight_and_hessian(6, 300)
    for symmetric in (True, False):
        for group_size in (None, 20):
            spec = gptq_spec(3, w_symmetric=symmetric, w_group_size=group_size, w_clip=clip, act_order=act_order)
            nearest = round_weight(weight, bits=3, group_size=group_size, symmetric=symmetric, clip_search=clip)
            for scale in (1.0, 37.0):
                assert torch.equal(gptq(weight, scale * torch.eye(300), spec), nearest)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_has_less_error_than_rounding_beyond_one_block_of_columns(seed: int, act_order: bool) -> None:
    weight, hessian = weight_and_hessian(16, 300, seed=seed)
    for bits in (3, 4, 8):
        nearest = objective(weight, round_weight(weight, bits=bits), hessian)
        rounded = gptq(weight, hessian, gptq_spec(bits, w_clip=False, act_order=act_order))
        assert objective(weight, rounded, hessian) < (0.7 if act_order else 0.95) * nearest


def test_channel_without_input_is_rounded_to_nearest() -> None:
    weight, hessian = weight_and_hessian(4, 24)
    hessian[5] = hessian[:, 5] = 0.0
    got = gptq(weight, hessian, gptq_spec(4, w_clip=False))
    assert torch.equal(got[:, 5], round_weight(weight, bits=4)[:, 5])
    assert got.isfinite().all()


@torch.no_grad()
def test_gptq_has_less_error_than_rounding_on_every_matrix_of_a_model() -> None:
    """On the inputs of each matrix in the model whose earlier matrices are quantized."""
    model, sequences = outlier_model(), some_tokens(24, 16)
    before = {name: m.weight.data for name, m in linears(model).items()}
    quantize_weights_gptq(model, QuantSpec(w_bits=4), sequences, sites=INNER_SITES["w"])
    inputs = inputs_of_matrices(model, sequences)
    assert len(inputs) == 14
    for name, x in inputs.items():
        hessian, weight = x.T @ x, before[name]
        nearest = round_weight(weight, bits=4, clip_search=True)
        rounded = linears(model)[name].weight
        assert objective(weight, rounded, hessian) < 0.95 * objective(weight, nearest, hessian), name


@torch.no_grad()
def test_only_the_given_sites_change() -> None:
    model, sequences = outlier_model(), some_tokens(4, 16)
    before = {name: m.weight.data for name, m in linears(model).items()}
    quantize_weights_gptq(model, QuantSpec(w_bits=4), sequences, sites=["k_proj", "down_proj"])
    changed = {name.split(".")[-1] for name, m in linears(model).items() if not torch.equal(m.weight, before[name])}
    assert changed == {"k_proj", "down_proj"}


def linears(model: Transformer) -> dict[str, Linear]:
    return {name: module for name, module in model.layers.named_modules() if isinstance(module, Linear)}


def inputs_of_matrices(model: Transformer, sequences: Tensor) -> dict[str, Tensor]:
    """Return the input (tokens, channels) of every matrix of the blocks."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, arguments: inputs.update({name: arguments[0].flatten(0, 1)})

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in linears(model).items()]
    model(sequences)
    for handle in handles:
        handle.remove()
    return inputs
