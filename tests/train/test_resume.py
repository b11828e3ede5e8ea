"""A resumed run equals an uninterrupted one bit for bit: data, losses, learning rates, weights, optimizer state."""

import json
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from osp.config import Config
from osp.errors import StoppedError, UserError
from osp.run.checkpoint import BUFFERS, Checkpoint, find
from osp.train.guards import spike_score
from osp.train.setup import train
from osp.train.trainer import Trainer
from tests.conftest import read_metrics

Tiny = Callable[..., Config]
Change = Callable[[Trainer, int, torch.Tensor], torch.Tensor]


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    """The small configuration without validation and sample, which only take time here."""
    return partial(tiny, "eval.every=0", "eval.tokens=64", "eval.sample_tokens=0")


def steps_of(folder: Path) -> dict[int, dict[str, float]]:
    """Return the checksum of the data, loss, gradient norm and learning rates of every step."""
    steps = {}
    for event in read_metrics(folder):
        if "train/loss" in event:
            assert event["step"] not in steps, f"step {event['step']} is there twice"
            keys = ("train/loss", "train/grad_norm", "train/rows_checksum")
            steps[event["step"]] = {k: v for k, v in event.items() if k in keys or k.startswith("train/lr/")}
    return steps


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return weights, momentum, Adam's moments and buffers of the newest checkpoint of a run."""
    path = find(folder)
    assert path is not None
    checkpoint = Checkpoint(path)
    state = {
        f"{kind}/{name}": checkpoint.read(kind, name, 0, math.prod(shape))
        for name, shape in checkpoint.shapes.items()
        for kind in checkpoint.kinds(name)
    }
    return state | {f"buffer/{name}": values for name, values in load_file(checkpoint.folder / BUFFERS).items()}


def assert_same_run(first: Path, second: Path) -> None:
    assert steps_of(first) == steps_of(second)
    a, b = state_of(first), state_of(second)
    assert a.keys() == b.keys()
    assert {key.split("/")[0] for key in a} >= {"weight", "momentum", "exp_avg", "exp_avg_sq"}
    for name in a:
        assert torch.equal(a[name], b[name]), (name, (a[name] - b[name]).abs().max())


def train_in_pieces(tiny: Tiny, *overrides: str, stops: tuple[int, ...], name: str) -> None:
    """Train the run of `overrides`, with a restart after each step in `stops`."""
    for stop in stops:
        train(tiny(*overrides, f"train.stop_at={stop}", name=name))
    train(tiny(*overrides, name=name))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("logger.every=3",),
        ("train.precision=bf16", "optimizer.ns_dtype=bf16"),
        ("norm.name=bhyt", "train.norm_refresh_every=4"),
        ("data.skip_steps=[[2,3],[6,6]]",),
        ("engine.zero_stage=3",),
        ("qk_clip.tau=0.05", "attention.value_gate=true", "attention.logit_cap=1.0", "attention.v_scale=0.5"),
        ("model.embed_proj=false", "model.tie_embeddings=true", "train.z_loss=0.01"),
        ("train.document_mask=true", "train.activation_checkpointing=true", "checkpoint.every=1"),
    ],
    ids=" ".join,
)
def test_resume_is_bit_identical_on_same_ranks(overrides: tuple[str, ...], tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(*overrides, name="straight"))
    train_in_pieces(tiny, *overrides, stops=(2, 5), name="pieces")
    assert_same_run(tmp_path / "straight", tmp_path / "pieces")


def test_skip_steps_leaves_out_the_sequences_of_those_steps(tiny: Tiny, tmp_path: Path) -> None:
    """data.skip_steps=[[2,3]] reads steps 1, 4, 5, ... of the run without it."""
    train(tiny("train.steps=8", name="all"))
    train(tiny("data.skip_steps=[[2,3]]", name="some"))
    rows = {name: [s["train/rows_checksum"] for s in steps_of(tmp_path / name).values()] for name in ("all", "some")}
    assert len(set(rows["all"])) == 8
    assert rows["some"] == [rows["all"][i] for i in (0, 3, 4, 5, 6, 7)]


def test_skip_steps_applies_after_a_checkpoint_and_is_refused_before_it(tiny: Tiny, tmp_path: Path) -> None:
    """As after a spike at step 5: back to the checkpoint of step 3, without the sequences of steps 5 and 6."""
    train(tiny("data.skip_steps=[[5,6]]", name="straight"))
    train(tiny(name="run"))
    back = f"resume={tmp_path / 'run' / 'checkpoints' / 'step_00000003'}"
    train(tiny("data.skip_steps=[[5,6]]", back, name="run"))
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    with pytest.raises(UserError, match=r"data.skip_steps=\[\[2, 2\]\] changes what was read before step 6"):
        train(tiny("data.skip_steps=[[2,2]]", name="run"))


def test_partial_gradient_of_an_interrupted_step_is_discarded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal arrives after the third of eight micro batches of step 4."""
    overrides = ("train.micro_batch_size=1", "checkpoint.every=0")
    train(tiny(*overrides, name="straight"))
    calls = []

    def ask(trainer: Trainer, step: int, loss: torch.Tensor) -> torch.Tensor:
        calls.append(step)
        trainer._check_every = 1  # as if a micro batch took seconds
        if len(calls) == 3 * 8 + 3:
            trainer.stop.signal = "SIGTERM"
        return loss

    change_loss(monkeypatch, ask)
    with pytest.raises(StoppedError, match="SIGTERM on rank 0: stopped after step 3 of 6 with a checkpoint"):
        train(tiny(*overrides, name="pieces"))
    assert len(calls) == 3 * 8 + 3  # the step was not completed
    marker = json.loads((tmp_path / "pieces" / "stopped.json").read_text())
    assert (marker["reason"], marker["step"]) == ("SIGTERM", 3)
    monkeypatch.undo()
    train(tiny(*overrides, name="pieces"))
    assert_same_run(tmp_path / "straight", tmp_path / "pieces")


def test_spike_windows_and_skip_count_survive_a_restart(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spike is relative to the steps before it, including steps before the interruption."""
    overrides = ("train.steps=12", "spike.action=skip", "spike.window=8", "train.max_skips=2", "spike.threshold=20")
    spiky = {4, 8}  # steps, from 0, with a spike of the loss

    def spike(trainer: Trainer, step: int, loss: torch.Tensor) -> torch.Tensor:
        return loss * (30.0 if step in spiky else 1.0)

    change_loss(monkeypatch, spike)
    train(tiny(*overrides, name="straight"))
    train_in_pieces(tiny, *overrides, stops=(6, 7), name="pieces")
    assert_same_run(tmp_path / "straight", tmp_path / "pieces")
    manifests = [manifest_of(tmp_path / name) for name in ("straight", "pieces")]
    assert [m["skipped"] for m in manifests] == [2, 2]
    assert manifests[0]["spikes"] == manifests[1]["spikes"]
    loss_of = [step["train/loss"] for step in steps_of(tmp_path / "straight").values()]
    assert manifests[1]["spikes"]["loss"] == loss_of[-8:]
    # the limit on skips holds for the whole run, not for one start
    spiky.add(10)
    with pytest.raises(RuntimeError, match=r"train.max_skips=2 updates are left out already"):
        train_in_pieces(tiny, *overrides, stops=(6, 9), name="once_more")


def test_skipped_update_leaves_weights_unchanged(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(trainer: Trainer, step: int, loss: torch.Tensor) -> torch.Tensor:
        return loss * (math.nan if step == 3 else 1.0)

    change_loss(monkeypatch, poison)
    train(tiny("train.on_nonfinite=skip", "checkpoint.every=1"))
    before, after = (
        Checkpoint(tmp_path / "run" / "checkpoints" / f"step_0000000{step}").read(
            "weight", "lm_head.weight", 0, 320 * 32
        )
        for step in (3, 4)
    )
    assert torch.equal(before, after)
    assert manifest_of(tmp_path / "run")["skipped"] == 1
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"]) for e in events] == [("nonfinite", 4)]


def test_spike_windows_are_restored_exactly(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[dict[str, list[float]]] = []
    original = Trainer.restore

    def remember(self: Trainer, checkpoint: Checkpoint) -> None:
        original(self, checkpoint)
        restored.append({key: list(window) for key, window in self.guard.spikes.items()})

    monkeypatch.setattr(Trainer, "restore", remember)
    train_in_pieces(tiny, "spike.window=3", stops=(5,), name="run")
    steps = steps_of(tmp_path / "run")
    assert restored == [
        {key: [steps[step][f"train/{key}"] for step in (3, 4, 5)] for key in ("loss", "grad_norm")},
    ]
    assert spike_score(100.0, deque(restored[0]["loss"], maxlen=3)) > 20


def manifest_of(folder: Path) -> dict[str, Any]:
    path = find(folder)
    assert path is not None
    return json.loads((path / "manifest.json").read_text())


def change_loss(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Replace the loss of every training batch by `change(trainer, step, loss)`."""
    original: Callable[..., Any] = Trainer._forward

    def changed(self: Trainer, batch: Any) -> Any:
        output = original(self, batch)
        return output._replace(loss=change(self, self.step, output.loss)) if self.model.training else output

    monkeypatch.setattr(Trainer, "_forward", changed)
