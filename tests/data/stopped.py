"""Preparation that stops at a chosen step, so that no test depends on the speed of the machine."""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from osp.data.prepare import BATCH_DOCUMENTS
from osp.data.sources import SOURCES, TextFiles

Moment = Literal["torn", "written", "renamed"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
WAIT = "wait for the file "


def becomes_true(condition: Callable[[], bool], *, seconds: float = 200) -> bool:
    """Wait for `condition`, which becomes true on any machine; return whether it was true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def die_in_write(number: int, moment: Moment) -> None:
    """Let SIGKILL end this process in write number `number`: in the middle, before the rename or after it."""
    replace, calls = os.replace, itertools.count(1)

    def deadly(source: Any, target: Any, **options: Any) -> None:
        if next(calls) < number:
            return replace(source, target, **options)
        if moment == "torn":
            os.truncate(source, os.path.getsize(source) // 2)
        elif moment == "renamed":
            replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly


class WaitingFiles(TextFiles):
    """Text files with documents that are no text: at `WAIT` + path the source waits until that file exists."""

    def documents(self) -> Iterator[str]:
        for text in super().documents():
            if text.startswith(WAIT):
                while not Path(text.removeprefix(WAIT)).exists():
                    time.sleep(0.01)
            else:
                yield text


def register_waiting_files() -> None:
    """Let `data.source=text` wait, also in the child process of `start_preparing`."""
    SOURCES["text"] = WaitingFiles


def waiting_corpus(path: Path, texts: list[str], *, gates: list[Path], num_workers: int = 1) -> None:
    """Write a corpus whose preparation waits for each of `gates`, and seals one more shard of 16,001 tokens before.

    Preparation reads two batches per thread ahead of the one that it writes.
    """
    texts = [text[:150] for text in texts]
    with path.open("w") as file:
        for part, gate in enumerate([*gates, None]):
            num_batches = 2 * num_workers if part == 0 else 1
            for number in range(num_batches * BATCH_DOCUMENTS):
                text = f"# {part} {number}\n{texts[number % len(texts)]}"
                file.write(json.dumps({"text": text}) + "\n")
            if gate:
                file.write(json.dumps({"text": f"{WAIT}{gate}"}) + "\n")
