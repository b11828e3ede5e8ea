"""Signals through the real launchers: a checkpoint at a boundary, a marker with the reason, and nothing lost."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from osp.config import Config
from osp.data.loader import Loader
from osp.errors import StoppedError
from osp.monitor import monitor
from osp.process import Launcher
from osp.train.setup import train
from osp.train.stop import SECONDS_OF_ONE_REQUEST, StopRequest
from osp.train.trainer import Trainer
from tests.conftest import ROOT, free_port, losses, overrides_of, read_metrics
from tests.train.test_resume import assert_same_run, manifest_of

Tiny = Callable[..., Config]
STEPS = 600
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2")


class Run:
    """A training of `config` in a background process. launcher: the arguments before the script."""

    def __init__(self, config: Config, launcher: tuple[str, ...] = ()):
        self.folder = Path(config.run.dir)
        number = len(list(self.folder.parent.glob(f"{self.folder.name}_*.log")))
        self.output = self.folder.with_name(f"{self.folder.name}_{number}.log")
        self.children: list[psutil.Process] = []
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        environment = {key: value for key, value in os.environ.items() if key not in names}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        if launcher == DEEPSPEED:
            launcher += ("--master_port", str(free_port()))
        else:
            launcher = (sys.executable, *launcher)
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*launcher, str(ROOT / "scripts" / "train.py"), *overrides_of(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environment, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)},
                cwd=self.folder.parent,
                start_new_session=True,
            )
        self.first = self.step

    @property
    def step(self) -> int:
        """The last logged step."""
        path = self.folder / "metrics.jsonl"
        steps = re.findall(r'"step": (\d+).*\n', path.read_text()) if path.exists() else ["0"]
        return int(steps[-1]) if steps else 0

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def marker(self) -> dict[str, Any]:
        return json.loads((self.folder / "stopped.json").read_text())

    def wait_for_steps(self, number: int) -> None:
        """Wait until `number` steps were taken since the start."""
        until = time.monotonic() + 400
        while self.step < self.first + number:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < until, self.text
            time.sleep(0.02)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def rank(self, number: int) -> psutil.Process:
        """Return the process of rank `number`."""
        for child in self.children:
            if "train.py" in " ".join(child.cmdline()) and child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(self.text)

    def wait(self, seconds: float = 600) -> int:
        """Wait for the launcher and the ranks, which deepspeed does not wait for on Ctrl-C; return its exit status."""
        _, alive = psutil.wait_procs(self.children, timeout=seconds)
        assert not alive, self.text
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End all processes, also after a failed test."""
        if self.process.poll() is None:
            self.children += psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
        for child in self.children:
            if child.is_running():
                child.kill()


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """`start(config, TORCHRUN)`: start a `Run` that ends with the test at the latest."""
    runs: list[Run] = []

    def begin(config: Config, launcher: tuple[str, ...] = ()) -> Run:
        runs.append(Run(config, launcher))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def many_steps(tiny: Tiny, name: str, *overrides: str) -> Config:
    """Return a configuration long enough to receive a signal, on a fast machine too."""
    return tiny(
        *(f"train.steps={STEPS}", "eval.every=0", "eval.tokens=64", "eval.sample_tokens=0", "checkpoint.every=0"),
        *overrides,
        name=name,
    )


def assert_stopped(run: Run, name: str, rank: int | None = None) -> None:
    """Check that the run ended on a boundary with a checkpoint, and reported it in one line."""
    assert run.marker["reason"] == name, run.text
    assert manifest_of(run.folder)["step"] == run.marker["step"] == run.step
    who = r"\d" if rank is None else str(rank)
    message = rf"^{name} on rank {who}: stopped after step {run.step} of {STEPS} with a checkpoint; the same command "
    assert len(re.findall(message, run.text, flags=re.MULTILINE)) == 1, run.text
    assert 'scripts/train.py", line' not in run.text, run.text  # no traceback of ours; torchrun has its own


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_launchers_pass_signals_on(tiny: Tiny, tmp_path: Path, start: Callable[..., Run]) -> None:
    """One run on two ranks, stopped in four ways and after losing a rank, equals an undisturbed run."""
    config = many_steps(tiny, "run", "checkpoint.every=5")

    run = start(config, TORCHRUN)
    run.wait_for_steps(3)
    run.process.send_signal(signal.SIGTERM)  # as a scheduler does; torchrun passes it on
    run.wait()
    assert_stopped(run, "SIGTERM")

    run = start(config, DEEPSPEED)
    run.wait_for_steps(3)
    os.killpg(run.process.pid, signal.SIGINT)  # as Ctrl-C does: to launcher and ranks at once
    run.wait()
    assert_stopped(run, "SIGINT")

    run = start(config, TORCHRUN)
    run.wait_for_steps(3)
    run.rank(1).send_signal(signal.SIGUSR1)  # one rank only
    run.wait()
    assert_stopped(run, "SIGUSR1", rank=1)

    run = start(config, TORCHRUN)
    run.wait_for_steps(3)
    run.process.kill()
    run.wait()
    assert run.marker["reason"] == "SIGTERM", run.text
    assert manifest_of(run.folder)["step"] == run.marker["step"] == run.step
    assert ", whose launcher has ended: stopped after step" in run.text

    run = start(config, TORCHRUN)
    run.wait_for_steps(3)
    assert_lost_rank_is_named(run)

    run = start(config, TORCHRUN)
    assert run.wait() == 0, run.text
    assert run.marker["reason"] == "complete"
    straight = start(many_steps(tiny, "straight"), TORCHRUN)
    assert straight.wait() == 0, straight.text
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def assert_lost_rank_is_named(run: Run) -> None:
    """Kill rank 1: rank 0 reports it and ends soon."""
    ranks = [run.rank(number) for number in (0, 1)]
    ranks[1].kill()
    began = time.monotonic()
    run.wait()
    assert time.monotonic() - began < 200  # a collective waits half an hour
    message = rf"error: .*rank 1 \(process {ranks[1].pid} on .*\) has died"
    assert re.search(message, run.text), run.text
    assert not ranks[0].is_running()


@pytest.mark.slow
def test_deepspeed_launcher_with_a_dead_rank(tiny: Tiny, start: Callable[..., Run]) -> None:
    run = start(many_steps(tiny, "run", "train.steps=2000"), DEEPSPEED)
    run.wait_for_steps(3)
    assert_lost_rank_is_named(run)


class Clock:
    """The time that `StopRequest` sees, and the statuses with which it ended the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        self.ended: list[int] = []
        monkeypatch.setattr("osp.train.stop.time.monotonic", lambda: self.now)
        monkeypatch.setattr("osp.train.stop.os._exit", self.ended.append)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_second_signal_ends_the_process_at_once(clock: Clock) -> None:
    """Two within a second are one request: a launcher passes on what the terminal has already sent."""
    request = StopRequest()
    with request.listen():
        signal.raise_signal(signal.SIGINT)
        clock.now += 0.9 * SECONDS_OF_ONE_REQUEST
        signal.raise_signal(signal.SIGTERM)
        assert (request.signal, clock.ended) == ("SIGINT", [])
        clock.now += 0.2 * SECONDS_OF_ONE_REQUEST
        signal.raise_signal(signal.SIGTERM)
        assert (request.signal, clock.ended) == ("SIGINT", [128 + signal.SIGTERM])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU])
def test_lost_terminal_and_limits_of_a_scheduler_ask_to_stop(number: signal.Signals) -> None:
    request = StopRequest()
    with request.listen():
        signal.raise_signal(number)
    assert request.signal == number.name


def test_nohup_keeps_a_run_going() -> None:
    before, request = signal.signal(signal.SIGHUP, signal.SIG_IGN), StopRequest()
    try:
        with request.listen():
            signal.raise_signal(signal.SIGHUP)
        assert not request
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_limit_of_time_that_is_repeated_is_one_request(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux sends SIGXCPU every second, and a launcher may end after it has passed a signal on."""
    request = StopRequest()
    with request.listen():
        signal.raise_signal(signal.SIGXCPU)
        clock.now += 10 * SECONDS_OF_ONE_REQUEST
        signal.raise_signal(signal.SIGXCPU)
        assert not clock.ended
        monkeypatch.setattr(Launcher, "gone", True)
        signal.raise_signal(signal.SIGTERM)
        assert not clock.ended


def test_end_of_the_launcher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launcher, "gone", True)
    request = StopRequest()
    with request.listen():
        signal.raise_signal(signal.SIGTERM)
    error = request.error(3, 9)
    assert str(error).startswith("SIGTERM on rank 0, whose launcher has ended: stopped after step 3 of 9 with a checkp")
    assert error.signal == "SIGTERM"


def test_signal_during_validation_saves_without_finishing_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restart validates again from the beginning."""
    overrides = ("train.steps=4", "eval.every=2", "eval.tokens=4096", "checkpoint.every=0")
    train(tiny(*overrides, name="straight"))
    original, batches = Trainer._forward, []

    def forward(self: Trainer, batch: Any) -> Any:
        if not self.model.training:
            batches.append(batch)
            if len(batches) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_forward", forward)
    with pytest.raises(StoppedError, match="SIGTERM on rank 0: stopped after step 2 of 4"):
        train(tiny(*overrides, name="run"))
    assert len(batches) == 3
    assert manifest_of(tmp_path / "run")["step"] == 2
    monkeypatch.undo()
    train(tiny(*overrides, name="run"))
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    validations = [[e["val/loss"] for e in read_metrics(tmp_path / n) if "val/loss" in e] for n in ("straight", "run")]
    assert len(validations[0]) == 2
    assert validations[0] == validations[1]


def test_signal_during_a_probe_stops_at_its_boundary(
    tiny: Tiny, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe is short, so it is completed."""
    config = tiny("monitor.enabled=true", "monitor.every=2", "monitor.tokens=64", 'monitor.statistics=["kurtosis"]')
    probe, probed = monitor.probe, []

    def signalled(*arguments: Any) -> Any:
        probed.append(None)
        if len(probed) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return probe(*arguments)

    monkeypatch.setattr(monitor, "probe", signalled)
    with pytest.raises(StoppedError, match="SIGTERM on rank 0: stopped after step 2 of 6"):
        train(config)
    assert manifest_of(tmp_path / "run")["step"] == 2
    monkeypatch.undo()
    train(config)
    assert losses(tmp_path / "run") == losses(plain_run)
    assert [e["step"] for e in read_metrics(tmp_path / "run") if "monitor/seconds" in e] == [0, 2, 4, 6]


def test_signal_stops_a_run_that_waits_for_data(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of step 4 is not prepared yet, and may take hours."""
    train(tiny(name="straight"))
    read, wait, prepared, steps_read = Loader._read, Loader.wait, threading.Event(), []

    def read_late(self: Loader, step: int) -> Any:
        if step >= 3:
            prepared.wait(280)
            steps_read.append(step)
        return read(self, step)

    def ask_while_waiting(self: Loader, step: int, *, seconds: float) -> bool:
        ready = wait(self, step, seconds=seconds)
        if step == 3 and not ready:
            os.kill(os.getpid(), signal.SIGUSR1)
        return ready

    monkeypatch.setattr(Loader, "_read", read_late)
    monkeypatch.setattr(Loader, "wait", ask_while_waiting)
    with pytest.raises(StoppedError, match="SIGUSR1 on rank 0: stopped after step 3 of 6"):
        train(tiny("eval.every=0", name="run"))
    assert steps_read == []  # the run did not wait for the data
    prepared.set()
    monkeypatch.undo()
    train(tiny("eval.every=0", name="run"))
    assert_same_run(tmp_path / "straight", tmp_path / "run")
