"""The end of a process: the right exit status, no thread of ours left, and no abort by a thread of torch."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entry
import pytest

from osp.config import Config, from_dict
from osp.distributed import Peers
from osp.errors import LostRankError, RunError, UserError
from osp.train.setup import train
from osp.train.trainer import Trainer
from tests.conftest import ROOT

Tiny = Callable[..., Config]

# In each child a thread keeps returning from C++, as threads of gloo do after the last collective. If the interpreter
# is finalized by then, the process dies of SIGABRT.
PROGRAM = """
import atexit, importlib.util, os, signal, sys, threading
import torch
import entry
from osp.errors import RunError, StoppedError, UserError

def busy():
    torch.set_num_threads(1)
    matrix = torch.ones(200, 200)
    while True:
        matrix @ matrix

def main(values):
    atexit.register(print, "closed")
    threading.Thread(target=busy, daemon=True).start()
    evaluate = importlib.util.find_spec("evaluate")
    assert evaluate is None or evaluate.origin != os.path.join(entry.SCRIPTS, "evaluate.py")
    print("done")
    if values["outcome"] is not None:
        raise values["outcome"]

entry._compose = lambda *_: [{"outcome": outcome}]
outcomes = [None, UserError("no"), RunError("no"), StoppedError("no", signal="SIGTERM")]
outcomes += [KeyboardInterrupt(), KeyError("no")]
for outcome in outcomes:
    child = os.fork()
    if not child:
        sys.argv[1:] = []
        entry.launch(main)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_main_sees_the_command_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate records the command: the argument that Hydra does not parse is a part of it."""
    typed = ["generate.py", "runs/a", "seed=3"]
    monkeypatch.setattr(sys, "argv", typed.copy())
    seen: list[Any] = []
    entry.run(
        lambda values: seen.append((values["path"], values["seed"], sys.argv.copy())),
        "generate",
        defaults={"path": None, "seed": 0},
        positional="path",
    )
    assert seen == [("runs/a", 3, typed)]


def test_process_ends_with_its_status_while_threads_are_in_c(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=240)
    statuses = [line for line in done.stdout.split("\n") if line.startswith("status")]
    assert statuses == [f"status {code}" for code in (0, 2, 1, 128 + 15, 128 + 2, 1)], done.stderr
    assert done.stdout.count("done\nclosed\n") == len(statuses)  # buffers are written, exit functions have run
    assert done.stderr.count("Traceback") == 1  # of the KeyError
    assert "terminate called" not in done.stderr


def composed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    """Return the configuration that scripts/train.py takes from a command line."""
    seen: list[Config] = []
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    entry.run(lambda values: seen.append(from_dict(values)))
    return seen[0]


@pytest.mark.parametrize("name", ["12345", "4e12345", "1e5", "1_0", "007", "true", "null", "inf", "a=b", "-3", "x~"])
def test_text_is_taken_as_it_was_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For instance the number of a job or the hash of a commit."""
    config = composed(monkeypatch, f"run.name={name}", f"data.text_field={name}", "train.steps=5e1")
    assert (config.run.name, config.run.dir, config.data.text_field) == (name, f"runs/{name}", name)
    assert config.train.steps == 50


def test_text_is_shown_as_it_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """scripts/slurm.sh asks for the run folder in this way."""
    arguments = ["run.name=4e12345", "--cfg", "job", "--resolve", "--package", "run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    entry.run(lambda _: pytest.fail("training began"))
    assert capsys.readouterr().out == "# @package run\nname: '4e12345'\ndir: runs/4e12345\n"


def test_alert_for_another_statistic_needs_no_plus(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = composed(monkeypatch, "monitor.alerts.rms.all.above=3", "~monitor.alerts.kurtosis").monitor.alerts
    assert rules["rms"]["all"].above == 3
    assert "kurtosis" not in rules


def test_paths_may_begin_with_a_tilde_and_hold_equals_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    arguments = ("run.dir=~/runs/${run.name}", "data.paths=[~/a,date=2024-01-01/b,2024,c d]", "resume=~/x")
    config = composed(monkeypatch, *arguments, 'data.cache_dir="~"')
    assert config.run.dir == "/home/me/runs/osp_nano"
    assert config.data.paths == ("/home/me/a", "date=2024-01-01/b", "2024", "c d")
    assert (config.resume, config.data.cache_dir) == ("/home/me/x", "/home/me")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "abc"}, "RANK='abc': must be a number; start with torchrun or deepspeed, or unset RANK"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': must be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2; start with torchrun or deepspeed"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without MASTER_ADDR; start with torchrun or deepspeed"),
        ({"MASTER_PORT": "99999999"}, "MASTER_PORT=99999999: a port is at most 65535"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc': must be a number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='': must be a number"),
    ],
)
def test_odd_variable_of_a_launcher(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        composed(monkeypatch)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_host_of_rank_0_must_have_a_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(entry, "SECONDS_TO_RESOLVE", 0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "MASTER_ADDR": "a..b"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        composed(monkeypatch)
    assert capsys.readouterr().err.startswith("error: MASTER_ADDR=a..b: the host of rank 0 has no such name: ")


@pytest.mark.parametrize("variables", [{"RANK": "3"}, {"WORLD_SIZE": "8", "LOCAL_RANK": "1"}])
def test_lone_variable_of_a_launcher_is_ignored(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in entry.LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    composed(monkeypatch)
    assert not set(entry.LAUNCHER_VARIABLES) & os.environ.keys()
    assert caplog.messages == [f"{next(iter(variables))} is set although no launcher runs: this process trains alone"]


# Ranks 0 and 1, children of this process as of a launcher. Rank 0 is slow, and reports last or not at all.
RANKS = """
import os, signal, sys, time
import entry
from osp.errors import UserError

def main(values):
    if os.environ["RANK"] == "0":
        time.sleep(60) if "blocked" in sys.argv else time.sleep(0.5)
    raise UserError(f"rank {os.environ['RANK']}")

entry.SECONDS_FOR_RANK_0 = 2 if "blocked" in sys.argv else 200
entry._compose = lambda *_: [{}]
entry.launch(main)
"""


@pytest.mark.parametrize(("case", "expected"), [("", ["error: rank 0\n", ""]), ("blocked", ["", "error: rank 1\n"])])
def test_one_rank_reports_the_error_of_all(case: str, expected: list[str]) -> None:
    """The other rank leaves after rank 0, unless rank 0 does not see the error."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, case],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2"}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert ranks[1].communicate(timeout=60)[1] == expected[1]
    if case == "blocked":
        ranks[0].kill()
    else:
        assert ranks[0].poll() == 2
    assert ranks[0].communicate()[1] == expected[0]
    assert ranks[1].returncode == 2


def ours() -> set[str]:
    """Return the threads of a run that are alive."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("osp-")}


class TwoRanks(Peers):
    """Watches although there is one rank."""

    def __init__(self) -> None:
        super().__init__()
        self._all *= 2
        self._thread.start()


@pytest.mark.parametrize("error", [None, RunError("the disk is full")])
def test_no_thread_of_a_run_outlives_it(error: Exception | None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def conclude(self: Trainer, first: int) -> None:
        during.update(ours())
        if error:
            raise error

    during: set[str] = set()
    monkeypatch.setattr("osp.data.loader.CLOSE_SECONDS", 200)  # a slow read is waited for
    monkeypatch.setattr("osp.train.setup.Peers", TwoRanks)
    monkeypatch.setattr(Trainer, "_conclude", conclude)
    config = tiny("train.steps=2", "eval.every=0")
    if error:
        with pytest.raises(RunError):
            train(config)
    else:
        train(config)
    assert during == {"osp-loader_0", "osp-peers", "osp-save_0"}
    assert not ours()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no text"), "no text"),
        (
            RuntimeError("[gloo] Connection closed by peer"),
            "before the first step: the connection to another rank broke",
        ),
    ],
)
def test_ranks_are_watched_while_the_text_is_prepared(
    error: Exception, message: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    during: set[str] = set()

    def fail(*_: Any, **__: Any) -> Path:
        during.update(ours())
        raise error

    monkeypatch.setattr("osp.train.setup.Peers", TwoRanks)
    monkeypatch.setattr("osp.train.setup.start_preparing", fail)
    with pytest.raises(LostRankError if isinstance(error, RuntimeError) else UserError, match=message):
        train(tiny())
    assert during == {"osp-peers"}
    assert not ours()
