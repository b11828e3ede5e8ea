"""Outlier statistics of activations: one definition each, on accumulators that merge exactly.

x is what one site shows: N tokens, D channels. A `Sample` holds fp64 sums, maxima and integer counts of it, so that the
samples of several rows and ranks merge into that of all tokens, whatever their split: to fp64 rounding, and without any
for maxima, medians and counts. Ratios are taken once, at the end, in `statistics`. A single spike cannot hide in them:
nothing is averaged over ranks.

N tokens, D channels, E_c = sum_t x_tc^2 the energy of channel c, e_t = sum_c x_tc^2 that of token t, E their total.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASSIVE_SIGMAS = 6.0  # OSP counts what lies beyond so many standard deviations as a massive activation

# `counts` sorts values by sign, octave and the 7 bits of a bf16 mantissa, between 2^-32 and 2^32
_OCTAVES = 64
_STEPS = 128  # of an octave: bf16's mantissa
_LOWEST_OCTAVE = -_OCTAVES // 2
_BINS = _OCTAVES * _STEPS  # per sign
_NONE = 2.0**53  # the place of a peak that is none


class Moments(NamedTuple):
    """Count, mean, and sums of the 2nd to 4th power of the deviation from that mean; fp64, all of one shape.

    Central sums, not plain power sums: with a mean of 1000 deviations the latter leave a 4th moment few digits.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor


class Sample(NamedTuple):
    """What is kept of the activations of one site."""

    channels: Moments  # of each channel over tokens, (D,)
    channel_max: Tensor  # (D,) max_t |x_tc|
    token_kurtosis: Tensor  # () sum over tokens of their excess kurtosis
    token_energy_squares: Tensor  # () sum_t e_t^2
    token_energy_max: Tensor  # () max_t e_t
    counts: Tensor  # (2 * _BINS,) int64: values, rounded to bf16, by size; first the positive ones
    peak: Tensor  # (3,) fp64: |x|, t * D + c and x of the largest |x|; the first one of equals


# --- moments ------------------------------------------------------------------------------------------------------


def moments(x: Tensor, dim: int) -> Moments:
    """`Moments` of x over the axis `dim`, which leaves the shape."""
    x = x.double()
    mean = x.mean(dim, keepdim=True)
    deviation = x - mean
    square = deviation * deviation
    mean = mean.squeeze(dim)
    return Moments(
        torch.full_like(mean, x.shape[dim]),
        mean,
        square.sum(dim),
        (square * deviation).sum(dim),
        (square * square).sum(dim),
    )


def recentred(m: Moments, centre: Tensor) -> Moments:
    """The same values with deviations taken from `centre`; then sums of different parts simply add up.

    With d = mean - centre: m2 + n d^2, m3 + 3 d m2 + n d^3, m4 + 4 d m3 + 6 d^2 m2 + n d^4 (the binomial theorem; Chan
    et al. 1979 and Pebay 2008, SAND2008-6212, give the case of two parts).
    """
    d = m.mean - centre
    n, m2, m3 = m.count, m.m2, m.m3
    return Moments(
        n,
        centre.expand_as(m.mean),
        m2 + n * d**2,
        m3 + 3 * d * m2 + n * d**3,
        m.m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4,
    )


def merged(parts: Moments) -> Moments:
    """The moments of all values of `parts`, which lie along the first axis."""
    count = parts.count.sum(0)
    centre = (parts.count * parts.mean).sum(0) / count.clamp(min=1)
    about = recentred(parts, centre)
    return Moments(count, centre, about.m2.sum(0), about.m3.sum(0), about.m4.sum(0))


def excess_kurtosis(m: Moments) -> Tensor:
    """E[(x - mu)^4] / Var[x]^2 - 3 with population moments (OSP eq. 4): n m4 / m2^2 - 3; 0 where x is constant.

    0 for a normal distribution, -2 at least, n - 5 + 1/(n - 1) at most: one value of n that differs from the rest.
    """
    constant = m.m2 <= m.count * (1e-13 * m.mean) ** 2  # what fp64 leaves of a constant
    return torch.where(constant, 0.0, m.count * m.m4 / m.m2**2 - 3)


def osp_script_kurtosis(x: Tensor) -> Tensor:
    """relu(mean(x^4) / std(x)^4 - 3) over the last axis, as the paper's `evaluate_kurtosis.py` computes it.

    Its fourth moment is not centred, its standard deviation is, and is unbiased. The script averages this over tokens
    and over Hugging Face's hidden states (embedding output, every block but the last, final norm), feeding every token
    alone, as a sequence of length 1 (papers: OSP, issue 4 of its repository). The arithmetic here is fp64.
    """
    x = x.double()
    return ((x**4).mean(-1) / x.std(-1) ** 4 - 3).relu()


# --- samples ------------------------------------------------------------------------------------------------------


def sample(x: Tensor, *, first_token: int = 0) -> Sample:
    """The `Sample` of x (N, D); `first_token` is the number of its first token, for the place of the peak."""
    wide = x.double()
    magnitude = wide.abs()
    energy = wide.square().sum(-1)
    place = magnitude.argmax()  # of equals the first
    return Sample(
        channels=moments(wide, 0),
        channel_max=magnitude.amax(0),
        token_kurtosis=excess_kurtosis(moments(wide, 1)).sum(),
        token_energy_squares=energy.square().sum(),
        token_energy_max=energy.amax(),
        counts=_counts(x),
        peak=torch.stack(
            (
                magnitude.flatten()[place],
                (place + first_token * x.shape[-1]).double(),
                wide.flatten()[place],
            )
        ),
    )


def empty_sample(num_channels: int, device: torch.device) -> Sample:
    """The `Sample` of no token."""
    channel = torch.zeros(num_channels, dtype=torch.float64, device=device)
    scalar = channel.new_zeros(())
    counts = torch.zeros(2 * _BINS, dtype=torch.int64, device=device)
    return Sample(
        Moments(channel, channel, channel, channel, channel),
        channel,
        scalar,
        scalar,
        scalar,
        counts,
        channel.new_tensor([-1.0, _NONE, 0.0]),
    )


def merged_samples(samples: list[Sample]) -> Sample:
    """The `Sample` of all their tokens."""
    return Sample(
        channels=merged(Moments(*map(torch.stack, zip(*(s.channels for s in samples), strict=True)))),
        channel_max=torch.stack([s.channel_max for s in samples]).amax(0),
        token_kurtosis=torch.stack([s.token_kurtosis for s in samples]).sum(),
        token_energy_squares=torch.stack([s.token_energy_squares for s in samples]).sum(),
        token_energy_max=torch.stack([s.token_energy_max for s in samples]).amax(),
        counts=torch.stack([s.counts for s in samples]).sum(0),
        peak=first_peak(torch.stack([s.peak for s in samples])),
    )


def first_peak(peaks: Tensor) -> Tensor:
    """The largest of `peaks` (n, 3), of equals the one with the first place: no order of merging changes it."""
    best = peaks[:, 0] == peaks[:, 0].max()
    return peaks[torch.where(best, peaks[:, 1], math.inf).argmin()]


def statistics(s: Sample) -> dict[str, float]:
    """Every statistic of a site by name.

    kurtosis           excess kurtosis of each token over its channels, averaged over tokens (OSP eq. 4)
    kurtosis_pooled    the same of all N D values at once
    kurtosis_channel   the same of each channel over tokens, averaged over channels
    max_abs            max|x|
    max_over_median    max|x| / median|x|, the median over all N D values rounded to bf16, the lower one of two
    rms                sqrt(E / (N D))
    top_channel_share  max_c E_c / E: 1/D for even channels, 1 for a single one
    top_token_share    max_t e_t / E
    massive_count      values with |x - mu| > 6 sigma, mu and sigma over all values (OSP section 5), x rounded to bf16
    few_channels       D sum_c E_c^2 / E^2, see below
    few_tokens         N sum_t e_t^2 / E^2, see below

    The last two split the pooled fourth moment: mean(x^4) / mean(x^2)^2 = few_channels * few_tokens * rest, exactly,
    which defines the rest. few_channels is 1 where all channels have the same energy and D where one has all of it;
    few_tokens is 1 to N likewise. If energy is a product, E[x_tc^2] = r_t c_c, the rest is the fourth moment of what is
    left after dividing by sqrt(r_t c_c): 3 for normal values, 1 for signs. So the larger factor says whether a kurtosis
    stems from few channels (stripes: Adam's outliers) or few tokens (attention sinks). Moments here are not centred:
    for values of mean zero the product is kurtosis_pooled + 3.
    """
    count, num_channels = s.channels.count.max(), s.channels.mean.numel()
    pooled = merged(s.channels)
    energy = channel_energy(s)
    total = energy.sum()
    sigma = (pooled.m2 / pooled.count).sqrt()
    return {
        name: float(value)
        for name, value in {
            "kurtosis": s.token_kurtosis / count,
            "kurtosis_pooled": excess_kurtosis(pooled),
            "kurtosis_channel": excess_kurtosis(s.channels).mean(),
            "max_abs": s.peak[0],
            "max_over_median": s.peak[0] / _median_magnitude(s.counts),
            "rms": (total / (count * num_channels)).sqrt(),
            "top_channel_share": energy.max() / total,
            "top_token_share": s.token_energy_max / total,
            "massive_count": _count_beyond(s.counts, pooled.mean, MASSIVE_SIGMAS * sigma),
            "few_channels": num_channels * energy.square().sum() / total**2,
            "few_tokens": count * s.token_energy_squares / total**2,
        }.items()
    }


def channel_energy(s: Sample) -> Tensor:
    """E_c, (D,)."""
    return s.channels.m2 + s.channels.count * s.channels.mean**2


def octaves(s: Sample) -> tuple[int, list[int]]:
    """(k, counts): how many |x|, rounded to bf16, lie in [2^k, 2^(k+1)), [2^(k+1), 2^(k+2)), ...

    From the first to the last octave that holds any; zeros, and what is below 2^-32, are in the first one.
    """
    counts = s.counts.view(2, _OCTAVES, _STEPS).sum((0, 2))
    counts[0] -= (zeros := s.counts[0] + s.counts[_BINS])
    filled = counts.nonzero().flatten().tolist() or [0]
    shown = counts[filled[0] : filled[-1] + 1].tolist()
    shown[0] += int(zeros)
    return _LOWEST_OCTAVE + filled[0], shown


def attention_statistics(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, off_by_one: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(largest logit, sum of sink probabilities, their number) of one row's attention, 0-dim fp64.

    The logit is q k^T / sqrt(K) over all pairs that see each other. The sink probability of a query is what it gives to
    the first token it sees (Gu et al. 2024, arXiv 2410.10781, for the first token); queries that see nothing but
    themselves have no choice and are left out. Strength of the sink = sum / number.

    q: (T, H, K), k: (T, G, K) after RoPE; mask: (T, T) bool, None: causal. off_by_one: as in
    `osp.model.attention.causal_attention`. fp32, a few heads at a time.
    """
    length, num_heads, head_dim = q.shape
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    first = mask.int().argmax(-1)  # of equals the first, for integers on the CPU and CUDA alike
    choice = mask.sum(-1) > 1
    keys = k.float().repeat_interleave(num_heads // k.shape[1], 1)
    largest = torch.full((), -math.inf, dtype=torch.float64, device=q.device)
    sink = torch.zeros((), dtype=torch.float64, device=q.device)
    at_once = max(1, 2**24 // length**2)
    for start in range(0, num_heads, at_once):
        heads = slice(start, start + at_once)
        logits = q[:, heads].float().transpose(0, 1) @ keys[:, heads].permute(1, 2, 0) / math.sqrt(head_dim)
        logits = logits.masked_fill(~mask, -math.inf)
        largest = torch.maximum(largest, logits.max().double())
        if off_by_one:
            logits = F.pad(logits, (0, 1))  # behind the others, so that `first` stays where it is
        to_first = logits.softmax(-1).gather(-1, first.expand(len(logits), -1)[..., None])[..., 0]
        sink += to_first[:, choice].double().sum()
    return largest, sink, choice.sum().double() * num_heads


def variance_error(approximated: Tensor, x: Tensor) -> Tensor:
    """|s'^2 - v| / v of every token, fp64, x.shape[:-1]: how far BHyT's variance s'^2 is from the true one.

    approximated: (..., 1) s'^2 at the norm after attention; x: (..., D) what that norm reads, v = mean(x^2). Neither
    has eps. The monitor logs its mean over tokens.
    """
    true = x.double().square().mean(-1)
    return (approximated[..., 0].double() - true).abs() / true


# --- values by size -----------------------------------------------------------------------------------------------


def _counts(x: Tensor) -> Tensor:
    """How many values of x, rounded to bf16, have each sign and size: (2 * _BINS,) int64.

    The bits of a bf16 number without its sign grow with its size, 128 of them to an octave: a histogram of them is
    exact for bf16 and a rounding of 0.4% otherwise. What is smaller than 2^-32 counts as zero, what is larger than 2^32
    as that.
    """
    bits = x.to(torch.bfloat16).flatten().view(torch.int16).int()
    lowest = (127 + _LOWEST_OCTAVE) * _STEPS
    size = ((bits & 0x7FFF) - lowest).clamp(0, _BINS - 1)
    return torch.bincount(size + (bits < 0) * _BINS, minlength=2 * _BINS)


def _magnitudes(device: torch.device) -> Tensor:
    """The value that each bin of one sign stands for, (_BINS,) fp64; the first one is zero."""
    bins = torch.arange(_BINS, device=device)
    octave = torch.div(bins, _STEPS, rounding_mode="floor") + _LOWEST_OCTAVE
    values = torch.ldexp(1 + (bins % _STEPS).double() / _STEPS, octave)
    values[0] = 0.0
    return values


def _median_magnitude(counts: Tensor) -> Tensor:
    """The median of |x| rounded to bf16, of two the lower one."""
    below = counts.view(2, _BINS).sum(0).cumsum(0)
    rank = torch.div(below[-1] + 1, 2, rounding_mode="floor")
    return _magnitudes(counts.device)[torch.searchsorted(below, rank).clamp(max=_BINS - 1)]


def _count_beyond(counts: Tensor, mean: Tensor, distance: Tensor) -> Tensor:
    """How many values, rounded to bf16, are farther than `distance` from `mean`."""
    magnitudes = _magnitudes(counts.device)
    values = torch.cat((magnitudes, -magnitudes))
    return counts[(values - mean).abs() > distance].sum()
