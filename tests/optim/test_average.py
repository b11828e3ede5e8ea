"""The running average of the weights: its formula, and training, resuming and measuring with it."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from osp.config import AverageConfig, Config, to_dict
from osp.errors import UserError
from osp.optim.average import build_samples
from osp.run.checkpoint import Checkpoint, load_model
from osp.train.setup import train
from tests.conftest import losses, read_metrics
from tests.distributed import run_distributed
from tests.monitor.workers import trained

Tiny = Callable[..., Config]
TOTAL = 12


def average(config: AverageConfig, values: list[float]) -> tuple[float, int]:
    """Return the average of the values after each of `TOTAL` steps, and the number of samples in it."""
    sample = build_samples(config, total_steps=TOTAL, tokens_per_step=100)
    mean, n = math.nan, 0
    for step, value in enumerate(values, 1):
        if found := sample(step, n):
            share, n = found
            mean = value if share == 1 else mean + share * (value - mean)
    return mean, n


@pytest.mark.parametrize(("every", "count"), [(1, 12), (3, 4)])
def test_ema_is_the_weighted_mean_of_the_samples(every: int, count: int) -> None:
    values = [float(step**2) for step in range(1, TOTAL + 1)]
    d = 0.7
    powers = [d**k for k in range(count)]
    newest_first = values[::-1][::every]
    expected = math.fsum(p * v for p, v in zip(powers, newest_first, strict=True)) / math.fsum(powers)
    mean, n = average(AverageConfig(kind="ema", decay=d, every=every), values)
    assert (mean, n) == (pytest.approx(expected, rel=1e-12), count)


@pytest.mark.parametrize("horizon", [5, "500 tokens", "40%"])
def test_window_is_the_mean_of_the_last_steps(horizon: str | int) -> None:
    values = [float(step**2) for step in range(1, TOTAL + 1)]
    mean, n = average(AverageConfig(kind="window", horizon=horizon), values)
    assert (mean, n) == (pytest.approx(sum(values[-5:]) / 5), 5)
    before, n = average(AverageConfig(kind="window", horizon=horizon), values[:7])  # the window before has ended
    assert (before, n) == (pytest.approx(sum(values[2:7]) / 5), 5)


def test_horizon_is_the_time_constant_of_an_ema() -> None:
    sample = build_samples(AverageConfig(kind="ema", horizon=50, every=5), total_steps=10**6, tokens_per_step=1)
    share, _ = sample(5 * 10**5, 10**5) or (math.nan, 0)  # many samples: a_n = 1 - d
    assert share == pytest.approx(1 - math.exp(-5 / 50))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("average.kind=ema", "average.horizon=2", "average.every=3"), "average.horizon=2 (2 steps) is shorter than"),
        (("average.kind=window", "average.horizon=often"), "average.horizon='often' is not a length"),
        (("average.kind=window", "average.decay=0.9"), "average.decay=0.9 does nothing with average.kind=window; set"),
        (("average.decay=0.9",), "average.decay=0.9 does nothing with average.kind=none; set average=ema"),
        (("average.kind=mean",), "average.kind"),
        (("eval.weights=averaged",), "eval.weights=averaged: there is no average of the weights; set average=ema"),
        (("monitor.weights=averaged",), "monitor.weights=averaged: there is no average of the weights"),
    ],
)
def test_mistakes_are_refused_before_the_run(overrides: tuple[str, ...], message: str, tiny: Tiny) -> None:
    with pytest.raises(UserError) as caught:
        train(tiny(*overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


EMA = ("average.kind=ema", "average.decay=0.6")
WINDOW = ("average.kind=window", "average.horizon=4")


def read(folder: Path, kind: str, step: int) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder / "checkpoints" / f"step_{step:08d}")
    return {name: checkpoint.read(kind, name, 0, math.prod(shape)) for name, shape in checkpoint.shapes.items()}


@pytest.mark.parametrize("overrides", [EMA, WINDOW], ids=["ema", "window"])
def test_average_in_the_checkpoint_equals_a_naive_reference_to_the_bit(
    overrides: tuple[str, ...], tiny: Tiny, plain_run: Path, tmp_path: Path
) -> None:
    train(tiny(*overrides, "checkpoint.every=1"))
    folder = tmp_path / "run"
    assert losses(folder) == losses(plain_run), "averaging does not change the training"
    model = load_model(folder / "checkpoints" / "step_00000001")
    n = 0

    def update(mean: torch.Tensor, new: torch.Tensor, _: torch.Tensor | int) -> torch.Tensor:
        share = 0.4 / (1 - 0.6**n) if overrides is EMA else 1 / n
        return mean.lerp(new, share)

    reference = AveragedModel(model, avg_fn=update)
    for step in range(1, 7):
        n = n + 1 if overrides is EMA or step != 3 else 1  # the window of steps 3 to 6
        if n == 1:
            reference.n_averaged.zero_()  # its first update is a copy
        reference.update_parameters(load_model(folder / "checkpoints" / f"step_{step:08d}"))
        stored = read(folder, "average", step)
        for name, parameter in reference.module.named_parameters():
            assert torch.equal(stored[name], parameter.detach().flatten()), (step, name)
    averaged = load_model(folder, weights="averaged")
    for name, parameter in averaged.named_parameters():
        assert torch.equal(parameter.flatten(), stored[name])


@pytest.mark.parametrize("overrides", [EMA, WINDOW, (*EMA, "engine.zero_stage=3")], ids=" ".join)
def test_resumed_average_is_bit_identical(overrides: tuple[str, ...], tiny: Tiny, tmp_path: Path) -> None:
    quick = (*overrides, "eval.every=0", "eval.tokens=64", "eval.sample_tokens=0")
    train(tiny(*quick, name="straight"))
    for stop in ("train.stop_at=2", "train.stop_at=5", "train.stop_at=6"):
        train(tiny(*quick, stop, name="pieces"))
    for kind in ("average", "weight"):
        one, two = (read(tmp_path / name, kind, 6) for name in ("straight", "pieces"))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (2, 2), (4, 3)])
def test_ranks_and_stages_change_only_rounding(ranks: int, stage: int, tiny: Tiny, tmp_path: Path) -> None:
    overrides = (*EMA, "eval.weights=averaged", "eval.every=2")
    train(tiny(*overrides, name="one"))
    run_distributed(trained, ranks, to_dict(tiny(*overrides, f"engine.zero_stage={stage}", name="many")))
    one, many = (read(tmp_path / name, "average", 6) for name in ("one", "many"))
    for name in one:
        torch.testing.assert_close(one[name], many[name], atol=2e-5, rtol=1e-3)
    expected, measured = (
        torch.tensor([event["val/loss"] for event in read_metrics(tmp_path / name) if "val/loss" in event])
        for name in ("one", "many")
    )
    torch.testing.assert_close(expected, measured, atol=0, rtol=5e-5)
    # continued by a single process
    for name in ("one", "many"):
        train(tiny(*overrides, "train.steps=8", f"resume={tmp_path / name}", name=f"{name}_more"))
    one, many = (read(tmp_path / f"{name}_more", "average", 8) for name in ("one", "many"))
    for name in one:
        torch.testing.assert_close(one[name], many[name], atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("norm", ["ssnorm", "bhyt"])
def test_measuring_averaged_weights_leaves_the_training_as_it_is(norm: str, tiny: Tiny, tmp_path: Path) -> None:
    common = (*WINDOW, f"norm.name={norm}", "train.norm_refresh_every=4")
    common += ("eval.every=2", "monitor.enabled=true", "eval.quant.every=3")
    train(tiny(*common, name="trained"))
    train(tiny(*common, "eval.weights=averaged", "monitor.weights=averaged", name="averaged"))
    assert losses(tmp_path / "trained") == losses(tmp_path / "averaged")
    for kind in ("average", "weight"):
        one, two = (read(tmp_path / name, kind, 6) for name in ("trained", "averaged"))
        assert all(torch.equal(one[name], two[name]) for name in one)
    for key in ("val/loss", "quant/perplexity/4-4-4", "monitor/kurtosis/max"):
        one, two = (
            [event[key] for event in read_metrics(tmp_path / name) if key in event] for name in ("trained", "averaged")
        )
        assert len(one) == len(two) > 0, key
        assert one[-1] != two[-1], key
    # the loss of the averaged weights, by the run that trained without looking at them
    stored = load_model(tmp_path / "averaged", weights="averaged")
    again = load_model(tmp_path / "trained", weights="averaged")
    assert all(
        torch.equal(a, b) for a, b in zip(stored.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_averaging_may_begin_in_a_continued_run(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.stop_at=3", "checkpoint.every=1", name="before"))
    train(tiny(*EMA, "checkpoint.every=1", f"resume={tmp_path / 'before'}"))
    w4, w5, w6 = (read(tmp_path / "run", "weight", step) for step in (4, 5, 6))
    measured = read(tmp_path / "run", "average", 6)
    for name, values in measured.items():
        torch.testing.assert_close(values, (0.36 * w4[name] + 0.6 * w5[name] + w6[name]) / 1.96)
    with pytest.raises(UserError, match="weights=averaged, but it has no average"):
        load_model(tmp_path / "before", weights="averaged")
