"""Outlier statistics of activations: one definition each, computed from accumulators that merge exactly.

x (N, D) is the activation at one site: N tokens, D channels. E_c = sum_t x_tc^2 is the energy of channel c,
e_t = sum_c x_tc^2 the energy of token t, E their total.

A `Sample` holds sums, maxima and counts of x. Samples of sequences and ranks merge into the sample of all tokens: sums
to fp64 rounding, the rest exactly. `compute_statistics` divides at the end: no spike is lost in a mean over ranks.
Nothing here waits for the device: the host reads no value, and no shape depends on one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from osp.model.attention import query_blocks, visible_logits

MASSIVE_SIGMAS = 6.0  # OSP counts values beyond this many standard deviations as massive activations
_TINY = 1e-300  # added to an energy, so that every share of zeros is 0

# `Sample.counts` is a histogram by sign, octave and the 7 bits of a bf16 mantissa, between 2^-32 and 2^32.
_OCTAVES = 64
_STEPS = 128  # bins per octave
_LOWEST_OCTAVE = -_OCTAVES // 2
_LOWEST_BITS = (127 + _LOWEST_OCTAVE) * _STEPS  # 2^-32 in bf16: its exponent has the bias 127
_BINS = _OCTAVES * _STEPS  # per sign


class Moments(NamedTuple):
    """Count, mean, and sums of powers of the deviation from it (power sums would cancel); fp64, all of one shape."""

    count: Tensor
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor


class Sample(NamedTuple):
    """Accumulators of the activations at one site."""

    channels: Moments  # of each channel over tokens, (D,)
    channel_max: Tensor  # (D,) max_t |x_tc|
    tokens: Tensor  # (2,) sums over tokens of their excess kurtosis and of e_t^2
    token_energy_max: Tensor  # () max_t e_t
    counts: Tensor  # (2 * _BINS,) int64: values rounded to bf16, by size; the positive ones first
    peak: Tensor  # (3,) fp64: |x|, t * D + c and x of the largest |x|; the first of equals


class Gains(NamedTuple):
    """The norm that writes a site: y = weight * z + bias with the normalized z. (D,) fp64; one gain counts D times."""

    weight: Tensor
    bias: Tensor


def compute_statistics(s: Sample, gains: Gains | None = None) -> dict[str, Tensor]:
    """Return every statistic of a site by name, 0-dim fp64; `gain_statistics` too if a norm writes it.

    few_channels and few_tokens split the pooled fourth moment, mean(x^4) / mean(x^2)^2 = few_channels * few_tokens *
    rest. The larger one tells whether kurtosis comes from few channels (Adam's outliers) or few tokens (attention
    sinks). If the energy is a product, E[x_tc^2] = r_t c_c, the rest is the fourth moment of x / sqrt(r_t c_c): 3 for
    normal values, 1 for signs. The moments are not centred: for values of mean 0 the product is kurtosis_pooled + 3.

    The top channel is the one with the most energy. If its constancy is near 1, the model uses it as a bias.
    mean_energy is 1 if every token is the same vector, and about 1/N for independent tokens of mean 0.
    """
    count, num_channels = s.channels.count.max(), s.channels.mean.numel()
    pooled = merge_moments(s.channels)
    energy, mean_energy = channel_energy(s), s.channels.count * s.channels.mean**2
    total, (token_kurtosis, token_energy_squares) = energy.sum() + _TINY, s.tokens
    top = energy.argmax()
    sigma = (pooled.m2 / pooled.count).sqrt()
    values = _bin_values(energy.device)
    massive = (values - pooled.mean).abs() > MASSIVE_SIGMAS * sigma
    at_most = s.counts.view(2, _BINS).sum(0).cumsum(0)
    rank = torch.div(at_most[-1] + 1, 2, rounding_mode="floor")  # of the lower median of |x|
    median = values.take(torch.searchsorted(at_most, rank).clamp(max=_BINS - 1))
    statistics = {
        "kurtosis": token_kurtosis / count,  # excess, of each token over its channels, averaged (OSP eq. 4)
        "kurtosis_pooled": excess_kurtosis(pooled),  # of all N D values
        "kurtosis_channel": excess_kurtosis(s.channels).mean(),  # of each channel over tokens, averaged
        "max_abs": s.peak[0],
        "max_over_median": torch.where(s.peak[0] == 0, 0.0, s.peak[0] / median),  # of |x| rounded to bf16
        "rms": (total / (count * num_channels)).sqrt(),
        "top_channel_share": energy.max() / total,  # 1/D: all have the same energy, 1: one has all
        "top_token_share": s.token_energy_max / total,  # max_t e_t / E
        "massive_count": (s.counts * massive).sum().double(),  # |x - mu| > 6 sigma (OSP section 5), x rounded to bf16
        "few_channels": num_channels * (energy / total).square().sum(),  # 1: all have the same energy, D: one has all
        "few_tokens": count * (token_energy_squares / total / total),  # 1: all have the same energy, N: one has all
        "mean_energy": mean_energy.sum() / total,  # sum_c N mean_c^2 / E
        "top_channel_constancy": (mean_energy.take(top) / (energy.take(top) + _TINY)).sqrt(),  # |mean| / rms
    }
    return statistics if gains is None else statistics | gain_statistics(s, gains)


def gain_statistics(s: Sample, gains: Gains) -> dict[str, Tensor]:
    """Return what the gains of a norm do to the top channel c of its output y, 0-dim.

    top_channel_share_before_gain is the share of the same channel c in the energy of z = (y - bias) / weight, computed
    from y. It is the answer to "did the gain make the outlier?": without a bias top_channel_share is larger by the
    factor g_c^2 / sum_k share_k g_k^2, which is 1 if all gains are equal. A channel other than c may have more energy
    in z. A channel whose gain is 0 leaves no trace in y and counts as 0. The rounding of y in bf16 adds to a channel
    whose gain is small against its bias.
    """
    square, mean = gains.weight.square(), s.channels.mean - gains.bias
    before = torch.where(square > 0, (s.channels.m2 + s.channels.count * mean**2) / square, 0.0)
    top, live = channel_energy(s).argmax(), (square > 0).sum()
    ascending = torch.where(square > 0, gains.weight.abs(), math.inf).sort().values
    median = ascending.take((live - 1).clamp(min=0) // 2)  # of the gains but 0
    return {
        "top_channel_share_before_gain": before.take(top) / (before.sum() + _TINY),
        "top_channel_gain": gains.weight.take(top).abs() / median,
        "gain_share": square.max() / (square.sum() + _TINY),  # 1/D: all gains are equal, 1: all but one are 0
    }


def excess_kurtosis(m: Moments) -> Tensor:
    """Return E[(x - mu)^4] / Var[x]^2 - 3 with population moments (OSP eq. 4): n m4 / m2^2 - 3; 0 for a constant x.

    0 for a normal distribution, at least -2, at most n - 5 + 1/(n - 1): one value of n differs from the rest.
    """
    constant = m.m2 <= m.count * (1e-13 * m.mean) ** 2  # the rounding error of a constant in fp64
    return torch.where(constant, 0.0, m.count * m.m4 / m.m2**2 - 3)


def osp_script_kurtosis(x: Tensor) -> Tensor:
    """Return relu(mean(x^4) / std(x)^4 - 3) over the last axis, as OSP's `evaluate_kurtosis.py` computes it, in fp64.

    Only the standard deviation is centred, and it is unbiased. The script averages this over tokens, fed one at a time,
    and over Hugging Face's hidden states: the output of the embedding, of every block but the last, of the final norm.
    """
    x = x.double()
    return ((x**4).mean(-1) / x.std(-1) ** 4 - 3).relu()


def channel_energy(s: Sample) -> Tensor:
    """Return E_c, (D,)."""
    return s.channels.m2 + s.channels.count * s.channels.mean**2


def attention_statistics(
    q: Tensor, k: Tensor, mask: Tensor | None = None, off_by_one: bool = False, logit_cap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (largest logit, sum of sink probabilities, their number) of one sequence's attention, 0-dim fp64.

    The logits are q k^T / sqrt(K) of all visible pairs, before `logit_cap`. The sink probability of a query is its
    attention to the first token it sees (Gu et al. 2024, arXiv 2410.10781); queries that see only themselves are left
    out. The strength of the sink is sum / number. q (T, H, K) and k (T, G, K) are after RoPE; mask is (T, T) bool,
    None: causal; the options are explained in `osp.model.attention.causal_attention`. Computed in fp32.
    """
    length, num_heads, _ = q.shape
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    first = mask.int().argmax(-1)  # of integers: argmax returns the first of equals on the CPU and on CUDA
    sees_others = mask.sum(-1) > 1
    largest = torch.full((), -math.inf, dtype=torch.float64, device=q.device)
    sink = torch.zeros((), dtype=torch.float64, device=q.device)
    for rows in query_blocks(length):
        logits = visible_logits(q[None], k[None], mask, rows)[0]
        largest = torch.maximum(largest, logits.max().double())
        if logit_cap is not None:
            logits = visible_logits(q[None], k[None], mask, rows, logit_cap)[0]
        if off_by_one:
            logits = F.pad(logits, (0, 1))  # last, which keeps the indices in `first`
        to_first = logits.softmax(-1).gather(-1, first[slice(*rows)].expand(num_heads, -1)[..., None])[..., 0]
        sink += torch.where(sees_others[slice(*rows)], to_first, 0.0).double().sum()
    return largest, sink, sees_others.sum().double() * num_heads


def compute_moments(x: Tensor, dim: int) -> Moments:
    """Return the moments of x over the axis `dim`, which is removed from the shape."""
    mean = x.double().mean(dim, keepdim=True)
    deviation = x.double() - mean
    square, mean = deviation * deviation, mean.squeeze(dim)
    sums = (square.sum(dim), (square * deviation).sum(dim), (square * square).sum(dim))
    return Moments(torch.full_like(mean, x.shape[dim]), mean, *sums)


def recentre_moments(m: Moments, centre: Tensor) -> Moments:
    """Return the moments about `centre` instead of the mean. Moments about the same centre add up.

    By the binomial theorem, with d = mean - centre (Pebay 2008, SAND2008-6212, gives the case of two parts).
    """
    n, d = m.count, m.mean - centre
    m2 = m.m2 + n * d**2
    m3 = m.m3 + 3 * d * m.m2 + n * d**3
    m4 = m.m4 + 4 * d * m.m3 + 6 * d**2 * m.m2 + n * d**4
    return Moments(n, centre.expand_as(m.mean), m2, m3, m4)


def merge_moments(parts: Moments) -> Moments:
    """Return the moments of all values of `parts`, which lie along the first axis."""
    count = parts.count.sum(0)
    centre = (parts.count * parts.mean).sum(0) / count.clamp(min=1)
    m = recentre_moments(parts, centre)
    return Moments(count, centre, m.m2.sum(0), m.m3.sum(0), m.m4.sum(0))


def take_sample(x: Tensor, *, first_token: int = 0) -> Sample:
    """Return the sample of x (N, D); `first_token` is the number of its first token, for the place of the peak."""
    wide, magnitude = x.double(), x.double().abs()
    energy = wide.square().sum(-1)
    i = magnitude.argmax()  # the first of equals
    place, value = (i + first_token * x.shape[-1]).double(), wide.take(i)
    return Sample(
        channels=compute_moments(wide, 0),
        channel_max=magnitude.amax(0),
        tokens=torch.stack((excess_kurtosis(compute_moments(wide, 1)).sum(), energy.square().sum())),
        token_energy_max=energy.amax(),
        counts=_count_values(x),
        peak=torch.stack((value.abs(), place, value)),
    )


def uncounted(s: Sample) -> Sample:
    """Return the sample with all sums at 0: it changes no merged sample that holds these tokens."""
    channels = Moments(*map(torch.zeros_like, s.channels))
    return s._replace(channels=channels, tokens=torch.zeros_like(s.tokens), counts=torch.zeros_like(s.counts))


def merge_samples(samples: Sequence[Sample]) -> Sample:
    """Return the sample of the tokens of all `samples`."""
    channels, *others = zip(*samples, strict=True)
    channel_max, tokens, energy_max, counts, peaks = map(torch.stack, others)
    return Sample(
        channels=merge_moments(Moments(*map(torch.stack, zip(*channels, strict=True)))),
        channel_max=channel_max.amax(0),
        tokens=tokens.sum(0),
        token_energy_max=energy_max.amax(0),
        counts=counts.sum(0),
        peak=first_peak(peaks),
    )


def first_peak(peaks: Tensor) -> Tensor:
    """Return the largest of `peaks` (n, 3), of equals the one with the first place, in whatever order they come."""
    best = peaks[:, 0] == peaks[:, 0].max()
    return peaks[torch.where(best, peaks[:, 1], math.inf).argmin(0, keepdim=True)][0]


def _count_values(x: Tensor) -> Tensor:
    """Return the number of values of x, rounded to bf16 (by up to 0.4%), by sign and size: (2 * _BINS,) int64.

    Without the sign, the bits of a bf16 number grow with it. Values below 2^-32 count as 0, above 2^32 as the largest.
    """
    bits = x.to(torch.bfloat16).flatten().view(torch.int16).int()
    size = ((bits & 0x7FFF) - _LOWEST_BITS).clamp(0, _BINS - 1)
    index = size + (bits < 0) * _BINS
    if not x.is_cuda:  # ten times faster there
        return torch.bincount(index, minlength=2 * _BINS)
    index = index.long()  # `bincount` waits for the device
    return torch.zeros(2 * _BINS, dtype=torch.int64, device=x.device).scatter_add_(0, index, torch.ones_like(index))


def _bin_values(device: torch.device) -> Tensor:
    """Return the value of each bin of `Sample.counts`, (2 * _BINS,) fp64."""
    bits = torch.arange(_LOWEST_BITS, _LOWEST_BITS + _BINS, dtype=torch.int16, device=device)
    magnitudes = bits.view(torch.bfloat16).double()
    magnitudes[0] = 0.0
    return torch.cat((magnitudes, -magnitudes))
