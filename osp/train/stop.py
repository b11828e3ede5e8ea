"""Signals that ask a run to stop: heard here, obeyed by the trainer when all ranks have agreed."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# One wish to stop reaches a rank several times: from the terminal or the scheduler and again from the launcher, which
# passes it on within this many seconds.
SECONDS_OF_ONE_REQUEST = 1.0


class StopRequest:
    """Whether this rank was asked to stop, and by which signal.

    The first SIGTERM, SIGINT or SIGUSR1 is noted; a further one ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: str | None = None  # "SIGTERM", ...; None: go on
        self._first = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Catch the signals inside this context. Only the main thread of a process can; elsewhere nothing is caught."""
        try:
            before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first > SECONDS_OF_ONE_REQUEST:
            os._exit(128 + number)
