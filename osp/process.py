"""This process: a console that may fail, signals that ask it to stop, and the launcher that started it."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from typing import Any

import psutil

from osp.files import printable

# What a launcher, a terminal or a scheduler sends to end a job: by request, on a lost connection, before a limit
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
POLL_SECONDS = 0.5


class _Console(io.FileIO):
    """Standard output or error. A failed write of anything but a result loses text and raises nothing."""

    def __init__(self, descriptor: int, *, is_result: bool):
        super().__init__(descriptor, "wb", closefd=False)
        self._is_result, self._failed = is_result, False

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)
        except OSError as error:  # the disk is full, or the terminal or the reader of the pipe is gone
            if not self._is_result:
                return len(data)
            if not isinstance(error, BrokenPipeError) and not self._failed:  # `head` causes the former
                print(f"error: cannot write to standard output: {error.strerror}", file=sys.stderr)
            self._failed = True
            sys.exit(1)


class _Printable(io.TextIOWrapper):
    """A stream for people: it shows the control characters of foreign text, which a terminal would obey."""

    def write(self, text: str, /) -> int:
        super().write(printable(text))
        return len(text)


def protect_console(*, result: bool = False, exact: bool = False) -> None:
    """Let no failed write to standard output and error end this process, but for a `result` on standard output.

    Standard output shows the control characters of foreign text; an `exact` text in a file or pipe keeps them. A closed
    descriptor is opened on /dev/null: the next file would get its number, and the messages of C++ libraries.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, f"__{name}__")
        with contextlib.suppress(OSError, AttributeError):
            before.flush()
        buffer = io.BufferedWriter(_Console(descriptor, is_result=result and name == "stdout"))
        encoding, by_line = (before.encoding, before.line_buffering) if before else ("utf-8", True)
        plain = name == "stderr" or (exact and not buffer.isatty())  # a progress bar moves the cursor
        wrapper = io.TextIOWrapper if plain else _Printable
        setattr(sys, name, wrapper(buffer, encoding, "backslashreplace", line_buffering=by_line))


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Launcher:
    """The torchrun or deepspeed that started this rank, if one did.

    Another parent, for instance a shell or the daemon of a scheduler, may end before this process and means nothing.
    """

    def __init__(self) -> None:
        self._processes: list[psutil.Process] = []
        if "RANK" in os.environ and ("TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ):
            with contextlib.suppress(psutil.Error):  # /proc may show no parent, for instance in a container
                self._processes.append(psutil.Process(os.getppid()))
                above = self._processes[0].parent()  # deepspeed starts its ranks through a process in between
                if above and "deepspeed" in " ".join(above.cmdline()[:2]):
                    self._processes.append(above)

    @property
    def gone(self) -> bool:
        """Whether one of the processes between this rank and the user's command has ended."""
        return any(has_ended(process) for process in self._processes)

    def watch(self) -> None:
        """Send SIGTERM to this process once the launcher is gone, because nothing else would end it."""
        if self._processes:
            threading.Thread(target=self._wait_for_end, daemon=True, name="launcher").start()

    def _wait_for_end(self) -> None:
        while not self.gone:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)


LAUNCHER = Launcher()
