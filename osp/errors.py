"""Errors that entry points print as one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake that the user can correct. Entry points exit with status 2."""


@contextmanager
def as_user_error(before: str, *kinds: type[BaseException], after: str = "") -> Iterator[None]:
    """Turn errors of these kinds inside the context into a `UserError`: the reason, between `before` and `after`."""
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{before}{reason}{after}") from error


class NotTextError(UserError):
    """A value that is not text, for a key that takes text only. key: its dotted name, without the index in a list."""

    def __init__(self, message: str, key: str):
        super().__init__(message)
        self.key = key


class RunError(RuntimeError):
    """A valid run that cannot continue. Entry points exit with status 1."""


class LostRankError(RunError):
    """Another rank has died. Every remaining rank prints it, because any of them may be the one on the console."""


class StoppedError(RunError):
    """A signal stopped the run after it saved its state. The same command continues it."""

    def __init__(self, message: str, *, signal: str):
        super().__init__(message)
        self.signal = signal
