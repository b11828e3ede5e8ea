"""Checkpoints by parameter name: any partition into slices reads back whole, damage is reported, `latest` is safe."""

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from osp.config import CheckpointConfig, Config, TrainConfig, from_dict, to_dict
from osp.errors import UserError
from osp.model.transformer import Transformer, build_model
from osp.run import checkpoint as checkpoint_module
from osp.run.checkpoint import (
    Checkpoint,
    Saved,
    Saver,
    Slice,
    candidates,
    copies_to_write,
    find,
    load_model,
    prune,
    remove_unfinished,
)
from osp.train.guards import spike_score
from osp.train.setup import check_continues

CONFIG = to_dict(Config(train=TrainConfig(steps=1, seq_len=8, tokens_per_step=8)))
CONFIG["model"] |= {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
CONFIG["model"] |= {"num_attention_heads": 2, "max_position_embeddings": 8}
CONFIG["tokenizer"]["vocab_size"] = 11


def model() -> Transformer:
    return build_model(from_dict(CONFIG).model, seed=3)


def partition(source: Transformer, ranks: int) -> list[list[Slice]]:
    """Return every parameter in `ranks` uneven slices, possibly empty; momentum is the weight plus one."""
    shares: list[list[Slice]] = [[] for _ in range(ranks)]
    for name, parameter in source.named_parameters():
        flat = parameter.detach().flatten()
        bounds = [round(flat.numel() * (rank / ranks) ** 1.5) for rank in range(ranks + 1)]
        for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start < stop:
                shares[rank].append((name, start, stop, {"weight": flat[start:stop], "momentum": flat[start:stop] + 1}))
    return shares


def write(folder: Path, source: Transformer, *, ranks: int = 1, step: int = 5, **options: Any) -> Path:
    """Write a checkpoint of `ranks` ranks; return its folder."""
    return save(begin_saves(folder, source, ranks=ranks, step=step, **options)).folder


def begin_saves(
    folder: Path,
    source: Transformer,
    *,
    ranks: int = 1,
    step: int = 5,
    keep_last: int = 0,
    keep_every: int = 0,
    **more: Any,
) -> list[Saver]:
    """Return one `Saver` per rank, each with a save in progress. more: keys of the manifest."""
    manifest = {"step": step, "tokens": 40, "config": CONFIG, **more}
    manifest["shapes"] = {name: list(p.shape) for name, p in source.named_parameters()}
    gather, started = threads_gather(ranks), []
    for rank, share in enumerate(partition(source, ranks)):
        keep = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
        saver = Saver(folder, keep, token="host-1", rank=rank, gather=partial(gather, rank))
        saver.begin(share, rng={"cpu": torch.full((5,), rank, dtype=torch.uint8)}, buffers={}, manifest=manifest)
        started.append(saver)
    return started


def threads_gather(ranks: int) -> Callable[[int, Any], list[Any]]:
    """Return a `gather` for ranks that are threads: it waits for the values of all of them."""
    barrier, values = threading.Barrier(ranks, timeout=120), [None] * ranks

    def gather(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        barrier.wait()
        result = list(values)
        barrier.wait()
        return result

    return gather


def save(savers: list[Saver]) -> Saved:
    """Finish the saves; return their common outcome."""
    with ThreadPoolExecutor(len(savers)) as ranks:
        outcomes = list(ranks.map(lambda saver: saver.finish(), savers))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    for saver in savers:
        saver.close()
    return outcomes[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_any_partition_reads_back_whole(ranks: int, tmp_path: Path) -> None:
    source = model()
    checkpoint = Checkpoint(write(tmp_path, source, ranks=ranks))
    for name, parameter in source.named_parameters():
        flat = parameter.detach().flatten()
        assert torch.equal(checkpoint.read("weight", name, 0, flat.numel()), flat), name
        middle = slice(flat.numel() // 3, flat.numel() - flat.numel() // 4)
        assert torch.equal(checkpoint.read("momentum", name, middle.start, middle.stop), flat[middle] + 1), name
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


def test_removed_key_is_left_out_at_its_default_and_refused_otherwise(tmp_path: Path) -> None:
    stored = {"name": "bhyt_star", "kappa_schedule": "constant", "exact_layers": [], "gain_variance": None}
    source = build_model(from_dict(CONFIG | {"norm": {"name": "bhyt_star"}}).model, seed=3)
    write(tmp_path / "default", source, config=CONFIG | {"norm": stored})
    ids = torch.arange(8)[None]
    torch.testing.assert_close(load_model(tmp_path / "default")(ids).logits, source(ids).logits)
    write(tmp_path / "other", source, config=CONFIG | {"norm": stored | {"exact_layers": [1]}})
    with pytest.raises(UserError, match=r"norm.exact_layers=\[1\] was removed after version 0.1.0; use that version"):
        load_model(tmp_path / "other")


# --- averaged weights ---------------------------------------------------------------------------------------------


def test_averaged_weights_are_the_weighted_mean_of_all_steps(averaged_run: Path) -> None:
    """With the factor 0.6 the weights after step n count 0.6^(4 - n); the mean is taken in fp64."""
    steps = [load_model(averaged_run / "checkpoints" / f"step_{n:08d}") for n in range(1, 5)]
    shares = torch.tensor([0.6**3, 0.6**2, 0.6, 1.0], dtype=torch.float64)
    averaged = load_model(averaged_run, weights="averaged")
    for name, parameter in averaged.named_parameters():
        stacked = torch.stack([step.get_parameter(name).double() for step in steps], dim=-1)
        assert (parameter - stacked @ shares / shares.sum()).abs().max() < 1e-6
    assert (averaged.lm_head.weight - steps[-1].lm_head.weight).abs().max() > 1e-3


def test_norms_have_the_statistics_of_the_averaged_weights(tmp_path: Path) -> None:
    """The buffers in a checkpoint are of the trained weights."""
    trained, average = (build_model(from_dict(CONFIG | {"norm": {"name": "bhyt"}}).model, seed=n) for n in (1, 2))
    for source in (trained, average):
        source.refresh_norms()
    slices = [
        (name, 0, p.numel(), {"weight": p.detach().flatten(), "average": other.detach().flatten()})
        for (name, p), other in zip(trained.named_parameters(), average.parameters(), strict=True)
    ]
    manifest = {"average": {"updates": 3}, "step": 1, "tokens": 1, "config": CONFIG | {"norm": {"name": "bhyt"}}}
    shapes = {name: list(p.shape) for name, p in trained.named_parameters()}
    saver = Saver(tmp_path, CheckpointConfig(), token="a", rank=0, gather=lambda x: [x])
    saver.begin(slices, rng={}, buffers=dict(trained.named_buffers()), manifest=manifest | {"shapes": shapes})
    assert saver.finish().error is None
    assert trained.has_norm_statistics
    for loaded, source in ((load_model(tmp_path), trained), (load_model(tmp_path, weights="averaged"), average)):
        read = loaded.state_dict()
        assert all(torch.equal(read[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("damage", [{"updates": -1}, {}, 3])
def test_damaged_entry_of_the_average_is_one_line(damage: Any, tmp_path: Path) -> None:
    path = write(tmp_path, model()) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"average": damage}))
    with pytest.raises(UserError, match=r"manifest.json: damaged: average.*; take an older checkpoint$"):
        load_model(path.parent)


def test_missing_state_is_reported(tmp_path: Path) -> None:
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
def test_damaged_file_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, model())
    damage(folder)
    with pytest.raises(UserError, match=message):
        Checkpoint(folder).verify()


FOREIGN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)


@settings(
    max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
def test_mutated_manifest_is_read_or_refused(data: st.DataObject, written: Path) -> None:
    """Replace or remove one value anywhere: every key that a start reads is present with its type, or refused."""
    path = written / "manifest.json"
    original = path.read_text()
    manifest = json.loads(original)
    table, key = data.draw(st.sampled_from(list(entries_of(manifest))))
    if data.draw(st.booleans()):
        table[key] = data.draw(FOREIGN)
    else:
        del table[key]
    path.write_text(json.dumps(manifest))
    message = ""
    try:
        read_as_at_start(written)
    except UserError as error:
        message = str(error)
    finally:
        path.write_text(original)
    assert not message or (str(written) in message and "\n" not in message)


def read_as_at_start(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    check_continues(checkpoint.config, checkpoint, checkpoint.shapes)
    for values in checkpoint.manifest.get("spikes", {}).values():
        spike_score(1.0, deque(values, maxlen=8))
    assert checkpoint.manifest.get("skipped", 0) >= 0


def entries_of(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every table of a JSON tree with each of its keys."""
    for key, value in tree.items():
        yield tree, key
        if isinstance(value, dict):
            yield from entries_of(value)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, which tests must not change."""
    spikes = {"loss": [1.0, 2.0, 1.5], "grad_norm": [0.1, 0.1, 0.2]}
    return write(tmp_path_factory.mktemp("written"), model(), ranks=2, skipped=1, spikes=spikes)


@pytest.mark.parametrize("key", ["weight/lm_head.weight", "lm_head.weight@0", "weight/lm_head.weight@first"])
def test_file_with_foreign_tensors_is_refused(key: str, tmp_path: Path) -> None:
    """Tensors of another program under the name of a rank file, with a matching checksum."""
    folder = write(tmp_path, model())
    file = folder / "rank_00000.safetensors"
    save_file({key: torch.zeros(88)}, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"rank_00000.safetensors: '{key}' is no slice of a checkpoint"):
        load_model(tmp_path)


def test_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", model())
    (tmp_path / "secret").write_bytes(b"x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: names the file '../../secret' outside of its folder"):
        Checkpoint(folder)


def test_target_of_latest_survives_pruning(tmp_path: Path) -> None:
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(p.numel() for p in model().parameters())


def test_training_continues_while_the_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`begin` returns before anything is on disk, and the file holds the state at that moment."""
    gate, source = threading.Event(), model()
    write_tensors = checkpoint_module.write_tensors

    def write_slowly(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        assert gate.wait(timeout=120)
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint_module, "write_tensors", write_slowly)
    (saver,) = begin_saves(tmp_path, source)
    before = source.lm_head.weight.detach().clone()
    assert saver.busy
    assert not saver.write_done
    assert find(tmp_path) is None
    with torch.no_grad():
        source.lm_head.weight.add_(1.0)  # training continues
    gate.set()
    saved = saver.finish()
    assert (saved.error, saver.busy) == (None, False)
    assert torch.equal(load_model(tmp_path).lm_head.weight, before)
    assert saved.num_bytes == sum(p.stat().st_size for p in saved.folder.glob("*.safetensors"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("Io error (os error 28)")])
def test_write_error_on_one_rank_fails_the_save_everywhere_and_keeps_the_old_one(
    rank: int, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, model(), ranks=2, step=1)
    write_tensors = checkpoint_module.write_tensors

    def fail(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        if path.name == f"rank_{rank:05d}.safetensors":
            raise error
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint_module, "write_tensors", fail)
    saved = save(begin_saves(tmp_path, model(), ranks=2, step=2))
    assert saved.error is not None
    assert saved.error.startswith(f"rank {rank}: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert find(tmp_path) == tmp_path / "step_00000001"


def test_write_error_of_the_manifest_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, model(), step=1)

    def fail(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint_module, "write_text", fail)
    saved = save(begin_saves(tmp_path, model(), step=2))
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


def put(folder: Path, step: int) -> None:
    """Make what counts as a complete checkpoint."""
    (folder / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
    (folder / f"step_{step:08d}" / "manifest.json").write_text("{}")
    (folder / "latest").write_text(f"step_{step:08d}")


COPIES = {  # (every, keep_last, keep_every, first step, last step, checkpoints there): copies
    "only at the end": ((0, 2, 0, 0, 100, ()), 1),
    "all of a short run": ((1000, 2, 0, 0, 150, ()), 1),
    "two saves, none removed": ((100, 2, 0, 0, 150, ()), 2),
    "two kept and the next one": ((10, 2, 0, 0, 100, ()), 3),
    "one kept and the next one": ((10, 1, 0, 0, 100, ()), 2),
    "ends with a regular save": ((50, 2, 0, 0, 100, ()), 2),
    "every one is kept": ((10, 0, 0, 0, 95, ()), 10),
    "multiples are kept": ((10, 1, 30, 0, 100, ()), 4),  # 30, 60 and 90, which is the newest too, beside 100
    "the newest kept are multiples": ((10, 2, 10, 0, 100, ()), 10),
    "resumed, two make room": ((10, 2, 0, 50, 100, (40, 50)), 1),
    "resumed, one of two there": ((10, 2, 0, 50, 100, (50,)), 2),
    "resumed before the last step": ((10, 2, 0, 95, 100, (80, 90)), 1),
    "resumed where more were kept": ((10, 1, 0, 50, 100, (20, 30, 40, 50)), 1),
    "resumed, all kept": ((10, 0, 0, 50, 100, (10, 20, 30, 40, 50)), 5),
    "gone back, others overwritten": ((10, 0, 0, 10, 40, (10, 20, 30)), 1),
    "gone back, the newest is kept too": ((10, 1, 0, 0, 60, (40,)), 2),
    "nothing left to do": ((10, 2, 0, 100, 100, (90, 100)), 1),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_to_write_are_what_the_run_saves(case: str, tmp_path: Path) -> None:
    (every, keep_last, keep_every, first, last, existing), expected = COPIES[case]
    for step in existing:
        put(tmp_path, step)
    config = CheckpointConfig(every=every, keep_last=keep_last, keep_every=keep_every)
    assert copies_to_write(tmp_path, config, first=first, last=last) == expected


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    every=st.integers(0, 6),
    keep_last=st.integers(0, 4),
    keep_every=st.integers(0, 9),
    first=st.integers(0, 20),
    steps=st.integers(1, 30),
    before=st.sets(st.integers(1, 20), max_size=5),
)
def test_copies_to_write_equal_a_run_that_saves_and_prunes(
    every: int, keep_last: int, keep_every: int, first: int, steps: int, before: set[int], tmp_path: Path
) -> None:
    """A run that goes back to a step before its checkpoints may ask for one too many."""
    folder, last = Path(tempfile.mkdtemp(dir=tmp_path)), first + steps
    for step in before:
        put(folder, step)
    config = CheckpointConfig(every=every, keep_last=keep_last, keep_every=keep_every)
    copies = copies_to_write(folder, config, first=first, last=last)
    existing, most = len(list(folder.glob("step_*"))), 0
    for step in range(first + 1, last + 1):
        if step == last or (every and step % every == 0):
            most = max(most, len(list(folder.glob("step_*"))) + 1)  # it is written under another name
            put(folder, step)
            prune(folder, keep_last=keep_last, keep_every=keep_every)
    assert most - existing <= copies <= most - existing + (max(before, default=0) > first)


def test_candidates_start_at_latest_and_go_back(tmp_path: Path) -> None:
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


def sign(folder: Path) -> None:
    """Give the manifest of a checkpoint the sizes and checksums of its files as they are now."""
    values = json.loads((folder / "manifest.json").read_text())
    for name in values["files"]:
        data = (folder / name).read_bytes()
        values["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["config"]["model"].update(hidden_size=2**20), r"its shape of embed_tokens.weight is not that of"),
        (lambda v: v["shapes"].pop("norm.weight"), r"its shape of norm.weight is not that of its config"),
        (
            lambda v: (v["config"]["model"].update(vocab_size=2**24), v["shapes"].update(
                {"embed_tokens.weight": [2**24, 8], "lm_head.weight": [2**24, 8]})),
            r"a model of \d+ bytes cannot be in files of \d+",
        ),
        (lambda v: v["config"]["model"].update(num_hidden_layers=2**31), r"not the configuration of a run"),
        (lambda v: v["files"].update({"x" * 300: {}}), r"outside of its folder|missing"),
    ],
    ids=["config", "shapes", "both", "layers", "name"],
)  # fmt: skip
def test_sizes_of_a_manifest_are_checked_before_memory_is_allocated(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, model())
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    for entry in values["files"].values():
        entry.update({key: entry.get(key, kind) for key, kind in (("bytes", 0), ("sha256", ""))})
    (folder / "manifest.json").write_text(json.dumps(values))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("allocates"))
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_slices_that_overlap_do_not_hide_a_gap(tmp_path: Path) -> None:
    folder = write(tmp_path, model())
    path = folder / "rank_00000.safetensors"
    tensors = load_file(path)
    whole = tensors.pop("weight/lm_head.weight@0")
    half = len(whole) // 2
    save_file(
        {**tensors, "weight/lm_head.weight@0": whole[:half], "weight/lm_head.weight@1": whole[:half].clone()}, path
    )
    sign(folder)
    with pytest.raises(UserError, match=rf"weight of lm_head.weight covers {half + 1} of the {len(whole)} values"):
        load_model(folder)


def test_damaged_buffers_are_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path, model())
    (folder / "buffers.safetensors").write_bytes(b"\xff" * 16)
    sign(folder)
    with pytest.raises(UserError, match=r"buffers.safetensors: missing or damaged"):
        load_model(folder)


def test_only_leftovers_of_the_dead_process_are_removed(tmp_path: Path) -> None:
    write(tmp_path, model())
    for name in (".step_00000007.host-1.tmp", ".step_00000007.host-2.tmp", ".step_00000003.removed.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00000.safetensors").write_bytes(b"half")
    remove_unfinished(tmp_path, "host-1")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [".step_00000007.host-2.tmp", "latest", "step_00000005"]


def test_rng_state_of_every_rank_is_restored(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, model(), ranks=3))
    for rank in range(3):
        assert checkpoint.rng(rank)["cpu"].tolist() == [rank] * 5
    assert checkpoint.rng(3) == {}
