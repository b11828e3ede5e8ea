"""The errors that an entry point turns into one line."""


class UserError(ValueError):
    """A mistake the user can mend. Entry points print it as one line and exit with status 2."""


class RunError(RuntimeError):
    """Why a run cannot go on although its configuration is right. One line, exit status 1."""


class LostRankError(RunError):
    """Another rank has died. Every rank that is left says so: which of them the user reads is not known."""


class StoppedError(RunError):
    """The run was asked to stop and has saved its state; the same command continues it. `signal` names who asked."""

    def __init__(self, message: str, *, signal: str):
        super().__init__(message)
        self.signal = signal
