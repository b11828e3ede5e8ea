"""Checkpoints by parameter name: any cut into slices reads back as the whole, damage is named, `latest` is safe."""

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from osp import checkpoint as checkpoint_module
from osp.checkpoint import (
    Checkpoint,
    Saved,
    Saver,
    Slice,
    candidates,
    find,
    load_model,
    prune,
    remove_unfinished,
    seconds_to_write,
)
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


def write(folder: Path, source: Transformer, *, ranks: int = 1, step: int = 5, **options: Any) -> Path:
    """A checkpoint as `ranks` ranks save it together, here one after the other."""
    return save(savers(folder, source, ranks=ranks, step=step, **options)).folder


def savers(
    folder: Path, source: Transformer, *, ranks: int = 1, step: int = 5, keep_last: int = 0, keep_every: int = 0
) -> list[Saver]:
    """One `Saver` per rank, each with a save under way."""
    manifest = {"step": step, "tokens": 40, "config": CONFIG}
    manifest["shapes"] = {name: list(p.shape) for name, p in source.named_parameters()}
    gather, started = threads_gather(ranks), []
    for rank, share in enumerate(cut(source, ranks)):
        saver = Saver(
            folder, keep_last=keep_last, keep_every=keep_every, token="host-1", rank=rank, gather=partial(gather, rank)
        )
        saver.begin(share, rng={"cpu": torch.full((5,), rank, dtype=torch.uint8)}, buffers={}, manifest=manifest)
        started.append(saver)
    return started


def threads_gather(ranks: int) -> Callable[[int, Any], list[Any]]:
    """What all ranks, each a thread, hand in; returned to all of them when the last one has."""
    barrier, values = threading.Barrier(ranks, timeout=120), [None] * ranks

    def gather(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        barrier.wait()
        result = list(values)
        barrier.wait()
        return result

    return gather


def save(savers: list[Saver]) -> Saved:
    """What all of them finish with."""
    with ThreadPoolExecutor(len(savers)) as ranks:
        outcomes = list(ranks.map(lambda saver: saver.finish(), savers))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return outcomes[0]


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
        Checkpoint(folder).verify()


def test_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", model())
    (tmp_path / "secret").write_bytes(b"x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: names the file '../../secret' outside of its folder"):
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


def test_training_goes_on_while_the_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`begin` returns before anything is on disk, and what is written is the state at that moment."""
    gate, source = threading.Event(), model()
    write_tensors = checkpoint_module._write_tensors

    def slowly(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        assert gate.wait(timeout=120)
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint_module, "_write_tensors", slowly)
    (saver,) = savers(tmp_path, source)
    before = source.lm_head.weight.detach().clone()
    assert saver.busy
    assert not saver.written
    assert find(tmp_path) is None
    with torch.no_grad():
        source.lm_head.weight.add_(1.0)  # training goes on
    gate.set()
    saved = saver.finish()
    assert (saved.error, saver.busy) == (None, False)
    assert torch.equal(load_model(tmp_path).lm_head.weight, before)
    assert saved.num_bytes == sum(p.stat().st_size for p in saved.folder.glob("*.safetensors"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("Io error (os error 28)")])
def test_rank_that_cannot_write_fails_the_save_on_all_and_leaves_the_old_one(
    rank: int, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, model(), ranks=2, step=1)
    write_tensors = checkpoint_module._write_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        if path.name == f"rank_{rank:05d}.safetensors":
            raise error
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint_module, "_write_tensors", full)
    saved = save(savers(tmp_path, model(), ranks=2, step=2))
    assert saved.error is not None
    assert saved.error.startswith(f"rank {rank}: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert find(tmp_path) == tmp_path / "step_00000001"


def test_manifest_that_cannot_be_written_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, model(), step=1)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint_module, "write_text", full)
    saved = save(savers(tmp_path, model(), step=2))
    assert saved.error is not None
    assert "No space left on device" in saved.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, model(), ranks=2)
    other = model()
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    write(tmp_path, other)
    assert torch.equal(load_model(tmp_path).lm_head.weight, other.lm_head.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000005"]


def test_retention_keeps_the_newest_and_every_multiple(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path, model(), step=step, keep_last=2, keep_every=3)
    (tmp_path / "step_00000002").mkdir()  # no manifest: somebody is copying it there
    write(tmp_path, model(), step=8, keep_last=2, keep_every=3)
    kept = sorted(p.name for p in tmp_path.glob("step_*"))
    assert kept == [f"step_0000000{n}" for n in (2, 3, 6, 7, 8)]


def test_candidates_go_back_from_the_one_that_latest_names(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, model(), step=step)
    (tmp_path / "latest").write_text("step_00000002\n")
    assert [p.name for p in candidates(tmp_path)] == ["step_00000002", "step_00000001"]
    (tmp_path / "latest").unlink()
    assert [p.name for p in candidates(tmp_path)] == [f"step_0000000{n}" for n in (3, 2, 1)]
    for damage, named in ((b"../../elsewhere\n", "elsewhere"), (b"\xff\xfe", "\ufffd\ufffd")):
        (tmp_path / "latest").write_bytes(damage)
        assert [p.name for p in candidates(tmp_path)] == [named, "step_00000003", "step_00000002", "step_00000001"]
    (tmp_path / "latest").write_text("\n")
    assert candidates(tmp_path)[0].name == "step_00000003"


def test_leftovers_of_a_dead_process_go_and_those_of_others_stay(tmp_path: Path) -> None:
    write(tmp_path, model())
    for name in (".step_00000007.host-1.tmp", ".step_00000007.host-2.tmp", ".step_00000003.removed.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00000.safetensors").write_bytes(b"half")
    remove_unfinished(tmp_path, "host-1")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [".step_00000007.host-2.tmp", "latest", "step_00000005"]


def test_random_state_of_each_rank_comes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, model(), ranks=3))
    for rank in range(3):
        assert checkpoint.rng(rank)["cpu"].tolist() == [rank] * 5
    assert checkpoint.rng(3) == {}


def test_write_test_leaves_nothing(tmp_path: Path) -> None:
    assert seconds_to_write(tmp_path, 10**6, sample=10**5) > 0
    assert list(tmp_path.iterdir()) == []
