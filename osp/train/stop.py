"""Signals that ask a run to stop: received on one rank, obeyed once all ranks know of it."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from osp.distributed import add_up, gather_objects, num_ranks
from osp.errors import StoppedError
from osp.process import LAUNCHER, STOP_SIGNALS

# The launcher passes the signal of a terminal or scheduler on, so one request may arrive twice within this time.
SECONDS_OF_ONE_REQUEST = 1.0


class StopRequest:
    """Whether this rank was asked to stop, by the first of `STOP_SIGNALS`; a later one ends the process at once."""

    def __init__(self) -> None:
        self.signal: str | None = None  # "SIGTERM", ...; None: no request
        self._reason = ""  # of the signal, if known
        self._first = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Catch the signals inside this context, SIGHUP not under `nohup`. Only the main thread can catch them."""
        numbers = set(STOP_SIGNALS)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        try:
            before = {number: signal.signal(number, self._receive) for number in numbers}
        except ValueError:  # another thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def error(self, step: int, total_steps: int) -> StoppedError:
        """Return the error that ends a run after `step` and names the first rank that was asked. Collective."""
        asked = gather_objects((self.signal, self._reason))
        name, reason, rank = next((name, reason, rank) for rank, (name, reason) in enumerate(asked) if name)
        end = f"stopped after step {step} of {total_steps} with a checkpoint; the same command continues it"
        return StoppedError(f"{name} on rank {rank}{reason}: {end}", signal=name)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._first = signal.Signals(number).name, time.monotonic()
            self._reason = ", whose launcher has ended" if LAUNCHER.gone else ""
        elif number == signal.SIGXCPU or LAUNCHER.gone:  # repeated every second; or sent by `LAUNCHER`
            return
        elif time.monotonic() - self._first > SECONDS_OF_ONE_REQUEST:
            os._exit(128 + number)


def count_flags(*flags: bool) -> list[int]:
    """Return on how many ranks each flag is set, so that all ranks act alike. Collective, and waits for no GPU."""
    return list(map(int, flags)) if num_ranks() == 1 else add_up(torch.tensor(flags, dtype=torch.int32)).tolist()
