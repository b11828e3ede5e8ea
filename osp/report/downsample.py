"""Reduce curves to the points that a screen can show. Extremes are kept."""

import math

import numpy as np

from osp.run.metrics import Site
from osp.run.read import Series


def envelope(series: Series, buckets: int) -> Series:
    """Return the smallest and the largest value of each of `buckets` stretches with equal numbers of points.

    Also keep the first and the last point, and one non-finite point per stretch (a gap in the curve). Drawn as a line,
    the result covers the same pixels as the whole curve, however narrow a spike is.
    """
    if len(series.steps) <= 2 * buckets:
        return series
    kept = {0, len(series.steps) - 1}
    for stretch in np.array_split(np.arange(len(series.steps)), buckets):
        values = series.values[stretch]
        finite = stretch[np.isfinite(values)]
        if len(finite):
            kept |= {int(finite[np.argmin(series.values[finite])]), int(finite[np.argmax(series.values[finite])])}
        if len(finite) < len(stretch):
            kept.add(int(stretch[~np.isfinite(values)][0]))
    chosen = np.array(sorted(kept))
    return Series(series.steps[chosen], series.values[chosen])


def averaged(series: Series, buckets: int) -> Series:
    """Return the mean of each of `buckets` stretches with equal numbers of points, at the middle step of each."""
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    stretches = [s for s in np.array_split(np.arange(len(steps)), buckets) if len(s)]
    return Series(np.array([steps[s[len(s) // 2]] for s in stretches]), np.array([values[s].mean() for s in stretches]))


def grid(sites: dict[Site, Series], buckets: int) -> tuple[list[list[int]], list[int | None], np.ndarray]:
    """Return (stretches of steps, layers, values (layers, stretches)) of one statistic at one kind of site.

    With more probes than `buckets`, neighbours share a column, which holds the largest of their values.
    """
    ordered = sorted(sites.items(), key=lambda item: -1 if item[0].layer is None else item[0].layer)
    steps = np.unique(np.concatenate([series.steps for _, series in ordered]))
    whole = np.full((len(ordered), len(steps)), math.nan)
    for row, (_, series) in enumerate(ordered):
        whole[row, np.searchsorted(steps, series.steps)] = series.values
    stretches = [s for s in np.array_split(np.arange(len(steps)), buckets) if len(s)]
    values = np.stack([np.fmax.reduce(whole[:, s], axis=1) for s in stretches], axis=1)  # nan where all are
    columns = [[int(steps[s[0]]), int(steps[s[-1]])] for s in stretches]
    return columns, [site.layer for site, _ in ordered], values


def rounded(values: np.ndarray, digits: int) -> list[float | int | None]:
    """Return JSON numbers with `digits` significant digits, None for values that are not finite."""
    short = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [None if not math.isfinite(v) else int(v) if v.is_integer() and abs(v) < 1e15 else v for v in short]
