"""Files that must survive a crash, JSON and text from outside, locks on folders, and the lines of a run folder."""

import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from osp.errors import UserError, as_user_error

log = logging.getLogger(__name__)

LOCK_NAME = "lock"
MOST_DIGITS = 4300  # of an integer that Python converts without being told to

# C0 without tab and line feed, DEL and C1: what a terminal may obey. The bidirectional controls reorder a line.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return `text` with control characters as escapes such as ``\\x1b``, so that a terminal shows and obeys nothing.

    Tabs and line feeds stay. Halves of surrogate pairs, as in names of files that are not UTF-8, are escaped as well.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def parse_json(text: str | bytes) -> Any:
    """Return the JSON value in `text`, integers of too many digits as floats; `ValueError` for what cannot be read."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= MOST_DIGITS else float(digits))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from error


def not_a_file(path: Path) -> bool:
    """Return whether `path` is there but no file: a folder, or a pipe or device, which would be read without end."""
    return path.exists() and not path.is_file()


def _read(path: Path, name: str) -> bytes:
    """Return the content of a file. Raises `UserError` with `name` if that is not possible."""
    if not_a_file(path):
        raise UserError(f"{name} is not a file")
    if not path.exists():
        raise UserError(f"{name} does not exist")
    with as_user_error(f"cannot read {name}: ", OSError):
        return path.read_bytes()


def read_utf8(path: Path, *, name: str) -> str:
    """Return the text of a file that the user names. Raises `UserError` with `name` if that is not possible."""
    with as_user_error(f"cannot read {name}: ", UnicodeDecodeError):
        return _read(path, name).decode()


def read_json(path: Path) -> Any:
    """Return the JSON value in a file. Raises `UserError` with the path if the file cannot be read or is not JSON."""
    data = _read(path, str(path))
    try:
        value = parse_json(data)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can spell halves of surrogate pairs, which nothing prints
    except (ValueError, RecursionError) as error:
        reason = "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else error
        raise UserError(f"{path}: malformed JSON ({reason})") from error
    return value


def read_record(path: Path) -> Any | None:
    """Return the JSON value in a file that describes a run; None if it is missing or damaged, as by a power failure."""
    if not path.exists():
        return None
    try:
        return read_json(path)
    except UserError as error:
        log.warning("%s; it is ignored", error)
        return None


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replace a file and flush it to disk, so that a reader, or a crash, sees all of `data` or none of it.

    Never writes through a link: one at `path` is replaced, one at the place of the temporary file is removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_record(path: Path, value: Any) -> None:
    """Write JSON for `read_record`; a run can do without the file, so that it is a warning if that is impossible."""
    try:
        write_text(path, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        log.warning("%s: not written: %s", path, error.strerror)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Do what `write_bytes` does; raise `UserError` where the file cannot be written."""
    with as_user_error(f"cannot write {path}: ", OSError):
        write_bytes(path, data)


def write_out(path: Path, text: str) -> None:
    """Write the file, device or pipe that the key `out` names, and its folder; `UserError` where that is impossible."""
    with as_user_error(f"out={path}: cannot write there: ", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb", buffering=0) as file:
                file.write(text.encode())
        else:
            write_text(path, text)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, creating the folder; waits while another process prepares it."""
    while True:
        with as_user_error(f"data.cache_dir: cannot write to {folder}: ", OSError):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                file = os.fdopen(os.open(folder / LOCK_NAME, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
            except FileNotFoundError:  # the holder before us gave up and removed the folder in between
                continue
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
def new_folder(out: Path, *, files: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder, renamed to `out` on success and removed otherwise. `out` must not exist.

    A temporary folder of `out` whose process was killed on this host is removed.
    files: names of files in the folder that are moved beside each other instead, in this order; the last is `out`.
    """
    targets = [out.with_name(name) for name in files] or [out]
    for target in reversed(targets):
        if target.exists() or target.is_symlink():
            fix = "name a file that does not, with no certificate beside it" if files else "name a folder that does not"
            raise UserError(f"out={target} exists; {fix}")
    here = f".{out.name}.{socket.gethostname()}-"
    temporary = out.with_name(f"{here}{os.getpid()}.tmp")
    with as_user_error(f"out={out}: cannot write there: ", OSError), ExitStack() as cleanup:
        for former in out.parent.glob(f"{glob.escape(here)}*.tmp"):
            pid = former.stem.rpartition("-")[2]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(former, ignore_errors=True)
        temporary.mkdir(parents=True)
        cleanup.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary
        with ExitStack() as undo:
            for target in targets:
                (temporary / target.name if files else temporary).rename(target)
                undo.callback(target.unlink, missing_ok=True)
            undo.pop_all()


def flush(path: Path) -> None:
    """Flush a file to disk, or the entries of a folder: new names survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the entries of `metrics.jsonl` or another file of lines with a step, without incomplete lines."""
    return list(iterate_lines(path, []))


def iterate_lines(path: Path, broken: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what `read_lines` returns, one entry at a time, and append the numbers of the other lines to `broken`."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = parse_json(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict) and type(entry.get("step")) is int and 0 <= entry["step"] < 2**53:
                yield entry
            elif line.endswith("\n"):  # else it is being written
                broken.append(number)


def drop_after(path: Path, step: int) -> None:
    """Remove incomplete lines and the lines after `step`: a run that resumes at `step` writes them again."""
    if path.is_file():
        kept = "".join(json.dumps(entry) + "\n" for entry in read_lines(path) if entry["step"] <= step).encode()
        if kept != path.read_bytes():
            write_bytes(path, kept)


class LineWriter:
    """Append JSON objects to a file, one per line, unbuffered. A full disk is reported once and loses lines."""

    def __init__(self, path: Path):
        self._path = path
        if path.is_dir():
            log.warning("%s is a folder; its lines are lost", path)
        self._file = (Path(os.devnull) if path.is_dir() else path).open("ab", buffering=0)
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
