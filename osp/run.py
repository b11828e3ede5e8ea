"""The run folder: what it holds, whether a configuration may continue it, and where a run resumes.

config.yaml        the resolved configuration
environment.json   one entry per start: git revision, versions, command, machine
metrics.jsonl      one line per event
tokenizer.json     the tokenizer of the data
checkpoints/       see osp.checkpoint
summary.json       the closing figures
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from osp.checkpoint import find
from osp.config import Config, UserError, to_dict

# Keys that may differ between a run and its continuation: they change neither the model nor what it learns.
FREE = (
    "run.",
    "resume",
    "debug",
    "logger.",
    "checkpoint.",
    "eval.",
    "engine.",
    "data.cache_dir",
    "data.num_workers",
    "train.micro_batch_size",
    "train.compile",
    "train.activation_checkpointing",
    "train.loss_chunk_tokens",
)

PACKAGES = ("torch", "deepspeed", "hydra-core", "datasets", "tokenizers", "numpy", "safetensors", "wandb")


def open_run(config: Config) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to resume from or None); nothing is written.

    Raises `UserError` if the folder belongs to another configuration, or there is nothing to resume from.
    """
    folder = Path(config.run.dir)
    if config.resume is True:
        raise UserError("resume=true; write resume=auto, resume=false or the path of a run or checkpoint")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir={folder} is a file; choose another run.name or run.dir")
    stored = folder / "config.yaml"
    if stored.exists():
        changed = differences(_read_yaml(stored), to_dict(config))
        if changed:
            raise UserError(
                f"run.dir={folder} holds a run with another configuration ({'; '.join(changed[:4])}); "
                "choose another run.name, or continue it there with resume=" + str(folder)
            )
        if config.resume is False:
            raise UserError(
                f"run.dir={folder} exists and resume=false would overwrite it; choose another run.name or remove it"
            )
    if isinstance(config.resume, str) and config.resume != "auto":
        checkpoint = find(Path(config.resume))
        if checkpoint is None:
            raise UserError(f"resume={config.resume}: no checkpoint there; name a run folder or a checkpoint folder")
        return folder, find(folder) or checkpoint
    return folder, find(folder)


def with_length_of_run(config: Config) -> Config:
    """`config`, with the steps that were measured for `train.minutes` when the run in its folder began."""
    stored = Path(config.run.dir) / "config.yaml"
    if config.train.steps is not None or not stored.exists():
        return config
    steps = _read_yaml(stored).get("train", {}).get("steps")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, minutes=None))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every key that is not `FREE` and differs, in order of the keys."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE)
    ]


def begin(folder: Path, config: Config, *, tokenizer: Path, world_size: int, device: str) -> None:
    """Write what describes the run into its folder.

    Raises `UserError` if the folder's run has another tokenizer: then the shards are other ones than those it read.
    """
    stored = folder / "tokenizer.json"
    if stored.exists() and stored.read_bytes() != tokenizer.read_bytes():
        raise UserError(
            f"run.dir={folder} was trained with another tokenizer than that of {tokenizer.parent}; "
            "the text has changed since: choose another run.name"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    shutil.copyfile(tokenizer, stored)
    path = folder / "environment.json"
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    starts.append({**environment(), "world_size": world_size, "device": device})
    path.write_text(json.dumps(starts, indent=1) + "\n", encoding="utf-8")


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
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def check_disk(folder: Path, num_bytes: int, *, copies: int) -> None:
    """Raise `UserError` unless `copies` checkpoints of `num_bytes` fit on the disk of the run folder."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes * copies:
        raise UserError(
            f"run.dir={folder}: {copies} checkpoints of {num_bytes / 1e9:.2f} GB do not fit into the "
            f"{free / 1e9:.2f} GB free there; choose another run.dir or a smaller checkpoint.keep_last"
        )
    if not os.access(place, os.W_OK):
        raise UserError(f"run.dir={folder}: cannot write there")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not the configuration of a run")
    return values


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]
    return [(path, tree)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
