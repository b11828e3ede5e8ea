"""Token shards -> sequences -> the micro batches of an optimizer step.

A sequence ("row" in names) is T+1 tokens: T inputs and, shifted by one, T labels. `Layout` cuts them from a shard.
Number g = step * rows_per_step + index runs through the shards in order, and inside a shard in an order that
depends on (seed, epoch, shard). So the sequences of a step depend on (seed, step) alone: not on the number of ranks,
the micro batch size, restarts, or the progress of the preparation. A run that continues another one with other
rows_per_step counts from its `origin`, the first sequence that the other one has not read.

Letters: n sequences, b sequences of a micro batch, T tokens that a sequence predicts, W ranks.
"""

import hashlib
import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from osp.config import Config
from osp.data.manifest import SplitName, check_files, check_sizes, content, damaged, load_manifest, same_text
from osp.errors import RunError, UserError
from osp.files import is_locked

PREFETCH_STEPS = 2
POLL_SECONDS = 0.5
CHECKED_TOKENS = 2**24  # of the first shard when a run starts; every sequence is checked when it is read
CLOSE_SECONDS = 2  # limit for a read in progress: a file system that hangs must not keep a failed run alive
GRACE_SECONDS = 20  # a preparation without the lock for this time has died

Array = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)


class Layout(NamedTuple):
    """How the sequences of T+1 tokens are cut from the tokens x of a shard; the start token is end-of-text.

    plain: x[gT : gT + T + 1], neighbours share one token. bos: the start token, then x[gT : gT + T]. repeat R, with
    T = 2R: the start token, then x[gR : gR + R] twice.
    """

    seq_len: int  # T
    bos: bool = False
    repeat: int | None = None

    @classmethod
    def of(cls, config: Config) -> "Layout":
        """Return the layout of a run."""
        return cls(config.train.seq_len, config.data.bos, config.data.repeat)

    @property
    def has_start(self) -> bool:
        return self.bos or self.repeat is not None

    @property
    def stride(self) -> int:
        """Tokens of a shard from one sequence to the next."""
        return self.repeat or self.seq_len

    def count(self, num_tokens: int) -> int:
        """Return the sequences in a shard of that many tokens."""
        return (num_tokens - (not self.has_start)) // self.stride

    def within(self, num_tokens: int) -> "Layout":
        """Return the layout whose sequences are short enough for one to fit into `num_tokens`."""
        longest = num_tokens - (not self.has_start)
        if self.repeat:
            return self._replace(seq_len=2 * min(self.repeat, longest), repeat=min(self.repeat, longest))
        return self._replace(seq_len=min(self.seq_len, longest))

    def read(self, tokens: Array, numbers: Array | slice, eos_id: int) -> Array:
        """Return the sequences with these numbers of a shard's tokens, int64 (n, T+1)."""
        size = self.stride + (not self.has_start)
        rows = sliding_window_view(tokens, size)[:: self.stride][numbers].astype(np.int64)
        if not self.has_start:
            return rows
        return np.hstack((np.full((len(rows), 1), eos_id), *[rows] * (2 if self.repeat else 1)))


class Batch(NamedTuple):
    """Sequences of one micro batch. From number `num_rows` on they only fill the shape and must not count."""

    tokens: torch.Tensor  # int64 (b, T+1)
    document_ids: torch.Tensor | None  # int32 (b, T+1): number of the document in its sequence, from 0
    num_rows: int
    checksum: int = 0  # sum of the CRC-32 of the training sequences: equal if two runs read the same data

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`. A copy from page-locked memory to a GPU is queued, not waited for."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        ids = None if self.document_ids is None else change(self.document_ids)
        return self._replace(tokens=change(self.tokens), document_ids=ids)


class Shards:
    """The sealed shards of one split, memory-mapped. Checks the sizes of the files and the tokenizer beside them.

    The SHA-256 of a shard of validation is checked at once, of a training shard by `check_hash` before its first use.
    """

    def __init__(self, folder: str | Path, split: SplitName) -> None:
        self.folder = Path(folder)
        self.split: SplitName = split
        self.tokens: list[Array] = []  # of each shard, uint16 or uint32 (tokens,)
        self._checked: set[int] = set()
        self.reload()
        check_files(self.folder, self.manifest)
        if split == "val":
            for shard in range(len(self.tokens)):
                self.check_hash(shard)

    def reload(self) -> None:
        """Read the manifest again and map the shards sealed since."""
        self.manifest = load_manifest(self.folder)
        check_sizes(self.folder, self.manifest)
        for shard in self.manifest.split(self.split).shards[len(self.tokens) :]:
            self.tokens.append(np.memmap(self.folder / shard.file, dtype=self.manifest.dtype, mode="r"))

    def check_hash(self, shard: int) -> None:
        """Raise `UserError` if a shard has other bytes than when it was sealed, read completely the first time."""
        entry, data = self.manifest.split(self.split).shards[shard], self.tokens[shard].view(np.uint8)
        path = self.folder / entry.file
        if path.exists() and path.stat().st_size != len(data):  # reading beyond the end would kill the process
            raise damaged(self.folder, f"shard {path} was cut short")
        if shard not in self._checked:
            if hashlib.sha256(data.data).hexdigest() != entry.sha256:
                raise damaged(self.folder, f"shard {path} is damaged, its SHA-256 differs from the manifest's")
            self._checked.add(shard)

    def check_ids(self, tokens: Array, shard: int) -> None:
        """Raise `UserError` if `tokens`, read from a shard, hold an id outside the vocabulary."""
        vocab_size, file = self.manifest.vocab_size, self.manifest.split(self.split).shards[shard].file
        if tokens.size and (largest := int(tokens.max())) >= vocab_size:
            problem = f"holds the token id {largest}, beyond its vocabulary of {vocab_size}"
            raise damaged(self.folder, f"shard {self.folder / file} {problem}")


class Rows(Shards):
    """Training sequences by number, for one (seed, layout): number g is always the same sequence.

    Raises `UserError` if there is no sequence to read, or the first shard holds an id outside the vocabulary.
    expected: `content` of the shards when the run read them before; other shards are not read.
    """

    def __init__(self, folder: str | Path, layout: Layout, *, seed: int, expected: Sequence[str] = ()) -> None:
        super().__init__(folder, "train")
        self.layout, self.seed, self.expected = layout, seed, expected
        self.stop = threading.Event()  # ends a wait for shards
        if self.rows_per_epoch == 0:
            raise UserError(
                f"the training split in {folder} has {self.manifest.train.tokens} tokens, fewer than one sequence of "
                f"train.seq_len={layout.seq_len} plus 1; lower train.seq_len or add text"
            )
        if self.tokens:
            self.check_ids(self.tokens[0][:CHECKED_TOKENS], 0)

    @property
    def rows_per_epoch(self) -> int | None:
        """Sequences of the whole split; None while it is being prepared."""
        return int(self._row_ends()[-1:].sum()) if self.manifest.complete else None

    def read(self, numbers: Array) -> Array:
        """Return the sequences with these numbers, int64 (n, T+1).

        Waits for shards that are not sealed yet. Raises `UserError` if the preparation failed or died, or a shard is
        damaged.
        """
        self._wait_for(int(numbers.max()))
        ends = self._row_ends()
        epochs, places = np.divmod(numbers, ends[-1])  # before the split is complete all are of epoch 0
        shards = np.searchsorted(ends, places, side="right")
        rows = np.empty((len(numbers), self.layout.seq_len + 1), dtype=np.int64)
        for epoch, shard in sorted(set(zip(epochs.tolist(), shards.tolist(), strict=True))):
            self.check_hash(shard)
            chosen = (epochs == epoch) & (shards == shard)
            first = ends[shard - 1] if shard else 0
            order = _order(self.seed, epoch, shard, int(ends[shard] - first))
            numbers_in_shard = order[places[chosen] - first]
            rows[chosen] = self.layout.read(self.tokens[shard], numbers_in_shard, self.manifest.eos_id)
            self.check_ids(rows[chosen], shard)
        return rows

    def _wait_for(self, number: int) -> None:
        """Wait until sequence `number` is in a sealed shard or all shards are sealed."""
        last_seen = 0.0  # when a process held the lock; 0: not waiting yet
        while not self.manifest.complete and number >= self._row_ends()[-1:].sum():
            if self.stop.is_set():
                raise RuntimeError("the loader was closed")
            if self.manifest.error:
                raise UserError(f"preparing {self.folder} failed: {self.manifest.error}")
            if not last_seen:
                logger.warning("waiting for the preparation of %s to reach sequence %d", self.folder, number)
            if not last_seen or is_locked(self.folder):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > GRACE_SECONDS:
                raise UserError(f"{self.folder} is not complete and nothing is preparing it; start the run again")
            self.stop.wait(POLL_SECONDS)
            self.reload()
            if not same_text(self.expected, content(self.manifest)):
                raise UserError(f"{self.folder} holds another text than the run has read; choose another run.name")

    def _row_ends(self) -> Array:
        """Return the number of sequences up to and including each sealed shard, (shards,)."""
        return np.cumsum([self.layout.count(len(tokens)) for tokens in self.tokens], dtype=np.int64)


@lru_cache(maxsize=4)  # a step touches one shard, or a few neighbours
def _order(seed: int, epoch: int, shard: int, num_rows: int) -> Array:
    """Return the order of one shard's sequences in one epoch, a permutation (n,)."""
    # sorting raw bits, not Generator.permutation: NumPy guarantees only the raw streams across versions
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, shard])).random_raw(num_rows)
    return np.argsort(bits, kind="stable")


class Loader:
    """This rank's micro batches, step by step; a thread prefetches the next steps.

    Micro step j takes the sequences [(j*W + rank) * b, (j*W + rank + 1) * b) of its step.
    """

    def __init__(
        self,
        folder: str | Path,
        layout: Layout,
        *,
        rows_per_step: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        document_ids: bool = False,
        skip_steps: Sequence[tuple[int, int]] = (),  # see `data_step`
        origin: tuple[int, int] = (0, 0),  # a data step, and the number of its first sequence
        expected: Sequence[str] = (),  # see `Rows`
        pin: bool = False,  # page-lock the batches, for a GPU to copy while it computes
    ) -> None:
        assert rows_per_step % (micro_batch_size * world_size) == 0 < rows_per_step, "osp.train.resolve must divide it"
        Shards(folder, "val")  # a damaged validation split is an error before the first step
        self.rows = Rows(folder, layout, seed=seed, expected=expected)
        self.origin = origin
        self.rows_per_step, self.micro_batch_size = rows_per_step, micro_batch_size
        self.rank, self.document_ids, self.skip_steps, self.pin = rank, document_ids, tuple(skip_steps), pin
        indices = np.arange(rows_per_step, dtype=np.int64).reshape(-1, world_size, micro_batch_size)
        self.indices = indices[:, rank].ravel()  # of this rank in every step, micro step by micro step
        self._epoch = 0
        self._ahead: dict[int, Future[list[Batch]]] = {}
        self._thread = ThreadPoolExecutor(1, "osp-loader")

    def wait(self, step: int, *, seconds: float) -> bool:
        """Return whether reading `step` ends, well or with an error, within that time."""
        self._request(step)
        return bool(wait([self._ahead[step]], timeout=seconds).done)

    def problem(self, step: int) -> str | None:
        """Return why `step`, which was waited for, cannot be read; None if it can or is not read yet."""
        error = self._ahead[step].exception() if self._ahead[step].done() else None
        return None if error is None else str(error) or type(error).__name__

    def step(self, step: int) -> list[Batch]:
        """Return this rank's micro batches of optimizer step `step`, counted from 0, in any order of steps."""
        self._request(step)
        batches = self._ahead.pop(step).result()
        rows_per_epoch = self.rows.rows_per_epoch
        epoch = self.first_row(step) // rows_per_epoch if rows_per_epoch else 0
        if epoch > self._epoch and self.rank == 0:
            logger.warning("step %d: the training split was read %d times; reading it again", step, epoch)
        self._epoch = epoch
        return batches

    def first_row(self, step: int) -> int:
        """Return the number of the first sequence of optimizer step `step`."""
        first, row = self.origin
        return row + (data_step(step, self.skip_steps) - first) * self.rows_per_step

    def _request(self, step: int) -> None:
        """Have the thread read `step` and the next ones, and cancel all others."""
        assert not self.rows.stop.is_set(), "the loader is closed"
        wanted = range(step, step + 1 + PREFETCH_STEPS)
        for other in [other for other in self._ahead if other not in wanted]:
            self._ahead.pop(other).cancel()
        for other in wanted:
            if other not in self._ahead:
                self._ahead[other] = self._thread.submit(self._read, other)

    def close(self) -> None:
        """Stop the thread. The loader cannot be used afterwards."""
        self.rows.stop.set()
        for future in self._ahead.values():
            future.cancel()
        _, hanging = wait([self._thread.submit(lambda: None)], timeout=CLOSE_SECONDS)  # after the read in progress
        self._thread.shutdown(wait=not hanging)

    def _read(self, step: int) -> list[Batch]:
        """Read the micro batches of a step. Raises `RunError` if that is not possible."""
        try:
            rows = self.rows.read(self.first_row(step) + self.indices)  # (M*b, T+1)
        except UserError as error:
            raise RunError(str(error)) from error
        eos_id = self.rows.manifest.eos_id if self.document_ids else None
        parts, layout = rows.reshape(-1, self.micro_batch_size, rows.shape[1]), self.rows.layout
        batches = [_batch(part, layout, eos_id, len(part), checksum=sum(map(zlib.crc32, part))) for part in parts]
        return [batch.map(torch.Tensor.pin_memory) for batch in batches] if self.pin else batches


def data_step(step: int, skip_steps: Sequence[tuple[int, int]]) -> int:
    """Return the step, from 0, whose sequences step `step` reads when the data of `skip_steps` is left out.

    skip_steps: ranges [first, last] of steps, counted from 1 as in logs, both ends included.
    """
    for first, last in sorted(skip_steps):
        if step >= first - 1:
            step += last - first + 1
    return step


def validation_batches(
    folder: str | Path,
    layout: Layout,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_tokens: int | None = None,
    document_ids: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's share of the validation split in the order of the text, the same in every call.

    Every rank gets the same number of batches (batch_size, T+1); the last ones repeat a sequence to keep the shape. A
    split shorter than a sequence gives one sequence of all its tokens.
    max_tokens: tokens to predict over all ranks, rounded down to whole sequences.
    """
    shards = Shards(folder, "val")
    if not shards.tokens:
        raise UserError(f"{folder} has no validation split yet; it is sealed with the first training shard")
    for shard, tokens in enumerate(shards.tokens):
        shards.check_ids(tokens, shard)
    tokens, eos_id = np.concatenate(shards.tokens), shards.manifest.eos_id
    layout = layout.within(len(tokens))
    num_rows = layout.count(len(tokens))
    if max_tokens is not None:
        num_rows = max(1, min(num_rows, max_tokens // layout.seq_len))
    for first in range(0, num_rows, world_size * batch_size):
        first += rank * batch_size
        numbers = np.minimum(np.arange(first, first + batch_size), num_rows - 1)
        rows, counted = layout.read(tokens, numbers, eos_id), max(0, min(batch_size, num_rows - first))
        yield _batch(rows, layout, eos_id if document_ids else None, counted)


def number_documents(rows: Array, eos_id: int, *, has_start: bool = False) -> Array:
    """Return which document of its sequence each token belongs to, int32 (n, T+1), from 0.

    has_start: the sequences begin with a start token, which belongs to the first document.
    """
    ids = np.zeros(rows.shape, dtype=np.int32)
    np.cumsum(rows[:, has_start:-1] == eos_id, axis=1, out=ids[:, 1 + has_start :])
    return ids


def _batch(rows: Array, layout: Layout, eos_id: int | None, num_rows: int, *, checksum: int = 0) -> Batch:
    """Return a batch of all `rows`. eos_id: number documents; None: do not"""
    ids = None if eos_id is None else torch.from_numpy(number_documents(rows, eos_id, has_start=layout.has_start))
    return Batch(torch.from_numpy(rows), ids, num_rows, checksum)
