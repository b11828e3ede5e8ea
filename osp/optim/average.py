"""A running average of the weights, which rounds to 4 bits with less error than the last weights (arXiv 2510.06213).

The average is an fp32 state of the optimizer, partitioned like the master weights: 4 bytes a parameter over all ranks,
no communication, 12 bytes of memory traffic a parameter for a sample. Sample n of weights w moves it by

    average += a_n (w - average),    ema: a_n = (1 - d) / (1 - d^n),    window: a_n = 1 / n

so that it is the mean of the samples with weights d^0, d^1, ... from the newest on (Adam's bias correction), or with
equal ones. A window begins again every `horizon` steps, so that the last one is the last `horizon` steps of the run.
"""

import math
from collections.abc import Callable

from osp.config import AverageConfig
from osp.errors import UserError
from osp.optim.schedule import length_in_steps

Samples = Callable[[int, int], tuple[float, int] | None]


def build_samples(config: AverageConfig, *, total_steps: int, tokens_per_step: int) -> Samples:
    """Return `sample(step, n)`: after step `step`, from 1, with n samples so far, a_n of the next one and its n.

    It is None where no sample is due.
    Raises `UserError` if `horizon` is no length or is shorter than `every`, or `decay` would do nothing.
    """
    kind, every, decay = config.kind, config.every, config.decay
    if decay is not None and kind != "ema":
        raise UserError(f"average.decay={decay} does nothing with average.kind={kind}; set average=ema")
    if kind == "none":
        return lambda step, n: None
    horizon = length_in_steps(
        "average.horizon", config.horizon, tokens_per_step=tokens_per_step, total_steps=total_steps
    )
    if horizon < every and decay is None:
        raise UserError(
            f"average.horizon={config.horizon!r} ({horizon} steps) is shorter than average.every={every}; set a longer "
            "horizon, or sample more often"
        )
    d = math.exp(-every / horizon) if decay is None else decay

    def sample(step: int, n: int) -> tuple[float, int] | None:
        if step % every:
            return None
        window, before = ((total_steps - s) // max(horizon, 1) for s in (step, step - every))
        if kind == "window":
            n = n + 1 if window == before else 1
            return 1 / n, n
        return (1 - d) / (1 - d ** (n + 1)), n + 1

    return sample
