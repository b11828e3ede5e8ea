"""Each statistic equals a closed form, a naive float64 oracle, and itself over any split of the tokens."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from osp.monitor import statistics as st
from osp.monitor.statistics import Sample

N, D = 64, 32


def measured(x: Tensor) -> dict[str, float]:
    return statistics_of(st.take_sample(x))


def statistics_of(sample: Sample, gains: st.Gains | None = None) -> dict[str, float]:
    statistics = st.compute_statistics(sample, gains)
    assert {(value.dtype, value.ndim) for value in statistics.values()} == {(torch.float64, 0)}
    return {name: value.item() for name, value in statistics.items()}


# --- closed forms -------------------------------------------------------------------------------------------------


def test_kurtosis_of_known_samples() -> None:
    """Two values: -2. Three values a, 0, -a in shares p/2, 1 - p, p/2: 1/p - 3. One of n that differs: n - 5 + 1/(n-1).
    A uniform grid of n points: -1.2 (n^2 + 1) / (n^2 - 1)."""

    def kurtosis_of(values: list[float]) -> float:
        return float(st.excess_kurtosis(st.compute_moments(torch.tensor(values), 0)))

    assert kurtosis_of([1.0, -1.0] * 8) == pytest.approx(-2, abs=1e-12)
    assert kurtosis_of([7.0, 3.0] * 8) == pytest.approx(-2, abs=1e-12)
    assert kurtosis_of([5.0, -5.0] + [0.0] * 14) == pytest.approx(16 / 2 - 3, rel=1e-12)
    assert kurtosis_of([1e6] + [1.0] * 31) == pytest.approx(32 - 5 + 1 / 31, rel=1e-12)
    assert kurtosis_of(list(range(100))) == pytest.approx(-1.2 * (100**2 + 1) / (100**2 - 1), rel=1e-12)
    assert kurtosis_of([0.1] * 50) == 0.0
    assert kurtosis_of([0.0] * 50) == 0.0


def test_every_statistic_of_alternating_signs() -> None:
    """All channels and tokens have the same energy, and all values the same magnitude."""
    result = measured(torch.tensor([1.0, -1.0]).repeat(N, D // 2) * 4)
    assert result == pytest.approx(
        {
            "kurtosis": -2,
            "kurtosis_pooled": -2,
            "kurtosis_channel": 0,  # each channel is constant
            "max_abs": 4,
            "max_over_median": 1,
            "rms": 4,
            "top_channel_share": 1 / D,
            "top_token_share": 1 / N,
            "massive_count": 0,
            "few_channels": 1,
            "few_tokens": 1,
            "mean_energy": 1,  # every token is the same vector
            "top_channel_constancy": 1,
        },
        abs=1e-12,
    )


def test_every_statistic_of_one_spike() -> None:
    """One value of 1024 among zeros: the largest possible kurtosis, all energy in one channel of one token."""
    x = torch.zeros(N, D)
    x[5, 7] = -1024.0
    result = measured(x)
    assert math.isinf(result.pop("max_over_median"))
    assert result == pytest.approx(
        {
            "kurtosis": (D - 5 + 1 / (D - 1)) / N,  # the other tokens are constant
            "kurtosis_pooled": N * D - 5 + 1 / (N * D - 1),
            "kurtosis_channel": (N - 5 + 1 / (N - 1)) / D,
            "max_abs": 1024,
            "rms": 1024 / math.sqrt(N * D),
            "top_channel_share": 1,
            "top_token_share": 1,
            "massive_count": 1,
            "few_channels": D,
            "few_tokens": N,
            "mean_energy": 1 / N,
            "top_channel_constancy": 1 / math.sqrt(N),
        },
        rel=1e-12,
    )


def test_decomposition_separates_channels_from_tokens() -> None:
    """Energy r_t c_c with random signs: the rest of the fourth moment is 1, the factors come from r and c."""
    signs = torch.randint(0, 2, (N, D), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    r, c = torch.ones(N).double(), torch.ones(D).double()
    r[3], c[8] = 25.0, 100.0
    x = signs * (r[:, None] * c).sqrt()
    result = measured(x)
    assert result["few_channels"] == pytest.approx(D * (D - 1 + 100**2) / (D - 1 + 100) ** 2, rel=1e-12)
    assert result["few_tokens"] == pytest.approx(N * (N - 1 + 25**2) / (N - 1 + 25) ** 2, rel=1e-12)
    fourth = float((x**4).mean() / (x**2).mean() ** 2)
    assert result["few_channels"] * result["few_tokens"] == pytest.approx(fourth, rel=1e-12)


def test_normal_values_have_no_excess() -> None:
    x = torch.randn(2000, 500, generator=torch.Generator().manual_seed(0))
    result = measured(x)
    assert result["kurtosis"] == pytest.approx(-6 / 501, abs=0.01)  # of a sample of 500, biased
    assert result["kurtosis_pooled"] == pytest.approx(0, abs=0.02)
    assert result["max_over_median"] == pytest.approx(float(x.abs().max()) / 0.6745, rel=5e-3)
    assert result["few_channels"] * result["few_tokens"] == pytest.approx(1, abs=0.01)


def test_mean_energy_of_independent_tokens_is_one_over_their_number() -> None:
    x = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    assert measured(x)["mean_energy"] == pytest.approx(1 / 400, rel=0.1)
    assert measured(x + 3)["mean_energy"] == pytest.approx(9 / 10, rel=0.01)


def test_constant_channel_and_its_gain_give_the_planted_numbers() -> None:
    """Channel 7 is 2 or -2 times 1 +- 0.1 and its gain is 3; the others are +-1 and their gain is 1."""
    signs = torch.tensor([1.0, -1.0])
    z = signs.repeat(N // 2)[:, None] * signs.repeat(D // 2)
    z[:, 7] = -2 * (1 + 0.1 * signs.repeat_interleave(2).repeat(N // 4))
    gains = st.Gains(torch.ones(D).double(), torch.zeros(D).double())
    gains.weight[7] = -3.0
    result = statistics_of(st.take_sample(z.double() * gains.weight), gains)
    assert result["top_channel_constancy"] == pytest.approx(1 / math.sqrt(1.01), rel=1e-6)
    assert result["mean_energy"] == pytest.approx(36 / (36 * 1.01 + D - 1), rel=1e-6)
    assert result["top_channel_share"] == pytest.approx(36 * 1.01 / (36 * 1.01 + D - 1), rel=1e-6)
    assert result["top_channel_share_before_gain"] == pytest.approx(4 * 1.01 / (4 * 1.01 + D - 1), rel=1e-6)
    assert result["gain_share"] == pytest.approx(9 / (9 + D - 1), rel=1e-12)
    assert result["top_channel_gain"] == 3
    # the factor of the docstring
    shares = z.double().square().sum(0) / z.double().square().sum()
    factor = 9 / float((shares * gains.weight.square()).sum())
    assert result["top_channel_share"] == pytest.approx(factor * result["top_channel_share_before_gain"], rel=1e-12)


@pytest.mark.parametrize("x", [torch.zeros(N, D), torch.full((N, D), -0.1), torch.eye(N, D)])
@pytest.mark.parametrize("weight", [0.0, 1.0, 1e-20])
def test_constant_channels_and_gains_of_zero_give_finite_numbers(x: Tensor, weight: float) -> None:
    gains = st.Gains(torch.full((D,), weight).double(), torch.ones(D).double())
    gains.weight[3] = 0.0
    sample = st.take_sample(x * gains.weight + gains.bias)
    for result in (measured(x), statistics_of(sample, gains)):
        result.pop("max_over_median" if x.count_nonzero() == D else "rms")  # infinite: most values are 0
        assert all(map(math.isfinite, result.values())), result
        shares = {name: value for name, value in result.items() if "share" in name or "constancy" in name}
        assert all(0 <= value <= 1 + 1e-12 for value in shares.values()), shares


def test_kurtosis_is_accurate_with_a_large_mean() -> None:
    """Sums of x^4 would cancel: 1000 deviations to the 4th power are 1e12."""
    x = torch.tensor([1.0, -1.0, 0.0, 0.0]).double().repeat(N, D // 4) + 1e4
    result = measured(x)
    assert result["kurtosis"] == pytest.approx(2 - 3, rel=1e-7)
    assert result["kurtosis_pooled"] == pytest.approx(2 - 3, rel=1e-7)


# --- oracles ------------------------------------------------------------------------------------------------------


def heavy(seed: int = 0, tokens: int = N) -> Tensor:
    """Values with heavy tails, uneven channels and tokens, and means."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=draw) ** 3
    x *= torch.rand(D, generator=draw) * 5
    x *= torch.rand(tokens, 1, generator=draw) * 3
    return x + torch.randn(D, generator=draw)


def naive(x: Tensor) -> dict[str, float]:
    """Return every statistic by its definition, in numpy."""
    a = x.double().numpy()
    rounded = x.bfloat16().double().numpy()

    def kurtosis(values: Any) -> float:
        d = values - values.mean()
        return float((d**4).mean() / (d**2).mean() ** 2 - 3)

    energy, magnitude = a**2, np.abs(a)
    top = energy.sum(0).argmax()
    median = sorted(np.abs(rounded).ravel().tolist())[(rounded.size - 1) // 2]
    return {
        "kurtosis": float(np.mean([kurtosis(token) for token in a])),
        "kurtosis_pooled": kurtosis(a),
        "kurtosis_channel": float(np.mean([kurtosis(channel) for channel in a.T])),
        "max_abs": float(magnitude.max()),
        "max_over_median": float(magnitude.max()) / median,
        "rms": float(np.sqrt(energy.mean())),
        "top_channel_share": float(energy.sum(0).max() / energy.sum()),
        "top_token_share": float(energy.sum(1).max() / energy.sum()),
        "massive_count": sum(abs(v - a.mean()) > 6 * a.std() for v in rounded.ravel()),
        "few_channels": float((energy.sum(0) ** 2).mean() / energy.sum(0).mean() ** 2),
        "few_tokens": float((energy.sum(1) ** 2).mean() / energy.sum(1).mean() ** 2),
        "mean_energy": float(len(a) * (a.mean(0) ** 2).sum() / energy.sum()),
        "top_channel_constancy": float(abs(a[:, top].mean()) / np.sqrt(energy[:, top].mean())),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_equal_their_definitions(seed: int, dtype: torch.dtype) -> None:
    x = heavy(seed).to(dtype)
    expected = naive(x)
    assert expected["massive_count"] > 0
    assert measured(x) == pytest.approx(expected, rel=1e-10)


def test_peak_is_the_first_of_the_largest_values() -> None:
    x = heavy()
    x[9, 3], x[20, 1] = -5000.0, 5000.0
    value, place, signed = st.take_sample(x, first_token=100).peak.tolist()
    assert (value, place, signed) == (5000.0, 109 * D + 3, -5000.0)
    later, earlier = st.take_sample(x, first_token=100), st.take_sample(x, first_token=0)
    assert st.merge_samples([later, earlier]).peak[1] == 9 * D + 3


def test_osp_script_kurtosis_equals_the_script() -> None:
    """Against a literal transcription in float32, the dtype of the script."""
    hidden_states = [heavy(seed, tokens=48)[:, None] for seed in range(3)]  # (tokens, 1, D): sequences of length 1
    total = []
    for x in hidden_states:
        kurt = (x**4).mean(dim=-1) / x.std(dim=-1) ** 4 - 3
        total.append(torch.relu(kurt).mean())
    expected = torch.stack(total).mean().item()
    result = torch.stack([st.osp_script_kurtosis(x).mean() for x in hidden_states]).mean().item()
    assert result == pytest.approx(expected, rel=1e-5)
    # one channel of D holds everything: the largest value D - 3, up to the unbiased deviation
    spike = torch.zeros(2048)
    spike[3] = 5.0
    assert st.osp_script_kurtosis(spike).item() == pytest.approx(2048 - 3, rel=1e-3)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("off_by_one", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_attention_statistics_equal_a_loop(
    heads: int, groups: int, cap: float | None, documents: bool, off_by_one: bool
) -> None:
    """The largest logit is the one before the cap, the probability the one after it."""
    length, size = 13, 6
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(length, heads, size, generator=draw) * 3
    k = torch.randn(length, groups, size, generator=draw)
    starts = [0] * 5 + [5] * 8 if documents else [0] * length
    ids = torch.tensor(starts)
    mask = (ids[:, None] == ids[None]) & torch.ones(length, length, dtype=torch.bool).tril() if documents else None
    largest, sink = -math.inf, []
    for h in range(heads):
        for t in range(length):
            visible = range(starts[t], t + 1)
            logits = [float(q[t, h].double() @ k[s, h * groups // heads].double()) / math.sqrt(size) for s in visible]
            largest = max(largest, *logits)
            logits = [cap * math.tanh(x / cap) for x in logits] if cap else logits
            if len(logits) > 1:
                sink.append(math.exp(logits[0]) / (off_by_one + sum(map(math.exp, logits))))
    result = st.attention_statistics(q, k, mask, off_by_one, cap)
    assert result[0].item() == pytest.approx(largest, rel=1e-5)
    assert result[1].item() == pytest.approx(sum(sink), rel=1e-5)
    assert result[2].item() == len(sink)


# --- merging ------------------------------------------------------------------------------------------------------


def test_moments_merge_exactly() -> None:
    """Against rational arithmetic: the sums of powers of 12 numbers in parts of 1, 4 and 7."""
    values = [3.5, -2.25, 100.0, 7.0, 0.5, -8.0, 11.0, 2.0, -1.0, 64.0, 5.0, 0.25]
    parts = [st.compute_moments(torch.tensor(values[a:b]), 0) for a, b in ((0, 1), (1, 5), (5, 12))]
    result = st.merge_moments(st.Moments(*map(torch.stack, zip(*parts, strict=True))))
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    assert float(result.mean) == pytest.approx(float(mean), rel=1e-14)
    for power, sums in ((2, result.m2), (3, result.m3), (4, result.m4)):
        assert float(sums) == pytest.approx(float(sum((v - mean) ** power for v in exact)), rel=1e-13)


@pytest.mark.parametrize("cuts", [[32], [1, 2, 3], [10, 11, 50, 63]])
def test_samples_of_parts_merge_into_the_sample_of_the_whole(cuts: list[int]) -> None:
    x = heavy()
    bounds = [0, *cuts, N]
    parts = [st.take_sample(x[a:b], first_token=a) for a, b in itertools.pairwise(bounds)]
    whole = st.take_sample(x)
    for samples in (parts, parts[::-1], [*parts, st.uncounted(parts[0])]):
        merged = st.merge_samples(samples)
        assert torch.equal(merged.counts, whole.counts)
        assert torch.equal(merged.peak, whole.peak)
        assert torch.equal(merged.channel_max, whole.channel_max)
        assert statistics_of(merged) == pytest.approx(statistics_of(whole), rel=1e-12)


def test_merging_is_associative() -> None:
    a, b, c = (st.take_sample(heavy(seed), first_token=seed * N) for seed in range(3))
    once: Sample = st.merge_samples([a, b, c])
    assert statistics_of(st.merge_samples([st.merge_samples([a, b]), c])) == pytest.approx(
        statistics_of(once), rel=1e-12
    )


def test_nan_propagates_to_the_statistics() -> None:
    x = heavy()
    x[3, 3] = math.nan
    result = measured(x)
    assert all(math.isnan(result[key]) for key in ("kurtosis", "kurtosis_pooled", "max_abs", "rms"))
