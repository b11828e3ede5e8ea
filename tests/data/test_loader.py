"""Sequences equal a naive packer's, and a step reads the same ones on any ranks, in any order, after a restart."""

import dataclasses
import hashlib
import os
import shutil
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from osp.data import loader
from osp.data.loader import Batch, Layout, Loader, Rows, number_documents, validation_batches
from osp.data.manifest import Manifest, load_manifest, save_manifest
from osp.errors import RunError, UserError
from osp.files import lock

SEQ_LEN = 37
ROWS_PER_STEP = 24


def naive_rows(folder: Path, seq_len: int) -> list[list[list[int]]]:
    """Return the training sequences of every shard, in the order of the text."""
    packed = []
    for shard in load_manifest(folder).train.shards:
        tokens = np.fromfile(folder / shard.file, dtype=np.uint16).tolist()
        rows = []
        while len(tokens) > seq_len:
            rows.append(tokens[: seq_len + 1])
            tokens = tokens[seq_len:]
        packed.append(rows)
    return packed


def step_rows(folder: Path, step: int, *, world_size: int = 1, micro_batch_size: int = 8, **options: Any) -> np.ndarray:
    """Return the sequences of one step by index, gathered from all ranks, (rows_per_step, T+1)."""
    ranks = []
    for rank in range(world_size):
        source = Loader(
            folder,
            Layout(SEQ_LEN),
            rows_per_step=ROWS_PER_STEP,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            **options,
        )
        batches = source.step(step)
        assert all(
            b.tokens.shape == (micro_batch_size, SEQ_LEN + 1) and b.num_rows == micro_batch_size for b in batches
        )
        assert all(batch.tokens.dtype == torch.int64 for batch in batches)
        ranks.append(torch.stack([batch.tokens for batch in batches]))
        source.close()
    return torch.stack(ranks, dim=1).flatten(0, 2).numpy()  # micro step, rank, row


def rewrite_manifest(folder: Path, **changes: Any) -> Manifest:
    manifest = dataclasses.replace(load_manifest(folder), **changes)
    save_manifest(manifest, folder)
    return manifest


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A folder of shards that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_epoch_reads_every_sequence_once_shard_by_shard(shards: Path) -> None:
    packed = naive_rows(shards, SEQ_LEN)
    assert len(packed) > 3
    assert len({len(rows) for rows in packed}) > 1
    rows = Rows(shards, Layout(SEQ_LEN), seed=3)
    rows_per_epoch = sum(map(len, packed))
    assert rows.rows_per_epoch == rows_per_epoch
    orders = []
    for epoch in range(3):
        remaining = rows.read(epoch * rows_per_epoch + np.arange(rows_per_epoch)).tolist()
        for expected in packed:
            shard, remaining = remaining[: len(expected)], remaining[len(expected) :]
            assert sorted(shard) == sorted(expected)
            assert shard != expected
            orders.append(shard)
    assert orders[0] != orders[len(packed)] != orders[2 * len(packed)]  # the first shard in each epoch
    other = Rows(shards, Layout(SEQ_LEN), seed=4)
    assert not np.array_equal(other.read(np.arange(100)), rows.read(np.arange(100)))


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 24), (1, 1), (2, 4), (2, 12), (4, 2), (4, 6), (3, 8)])
def test_step_has_the_same_sequences_on_any_world_size(shards: Path, world_size: int, micro_batch_size: int) -> None:
    rows = Rows(shards, Layout(SEQ_LEN), seed=0)
    assert rows.rows_per_epoch is not None
    last = rows.rows_per_epoch // ROWS_PER_STEP  # crosses into the second epoch
    for step in (0, 7, last, 5 * last):
        expected = rows.read(np.arange(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP))
        actual = step_rows(shards, step, world_size=world_size, micro_batch_size=micro_batch_size)
        np.testing.assert_array_equal(actual, expected)


def test_steps_can_be_read_in_any_order(shards: Path) -> None:
    source = Loader(shards, Layout(SEQ_LEN), rows_per_step=ROWS_PER_STEP, micro_batch_size=8, seed=5, document_ids=True)
    for step in (0, 1, 2, 9, 10, 3, 3, 700, 0, 1):
        batches = source.step(step)
        tokens = torch.cat([batch.tokens for batch in batches]).numpy()
        np.testing.assert_array_equal(tokens, step_rows(shards, step, seed=5))
        ids = torch.cat([batch.document_ids for batch in batches if batch.document_ids is not None]).numpy()
        np.testing.assert_array_equal(ids, number_documents(tokens, 0))
    source.close()


def test_batches_are_pinned_in_the_thread_that_reads(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and document ids, each in the order of the text; without `pin` nothing is."""
    pinned: dict[str, list[torch.Tensor]] = {}

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copies = pinned.setdefault(threading.current_thread().name, [])
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(loader, "PREFETCH_STEPS", 0)
    build = partial(Loader, rows_per_step=ROWS_PER_STEP, micro_batch_size=8, document_ids=True)
    plain = build(shards, Layout(SEQ_LEN))
    expected = plain.step(3)
    plain.close()
    assert not pinned
    source = build(shards, Layout(SEQ_LEN), pin=True)
    batches = source.step(3)
    source.close()
    ((thread, copies),) = pinned.items()
    assert thread.startswith("osp-loader")
    assert len(copies) == 2 * len(batches) == 6
    for batch, copy in zip(batches, expected, strict=True):
        assert any(batch.tokens is one for one in copies)
        assert any(batch.document_ids is one for one in copies)
        assert torch.equal(batch.tokens, copy.tokens)
        assert batch.document_ids is not None
        assert copy.document_ids is not None
        assert torch.equal(batch.document_ids, copy.document_ids)
        assert batch[2:] == copy[2:]


def test_batch_goes_to_a_device_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, device, calls = Batch(torch.ones(2, 3), torch.zeros(2, 3), 1, 7), torch.device("meta"), list[Any]()
    original: Any = torch.Tensor.to

    def record(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((args, kwargs))
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", record)
    there = batch.to(device)
    assert calls == [((device,), {"non_blocking": True})] * 2
    assert there.document_ids is not None
    assert (there.tokens.device, there.document_ids.device, there[2:]) == (device, device, (1, 7))
    assert batch.to(torch.device("cpu")).tokens is batch.tokens, "on a CPU nothing is copied"
    assert Batch(batch.tokens, None, 2).to(device).document_ids is None


def test_document_ids_equal_a_plain_loop() -> None:
    rows = np.random.default_rng(0).integers(0, 4, size=(50, 30))
    for row, ids in zip(rows.tolist(), number_documents(rows, 3).tolist(), strict=True):
        current, expected = 0, []
        for token in row:
            expected.append(current)
            current += token == 3
        assert ids == expected
    assert number_documents(rows, 3).dtype == np.int32


def test_new_epoch_is_logged_once(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Loader(shards, Layout(SEQ_LEN), rows_per_step=ROWS_PER_STEP, micro_batch_size=8)
    assert source.rows.rows_per_epoch is not None
    first = -(-source.rows.rows_per_epoch // ROWS_PER_STEP)
    for step in range(first - 2, first + 3):
        source.step(step)
    source.close()
    assert [record.message for record in caplog.records] == [
        f"step {first}: the training split was read 1 times; reading it again"
    ]


def counted_sequences(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens[: batch.num_rows].tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("batch_size", "max_tokens"), [(1, None), (5, None), (64, None), (3, 10 * SEQ_LEN + 5), (2, 1)]
)
def test_validation_counts_every_sequence_once(
    shards: Path, world_size: int, batch_size: int, max_tokens: int | None
) -> None:
    tokens = np.fromfile(shards / "val-00000.bin", dtype=np.uint16).tolist()
    expected = [tokens[i : i + SEQ_LEN + 1] for i in range(0, len(tokens) - SEQ_LEN, SEQ_LEN)]
    if max_tokens is not None:
        expected = expected[: max(1, max_tokens // SEQ_LEN)]
    ranks = [
        list(
            validation_batches(
                shards,
                Layout(SEQ_LEN),
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                max_tokens=max_tokens,
                document_ids=True,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # every rank takes part in the same collectives
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.tokens.shape == (batch_size, SEQ_LEN + 1)
        assert batch.document_ids is not None
        np.testing.assert_array_equal(batch.document_ids.numpy(), number_documents(batch.tokens.numpy(), 0))
    interleaved = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    assert counted_sequences(interleaved) == expected


def test_validation_split_shorter_than_a_sequence_is_one_sequence(shards: Path) -> None:
    tokens = np.fromfile(shards / "val-00000.bin", dtype=np.uint16)
    (batch,) = validation_batches(shards, Layout(10**6), batch_size=2, rank=0, world_size=1)
    assert batch.num_rows == 1
    assert batch.tokens[0].tolist() == tokens.tolist()
    (empty,) = validation_batches(shards, Layout(10**6), batch_size=2, rank=1, world_size=2)
    assert empty.num_rows == 0
    assert empty.tokens.shape == (2, len(tokens))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "train-00002.bin").unlink(), r"shard .*train-00002\.bin is missing; delete"),
        (lambda f: (f / "val-00000.bin").write_bytes(b"12"), r"shard .*val-00000\.bin has 2 bytes, the manifest says"),
        (lambda f: (f / "manifest.json").unlink(), r"holds no prepared shards \(manifest\.json is missing\)"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json is damaged .*; delete"),
        (lambda f: rewrite_manifest(f, format=0), r"manifest\.json is not of format 1; delete"),
        (
            lambda f: (f / "tokenizer.json").write_text('{"a": 1}'),
            r"tokenizer\.json is not the tokenizer of the shards",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is not the tokenizer of the shards"),
    ],
)
def test_damaged_folder_is_refused(copy: Path, spoil: Any, message: str) -> None:
    spoil(copy)
    with pytest.raises(UserError, match=message):
        Loader(copy, Layout(SEQ_LEN), rows_per_step=4, micro_batch_size=4)


def flip(path: Path, *, position: int = 1001) -> None:
    """Flip one bit of a file in place."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_shard_with_a_flipped_bit_is_refused_before_its_first_sequence(copy: Path) -> None:
    flip(copy / "train-00001.bin")
    rows = Rows(copy, Layout(SEQ_LEN), seed=0)
    in_first = (rows.manifest.train.shards[0].tokens - 1) // SEQ_LEN
    rows.read(np.arange(in_first))
    with pytest.raises(UserError, match=r"train-00001\.bin is damaged, its SHA-256 differs .*; delete .*copy and"):
        rows.read(np.array([in_first]))
    source = Loader(copy, Layout(SEQ_LEN), rows_per_step=in_first, micro_batch_size=in_first)
    source.step(0)
    with pytest.raises(RunError, match=r"train-00001\.bin is damaged"):
        source.step(1)
    source.close()


def test_validation_split_with_a_flipped_bit_is_refused(copy: Path) -> None:
    flip(copy / "val-00000.bin")
    with pytest.raises(UserError, match=r"val-00000\.bin is damaged, its SHA-256 differs"):
        next(validation_batches(copy, Layout(SEQ_LEN), batch_size=2))
    with pytest.raises(UserError, match=r"val-00000\.bin is damaged, its SHA-256 differs"):
        Loader(copy, Layout(SEQ_LEN), rows_per_step=4, micro_batch_size=4)


def test_shard_is_read_for_its_hash_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hashed = Rows(shards, Layout(SEQ_LEN), seed=0), []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(1) or sha256(data))
    for _ in range(3):
        rows.read(np.arange(int(rows.rows_per_epoch or 0)))
    assert len(hashed) == len(rows.tokens)


def test_shard_cut_short_under_a_running_training_is_an_error_and_not_a_crash(copy: Path) -> None:
    rows = Rows(copy, Layout(SEQ_LEN), seed=0)
    rows.read(np.arange(10))
    os.truncate(copy / "train-00000.bin", 0)
    with pytest.raises(UserError, match=r"shard .*train-00000\.bin was cut short; delete"):
        rows.read(np.arange(10))


def test_training_split_shorter_than_a_sequence_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match=r"has \d+ tokens, fewer than one sequence of train\.seq_len=1000000 plus 1"):
        Loader(shards, Layout(10**6), rows_per_step=4, micro_batch_size=4)


def test_reading_waits_for_shards_in_preparation(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.02)
    whole = load_manifest(copy)
    last = sum(map(len, naive_rows(copy, SEQ_LEN))) // ROWS_PER_STEP - 1
    expected = {step: step_rows(copy, step) for step in (0, last, last + 1)}
    with lock(copy):
        part = dataclasses.replace(whole.train, shards=whole.train.shards[:1])
        rewrite_manifest(copy, train=part, complete=False)
        source = Loader(copy, Layout(SEQ_LEN), rows_per_step=ROWS_PER_STEP, micro_batch_size=24)
        np.testing.assert_array_equal(source.step(0)[0].tokens.numpy(), expected[0])
        results: dict[int, np.ndarray] = {}
        asking = threading.Thread(target=lambda: results.update({last: source.step(last)[0].tokens.numpy()}))
        asking.start()
        for num_shards in range(2, len(whole.train.shards) + 1):
            assert not results
            time.sleep(0.1)
            rewrite_manifest(copy, train=dataclasses.replace(whole.train, shards=whole.train.shards[:num_shards]))
        asking.join(60)
        np.testing.assert_array_equal(results[last], expected[last])
        time.sleep(0.1)  # the next step waits until the manifest says that the text is complete
        save_manifest(whole, copy)
        np.testing.assert_array_equal(source.step(last + 1)[0].tokens.numpy(), expected[last + 1])
    source.close()
    assert sum("waiting for the preparation" in record.message for record in caplog.records) <= 3


def test_reading_stops_waiting_for_a_dead_preparation(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(loader, "GRACE_SECONDS", 0.1)
    manifest = load_manifest(copy)
    rewrite_manifest(copy, complete=False)
    source = Loader(copy, Layout(SEQ_LEN), rows_per_step=4, micro_batch_size=4)
    with pytest.raises(RunError, match=r"is not complete and nothing is preparing it; start the run again"):
        source.step(10**6)
    rewrite_manifest(copy, complete=False, error="bad.jsonl, line 7: malformed JSON")
    with pytest.raises(RunError, match=r"preparing .* failed: bad\.jsonl, line 7: malformed JSON"):
        source.step(10**7)
    source.close()
    assert manifest.complete


def test_close_ends_a_waiting_thread(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "CLOSE_SECONDS", 200)
    monkeypatch.setattr(loader, "POLL_SECONDS", 10**6)  # the thread does not look again before the end
    rewrite_manifest(copy, complete=False)
    with lock(copy):
        source = Loader(copy, Layout(SEQ_LEN), rows_per_step=ROWS_PER_STEP, micro_batch_size=24)
        rows = sum(map(len, naive_rows(copy, SEQ_LEN)))
        source.step(rows // ROWS_PER_STEP - 1)  # reads ahead beyond the last shard
        thread = next(thread for thread in threading.enumerate() if thread.name.startswith("osp-loader"))
        source.close()
        assert not thread.is_alive()


def test_close_does_not_wait_for_a_hanging_file_system(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "CLOSE_SECONDS", 0.1)
    hanging, released, ended = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(Loader, "_read", lambda *_: (hanging.set(), released.wait(60), ended.set()))
    source = Loader(shards, Layout(SEQ_LEN), rows_per_step=ROWS_PER_STEP, micro_batch_size=24)
    assert not source.wait(0, seconds=0.0)
    assert hanging.wait(60)
    source.close()
    assert not ended.is_set()
    released.set()
    assert ended.wait(60)


def test_large_vocabularies_use_32_bits(shards: Path, copy: Path) -> None:
    manifest = load_manifest(copy)
    for shard in manifest.val.shards + manifest.train.shards:
        tokens = np.fromfile(copy / shard.file, dtype=np.uint16).astype(np.uint32) + 100_000
        tokens.tofile(copy / shard.file)
        shard.sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
    save_manifest(dataclasses.replace(manifest, dtype="uint32", vocab_size=200_000), copy)
    np.testing.assert_array_equal(step_rows(copy, 3), step_rows(shards, 3) + 100_000)


@pytest.mark.parametrize("layout", [Layout(SEQ_LEN, bos=True), Layout(36, repeat=18)])
def test_sequences_with_a_start_token(shards: Path, layout: Layout) -> None:
    manifest = load_manifest(shards)
    size = layout.repeat or layout.seq_len
    expected = Counter()
    for shard in manifest.train.shards:
        tokens = np.fromfile(shards / shard.file, dtype=np.uint16).tolist()
        spans = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        expected.update((manifest.eos_id, *span, *(span if layout.repeat else [])) for span in spans)
    rows = Rows(shards, layout, seed=3)
    assert rows.rows_per_epoch == expected.total()
    read = Counter(map(tuple, rows.read(np.arange(expected.total())).tolist()))
    assert read == expected
    assert {len(row) for row in read} == {layout.seq_len + 1}

    tokens = np.fromfile(shards / "val-00000.bin", dtype=np.uint16).tolist()
    spans = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
    held_out = [[manifest.eos_id, *span, *(span if layout.repeat else [])] for span in spans]
    batches = list(validation_batches(shards, layout, batch_size=2, document_ids=True))
    assert [row for batch in batches for row in batch.tokens[: batch.num_rows].tolist()] == held_out
    for batch in batches:  # the start token is in the first document, and attends to nothing else
        ids = batch.document_ids
        assert ids is not None
        assert (ids[:, :2] == 0).all()
        torch.testing.assert_close(ids[:, 1:], torch.from_numpy(number_documents(batch.tokens[:, 1:].numpy(), 0)))


@pytest.mark.parametrize("layout", [Layout(10**6), Layout(10**6, bos=True), Layout(10**6, repeat=10**6 // 2)])
def test_validation_of_a_split_shorter_than_a_sequence(shards: Path, layout: Layout) -> None:
    tokens = np.fromfile(shards / "val-00000.bin", dtype=np.uint16).tolist()
    (batch,) = validation_batches(shards, layout, batch_size=1)
    start = [load_manifest(shards).eos_id] if layout.has_start else []
    assert batch.tokens.tolist() == [start + tokens * (2 if layout.repeat else 1)]
