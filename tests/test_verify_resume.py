"""The certificate of exact resume passes for identical runs and fails if state is damaged between two starts."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from verify_resume import (
    Difference,
    Subprocesses,
    Topology,
    Verification,
    VerifyResumeConfig,
    compare,
    shortened,
    stopped_by,
    verify,
)

from osp.config import Config
from osp.errors import RunError, UserError
from osp.train.launch import failure
from osp.train.setup import train
from tests.conftest import ROOT, overrides_of
from tests.distributed import ForkedProcess

ONE = Topology(1, 1)
Tiny = Callable[..., Config]


def in_process(config: Config, ranks: int, stop: Callable[[], bool] | None = None) -> None:
    assert ranks == 1
    train(config)


def verification(
    config: Config, folder: Path, between: Callable[[Path], None] = lambda checkpoint: None
) -> Verification:
    options = VerifyResumeConfig(steps=(2, 2), ranks=(1,), stages=(1, 3))
    return Verification(config, options, folder, in_process, between=between)


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit a checkpoint of one rank with `change(tensors)` and update its checksum."""
    path, manifest = checkpoint / "rank_00000.safetensors", json.loads((checkpoint / "manifest.json").read_text())
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest["files"][path.name] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_every_stage_resumes_its_own_and_the_other_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    checked = verification(tiny(), tmp_path / "work")
    results = [
        checked.again(),
        *(checked.interrupted(t, 2) for t in checked.topologies),
        checked.interrupted(ONE, 2, 3),
        *checked.across(),
    ]
    assert [r.passed for r in results] == [True] * 6, results
    assert [r.difference.bitwise for r in results[:4]] == [True] * 4
    assert [(r.before.stage, r.after.stage) for r in results[4:]] == [(1, 3), (3, 1)]
    assert {p.name for p in (tmp_path / "work").iterdir()} == {"reference_1_1", "reference_1_3"}


def no_momentum(tensors: dict[str, torch.Tensor]) -> None:
    for key in tensors:
        if key.startswith("momentum/"):
            tensors[key].zero_()


def other_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["weight/lm_head.weight@0"].view(-1)[7] += 1e-7


@pytest.mark.parametrize(("change", "seen"), [(no_momentum, {"weights", "state", "loss"}), (other_weight, {"weights"})])
def test_damaged_checkpoint_fails_the_case(
    change: Callable[[dict[str, torch.Tensor]], None], seen: set[str], tiny: Tiny, tmp_path: Path
) -> None:
    """On the same topology a change in the last digits of one weight is detected, on another one a lost momentum."""
    checked = verification(tiny(), tmp_path, lambda checkpoint: rewrite(checkpoint, change))
    result = checked.interrupted(ONE, 2)
    assert not result.passed
    assert {name for name in ("weights", "state", "loss") if getattr(result.difference, name)} >= seen
    if change is no_momentum:
        across = next(checked.across())
        assert not across.passed
        assert across.yardstick is not None
        assert across.difference.state > 100 * across.yardstick.state


def test_wrong_data_position_fails_the_case(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(checkpoint: Path) -> None:
        monkeypatch.setattr("osp.data.loader.data_step", lambda step, skip_steps: step + 1)

    result = verification(tiny(), tmp_path, break_it).interrupted(ONE, 2)
    assert not result.passed
    assert not result.difference.rows
    assert result.difference.rates


def test_compare_detects_other_data(tiny: Tiny, tmp_path: Path) -> None:
    """The checksums differ even where the losses of two runs are close."""
    train(tiny("train.seed=0", name="a"))
    train(tiny("data.skip_steps=[[4,4]]", name="b"))
    difference = compare(tmp_path / "a", tmp_path / "b")
    assert not difference.rows
    assert difference.rates


def test_zero_bound_requires_equal_bits() -> None:
    nothing = Difference(True, True, 0.0, 0.0, 0.0, bitwise=True)
    small = dataclasses.replace(nothing, state=1e-9, bitwise=False)
    assert nothing.within(nothing)
    assert not small.within(nothing)
    assert small.within(dataclasses.replace(small, state=3e-10))
    assert not small.within(dataclasses.replace(small, state=1e-10))
    assert not dataclasses.replace(small, rows=False).within(dataclasses.replace(small, state=3e-10))


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [("5%", "20%", (1, 2)), (10, 0, (1, 0)), ("90%", "10%", (6, 0)), ("2560 tokens", "100%", (1, 5))],
)
def test_schedule_is_scaled_to_the_short_run(
    warmup: object, decay: object, expected: tuple[int, int], tiny: Tiny
) -> None:
    config = tiny("train.steps=100", f"schedule.warmup={warmup}", f"schedule.decay={decay}")
    short = shortened(config, VerifyResumeConfig(), max_ranks=4)
    assert (short.schedule.warmup, short.schedule.decay) == expected
    assert (short.train.steps, short.train.tokens_per_step) == (6, 2 * 4 * 32)


@pytest.mark.timeout(900)  # four starts, two of two ranks
def test_checkpoints_cross_ranks_and_stages_in_processes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank at ZeRO-1 resumes the checkpoint of two ranks at ZeRO-3, and vice versa."""
    monkeypatch.setattr("verify_resume.Process", ForkedProcess)
    options = VerifyResumeConfig(steps=(2, 2))
    checked = Verification(tiny(name="verified"), options, tmp_path, Subprocesses(tmp_path))
    checked.topologies = [ONE, Topology(2, 3)]
    results = list(checked.across())
    assert [r.passed for r in results] == [True] * 2, results
    assert results[0].yardstick is not None
    assert 0 < results[0].yardstick.weights < 1e-4


@pytest.mark.slow
def test_sigterm_in_real_processes_loses_nothing(tiny: Tiny, tmp_path: Path) -> None:
    checked = Verification(tiny(), VerifyResumeConfig(), tmp_path, Subprocesses(tmp_path))
    for topology in (ONE, Topology(2, 2)):
        result = checked.signalled(topology)
        assert result.passed, result
        assert result.difference.bitwise


def test_certificate_records_pass_and_failure(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify_resume.Subprocesses", lambda folder: in_process)
    monkeypatch.setattr(Verification, "signalled", lambda self, topology: self.interrupted(topology, 1))
    options = VerifyResumeConfig(steps=(1, 1), ranks=(1,), stages=(1,))
    verify(tiny(), options)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["verify_resume.json"]
    written = json.loads((tmp_path / "run" / "verify_resume.json").read_text())
    assert written["passed"] is True
    assert len(written["results"]) == 4
    assert {"git", "torch", "host", "command"} <= written["environment"].keys()
    monkeypatch.setattr("verify_resume.compare", lambda *_, **__: Difference(True, False, 0, 0, 0, bitwise=True))
    with pytest.raises(RunError, match=r"4 of 4 cases failed \(not interrupted, 1 x ZeRO-1 -> 1 x ZeRO-1; "):
        verify(tiny(), options)
    assert json.loads((tmp_path / "run" / "verify_resume.json").read_text())["passed"] is False


def test_user_errors_are_reported_as_by_training(tmp_path: Path) -> None:
    """Unknown keys are reported before anything starts, other mistakes by the first training."""

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "scripts" / "verify_resume.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
        return done.returncode, done.stderr.strip()

    assert run("verify.step=[1,1]") == (2, "error: unknown key 'verify.step'; did you mean 'verify.steps'?")
    assert not list(tmp_path.iterdir())
    log = tmp_path / "start.log"
    log.write_text("x\nerror: data.paths=[nowhere]: not there\n")
    assert isinstance(failure(log, 2), UserError)
    assert isinstance(failure(log, 1), RunError)
    log.write_text("error: data.paths=[nowhere]: not there\n...\n  exitcode  : 2 (pid: 7)\n")  # as torchrun reports
    assert str(failure(log, 1)) == "data.paths=[nowhere]: not there"
    assert isinstance(failure(log, 1), UserError)
    log.write_text("Segmentation fault\n")
    assert "ended with exit status 139" in str(failure(log, 139))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_script_passes_on_all_topologies(tiny: Tiny, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "verify_resume.py"), *overrides_of(tiny())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert "all 23 cases passed" in done.stderr
    assert stopped_by(tmp_path / "run") is None
