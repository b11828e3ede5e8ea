import itertools
import math

import pytest

from osp.config import ScheduleConfig
from osp.errors import UserError
from osp.optim.schedule import build_schedule, length_in_steps


def values(config: ScheduleConfig, total: int, *, tokens_per_step: int = 100) -> list[float]:
    factor = build_schedule(config, total_steps=total, tokens_per_step=tokens_per_step)
    return [factor(step) for step in range(total)]


def test_trapezoid_at_named_steps() -> None:
    result = values(ScheduleConfig("trapezoid", warmup=4, decay=5, final_ratio=0.0), 20)
    assert result[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert result[4:16] == [1.0] * 12
    assert result[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_final_ratio_is_reached_right_after_the_last_step() -> None:
    for name in ("trapezoid", "cosine"):
        factor = build_schedule(
            ScheduleConfig(name, warmup=2, decay=10, final_ratio=0.1), total_steps=30, tokens_per_step=1
        )
        assert factor(30) == pytest.approx(0.1)
        assert factor(29) > 0.1


def test_cosine_at_named_steps() -> None:
    result = values(ScheduleConfig("cosine", warmup=2, final_ratio=0.2), 12)
    assert result[:2] == pytest.approx([0.5, 1.0])
    assert result[7] == pytest.approx(0.6)  # half way down
    assert result[4] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 0.2)) / 2)
    assert all(a > b for a, b in itertools.pairwise(result[2:]))


def test_constant_ignores_the_end() -> None:
    assert values(ScheduleConfig("constant", warmup=2), 10) == [0.5] + [1.0] * 9


def test_lengths_in_tokens_and_percent() -> None:
    in_steps = values(ScheduleConfig("trapezoid", warmup=10, decay=20), 100)
    assert values(ScheduleConfig("trapezoid", warmup="1e3 tokens", decay="20%"), 100) == in_steps
    assert values(ScheduleConfig("trapezoid", warmup="10%", decay="2000 tokens"), 100) == in_steps


def test_zero_lengths_give_a_constant_learning_rate() -> None:
    assert values(ScheduleConfig("trapezoid", warmup=0, decay=0), 5) == [1.0] * 5


def test_steps_past_the_end_keep_the_final_learning_rate() -> None:
    factor = build_schedule(ScheduleConfig(final_ratio=0.3), total_steps=50, tokens_per_step=1)
    assert factor(50) == factor(10**6) == pytest.approx(0.3)


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_default_percentages_fit_runs_of_a_few_steps(total: int) -> None:
    result = values(ScheduleConfig(), total)
    assert len(result) == total
    assert all(0 <= value <= 1 for value in result)
    assert result[0] == 1.0


def test_overlong_phases_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"schedule.warmup=6 \(6 steps\) and schedule.decay=5 \(5 steps\) exceed .* 10"):
        values(ScheduleConfig("trapezoid", warmup=6, decay=5), 10)
    with pytest.raises(UserError, match=r"exceed"):
        values(ScheduleConfig("trapezoid", warmup="60%", decay="50%"), 10)
    with pytest.raises(UserError, match=r"schedule.warmup='soon' is not a length"):
        values(ScheduleConfig("trapezoid", warmup="soon"), 10)


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0),
        (100, 100),
        ("100", 100),
        ("100 steps", 100),
        ("4000 tokens", 4),
        ("4001 tokens", 5),
        ("5e3 tokens", 5),
        ("0 tokens", 0),
        ("20%", 40),
        ("0.2%", 1),  # 0.4 steps, rounded up
        ("0%", 0),
        ("100%", 200),
        ("12.5 %", 25),
        ("7%", 14),
    ],
)
def test_length_in_steps(value: str | int, steps: int) -> None:
    assert length_in_steps("schedule.warmup", value, tokens_per_step=1000, total_steps=200) == steps


@pytest.mark.parametrize("percent", range(101))
def test_percent_of_a_hundred_steps_is_exact(percent: int) -> None:
    """0.07 * 100 is above 7 in floating point: rounding up must not turn it into 8."""
    assert length_in_steps("schedule.decay", f"{percent}%", tokens_per_step=1, total_steps=100) == percent


@pytest.mark.parametrize(
    "value", ["", "many", "20 %%", "-1", -1, "-5%", "1.5", "5e9", "5e9 token", "nan%", "inf tokens"]
)
def test_malformed_length_names_key_value_and_the_forms(value: str | int) -> None:
    with pytest.raises(UserError) as caught:
        length_in_steps("schedule.decay", value, tokens_per_step=1000, total_steps=200)
    message = str(caught.value)
    assert f"schedule.decay={value!r}" in message
    assert "5e9 tokens" in message
    assert "20%" in message
