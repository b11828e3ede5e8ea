"""Run scripts of the project in child processes, started as a user starts them."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen

import yaml

from osp.config import Config, to_dict
from osp.errors import RunError, UserError
from osp.files import write_text

SECONDS_TO_END = 60.0  # for a child that is asked to end

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # with these variables a child would be a rank
_QUIET = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
_HYDRA = {
    "defaults": ["defaults", "_self_", *_QUIET],
    "hydra": {"output_subdir": None, "run": {"dir": "."}, "job": {"chdir": False}},
}


def training_command(config: Config, *, script: Path, ranks: int, path: Path) -> list[str]:
    """Return the command by which `script`, scripts/train.py, trains exactly `config`, written to the YAML `path`."""
    write_text(path, yaml.safe_dump(_HYDRA | to_dict(config), sort_keys=False))
    torchrun = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    launcher = [*torchrun, str(ranks)] if ranks > 1 else []
    place = ["--config-path", str(path.parent.resolve()), "--config-name", path.stem]
    return [sys.executable, *launcher, str(script), *place]


class Process(Popen[bytes]):
    """A child process that writes its output to the file `output`; after SIGTERM a training saves its state and ends.

    It does not receive signals of the terminal: Ctrl-C reaches this process, which calls `stop`.
    """

    def __init__(self, command: Sequence[str], output: Path, *, environment: Mapping[str, str] | None = None):
        self.output = output
        env = {key: value for key, value in os.environ.items() if key not in _LAUNCHED} | dict(environment or {})
        output.unlink(missing_ok=True)
        with output.open("x", encoding="utf-8") as file:
            super().__init__(command, stdin=DEVNULL, stdout=file, stderr=file, env=env, start_new_session=True)

    def stop(self) -> None:
        """End the process if it runs, and wait for it."""
        self.terminate()
        self.wait(SECONDS_TO_END)


def failure(output: Path, status: int, *, hint: str = "") -> UserError | RunError | None:
    """Return the error that a script printed into `output` before it ended with `status`; None for 0. hint: if none."""
    if status == 0:
        return None
    text = output.read_text(encoding="utf-8", errors="replace")
    if not (errors := re.findall(r"^error: (.*)$", text, flags=re.MULTILINE)):
        last = "; ".join(text.strip().split("\n")[-3:])
        return RunError(f"a process ended with exit status {status}, see {output}{hint}: {last}")
    # torchrun itself exits with 1; its report holds the status of the ranks
    is_mistake = status == 2 or re.search(r"exitcode\s*: 2\b", text)
    return UserError(errors[0]) if is_mistake else RunError(errors[0])
