"""The run folder: its files and disk, whether a configuration may continue it, and where a run resumes.

config.yaml        the resolved configuration
environment.json   one entry per start: git revision, versions, command, machine
metrics.jsonl      one line per measurement
events.jsonl       one line per event: resumed, spike, alert, checkpoint_failed, ...
probes.jsonl       details of the monitor that are not metrics (osp.monitor)
forensics/         evidence for every alert
tokenizer.json     the tokenizer of the data
checkpoints/       see osp.run.checkpoint
stopped.json       why the run ended, and where it would continue; absent while it runs and after a crash
summary.json       the closing figures
.lock              held by the process that trains here
"""

import contextlib
import fcntl
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
from typing import Any, NamedTuple, TextIO

import yaml

from osp.config import CheckpointConfig, Config, to_dict, upgrade
from osp.data.manifest import content, load_manifest, same_text
from osp.data.prepare import prepare
from osp.errors import UserError, as_user_error
from osp.files import printable, read_record, write_bytes, write_record, write_text
from osp.run.checkpoint import LATEST, Checkpoint, candidates, copies_to_write, find, remove_unfinished
from osp.run.read import differences, read_yaml

log = logging.getLogger(__name__)

STOPPED = "stopped.json"
PACKAGES = (  # whose versions are recorded
    *("torch", "deepspeed", "hydra-core", "datasets", "tokenizers", "numpy", "safetensors", "wandb"),
    *("transformers", "compressed-tensors", "gguf", "llama_cpp_python"),
)


class RunLock:
    """Reserves a run folder for one training. Rank 0 holds the lock, and it is released when that process ends.

    Sent to other ranks, it is only the token: the name of this training in its temporary files.
    """

    def __init__(self, folder: Path):
        """Raises `UserError` if another process trains in `folder`."""
        self.token = f"{socket.gethostname()}-{os.getpid()}"
        self._path = folder / ".lock"
        file = self._path.open("a+", encoding="utf-8", errors="replace")
        _take_lock(file, folder)
        file.seek(0)
        if former := file.read().strip():
            remove_unfinished(folder / "checkpoints", former)
        file.truncate(0)
        file.write(self.token)
        file.flush()
        self._file = file

    def __getstate__(self) -> dict[str, Any]:
        return {"token": self.token, "_path": self._path, "_file": None}

    def lost(self) -> str | None:
        """Return what happened to the folder that this process holds; None if nothing, or on other ranks."""
        try:
            holder = self.token if self._file is None else self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return f"the run folder {self._path.parent} was removed; nothing more can be saved there"
        except (OSError, ValueError):  # a file system that does not answer is no reason to stop
            return None
        if holder != self.token:
            return f"another training ({holder}) has taken the run folder {self._path.parent}"
        return None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


class Found(NamedTuple):
    """What a start finds before it holds the lock of its run folder."""

    folder: Path
    resumable: list[Path]  # checkpoints to resume from, best first
    config: dict[str, Any]  # of the run in the folder; empty for a new run
    checkpoints: list[Path]  # of that run


def open_run(config: Config) -> Found:
    """Return the run folder, and the checkpoints to resume from. Writes nothing.

    `resume=auto` takes the newest checkpoint of the run folder. `resume=PATH` begins with the checkpoint of another
    run, or takes this run back to one of its checkpoints; the same command, given again, continues from there.
    Raises `UserError` if the folder belongs to another configuration or process, or there is nothing to resume from.
    """
    folder, where = Path(config.run.dir), f"run.dir={Path(config.run.dir)}"
    before, lock = _read_config(folder), folder / ".lock"
    if config.resume is True:
        raise UserError("resume=true; write resume=auto, resume=false or the path of a run or checkpoint")
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{where} is a link to {os.readlink(folder)}, which does not exist; make that folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{where} is a file; choose another run.name or run.dir")
    if before and (changed := differences(before, to_dict(config))):
        raise UserError(
            f"{where} holds a run with another configuration ({'; '.join(changed[:4])}); "
            f"choose another run.name; with resume={folder} that one begins where this one is"
        )
    if before and config.resume is False:
        raise UserError(f"{where} exists and resume=false would overwrite it; choose another run.name or remove it")
    if lock.is_file():
        with lock.open(encoding="utf-8") as file:
            _take_lock(file, folder)
    own = candidates(folder)
    if config.resume in ("auto", False):
        return Found(folder, own, before, own)
    if not (named := candidates(Path(config.resume))):
        raise UserError(f"resume={config.resume}: no checkpoint there; name a run folder or a checkpoint folder")
    is_own = named[0].resolve().parent == (folder / "checkpoints").resolve()
    goes_back = is_own and before.get("resume") != config.resume
    return Found(folder, named if goes_back or not own else own, before, own)


def check_disk(folder: Path, num_bytes: int, config: CheckpointConfig, *, first: int, last: int) -> None:
    """Raise `UserError` unless the checkpoints of `num_bytes` of steps `first` to `last` fit on the folder's disk.

    Existing checkpoints need no more room. The next one is written before the oldest is removed.
    """
    copies = copies_to_write(folder / "checkpoints", config, first=first, last=last)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"run.dir={folder}: {place} is a file; choose another run.dir")
    if (free := shutil.disk_usage(place).free) < num_bytes * copies:
        raise UserError(
            f"run.dir={folder}: {copies} more checkpoint{'s' * (copies > 1)} of {num_bytes / 1e9:.2f} GB, as steps "
            f"{first} to {last} with checkpoint.every={config.every} and checkpoint.keep_last={config.keep_last} need, "
            f"do not fit into the {free / 1e9:.2f} GB free there; choose another run.dir or save and keep fewer"
        )
    if not os.access(place, os.W_OK):
        raise UserError(f"run.dir={folder}: cannot write there")


def begin(
    found: Found, config: Config, *, checkpoint: Path | None, tokenizer: Path, world_size: int, device: str
) -> RunLock:
    """Lock the run folder and describe the run there; `UserError` if another training has written since `found`."""
    folder, where = found.folder, f"run.dir={found.folder}"
    files = {"config.yaml": yaml.safe_dump(to_dict(config), sort_keys=False).encode()}
    with as_user_error(f"{where}: cannot write there: ", OSError):
        files["tokenizer.json"] = tokenizer.read_bytes()
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
        if (found.config, found.checkpoints) != (_read_config(folder), candidates(folder)):
            lock.release()
            raise UserError(f"{where}: another training has written there meanwhile; start again to continue it")
        for path, data in ((folder / name, data) for name, data in files.items()):
            if not path.is_file() or path.read_bytes() != data:
                write_bytes(path, data)
        path, start = folder / "environment.json", {**environment(), "world_size": world_size, "device": device}
        starts = read_record(path)
        write_record(path, [*(starts if isinstance(starts, list) else []), start])
        if checkpoint and checkpoint.resolve().parent == (folder / "checkpoints").resolve():
            write_text(checkpoint.parent / LATEST, checkpoint.name + "\n")  # later checkpoints are given up
        with contextlib.suppress(IsADirectoryError):
            (folder / STOPPED).unlink(missing_ok=True)
    return lock


def end(folder: Path, reason: str, *, step: int, tokens: int, total_steps: int) -> None:
    """Write `stopped.json`. reason: "complete", "train.stop_at", the name of a signal, or an error."""
    if folder.exists():
        checkpoint, now = find(folder), datetime.now(UTC).isoformat(timespec="seconds")
        marker = {"reason": reason, "time": now, "step": step, "tokens": tokens, "total_steps": total_steps}
        write_record(folder / STOPPED, marker | {"checkpoint": str(checkpoint) if checkpoint else None})


def training_shards(folder: Path, *, instead: str) -> Path:
    """Return the shards that the run of the checkpoint `folder` reads, found by their content or prepared again.

    Raises `UserError` if they are gone and its text is gone or has changed. instead: how to name another text
    """
    checkpoint = Checkpoint(folder)
    data, config, run = checkpoint.data, checkpoint.config, folder.resolve().parent.parent
    for place in (Path(data.shards), run / str(data.from_run)) if data.shards else ():
        with contextlib.suppress(UserError):
            manifest = load_manifest(place)
            if manifest.usable and same_text(data.content, content(manifest)):
                return place
    try:
        shards = prepare(config.data, config.tokenizer)
        if same_text(data.content, content(load_manifest(shards))):
            return shards
        problem = f"{shards} holds another text now"
    except UserError as error:
        problem = str(error)
    raise UserError(f"{run}: its shards {data.shards or ''} are gone, and its text too ({problem}); {instead}")


def environment() -> dict[str, Any]:
    """Return the git revision, versions, command and machine of this process."""
    machine: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "git": git_revision()}
    machine |= {"command": sys.argv, "host": platform.node(), "python": platform.python_version()}
    machine["cpus"] = os.cpu_count()
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            machine[name] = metadata.version(name)
    return machine


def git_revision() -> str | None:
    """Return the commit of this source tree, with `+changes` if files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "status", "--porcelain=v2", "--branch"]
    try:
        status = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    commit = next(line.split()[-1] for line in status if line.startswith("# branch.oid "))
    return commit + "+changes" * any(not line.startswith("#") for line in status)


def _take_lock(file: TextIO, folder: Path) -> None:
    """Lock `file` until it is closed. Raises `UserError` if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        holder = printable((folder / ".lock").read_text(encoding="utf-8", errors="replace").strip())
        raise UserError(
            f"run.dir={folder}: another training ({holder}) is writing there; choose another run.name or stop it first"
        ) from error
    except OSError as error:
        log.warning("the file system of the run folder has no locks (%s): start one training at a time there", error)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the run in `folder`, empty for a new run."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    with as_user_error(f"{path}: not valid YAML: ", yaml.YAMLError, ValueError, OSError, RecursionError):
        values = read_yaml(path)
    # an empty one would pass for a new run
    if not values or not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: not the configuration of a run")
    return upgrade(values)
