"""Files that must survive a crash, locks on folders, and the lines of a run folder."""

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


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replace a file and flush it to disk, so that a reader, or a crash, sees all of `data` or none of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Do what `write_bytes` does; raise `UserError` where the file cannot be written."""
    try:
        write_bytes(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_out(path: Path, text: str) -> None:
    """Write the file that the key `out` names, and its folder; raise `UserError` where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"out={path}: cannot write there: {error.strerror}") from error


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
    """Return whether a process holds the lock of `folder`."""
    try:
        with (folder / LOCK_NAME).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, renamed to `out` on success and removed otherwise. `out` must not exist."""
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


def flush_folder(folder: Path) -> None:
    """Flush the entries of `folder` to disk: new names survive a crash."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the entries of `metrics.jsonl` or another file of lines with a step, without incomplete lines."""
    return list(iterate_lines(path, []))


def iterate_lines(path: Path, broken: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what `read_lines` returns, one entry at a time, and append the numbers of the other lines to `broken`."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry
            elif line.endswith("\n"):  # else it is being written
                broken.append(number)


def drop_after(path: Path, step: int) -> None:
    """Remove incomplete lines and the lines after `step`: a run that resumes at `step` writes them again."""
    if path.exists():
        lines = [json.dumps(entry) + "\n" for entry in read_lines(path) if entry["step"] <= step]
        write_text(path, "".join(lines))


class LineWriter:
    """Append JSON objects to a file, one per line, unbuffered. A full disk is reported once and loses lines."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._whole = True  # the last line was written completely
        self._reported = False

    def write(self, values: dict[str, Any]) -> None:
        line = (("" if self._whole else "\n") + json.dumps(values) + "\n").encode()
        try:
            self._whole = self._file.write(line) == len(line)
        except OSError as error:
            self._whole = False
            if not self._reported:
                log.warning("%s: %s; lines are lost until there is room again", self._path, error.strerror)
            self._reported = True

    def close(self) -> None:
        self._file.close()
