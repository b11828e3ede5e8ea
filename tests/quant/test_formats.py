"""Fake quantization against a value-by-value oracle, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.quant.integers import round_activation, round_weight

f32 = np.float32


def naive_weight(row: Any, bits: int) -> list[Any]:
    top = 2 ** (bits - 1) - 1
    scale = f32(max(abs(v) for v in row)) / f32(top)
    if scale == 0:
        return list(row)
    return [scale * f32(min(max(round(float(v / scale)), -top - 1), top)) for v in row]  # round: half to even


def naive_activation(row: Any, bits: int) -> list[Any]:
    low, high = min([*row, f32(0)]), max([*row, f32(0)])
    scale = f32(high - low) / f32(2**bits - 1)
    if scale == 0:
        return list(row)
    zero = round(float(-low / scale))
    return [scale * f32(min(max(round(float(v / scale)) + zero, 0), 2**bits - 1) - zero) for v in row]


def samples() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, 24, generator=draw) * torch.logspace(-3, 3, 8)[:, None]
    x[1] = 0.0  # has no scale
    x[2] = x[2].abs() + 1.0  # all on one side of zero
    x[3, 5] = 1e4  # an outlier
    x[4] = torch.arange(24.0) - 12  # ties
    return x


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("group_size", [None, 8])
def test_rounding_matches_the_oracle_bit_for_bit(bits: int, group_size: int | None) -> None:
    x = samples()
    for quantize, naive in ((round_weight, naive_weight), (round_activation, naive_activation)):
        size = group_size or 24
        parts = x.numpy().reshape(-1, size)
        expected = np.array([naive(list(part), bits) for part in parts], dtype=f32).reshape(8, 24)
        got = quantize(x, bits=bits, group_size=group_size)
        assert torch.equal(got, torch.from_numpy(expected)), (quantize.__name__, bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_fit_the_bits_and_include_zero(bits: int) -> None:
    x = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0.0
    for quantize in (round_weight, round_activation):
        for row in quantize(x, bits=bits):
            assert len(row.unique()) <= 2**bits
            assert row[0] == 0.0
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    error = (round_activation(x, bits=bits) - x).abs().amax(-1)
    assert (error <= step * 1.001).all()  # half a step, and half a step for the rounded zero at the ends


def test_one_outlier_ruins_its_group_only() -> None:
    """With a value of 1000 in the group, the other values are rounded to zero."""
    x = torch.ones(1, 16)
    x[0, 0] = 1000.0
    assert round_activation(x, bits=4)[0, 1:].abs().max() == 0
    assert torch.equal(round_activation(x, bits=4, group_size=8)[0, 8:], torch.ones(8))


def test_dtype_is_kept_and_argument_unchanged() -> None:
    x = samples().bfloat16()
    before = x.clone()
    assert round_activation(x, bits=4).dtype == torch.bfloat16
    assert round_weight(x, bits=4).dtype == torch.bfloat16
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [1, 17])
def test_invalid_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"bits="):
        round_weight(samples(), bits=bits)


def test_zeros_fill_the_last_group() -> None:
    x = samples()
    for quantize in (round_weight, round_activation):
        expected = quantize(F.pad(x, (0, 4)), bits=4, group_size=7)[:, :24]
        assert torch.equal(quantize(x, bits=4, group_size=7), expected)
