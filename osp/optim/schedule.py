"""The learning rate as a pure function of the step, so that a resumed run needs only the step."""

import math
from collections.abc import Callable

from osp.config import ScheduleConfig
from osp.errors import UserError


def build_schedule(config: ScheduleConfig, *, total_steps: int, tokens_per_step: int) -> Callable[[int], float]:
    """Return `factor(step)`: the learning rate divided by its peak at a step, counted from 0.

    trapezoid: linear warm-up, constant, linear decay.  cosine: linear warm-up, then half a cosine.  constant: linear
    warm-up, constant. The decay reaches `final_ratio` right after the last step. A warm-up of n steps begins at 1/n,
    because a step with learning rate 0 would be wasted.
    """
    warmup = length_in_steps("schedule.warmup", config.warmup, tokens_per_step=tokens_per_step, total_steps=total_steps)
    decay = length_in_steps("schedule.decay", config.decay, tokens_per_step=tokens_per_step, total_steps=total_steps)
    if config.name != "trapezoid":
        decay = 0
    percents = [float(s[:-1]) if s.endswith("%") else math.inf for s in (str(config.warmup), str(config.decay))]
    if sum(percents) <= 100:
        decay = min(decay, total_steps - warmup)  # both were rounded up and can overlap in a short run
    if warmup + decay > total_steps:
        raise UserError(
            f"schedule.warmup={config.warmup!r} ({warmup} steps) and schedule.decay={config.decay!r} ({decay} steps) "
            f"exceed the run's {total_steps} steps; shorten one of them"
        )

    def factor(step: int) -> float:
        step = min(step, total_steps)
        if step < warmup:
            return (step + 1) / warmup
        if config.name == "constant":
            return 1.0
        length = decay if config.name == "trapezoid" else total_steps - warmup
        done = max(0, step - (total_steps - length)) / max(1, length)  # share of the decay, 1 after the last step
        fall = done if config.name == "trapezoid" else (1 - math.cos(math.pi * done)) / 2
        return 1 - (1 - config.final_ratio) * fall

    return factor


def length_in_steps(key: str, value: str | int, *, tokens_per_step: int, total_steps: int) -> int:
    """Return the steps of a length, rounded up: `100` steps, `5e9 tokens` or `20%` of the run. key: for the message."""
    try:
        if isinstance(value, str) and value.endswith("%"):
            steps = math.ceil(float(value[:-1]) * total_steps / 100)  # multiply first: 0.07 * 100 > 7
        elif isinstance(value, str) and value.endswith("tokens"):
            steps = math.ceil(float(value.removesuffix("tokens")) / tokens_per_step)
        else:
            steps = int(str(value).removesuffix("steps"))
    except (ValueError, OverflowError):
        steps = -1
    if steps < 0:
        raise UserError(f"{key}={value!r} is not a length; write 100 (steps), '5e9 tokens' or 20%")
    return steps
