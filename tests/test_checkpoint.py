"""Checkpoints by parameter name: any cut into slices reads back as the whole, damage is named, `latest` is safe."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.checkpoint import Checkpoint, Slice, find, load_model, prune, save
from osp.config import Config, TrainConfig, UserError, from_dict, to_dict
from osp.model import Transformer, build_model

CONFIG = to_dict(Config(train=TrainConfig(steps=1, seq_len=8, tokens_per_step=8)))
CONFIG["model"] |= {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
CONFIG["model"] |= {"num_attention_heads": 2, "max_position_embeddings": 8}
CONFIG["tokenizer"]["vocab_size"] = 11


def model() -> Transformer:
    return build_model(from_dict(CONFIG).model, seed=3)


def cut(source: Transformer, ranks: int) -> list[list[Slice]]:
    """Every parameter in `ranks` uneven slices, the last ones possibly empty; momentum is the weight plus one."""
    shares: list[list[Slice]] = [[] for _ in range(ranks)]
    for name, parameter in source.named_parameters():
        flat = parameter.detach().flatten()
        bounds = [round(flat.numel() * (rank / ranks) ** 1.5) for rank in range(ranks + 1)]
        for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start < stop:
                shares[rank].append((name, start, stop, {"weight": flat[start:stop], "momentum": flat[start:stop] + 1}))
    return shares


def write(folder: Path, source: Transformer, *, ranks: int = 1, step: int = 5) -> Path:
    """`save` as `ranks` ranks would call it together, here one after the other."""
    entries: list[Any] = []

    def gather(value: Any) -> list[Any]:
        entries.append(value)
        return entries

    shares = cut(source, ranks)

    def save_as(rank: int, barrier: Callable[[], None]) -> Path:
        return save(
            folder,
            shares[rank],
            step=step,
            tokens=40,
            config=CONFIG,
            extra={},
            shapes={name: list(p.shape) for name, p in source.named_parameters()},
            buffers={},
            rank=rank,
            barrier=barrier,
            gather=gather,
        )

    def others() -> None:  # at rank 0's first barrier the folder is there: the others write now
        while waiting:
            save_as(waiting.pop(), lambda: None)

    waiting = list(range(1, ranks))
    return save_as(0, others)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_any_cut_reads_back_as_the_whole(ranks: int, tmp_path: Path) -> None:
    source = model()
    checkpoint = Checkpoint(write(tmp_path, source, ranks=ranks))
    for name, parameter in source.named_parameters():
        flat = parameter.detach().flatten()
        assert torch.equal(checkpoint.read("weight", name, 0, flat.numel()), flat), name
        middle = slice(flat.numel() // 3, flat.numel() - flat.numel() // 4)
        assert torch.equal(checkpoint.read("momentum", name, middle.start, middle.stop), flat[middle] + 1), name
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


def test_state_that_was_not_written_is_missed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, model()))
    with pytest.raises(UserError, match=r"exp_avg of lm_head.weight covers 0 of the 88 values wanted"):
        checkpoint.read("exp_avg", "lm_head.weight", 0, 88)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "not a manifest"),
        (lambda f: (f / "manifest.json").write_text('{"format": 99}'), "checkpoint format 99"),
        (
            lambda f: (f / "rank_00000.safetensors").unlink(),
            "rank_00000.safetensors: named by manifest.json but missing",
        ),
        (lambda f: (f / "rank_00000.safetensors").write_bytes(b"abc"), "rank_00000.safetensors: damaged"),
    ],
)
def test_damage_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, model())
    damage(folder)
    with pytest.raises(UserError, match=message):
        Checkpoint(folder)


def test_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", model())
    (tmp_path / "secret").write_bytes(b"x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"step_00000005/secret: named by manifest.json but missing"):
        Checkpoint(folder)


def test_latest_names_the_newest_and_survives_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, model(), step=step)
    (tmp_path / ".step_00000009.tmp").mkdir()  # an unfinished write is no checkpoint
    assert find(tmp_path) == tmp_path / "step_00000004"
    (tmp_path / "latest").write_text("step_00000001\n")
    prune(tmp_path, keep_last=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000001", "step_00000003", "step_00000004"]
    assert find(tmp_path / "nowhere") is None


def test_loaded_model_needs_neither_deepspeed_nor_hydra(tmp_path: Path) -> None:
    write(tmp_path, model())
    code = (
        f"import sys, osp; m = osp.load_model({str(tmp_path)!r}); "
        "assert not {'deepspeed', 'hydra', 'wandb', 'datasets'} & set(sys.modules), sys.modules.keys(); "
        "print(sum(p.numel() for p in m.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(p.numel() for p in model().parameters())
