"""Losses and gradient norms that leave the range of the last steps."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
_LEAST_DEVIATION = 0.01  # of the median: what varies less than that is no spike


class SpikeDetector:
    """Robust z-score of a value against the `window` values before it; no opinion before a quarter of them is there.

    z = (x - median) / max(1.4826 median(|x_i - median|), 0.01 |median|)
    """

    def __init__(self, window: int, values: Iterable[float] = ()):
        self.values = deque(values, maxlen=window)

    def score(self, value: float) -> float:
        """The z-score of `value`; 0 while there is too little to compare with."""
        if len(self.values) < max(2, math.ceil(self.values.maxlen / 4) if self.values.maxlen else 2):
            return 0.0
        median = statistics.median(self.values)
        deviation = _MAD_TO_DEVIATION * statistics.median(abs(x - median) for x in self.values)
        return (value - median) / max(deviation, _LEAST_DEVIATION * abs(median), 1e-12)

    def add(self, value: float) -> None:
        """Let `value` count for those that follow; what is not finite does not."""
        if math.isfinite(value):
            self.values.append(value)
