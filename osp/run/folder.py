"""The run folder: what it holds, whether a configuration may continue it, and where a run resumes.

config.yaml        the resolved configuration
environment.json   one entry per start: git revision, versions, command, machine
metrics.jsonl      one line per measurement
events.jsonl       one line per thing that happened: resumed, spike, alert, checkpoint_failed, ...
probes.jsonl       what the monitor saw and is no number (osp.monitor)
forensics/         what stands behind an alert
tokenizer.json     the tokenizer of the data
checkpoints/       see osp.run.checkpoint
stopped.json       why the run ended or stopped, and where it would continue; absent while it runs or after a crash
summary.json       the closing figures
.lock              held by the process that trains here
"""

import fcntl
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from osp.config import Config, differences, to_dict
from osp.errors import UserError
from osp.files import write_text
from osp.run.checkpoint import LATEST, candidates, remove_unfinished

log = logging.getLogger(__name__)

STOPPED = "stopped.json"

PACKAGES = ("torch", "deepspeed", "hydra-core", "datasets", "tokenizers", "numpy", "safetensors", "wandb")


class RunLock:
    """Makes a run folder the business of one process, rank 0 of the training there; gone when that process is.

    token: what tells this process from others, in the names of its temporary files.
    """

    def __init__(self, folder: Path):
        """Raises `UserError` if another process trains in `folder`."""
        self.token = f"{socket.gethostname()}-{os.getpid()}"
        self._file = (folder / ".lock").open("a+", encoding="utf-8")
        if not _try_lock(self._file.fileno()):
            self._file.close()
            raise UserError(_occupied(folder))
        self._file.seek(0)
        former = self._file.read().strip()
        if former:
            remove_unfinished(folder / "checkpoints", former)
        self._file.truncate(0)
        self._file.write(self.token)
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def open_run(config: Config) -> tuple[Path, list[Path]]:
    """(run folder, checkpoints to resume from, the first that is whole); nothing is written.

    `resume=auto` takes the newest checkpoint of the run folder. `resume=PATH` begins with the checkpoint of another
    run, or takes this run back to one of its own; the same command given again then continues from there.
    Raises `UserError` if the folder belongs to another configuration or process, or there is nothing to resume from.
    """
    folder = Path(config.run.dir)
    if config.resume is True:
        raise UserError("resume=true; write resume=auto, resume=false or the path of a run or checkpoint")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir={folder} is a file; choose another run.name or run.dir")
    stored = folder / "config.yaml"
    before: dict[str, Any] = {}
    if stored.exists():
        before = _read_yaml(stored)
        changed = differences(before, to_dict(config))
        if changed:
            raise UserError(
                f"run.dir={folder} holds a run with another configuration ({'; '.join(changed[:4])}); "
                f"choose another run.name; with resume={folder} that one begins where this one is"
            )
        if config.resume is False:
            raise UserError(
                f"run.dir={folder} exists and resume=false would overwrite it; choose another run.name or remove it"
            )
    lock = folder / ".lock"
    if lock.exists():
        with lock.open(encoding="utf-8") as file:
            if not _try_lock(file.fileno()):
                raise UserError(_occupied(folder))
    own = candidates(folder)
    if config.resume == "auto" or config.resume is False:
        return folder, own
    named = candidates(Path(config.resume))
    if not named:
        raise UserError(f"resume={config.resume}: no checkpoint there; name a run folder or a checkpoint folder")
    goes_back = (
        named[0].resolve().parent == (folder / "checkpoints").resolve() and before.get("resume") != config.resume
    )
    return folder, named if goes_back or not own else own


def recorded_steps(config: Config) -> int | None:
    """Return the length that was measured for `train.minutes` when the run in the folder of `config` began.

    None if there is no such run, or `config` gives a length that needs no measurement.
    """
    stored = Path(config.run.dir) / "config.yaml"
    if config.train.num_steps is not None or not stored.exists():
        return None
    return _read_yaml(stored).get("train", {}).get("steps")


def begin(
    folder: Path, config: Config, *, checkpoint: Path | None, tokenizer: Path, world_size: int, device: str
) -> RunLock:
    """Write what describes the run into its folder; the lock to hold while it trains.

    checkpoint: what it resumes from. Raises `UserError` if the folder's run has another tokenizer: then the shards are
    other ones than those it read.
    """
    stored = folder / "tokenizer.json"
    if stored.exists() and stored.read_bytes() != tokenizer.read_bytes():
        raise UserError(
            f"run.dir={folder} was trained with another tokenizer than that of {tokenizer.parent}; "
            "the text has changed since: choose another run.name"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    write_text(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    shutil.copyfile(tokenizer, stored)
    path = folder / "environment.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError:  # cut short by a power failure: a record of starts must not prevent one
        log.warning("%s is damaged and begun anew", path)
        starts = []
    starts.append({**environment(), "world_size": world_size, "device": device})
    write_text(path, json.dumps(starts, indent=1) + "\n")
    if checkpoint and checkpoint.resolve().parent == (folder / "checkpoints").resolve():
        write_text(checkpoint.parent / LATEST, checkpoint.name + "\n")  # what came after it is given up
    (folder / STOPPED).unlink(missing_ok=True)
    return lock


def end(folder: Path, reason: str, *, step: int, tokens: int, total_steps: int) -> None:
    """Leave the marker that says why the run is not running: "complete", "SIGTERM", "train.stop_at" or an error."""
    checkpoint = next(iter(candidates(folder)), None)
    marker = {
        "reason": reason,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "tokens": tokens,
        "total_steps": total_steps,
        "checkpoint": str(checkpoint) if checkpoint else None,
    }
    try:
        write_text(folder / STOPPED, json.dumps(marker, indent=1) + "\n")
    except OSError as error:
        log.warning("%s: %s", folder / STOPPED, error.strerror)


def environment() -> dict[str, Any]:
    """Git revision, versions, command and machine of this process."""
    installed = {name: _version(name) for name in PACKAGES}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_revision(),
        "command": sys.argv,
        "host": platform.node(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        **{name: version for name, version in installed.items() if version},
    }


def git_revision() -> str | None:
    """The commit of this source tree, with `+changes` if files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def check_disk(folder: Path, num_bytes: int, *, keep_last: int) -> None:
    """Raise `UserError` unless the checkpoints of `num_bytes` that a run keeps fit on the disk of its folder.

    Those that are there already need no more room, and the next one is written before the oldest is removed.
    """
    copies = max(1, max(1, keep_last) + 1 - len(candidates(folder)))
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"run.dir={folder}: {place} is a file; choose another run.dir")
    free = shutil.disk_usage(place).free
    if free < num_bytes * copies:
        raise UserError(
            f"run.dir={folder}: {copies} more checkpoint{'s' * (copies > 1)} of {num_bytes / 1e9:.2f} GB, as "
            f"checkpoint.keep_last={keep_last} needs, do not fit into the {free / 1e9:.2f} GB free there; choose "
            "another run.dir or a smaller checkpoint.keep_last"
        )
    if not os.access(place, os.W_OK):
        raise UserError(f"run.dir={folder}: cannot write there")


def _try_lock(descriptor: int) -> bool:
    """Whether the file is locked now, for as long as it is open; also where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("the file system of the run folder has no locks (%s): start one training at a time there", error)
    return True


def _occupied(folder: Path) -> str:
    holder = (folder / ".lock").read_text(encoding="utf-8").strip()
    return f"run.dir={folder}: another training ({holder}) is writing there; choose another run.name or stop it first"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not the configuration of a run")
    return values


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
