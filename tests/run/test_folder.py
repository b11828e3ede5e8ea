"""The run folder between two starts: locking, resuming, damaged checkpoints, full disks."""

import dataclasses
import fcntl
import json
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from osp.config import CheckpointConfig, Config
from osp.errors import RunError, UserError
from osp.run import checkpoint as checkpoint_module
from osp.run.checkpoint import Checkpoint, find
from osp.run.folder import Found, RunLock, check_disk, open_run
from osp.train.setup import train
from osp.train.trainer import Trainer
from tests.conftest import losses, read_metrics
from tests.train.test_trainer import assert_same_weights

Tiny = Callable[..., Config]


def marker(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stopped.json").read_text())


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_two_trainings_cannot_share_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.stop_at=2"))
    with (tmp_path / "run" / ".lock").open("a") as other:  # as another process would hold it
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"run.dir=.*run: another training \(.+-\d+\) is writing there"):
            train(tiny())
    train(tiny())
    assert len(losses(tmp_path / "run")) == 6


def test_new_lock_removes_leftovers_of_the_former_holder(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("node7-4711")
    for token in ("node7-4711", "node8-1"):
        (tmp_path / "checkpoints" / f".step_00000003.{token}.tmp").mkdir(parents=True)
    lock = RunLock(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [".step_00000003.node8-1.tmp"]
    assert (tmp_path / ".lock").read_text() == lock.token
    lock.release()


def test_stop_at_saves_and_keeps_the_schedule_of_the_whole_run(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(name="straight"))
    train(tiny("train.stop_at=2", "checkpoint.every=0"))
    assert marker(tmp_path / "run")["reason"] == "train.stop_at"
    assert marker(tmp_path / "run")["checkpoint"].endswith("step_00000002")
    assert not (tmp_path / "run" / "summary.json").exists()
    train(tiny("checkpoint.every=0"))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert marker(tmp_path / "run")["reason"] == "complete"
    assert_same_weights(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    damage: str, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny(name="straight"))
    train(tiny("train.stop_at=4", "checkpoint.every=2"))
    newest = tmp_path / "run" / "checkpoints" / "step_00000004"
    file = newest / "rank_00000.safetensors"
    if damage == "flip":
        flip_last_byte(file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "manifest.json").write_text('{"format": 1, "st')
    train(tiny("checkpoint.every=2"))
    name = "manifest.json" if damage == "manifest" else "rank_00000.safetensors"
    assert any(f"step_00000004/{name}" in r.message and "the one before" in r.message for r in caplog.records)
    assert events(tmp_path / "run", "resumed")[-1]["step"] == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert_same_weights(tmp_path / "run", tmp_path / "straight")


def test_run_is_refused_when_every_checkpoint_is_damaged(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.stop_at=4", "checkpoint.every=2"))
    for file in (tmp_path / "run" / "checkpoints").glob("step_*/rank_00000.safetensors"):
        flip_last_byte(file)
    with pytest.raises(UserError, match=r"step_00000002/rank_00000.safetensors: damaged"):
        train(tiny())


def test_resuming_from_an_older_checkpoint_discards_later_ones(tiny: Tiny, tmp_path: Path) -> None:
    """The same command continues when it is run again, for example by a scheduler; it does not go back once more."""
    train(tiny("checkpoint.every=1", name="straight"))
    train(tiny("train.stop_at=4", "checkpoint.every=1"))
    back = f"resume={tmp_path / 'run' / 'checkpoints' / 'step_00000002'}"
    skip = "data.skip_steps=[[3, 3]]"
    train(tiny(back, skip, "train.stop_at=3", "checkpoint.every=1"))
    assert [e["step"] for e in read_metrics(tmp_path / "run") if "train/loss" in e] == [1, 2, 3]
    train(tiny(back, skip, "checkpoint.every=1"))
    assert [event["step"] for event in events(tmp_path / "run", "resumed")] == [2, 3]
    checksums, straight = (
        [e["train/rows_checksum"] for e in read_metrics(tmp_path / name) if "train/rows_checksum" in e]
        for name in ("run", "straight")
    )
    assert checksums[:5] == [straight[0], straight[1], straight[3], straight[4], straight[5]]


def test_going_back_to_an_older_checkpoint_persists_without_a_later_save(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.stop_at=4", "checkpoint.every=1"))
    back = f"resume={tmp_path / 'run' / 'checkpoints' / 'step_00000002'}"
    train(tiny(back, "train.stop_at=2"))  # as if killed before the first save
    train(tiny(back, "train.stop_at=2"))
    assert [event["step"] for event in events(tmp_path / "run", "resumed")] == [2, 2]


def remove_after_step(monkeypatch: pytest.MonkeyPatch, step: int, folder: Path) -> None:
    """Remove a folder during a training, after `step`."""
    original: Callable[..., Any] = Trainer.train_step

    def train_step(self: Trainer, number: int, *, record: bool) -> Any:
        if number == step:
            writing = self.saver._writing
            wait([writing] if writing else [])  # a file that appears meanwhile would make the removal fail
            shutil.rmtree(folder)
        return original(self, number, record=record)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_removed_run_folder_ends_the_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_after_step(monkeypatch, 4, tmp_path / "run")
    with pytest.raises(RunError, match=r"step 5: the run folder .*run was removed; nothing more can be saved there"):
        train(tiny("checkpoint.every=2"))
    assert not (tmp_path / "run").exists()


def test_folder_taken_by_another_training_is_not_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = Trainer.train_step

    def train_step(self: Trainer, number: int, *, record: bool) -> Any:
        if number == 4:
            (tmp_path / "run" / ".lock").write_text("node7-4711")
        return original(self, number, record=record)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(RunError, match=r"step 5: another training \(node7-4711\) has taken the run folder"):
        train(tiny("checkpoint.every=2"))
    assert not (tmp_path / "run" / "checkpoints" / "step_00000005").exists()


def test_removed_checkpoints_are_written_again(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny("checkpoint.every=0", name="straight"))
    remove_after_step(monkeypatch, 4, tmp_path / "run" / "checkpoints")
    train(tiny("checkpoint.every=2"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000006"]
    assert_same_weights(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("tokenizer", [b"", b"{", b'{"version": "1.0"}'])
def test_damaged_tokenizer_is_written_again(tokenizer: bytes, tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    """As after a power failure, when a file was created and its content was not on disk yet."""
    shutil.copytree(plain_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000003\n")
    (tmp_path / "run" / "tokenizer.json").write_bytes(tokenizer)
    train(tiny())
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (plain_run / "tokenizer.json").read_bytes()
    assert losses(tmp_path / "run") == losses(plain_run)


def test_damaged_records_do_not_stop_a_start(tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny("monitor.enabled=true", "monitor.tokens=64", 'monitor.statistics=["kurtosis"]')
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, stop_at=3)))
    lines = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"\xff" + lines[1:])
    (folder / "environment.json").write_text('{"time": 3}')
    (folder / "wandb_run_id").write_bytes(b"\xff\xfe")
    for name in ("stopped.json", "probes.jsonl", "events.jsonl", "summary.json", "nonfinite.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    train(config)
    assert losses(folder)[-3:] == losses(plain_run)[-3:]
    assert json.loads((folder / "environment.json").read_text())[0]["world_size"] == 1
    found = find(folder)
    assert found is not None
    assert Checkpoint(found).manifest["wandb_run_id"] is None


@pytest.mark.parametrize("summary", ["", "{", "[]", '{"steps": 6}', '{"steps": "six"}'])
def test_damaged_summary_is_written_again(summary: str, tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    shutil.copytree(plain_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(summary)
    train(tiny())
    written, before = (json.loads((path / "summary.json").read_text()) for path in (tmp_path / "run", plain_run))
    assert written.keys() == before.keys()
    assert written["val/loss"] == before["val/loss"]


def test_complete_run_needs_no_text_and_no_room(
    tiny: Tiny, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(plain_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 1000, 0))
    monkeypatch.setattr("osp.files.write_bytes", full)
    monkeypatch.setattr("osp.train.setup.start_preparing", lambda *_, **__: pytest.fail("the text is not needed"))
    caplog.set_level("INFO")
    train(tiny())
    (message,) = [record.getMessage() for record in caplog.records if "this run is complete" in record.getMessage()]
    assert "trained             6 steps, 1,536 tokens" in message
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} <= {"report.html"}
    monkeypatch.undo()
    (tmp_path / "run" / "stopped.json").unlink()
    train(tiny())
    assert marker(tmp_path / "run")["reason"] == "complete"


def test_start_that_looked_before_another_training_is_refused(
    tiny: Tiny, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def look_early(config: Config) -> Found:
        found = open_run(config)
        shutil.copytree(plain_run, folder)  # the other training begins and ends
        return found

    monkeypatch.setattr("osp.train.setup.open_run", look_early)
    with pytest.raises(UserError, match=r"run.dir=.*: another training has written there meanwhile; start again"):
        train(tiny())
    assert losses(folder) == losses(plain_run)
    monkeypatch.undo()
    train(tiny())
    assert len(losses(folder)) == 6


def test_lines_are_on_disk_before_the_checkpoint_that_follows_them(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def record_name(file: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", record_name)
    train(tiny("train.steps=1"))
    manifest, lines = flushed.index("manifest.json.tmp"), [flushed.index(f"{n}.jsonl") for n in ("metrics", "events")]
    assert max(lines) < manifest


def test_lock_of_a_foreign_folder_names_no_other_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.tmp"
    outside.mkdir()
    (tmp_path / "run" / "checkpoints" / ".step_1.x").mkdir(parents=True)
    (tmp_path / "run" / ".lock").write_text("x/../../../outside")
    RunLock(tmp_path / "run").release()
    assert outside.exists()


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, *, at_step: int) -> None:
    """Leave no space for the checkpoint of one step."""
    write_tensors = checkpoint_module.write_tensors

    def fail(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
        if f".step_{at_step:08d}." in str(path):
            raise OSError(28, "No space left on device", str(path))
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint_module, "write_tensors", fail)


def test_full_disk_fails_a_save_but_not_the_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_the_disk(monkeypatch, at_step=2)
    train(tiny("checkpoint.every=1"))
    (event,) = events(tmp_path / "run", "checkpoint_failed")
    assert "checkpoint of step 2 not written: rank 0: " in event["message"]
    assert "No space left on device" in event["message"]
    written = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert written == [f"step_0000000{n}" for n in (1, 3, 4, 5, 6)]
    assert len(losses(tmp_path / "run")) == 6


def test_run_without_its_last_checkpoint_is_not_complete(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fill_the_disk(patch, at_step=6)
        with pytest.raises(RunError, match=r"step 6: the last checkpoint could not be written to .*make room there"):
            train(tiny())
    assert marker(tmp_path / "run")["checkpoint"].endswith("step_00000003")
    train(tiny())
    assert marker(tmp_path / "run")["reason"] == "complete"


def test_size_and_time_of_saves_are_logged(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny())
    saves = [event for event in read_metrics(tmp_path / "run") if "checkpoint/bytes" in event]
    assert len(saves) == 2
    folder = tmp_path / "run" / "checkpoints" / "step_00000006"
    assert saves[-1]["checkpoint/bytes"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert all(0 < event["checkpoint/blocked_seconds"] < 200 for event in saves)
    assert all(event["checkpoint/write_seconds"] > 0 for event in saves)


def test_disk_check_counts_what_will_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restarted run needs room for the next checkpoint, not for existing ones; without saves, only for the last."""
    config = CheckpointConfig(every=10, keep_last=2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 750, 250))
    with pytest.raises(UserError, match=r"3 more checkpoints of .* do not fit"):  # two are kept, a third is written
        check_disk(tmp_path, 100, config, first=0, last=100)
    check_disk(tmp_path, 100, CheckpointConfig(every=0, keep_last=2), first=0, last=100)
    check_disk(tmp_path, 100, config, first=0, last=20)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_0000000{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_0000000{step}" / "manifest.json").write_text("{}")
    check_disk(tmp_path, 100, config, first=20, last=100)
    with pytest.raises(UserError, match=r"1 more checkpoint of .* do not fit"):
        check_disk(tmp_path, 300, config, first=20, last=100)


def test_training_asks_for_the_room_of_its_own_saves(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to `train.stop_at`, from the step where it continues."""
    asked = []

    def record(folder: Path, num_bytes: int, config: CheckpointConfig, **steps: int) -> None:
        asked.append((folder, config.every, steps))

    monkeypatch.setattr("osp.train.setup.check_disk", record)
    train(tiny("train.stop_at=3", "eval.sample_tokens=0"))
    train(tiny("eval.sample_tokens=0"))
    assert asked == [(tmp_path / "run", 3, {"first": 0, "last": 3}), (tmp_path / "run", 3, {"first": 3, "last": 6})]


def test_training_waits_only_for_the_copy_of_a_save(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing, renaming and removing, slow on some file systems, run in the background."""
    done: list[tuple[str, threading.Thread]] = []

    def record_calls(name: str) -> None:
        original = getattr(checkpoint_module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if "checkpoints" in str(arguments[0]):
                done.append((name, threading.current_thread()))
            return original(*arguments, **options)

        monkeypatch.setattr(checkpoint_module, name, call)

    config = tiny("checkpoint.every=2", "checkpoint.keep_last=1", "eval.every=0", "eval.sample_tokens=0")
    for name in ("sha256_of", "flush", "remove", "prune"):
        record_calls(name)
    train(config)
    assert {name for name, _ in done} == {"sha256_of", "flush", "remove", "prune"}
    assert threading.main_thread() not in [thread for _, thread in done]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000006"]
    saves = [event for event in read_metrics(tmp_path / "run") if "checkpoint/bytes" in event]
    assert all(event["checkpoint/blocked_seconds"] > 0 for event in saves)
    assert len(saves) == 3


def test_validation_is_not_repeated_after_resuming(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.stop_at=3"))
    train(tiny())
    assert [e["step"] for e in read_metrics(tmp_path / "run") if "val/loss" in e] == [3, 6]
