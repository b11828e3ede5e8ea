"""Fixtures for tests of a whole run: a small corpus, a small configuration, the real entry point in a subprocess."""

import contextlib
import gc
import json
import os
import random
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entry
import pytest

from osp.config import Config, from_dict

pytest_plugins = ["tests.evaluation_models"]

ROOT = Path(__file__).resolve().parents[1]

# The longest files go first, so that no process is left with one of them at the end.
LONGEST = (
    *("test_trainer.py", "test_engine.py", "test_verify_resume.py", "test_ablation.py", "test_slurm.py"),
    *("test_resume.py", "test_training.py", "test_fp8.py", "test_report.py", "test_equivalent_training.py"),
    "test_fuzz.py",
)


def pytest_collection_finish() -> None:
    gc.freeze()  # DeepSpeed collects garbage at the start of a run, and the imported modules are a million objects


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the losses of tests/train/golden again")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` import only the files of these tests: a machine with a GPU may lack packages that others need."""
    files = [collection_path] if collection_path.is_file() else collection_path.rglob("test_*.py")
    skipped = config.option.markexpr == "gpu" and not any("mark.gpu" in file.read_text("utf-8") for file in files)
    return True if skipped else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def made_text(num_documents: int, *, seed: int = 0) -> list[str]:
    """Return documents of made-up words with a learnable structure, equal on every machine and Python version."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 7))) for _ in range(150)]
    return [
        " ".join(draw.choice(words[: draw.randint(2, 150)]) for _ in range(120)) + ".\n" for _ in range(num_documents)
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a jsonl file of 400 documents, about 250 kB."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in made_text(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_values(corpus: Path) -> dict[str, Any]:
    """Return the smallest configuration that uses every part. Its shards are prepared once per session."""
    return {
        "train": {
            "steps": 6,
            "seq_len": 32,
            "tokens_per_step": 256,
            "micro_batch_size": 2,
            "compile": False,
            "precision": "fp32",
            "loss_chunk_tokens": 8192,
        },
        "model": {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "embed_proj": True,
        },
        "norm": {"name": "ssnorm"},
        "optimizer": {"lr": 0.01, "ns_dtype": "fp32"},  # auto is bf16 on some machines, which would change the losses
        "eval": {"every": 3, "tokens": 1024, "sample_tokens": 4},
        "data": {
            "source": "text",
            "paths": [str(corpus)],
            "val_fraction": 0.05,
            "cache_dir": str(corpus.parent / "shards"),
            "num_workers": 1,
        },
        "tokenizer": {"vocab_size": 320},
        "checkpoint": {"every": 3, "keep_last": 0},
        "logger": {"wandb": "disabled", "progress": False},
        "engine": {"device": "cpu", "threads": 1},
        "monitor": {"enabled": False},
    }


@pytest.fixture(scope="session")
def plain_run(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of `tiny_values`, to read only."""
    from osp.train.setup import train

    folder = tmp_path_factory.mktemp("plain") / "run"
    train(from_dict({**tiny_values, "run": {"name": "run", "dir": str(folder)}}))
    return folder


@pytest.fixture
def tiny(tiny_values: dict[str, Any], tmp_path: Path) -> Callable[..., Config]:
    """Return `tiny_values` with overrides and a run folder in tmp_path: `tiny("train.steps=3", name="a")`."""

    def build(*overrides: str, name: str = "run") -> Config:
        values = json.loads(json.dumps(tiny_values))
        values["run"] = {"name": name, "dir": str(tmp_path / name)}
        for override in overrides:
            key, value = override.split("=", 1)
            *path, last = key.split(".")
            table = values
            for part in path:
                table = table.setdefault(part, {})
            try:
                table[last] = json.loads(value)
            except json.JSONDecodeError:
                table[last] = value
        return from_dict(values)

    return build


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]


def losses(folder: Path) -> list[float]:
    """Return the training loss of every step."""
    return [event["train/loss"] for event in read_metrics(folder) if "train/loss" in event]


def overrides_of(config: Config) -> list[str]:
    """Return the command line that sets every leaf of `config`, as `key=value`."""
    from osp.config import to_dict

    def leaves(tree: Any, path: str) -> list[str]:
        if isinstance(tree, dict):
            return [leaf for k, v in tree.items() for leaf in leaves(v, f"{path}.{k}" if path else k)]
        return [f"{path}={json.dumps(tree)}"]

    return leaves(to_dict(config), "")


def free_port(first: int = 10_000, end: int = 32_000) -> int:
    """Return a free port in [first, end), for a launcher that cannot choose one.

    Below the ports that the system gives to connections. The search begins at another place in every process, because
    tests run in parallel.
    """
    begin = os.getpid() * 37
    for number in range(begin, begin + end - first):
        port = first + number % (end - first)
        with socket.socket() as place, contextlib.suppress(OSError):
            place.bind(("", port))
            return port
    raise RuntimeError("all ports are in use")


def run_in_process(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    """Run `python scripts/SCRIPT.py ARGUMENTS` in this process and in the working directory."""
    path = str(ROOT / "scripts" / f"{script}.py")
    monkeypatch.setattr(entry, "launch", entry.run)  # `launch` would end this process
    monkeypatch.setattr("osp.distributed.shutdown", lambda: None)  # later tests use the process group
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(path, run_name="__main__")


def run_script(
    *arguments: str, launcher: tuple[str, ...] = (), cwd: Path, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `python scripts/train.py ARGUMENTS`, or the same under a launcher such as `torchrun --nproc-per-node 2`."""
    script = str(ROOT / "scripts" / "train.py")
    if "deepspeed" in launcher:
        launcher = (*launcher, "--master_port", str(free_port()))
    command = [*launcher, script, *arguments] if launcher else [sys.executable, script, *arguments]
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )
