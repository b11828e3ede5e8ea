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

from osp.config import Config
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
