"""Malformed inputs of every kind end well or in one line, in bounded time and memory, and run no code.

`python benchmarks/faults.py --fuzz 5000` runs more of them.
"""

import html
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from osp.errors import UserError
from tests import fuzzing
from tests.fuzz_inputs import Payloads, change_tree, dump_json, places
from tests.fuzzing import KINDS, Healthy, Input, Worker, check_page, run_all

SEED = 0
INPUTS = {  # slower kinds get fewer
    "configuration": 60,
    "corpus": 50,
    "tokenizer": 50,
    "shards": 80,
    "checkpoint": 60,
    "model folder": 60,
    "run folder": 40,
    "task": 60,
}


def test_malformed_inputs_end_well_or_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run_all(tmp_path_factory.mktemp("fuzz") / "work", counts=INPUTS, seed=SEED)
    with capsys.disabled():
        print(f"\n{figures.table()}")
    assert figures.failures == [], figures.table()
    assert figures.inputs == sum(INPUTS.values()) == 460
    assert set(figures.outcomes) == set(KINDS) == set(INPUTS)
    assert figures.count("accepted") > 40  # what is refused at the first byte tests little
    assert figures.count("refused") > 200


# ---- the harness notices what it looks for ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = tmp_path_factory.mktemp("worker").resolve()
    return Worker(Healthy(folder / "healthy"), folder, seed=0)


def read_secret(it: Input) -> None:
    it.payloads.secret.read_text()


def write_outside(it: Input) -> None:
    (it.healthy.folder.parents[1] / "outside").write_text("x")


def unpickle(it: Input) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {it.payloads.canary}",)

    pickle.loads(pickle.dumps(Runs()))


def import_from_here(it: Input) -> None:
    (it.folder / "tqdm_of_the_folder.py").write_text(f"open({str(it.payloads.canary)!r}, 'w')\n")
    subprocess.run(["git"], capture_output=True)  # git is asked for the commit of a run
    exec(compile((it.folder / "tqdm_of_the_folder.py").read_text(), "here", "exec"))


def print_escape(_: Input) -> None:
    print("the text begins with \x1b]0;title\x07")


def two_lines(_: Input) -> None:
    raise UserError("")


def exhaust(_: Input) -> None:
    raise MemoryError


def hang(_: Input) -> None:
    raise fuzzing.HangError


def fail(_: Input) -> None:
    raise KeyError("x")


CAUGHT = {
    "path": (read_secret, write_outside),
    "code": (unpickle, import_from_here),
    "escape": (print_escape,),
    "memory": (exhaust,),
    "hang": (hang,),
    "traceback": (fail, two_lines),
    "accepted": (lambda _: None,),
}
CASES = [(outcome, function) for outcome, functions in CAUGHT.items() for function in functions]


@pytest.mark.parametrize(("outcome", "function"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_worker_names_what_an_input_did(
    outcome: str, function: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "made up", function)
    assert worker.run("made up", 0)[0] == outcome


def test_worker_that_dies_is_a_failure_of_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(
        "import json, os, sys\n"
        "for _, number in json.loads(sys.argv[-1]):\n"
        "    print(json.dumps({'kind': 'task', 'number': number}), flush=True)\n"
        "    if number == 2: os.abort()\n"
        "    print(json.dumps({'kind': 'task', 'number': number, 'outcome': 'refused', 'line': ''}), flush=True)\n"
    )
    monkeypatch.setattr(fuzzing, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    figures = run_all(tmp_path / "work", counts={"task": 5}, seed=3)
    assert (figures.inputs, figures.count("refused")) == (5, 4)
    assert [(f["number"], f["outcome"], f["seed"]) for f in figures.failures] == [(2, "killed", 3)]
    assert "killed: task 2 (seed 3): status -6" in figures.table()


def test_inputs_depend_on_the_seed_alone(tmp_path: Path) -> None:
    payloads = Payloads(tmp_path / "canary", tmp_path / "secret")
    tree = {"a": {"b": [1, 2, {"c": "d"}], "e": None}, "f": 0.5}

    def drawn(seed: int) -> list[str]:
        draw = random.Random(seed)
        return [dump_json(change_tree({"a": {"b": [1, 2, {"c": "d"}], "e": None}}, draw, payloads)) for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 15
    assert places(tree) == [
        ("a",), ("a", "b"), ("a", "b", 0), ("a", "b", 1), ("a", "b", 2), ("a", "b", 2, "c"), ("a", "e"), ("f",),
    ]  # fmt: skip


def test_page_with_foreign_elements_is_noticed() -> None:
    scripts = "<script></script>" * 3
    check_page(scripts + html.escape("<img src=x onerror=alert(1)>"))
    for foreign in ("<img src=x>", "<p onclick=x>", "<script>", "<svg/onload=alert(1)>"):
        with pytest.raises(AssertionError):
            check_page(scripts + foreign)
