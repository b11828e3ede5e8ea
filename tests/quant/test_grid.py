"""Integers, scales and the clip search against the oracle."""

import pytest
import torch

from osp.quant.grid import grouped
from tests.quant.integers import integers, round_activation, round_weight
from tests.quant.quant_oracle import naive_levels, naive_quantize


def values() -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, 32, generator=draw) * torch.logspace(-2, 2, 6)[:, None]
    x[1] = x[1].abs() + 2.0  # all on one side of zero
    x[2, 7] = 900.0  # an outlier: the clip search has something to do
    x[3] = 0.0
    return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
def test_integers_match_the_oracle(group_size: int | None, symmetric: bool, clip: bool) -> None:
    for bits in (2, 3, 4, 8):  # test_formats.py has all of them, in fp32 as the code
        groups = grouped(values(), group_size=group_size)
        grid = integers(bits, symmetric=symmetric).grid(groups, clip_search=clip)
        levels = grid.levels(groups).flatten(0, 1)
        for row, scale, zero, x in zip(
            levels.tolist(), grid.scale.flatten(), grid.zero.flatten(), groups.flatten(0, 1).tolist(), strict=True
        ):
            expected, expected_scale, expected_zero = naive_levels(x, bits, symmetric, clip)
            assert row == expected, (bits, x)
            assert float(scale) == pytest.approx(expected_scale, rel=1e-6)
            assert int(zero) == expected_zero


def test_rounding_matches_the_oracle() -> None:
    x = values().double()
    for symmetric in (False, True):
        for clip in (False, True):
            got = round_weight(x, bits=4, group_size=8, symmetric=symmetric, clip_search=clip)
            expected = naive_quantize(x.numpy(), 4, symmetric=symmetric, group_size=8, clip=clip)
            torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)
        got = round_activation(x, bits=4, symmetric=symmetric)
        expected = naive_quantize(x.numpy(), 4, symmetric=symmetric)
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


def test_clip_search_clips_the_outlier() -> None:
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    x[0, 7] = 6.0
    full, clipped = (integers(4, symmetric=True).grid(x, clip_search=clip) for clip in (False, True))
    assert clipped.scale < 0.95 * full.scale
    errors = [float((grid.nearest(x) - x).abs().pow(2.4).sum()) for grid in (clipped, full)]
    assert errors[0] < 0.8 * errors[1]
