"""The page on errors quotes the program: commands are run and must print what the page says, other messages are looked
up in the source."""

import ast
import fcntl
import functools
import gzip
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import entry
import pytest
import torch
import wandb
import yaml

from osp.config import from_dict, to_dict
from osp.data.prepare import prepare
from osp.train.resolve import resolve
from osp.train.setup import train
from osp.train.trainer import Trainer
from tests.conftest import ROOT, run_in_process

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
BLOCKS = [" ".join(block.split("\n")) for block in re.findall(r"^```text\n(.*?)\n```$", PAGE, flags=re.M | re.S)]
COMMAND = re.compile(r"\$ python scripts/(\w+)\.py (.*?) (error: .*)")
PROVOKED = [match.groups() for block in BLOCKS if (match := COMMAND.fullmatch(block))]
QUOTED = [block for block in BLOCKS if not block.startswith("$ ")]
# messages of other programs, which are not in the source
FOREIGN = {
    "ModuleNotFoundError: No module named 'hydra'": "Python",
    "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in": "PyTorch",
    "torch.distributed.DistNetworkError: The server socket has failed to listen": "PyTorch",
    "torch.OutOfMemoryError: CUDA out of memory.": "PyTorch",
    "RuntimeError: [enforce fail at": "gloo",
    "scripts/train.py FAILED": "torchrun",
}


# --- messages of commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with the corpora and runs that the commands of the page name."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("osp", "bhyt", "layernorm"):
        run, norm = {"name": name, "dir": str(folder / "runs" / name)}, {"name": "ssnorm" if name == "osp" else name}
        train(from_dict({**tiny_values, "run": run, "norm": norm, "eval": {"every": 0, "sample_tokens": 0}}))
    (folder / "runs" / "first").mkdir()
    given = from_dict(entry.compose(["run.name=first", "logger.wandb=disabled"]))
    first = to_dict(resolve(given, device=torch.device("cpu"), world_size=1).config)
    (folder / "runs" / "first" / "config.yaml").write_text(yaml.safe_dump(first), encoding="utf-8")
    (folder / "runs" / "busy").mkdir()
    (folder / "photos").mkdir()
    (folder / "photos" / "song.mp3").write_bytes(b"ID3")
    (folder / "posts.jsonl").write_text('{"body": "text"}\n')
    (folder / "latin.txt").write_bytes(b"one\ncaf\xe9 au lait")
    records = b"".join(b'{"text": "the word number %d"}\n' % i for i in range(5000))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(records, mtime=0)[:-200])
    (folder / "book.txt").write_text("one long document " * 200)
    (folder / "empty.txt").write_text("")
    (folder / "own.json").write_text("{}")
    with (folder / "runs" / "busy" / ".lock").open("w") as lock:
        lock.write("node7-3468")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture
def error_of(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, list[str]], str]:
    """Return the error line of a script, which runs in this process and must refuse before any work."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("osp.train.setup.start_preparing", prepare)  # in this process: a child takes seconds to import
    monkeypatch.setattr(Trainer, "fit", lambda _: pytest.fail("training began"))
    monkeypatch.setattr(wandb, "login", lambda **_: False)

    def run(script: str, arguments: list[str]) -> str:
        if script == "train" and not any(argument.startswith("logger.wandb=") for argument in arguments):
            arguments = [*arguments, "logger.wandb=disabled"]
        with pytest.raises(SystemExit) as stop:
            run_in_process(monkeypatch, script, *arguments)
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error:")]
        return line

    return run


@pytest.mark.parametrize(("script", "arguments", "message"), PROVOKED)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one command wants a machine without a GPU")
def test_command_prints_the_message_of_the_page(
    script: str, arguments: str, message: str, error_of: Callable[[str, list[str]], str]
) -> None:
    assert " ".join(error_of(script, shlex.split(arguments)).split()) == message


# --- messages in the source ---------------------------------------------------------------------------------------


@functools.cache
def texts() -> list[str]:
    """Return the texts of the source between the fields of f-strings and of log messages, with two words or more."""
    found = set()
    for path in [*(ROOT / "osp").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 300:
                found |= {" ".join(part.split()) for part in re.split(r"%[sd]|\n", node.value)}
    return sorted(text for text in found if re.search(r"[a-z]+\W+[a-z]+", text))


def covered(message: str) -> set[int]:
    """Return the places of a message that a text of the source covers."""
    starts = [(match.start(), text) for text in texts() for match in re.finditer(re.escape(text), message)]
    return {place for start, text in starts for place in range(start, start + len(text))}


@pytest.mark.parametrize("message", [block for block in QUOTED if not block.startswith(tuple(FOREIGN))])
def test_message_of_the_page_is_in_the_source(message: str) -> None:
    """The texts of the source cover at least a third of the message; the rest is values."""
    if message.startswith("error: Python "):
        assert all(part in (ROOT / "Makefile").read_text() for part in message.split("3.9.18")[1:])
        return
    places = covered(message)
    missing = "".join("_" if place in places else letter for place, letter in enumerate(message))
    assert len(places) > 0.33 * len(message), missing


def test_message_that_is_not_in_the_source_is_noticed() -> None:
    message = "error: the checkpoint is of another planet; choose another planet"
    assert len(covered(message)) < 0.33 * len(message)


def test_page_is_read_whole() -> None:
    assert len(BLOCKS) == PAGE.count("```") / 2
    assert len(PROVOKED) + len(QUOTED) == len(BLOCKS)
    assert len(PROVOKED) > 30
    assert all(any(block.startswith(words) for block in BLOCKS) for words in FOREIGN)


def test_every_section_is_found_by_the_words_of_its_message() -> None:
    """Each heading shares a word of four letters with its message, so that a search for the message finds it."""
    for heading, text in re.findall(r"^### (.*)\n(.*?)(?=^##|\Z)", PAGE, flags=re.M | re.S):
        if blocks := re.findall(r"^```text\n(.*?)\n```$", text, flags=re.M | re.S):
            words = set(re.findall(r"[\w.]{4,}", heading.lower()))
            assert words & set(re.findall(r"[\w.]{4,}", " ".join(blocks).lower())), heading
