"""Values that are not finite, spikes, and the sequences that are left out because of them."""

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.config import Config
from osp.data.loader import data_step
from osp.errors import RunError, UserError
from osp.run.checkpoint import load_model
from osp.train.guards import spike_score
from osp.train.setup import train
from osp.train.trainer import Trainer
from tests.conftest import losses, read_metrics

Tiny = Callable[..., Config]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def checksums(folder: Path) -> list[float]:
    return [event["train/rows_checksum"] for event in read_metrics(folder) if "train/rows_checksum" in event]


@pytest.fixture
def scaled_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """`scaled_loss({n: factor})`: multiply the n-th loss of a run, from 1, with its gradient, by `factor`."""

    def install(factors: dict[int, float]) -> None:
        original: Callable[..., Any] = Trainer._forward
        calls = [0]

        def scaled(self: Trainer, batch: Any) -> Any:
            calls[0] += torch.is_grad_enabled()
            output = original(self, batch)
            factor = factors.get(calls[0], 1.0) if torch.is_grad_enabled() else 1.0
            return output._replace(loss=output.loss * factor)

        monkeypatch.setattr(Trainer, "_forward", scaled)

    return install


ONE_BATCH = ("train.micro_batch_size=8", "eval.every=0")  # one loss per step


def test_spike_score_of_a_known_window() -> None:
    """Median 3, median absolute deviation 1: 10 is 7 / 1.4826 deviations above."""
    window = deque([1.0, 2.0, 3.0, 4.0, 5.0], maxlen=8)
    assert spike_score(10.0, window) == pytest.approx(7 / 1.4826)
    assert spike_score(3.0, window) == 0.0
    assert spike_score(-4.0, window) == pytest.approx(-7 / 1.4826)


def test_one_spike_does_not_hide_the_next() -> None:
    """A mean and a standard deviation would: after 1000 they score another 1000 as normal."""
    assert spike_score(1000.0, deque([1.0, 1.1, 0.9, 1.05, 0.95, 1000.0], maxlen=16)) > 1000


def test_score_is_zero_before_a_quarter_of_the_window() -> None:
    window = deque([1.0, 1.1, 0.9], maxlen=16)
    assert spike_score(1e6, window) == 0.0
    window.append(1.0)
    assert spike_score(1e6, window) > 0


def test_constant_values_tolerate_one_percent() -> None:
    assert spike_score(2.02, deque([2.0, 2.0, 2.0, 2.0], maxlen=4)) == pytest.approx(1.0)


@pytest.mark.parametrize("stage", [1, 3])
def test_step_with_non_finite_gradient_is_skipped_and_reported(
    stage: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a finite loss: the step leaves every weight unchanged."""
    original: Callable[..., Any] = Trainer._forward
    calls = [0]

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * (math.inf if calls[0] == 3 else 1.0)

    def poisoned(self: Trainer, batch: Any) -> Any:
        calls[0] += torch.is_grad_enabled()
        output = original(self, batch)
        return output._replace(loss=Poison.apply(output.loss)) if torch.is_grad_enabled() else output

    monkeypatch.setattr(Trainer, "_forward", poisoned)
    config = tiny("train.on_nonfinite=skip", f"engine.zero_stage={stage}", "checkpoint.every=1", *ONE_BATCH)
    train(config)
    (event,) = events(tmp_path / "run", "nonfinite")
    assert event["step"] == 3
    assert "the gradient is not finite though the loss is" in event["message"]
    assert "this update is left out (1 of at most 10)" in event["message"]
    curve = losses(tmp_path / "run")
    assert len(curve) == 6
    assert all(math.isfinite(value) for value in curve)
    before, after = (load_model(tmp_path / "run" / "checkpoints" / f"step_0000000{n}").state_dict() for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert curve[3] != curve[2]  # other sequences: a skipped step is not read again
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    assert manifest["spikes"]["loss"] == [*curve[:2], *curve[3:]]  # the step that was left out is in no window
    assert all(map(math.isfinite, manifest["spikes"]["grad_norm"]))
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert report["rows"] == []
    assert {"inf", "nan"} & set(report["gradients"].values())


def test_exceeding_max_skips_ends_the_run_with_a_checkpoint(
    tiny: Tiny, tmp_path: Path, scaled_loss: Callable[..., None]
) -> None:
    scaled_loss({2: math.nan, 4: math.nan})
    config = tiny("train.on_nonfinite=skip", "train.max_skips=1", "checkpoint.every=0", *ONE_BATCH)
    with pytest.raises(RunError, match=r"step 4: the loss is not finite in .* train.max_skips=1 updates are left out"):
        train(config)
    marker = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert marker["step"] == 3
    assert marker["checkpoint"].endswith("step_00000003")
    assert "not finite" in marker["reason"]


def test_run_stopped_by_nan_continues_without_its_sequences(
    tiny: Tiny, tmp_path: Path, scaled_loss: Callable[..., None]
) -> None:
    """The advice of the message works: leave the sequences of the step out and start again."""
    scaled_loss({4: math.nan})
    with pytest.raises(RunError, match=r"step 4: the loss is not finite.*no weight was changed"):
        train(tiny("checkpoint.every=0", *ONE_BATCH))
    train(tiny("checkpoint.every=0", "data.skip_steps=[[4, 4]]", *ONE_BATCH))
    train(tiny("train.steps=8", "checkpoint.every=0", *ONE_BATCH, name="straight"))
    straight = checksums(tmp_path / "straight")
    assert checksums(tmp_path / "run") == [*straight[:3], *straight[4:7]]


@pytest.mark.parametrize(("action", "applied"), [("warn", True), ("skip", False)])
def test_spike_is_reported_with_its_sequences(
    action: str, applied: bool, tiny: Tiny, tmp_path: Path, scaled_loss: Callable[..., None]
) -> None:
    scaled_loss({5: 30.0})
    train(tiny(f"spike.action={action}", "spike.window=8", "checkpoint.every=1", *ONE_BATCH))
    (event,) = events(tmp_path / "run", "spike")
    assert event["step"] == 5
    assert "loss" in event["message"]
    assert "grad_norm" in event["message"]
    assert "data.skip_steps=[[5,5]]" in event["message"]
    before, after = (load_model(tmp_path / "run" / "checkpoints" / f"step_0000000{n}").state_dict() for n in (4, 5))
    assert any(not torch.equal(before[name], after[name]) for name in before) == applied


def test_normal_training_has_no_spikes(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.steps=40", "spike.window=16", "eval.every=0", "checkpoint.every=0"))
    assert events(tmp_path / "run", "spike") == []


@pytest.mark.parametrize(
    ("skip", "read"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        ([(1, 2)], [2, 3, 4, 5, 6, 7]),
        ([(3, 3)], [0, 1, 3, 4, 5, 6]),
        ([(5, 6), (2, 3)], [0, 3, 6, 7, 8, 9]),  # given in any order
        ([(2, 2), (3, 3)], [0, 3, 4, 5, 6, 7]),
    ],
)
def test_sequences_of_skipped_steps_are_not_read(skip: list[tuple[int, int]], read: list[int]) -> None:
    assert [data_step(step, skip) for step in range(6)] == read


def test_skipping_sequences_already_read_is_refused(tiny: Tiny) -> None:
    train(tiny("train.stop_at=4"))
    with pytest.raises(UserError, match=r"data.skip_steps=\[\[2, 2\]\] changes what was read before step 4"):
        train(tiny("data.skip_steps=[[2, 2]]"))
    train(tiny("data.skip_steps=[[5, 5]]"))


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("[[3, 2]]", r"data.skip_steps=.*write \[\[first, last\], ...\]"),
        ("[[1, 3], [3, 4]]", r"data.skip_steps=.*write \[\[first, last\], ...\]"),
        ("[[0, 1]]", r"data.skip_steps\[0\]\[0\]=0: must be at least 1"),
    ],
)
def test_malformed_skip_is_refused(skip: str, message: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=message):
        tiny(f"data.skip_steps={skip}")
