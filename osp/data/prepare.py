"""Documents -> token shards, prepared once per configuration.

1. `sources.documents` yields texts; `_batches` groups them.
2. Worker processes encode a batch (`_encode`): tokens + end-of-text, and the hash of each text. Results come back in
   the order of the documents, so the bytes written do not depend on the number of workers.
3. `_Writer` sends a document to the validation split if the hash of its text is small, else to training, and seals a
   shard for every `data.shard_tokens` training tokens. The validation split is sealed together with the first training
   shard, so that a run can start while documents still stream in; later documents of that split are dropped.

The folder's name holds a hash of everything that decides its content. An interrupted preparation continues after the
last sealed shard and ends with the same bytes.
"""

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from osp.config import DataConfig, TokenizerConfig
from osp.data import sources
from osp.data.manifest import FILE_NAME, FORMAT, Manifest, Shard, check_sizes, load_manifest, save_manifest
from osp.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from osp.data.tokenizer import eos_id, existing_tokenizer, load_tokenizer, spec_hash, train_tokenizer, vocab_size
from osp.errors import UserError
from osp.files import lock, write_atomically

BATCH_BYTES = 1 << 20  # text per task of a worker
BATCH_DOCUMENTS = 1024
POLL_SECONDS = 0.2

# A child must be referenced while it runs, or Python warns about it; `start_preparing` returns only the folder.
_children: list[subprocess.Popen[bytes]] = []


class Encoded(NamedTuple):
    """One document, encoded by a worker."""

    tokens: np.ndarray[Any, Any]  # with end-of-text, () for an empty document
    hash: int  # of the text, 64 bits
    bytes: int  # of the text in UTF-8
    gzip_bytes: int  # compressed alone with gzip -9; 0 for a training document


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, *, progress: bool = True, in_background: bool = False
) -> Path:
    """Return the folder with the complete shards of this configuration; prepare it first if it does not exist.

    Existing shards are used without reading the corpus. Waits if another process is preparing the same shards.
    in_background: close the progress bar once a run can start, because the run then uses the terminal.
    """
    folder = shard_folder(data, tokenizer)
    manifest = _find_manifest(folder)
    if manifest and manifest.complete:
        return folder
    with lock(folder):
        manifest = _find_manifest(folder)
        if manifest and manifest.complete:  # by the previous holder of the lock
            return folder
        try:
            _write_shards(data, tokenizer, folder, progress=progress, in_background=in_background)
        except UserError as error:
            manifest = _find_manifest(folder)
            if manifest and manifest.usable:  # a run may be waiting for the next shard
                manifest.error = str(error)
                save_manifest(manifest, folder)
            else:
                shutil.rmtree(folder)
            raise
    return folder


def start_preparing(data: DataConfig, tokenizer: TokenizerConfig, *, progress: bool = True) -> Path:
    """Return the folder of this configuration's shards as soon as the manifest is `usable`.

    A child process prepares the rest. It ends with this process; sealed shards are kept and the next call continues.
    """
    folder = shard_folder(data, tokenizer)
    manifest = _find_manifest(folder)
    if manifest and manifest.complete:
        return folder
    child = subprocess.Popen(
        [sys.executable, "-c", f"from osp.data.prepare import _background; _background({os.getpid()})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        start_new_session=True,  # Ctrl-C is for the trainer, which may want to save first
    )
    _children.append(child)
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin:
        child.stdin.write(pickle.dumps((sources.SOURCES, data, tokenizer, progress)))
    while child.poll() is None:
        manifest = _find_manifest(folder)
        if manifest and manifest.usable and manifest.error is None:  # the child clears an error of an earlier one
            break
        time.sleep(POLL_SECONDS)
    if child.returncode == 2:
        raise UserError(child.stdout.read().decode().strip())
    if child.returncode not in (None, 0):
        raise RuntimeError(f"preparing {folder} failed with exit code {child.returncode}; its error is printed above")
    return folder


def shard_folder(data: DataConfig, tokenizer: TokenizerConfig) -> Path:
    """Return data.cache_dir / NAME-HASH; the hash covers the configuration, the source's fingerprint and the format."""
    settings = dataclasses.asdict(dataclasses.replace(data, skip_steps=()))
    for key in ("cache_dir", "num_workers"):  # like skip_steps these do not change a byte
        del settings[key]
    try:
        spec = hashlib.sha256(Path(tokenizer.path).read_bytes()).hexdigest() if tokenizer.path else None
    except OSError as error:
        raise UserError(f"tokenizer.path={tokenizer.path} cannot be read: {error.strerror}") from error
    source = sources.make_source(data)
    identity = [FORMAT, settings, dataclasses.asdict(tokenizer), spec, source.fingerprint()]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._]+", "_", source.label)[:100]  # a file name has at most 255 bytes
    return Path(data.cache_dir) / f"{name}-{digest}"


def _find_manifest(folder: Path) -> Manifest | None:
    return load_manifest(folder) if (folder / FILE_NAME).exists() else None


def _write_shards(
    data: DataConfig, config: TokenizerConfig, folder: Path, *, progress: bool, in_background: bool
) -> None:
    """Fill `folder`, whose lock is held, from the start or after the last sealed shard."""
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    manifest = _find_manifest(folder)
    num_workers = data.num_workers or _num_cores()
    bar = tqdm(total=data.max_tokens, unit=" tokens", unit_scale=True, disable=not progress)
    with bar, _executor(num_workers) as executor:
        if manifest:
            check_sizes(folder, manifest)
            manifest.error = None
        else:
            bar.set_description("training the tokenizer" if config.train else "loading the tokenizer")
            # in a worker: after `tokenizers` has used threads, a process can no longer fork workers
            manifest = executor.submit(_begin, data, config, folder).result()
        save_manifest(manifest, folder)
        writer = _Writer(folder, manifest, max_tokens=data.max_tokens)
        texts = itertools.islice(sources.documents(data), manifest.next_document, None)
        encoded = _encode_all(executor, texts, manifest, folder, max_pending=2 * num_workers)
        bar.set_description("preparing data")
        bar.update(manifest.train.tokens)
        while writer.room and (item := next(encoded, None)) is not None:
            writer.add(*item)
            bar.update(len(item[1].tokens))
            if in_background and manifest.usable:
                bar.close()
        writer.finish()


def _begin(data: DataConfig, config: TokenizerConfig, folder: Path) -> Manifest:
    """Write the tokenizer.json of `folder`, trained on the training split or an existing one; return a manifest."""
    limit = int(data.val_fraction * 2**64)
    if config.train:
        texts = (text for text in sources.documents(data) if text and text_hash(text) >= limit)
        tokenizer = train_tokenizer(texts, config)
    else:
        tokenizer = existing_tokenizer(config)
    write_atomically(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True).encode())
    size = vocab_size(tokenizer)
    return Manifest(
        source=dataclasses.asdict(data),
        tokenizer_hash=spec_hash(tokenizer.to_str()),
        vocab_size=size,
        eos_id=eos_id(tokenizer, config.eos_token),
        dtype="uint16" if size <= 1 << 16 else "uint32",
        shard_tokens=data.shard_tokens,
        held_out_below=limit,
    )


def text_hash(text: str) -> int:
    """Return 64 bits of the sha256 of `text`, which decide its split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _encode_all(
    executor: Executor, texts: Iterable[str], manifest: Manifest, folder: Path, *, max_pending: int
) -> Iterator[tuple[str, Encoded]]:
    """Yield every text with its encoding, in order; at most `max_pending` batches wait beside the current one."""
    path, limit = folder / TOKENIZER_FILE, manifest.held_out_below
    arguments = (path, manifest.tokenizer_hash, manifest.eos_id, manifest.dtype, limit)
    pending: deque[tuple[list[str], Future[list[Encoded]]]] = deque()
    batches = _batches(texts)
    while True:
        while len(pending) < max_pending and (batch := next(batches, None)):
            pending.append((batch, executor.submit(_encode, batch, *arguments)))
        if not pending:
            return
        batch, future = pending.popleft()
        yield from zip(batch, future.result(), strict=True)


def _encode(
    texts: list[str], path: Path, spec_hash: str, eos: int, dtype: Literal["uint16", "uint32"], limit: int
) -> list[Encoded]:
    """Return the encodings of `texts`. limit: documents with a smaller hash are in the validation split."""
    tokenizer = _load_cached(path, spec_hash)
    documents = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids if text else []
        tokens = np.array([*ids, eos] if ids else [], dtype=dtype)
        digest, content = text_hash(text), text.encode()
        gzip_bytes = len(gzip.compress(content, 9)) if digest < limit and ids else 0
        documents.append(Encoded(tokens, digest, len(content), gzip_bytes))
    return documents


@lru_cache(maxsize=1)
def _load_cached(path: Path, spec_hash: str) -> Tokenizer:
    """Read the tokenizer at `path` once per process; the hash invalidates the cache when the file changes."""
    return load_tokenizer(path)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of about BATCH_BYTES characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Distribute encoded documents over the splits and seal shards; the manifest on disk lists the sealed ones."""

    def __init__(self, folder: Path, manifest: Manifest, *, max_tokens: int | None) -> None:
        self.folder, self.manifest, self.max_tokens = folder, manifest, max_tokens
        self.train: list[Encoded] = []  # documents, or the rest of one, that are in no shard yet
        self.val: list[Encoded] = []
        self.num_tokens = 0  # in self.train
        self.smallest: tuple[int, str] | None = None  # hash and text of a document, for a validation split
        self.num_documents = manifest.next_document
        self.skip = manifest.next_token  # tokens of the next document that are already in a shard

    @property
    def room(self) -> int:
        """Tokens of the next shard when full; 0 once `data.max_tokens` training tokens are written."""
        if self.max_tokens is None:
            return self.manifest.shard_tokens
        return min(self.manifest.shard_tokens, self.max_tokens - self.manifest.train.tokens)

    def add(self, text: str, document: Encoded) -> None:
        """Add the next document of the source and seal the shards that it fills."""
        self.num_documents += 1
        if len(document.tokens) == 0:
            return
        if document.hash < self.manifest.held_out_below:
            if not self.manifest.val.shards:
                self.val.append(document)
            return
        split = self.manifest.train
        if not self.skip:
            split.documents, split.bytes = split.documents + 1, split.bytes + document.bytes
        self.train.append(document._replace(tokens=document.tokens[self.skip :]))
        self.num_tokens += len(self.train[-1].tokens)
        if self.smallest is None or document.hash < self.smallest[0]:
            self.smallest = document.hash, text
        while 0 < self.room <= self.num_tokens:
            self._ensure_validation()
            if self.num_tokens >= self.room:
                self._seal_train(self.room)
        self.skip = 0

    def finish(self) -> None:
        """Seal the rest and mark the folder complete."""
        if not self.manifest.usable:
            self._check_corpus()
            self._ensure_validation()
        if self.room:
            if self.num_tokens:
                self._seal_train(self.num_tokens)
            self.manifest.next_document, self.manifest.next_token = self.num_documents, 0
        self.manifest.complete = True
        save_manifest(self.manifest, self.folder)

    def _check_corpus(self) -> None:
        """Raise `UserError` unless each split gets a document."""
        hashes = {document.hash for document in self.train + self.val}
        if not hashes:
            raise UserError(f"the corpus is empty: {self.num_documents} documents, none of them with text")
        if len(hashes) == 1:
            raise UserError(
                "the corpus is a single document, and one document is needed for validation; "
                "split it into several files or records"
            )
        if not self.train:
            raise UserError(
                f"all {len(self.val)} documents of the corpus are in the validation split; lower data.val_fraction"
            )

    def _ensure_validation(self) -> None:
        """If the validation split is empty, move the document with the smallest hash and its copies there.

        The limit moves to that hash, so that later copies are not trained on either.
        """
        if self.val or self.manifest.val.shards:
            return
        assert self.smallest is not None
        chosen, text = self.smallest
        self.manifest.held_out_below = chosen + 1
        gzip_bytes = len(gzip.compress(text.encode(), 9))
        self.val = [document._replace(gzip_bytes=gzip_bytes) for document in self.train if document.hash == chosen]
        self.train = [document for document in self.train if document.hash != chosen]
        self.num_tokens = sum(len(document.tokens) for document in self.train)
        split = self.manifest.train
        split.documents, split.bytes = len(self.train), sum(document.bytes for document in self.train)

    def _seal_train(self, num_tokens: int) -> None:
        """Write the first `num_tokens` queued tokens as a shard; before the first shard, seal the validation split."""
        if not self.manifest.val.shards:
            val = self.manifest.val
            self._seal("val", np.concatenate([document.tokens for document in self.val]))
            val.documents, val.bytes = len(self.val), sum(document.bytes for document in self.val)
            self.manifest.val_gzip_bytes = sum(document.gzip_bytes for document in self.val)
            self.val = []
        tokens = np.concatenate([document.tokens for document in self.train])
        self._seal("train", tokens[:num_tokens])
        newest = self.train[-1]
        self.num_tokens -= num_tokens  # of the newest document: without it the queue was shorter than a shard
        if self.num_tokens:
            self.skip += len(newest.tokens) - self.num_tokens
            self.train = [newest._replace(tokens=newest.tokens[-self.num_tokens :])]
            self.manifest.next_document, self.manifest.next_token = self.num_documents - 1, self.skip
        else:
            self.train = []
            self.manifest.next_document, self.manifest.next_token = self.num_documents, 0
        save_manifest(self.manifest, self.folder)

    def _seal(self, name: Literal["train", "val"], tokens: np.ndarray[Any, Any]) -> None:
        """Write one shard. It counts once the manifest that lists it is saved."""
        shards = self.manifest.split(name).shards
        file = f"{name}-{len(shards):05d}.bin"
        content = np.ascontiguousarray(tokens).view(np.uint8).data
        write_atomically(self.folder / file, content)
        shards.append(Shard(file, len(tokens), hashlib.sha256(content).hexdigest()))


@contextmanager
def _executor(num_workers: int) -> Iterator[Executor]:
    """Run `_encode` in processes, or for a single worker in a thread, which starts faster."""
    if num_workers == 1:
        pool: Executor = ThreadPoolExecutor(1)
    else:
        pool = ProcessPoolExecutor(num_workers, _Fork(), initializer=_follow, initargs=(os.getpid(),))
    try:
        with pool:
            yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenizing process was killed, perhaps for lack of memory; set data.num_workers to fewer processes"
        ) from error


class _Worker(ForkProcess):
    def terminate(self) -> None:
        self.kill()  # the executor ends a broken pool with this; workers ignore SIGTERM


class _Fork(ForkContext):
    """Forked processes: a spawned one would import the main script and with it the whole training stack."""

    Process = _Worker


def _follow(parent: int) -> None:
    """Let only the end of the process `parent`, even if that is killed, end this one.

    A launcher signals every process of a job, and the trainer may need data to finish its step.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _background(parent: int) -> None:
    """Run the child process of `start_preparing`; the message of a `UserError` goes to standard output."""
    _follow(parent)
    registered, data, tokenizer, progress = pickle.load(sys.stdin.buffer)
    sources.SOURCES.update(registered)
    reply, sys.stdout = sys.stdout, sys.stderr  # nothing else may mix with the message
    try:
        prepare(data, tokenizer, progress=progress, in_background=True)
    except UserError as error:
        print(error, file=reply, flush=True)
        sys.exit(2)
