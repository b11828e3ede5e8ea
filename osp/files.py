"""Files that must survive a crash, locks on folders, and the lines of a run folder."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from osp.errors import UserError

log = logging.getLogger(__name__)

LOCK_NAME = "lock"


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Put `data` at `path` so that a reader, or a crash, sees all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, creating the folder; waits while another process prepares it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot write to {folder}: {error.strerror}") from error
        try:
            file = (folder / LOCK_NAME).open("w")
        except FileNotFoundError:  # the holder before us gave up and removed the folder between the two lines
            continue
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot write to {folder}: {error.strerror}") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK_NAME))
            except FileNotFoundError:
                current = False
            if current:  # else the holder before us removed the folder while we waited
                yield
                return


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`."""
    try:
        with (folder / LOCK_NAME).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is named `out` if the context ends well, and is gone if not.

    Raises `UserError` if `out` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"out={out} exists; name a folder that does not")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"out={out}: cannot write there: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file at once, flushed to disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Have the names in `folder` on disk."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of `metrics.jsonl` and its like, all with their step; a line cut short by a crash is left out."""
    objects = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [entry for entry in objects if isinstance(entry, dict) and isinstance(entry.get("step"), int)]


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of `path` after `step`, and incomplete ones: a run resumed at `step` writes them again."""
    if path.exists():
        lines = [json.dumps(entry) + "\n" for entry in read_lines(path) if entry["step"] <= step]
        write_text(path, "".join(lines))


class LineWriter:
    """Appends JSON objects to a file, one per line, unbuffered. A full disk is reported once and loses lines."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._whole = True  # the last line was written completely
        self._reported = False

    def write(self, values: dict[str, Any]) -> None:
        line = ("" if self._whole else "\n") + json.dumps(values) + "\n"
        try:
            self._whole = self._file.write(line.encode()) == len(line.encode())
        except OSError as error:
            self._whole = False
            if not self._reported:
                log.warning("%s: %s; lines are lost until there is room again", self._path, error.strerror)
            self._reported = True

    def close(self) -> None:
        self._file.close()
