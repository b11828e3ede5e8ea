"""Documents -> token shards, prepared once per configuration.

1. The source yields texts; `_batches` groups them.
2. Threads encode a batch (`_encode`): tokens + end-of-text, and the hash of each text. Results come back in the order
   of the documents, so the bytes written do not depend on the number of threads.
3. `_Writer` sends a document to the validation split if the hash of its text is small, else to training, and seals a
   shard for every `data.shard_tokens` training tokens. The validation split is sealed together with the first training
   shard, so that a run can start while documents still stream in; later documents of that split are dropped.

The folder's name holds a hash of everything that decides its content. An interrupted preparation continues after the
last sealed shard and ends with the same bytes.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import logging
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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from osp.config import DataConfig, TokenizerConfig
from osp.data.encoder import Encoder
from osp.data.manifest import (
    FORMAT,
    Manifest,
    Shard,
    Split,
    SplitName,
    check_files,
    find_manifest,
    save_manifest,
    shard_name,
)  # fmt: skip
from osp.data.sources import SOURCES, make_source
from osp.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from osp.data.tokenizer import (
    cut,
    eos_id,
    existing_tokenizer,
    load_tokenizer,
    read_spec,
    spec_hash,
    train_tokenizer,
    vocab_size,
)
from osp.errors import RunError, UserError
from osp.files import lock, printable, write_atomically
from osp.process import STOP_SIGNALS, protect_console

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 20  # of texts that a thread encodes at a time
BATCH_DOCUMENTS = 1024
MOST_THREADS = 32  # for data.num_workers=0
POLL_SECONDS = 0.2
PART_ENDS = (re.compile(r"(?<=\n\n)(?=\S)"), re.compile(r"(?<=\n)"), re.compile(r"(?<=\s)"))  # paragraph, line, word

# A child must be referenced while it runs, or Python warns about it; `start_preparing` returns only the folder.
_children: list[subprocess.Popen[bytes]] = []


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, *, progress: bool = True, in_background: bool = False
) -> Path:
    """Return the folder with the complete shards of this configuration; prepare it first if it does not exist.

    Existing shards are used without reading the corpus. Waits if another process is preparing the same shards.
    in_background: close the progress bar once a run can start, because the run then uses the terminal.
    """
    folder = shard_folder(data, tokenizer)
    if _is_complete(folder):
        return folder
    with lock(folder):
        try:
            while not _is_complete(folder):  # the previous holder of the lock may have completed it
                with contextlib.suppress(_NoValidationDocumentError):
                    _write_shards(data, tokenizer, folder, progress=progress, in_background=in_background)
        except UserError as error:
            manifest = find_manifest(folder)
            if manifest and manifest.usable:  # a run may be waiting for the next shard
                manifest.error = str(error)
                try:
                    save_manifest(manifest, folder)
                except UserError:  # the disk is full, so the run that waits cannot say why
                    logger.warning("preparing %s failed: %s", folder, error)
            else:
                shutil.rmtree(folder)
            raise
    return folder


def start_preparing(data: DataConfig, tokenizer: TokenizerConfig, *, progress: bool = True) -> Path:
    """Return the folder of this configuration's shards as soon as the manifest is `usable`.

    A child process prepares the rest. It ends with this process; sealed shards are kept and the next call continues.
    """
    folder = shard_folder(data, tokenizer)
    if _is_complete(folder):
        return folder
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", f"from osp.data.prepare import _background; _background({os.getpid()})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        start_new_session=True,  # Ctrl-C is for the trainer, which may want to save first
    )
    _children.append(child)
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin:
        child.stdin.write(pickle.dumps((SOURCES, folder, data, tokenizer, progress)))
    while child.poll() is None:
        manifest = find_manifest(folder)
        if manifest and manifest.usable and manifest.error is None:  # the child clears an error of an earlier one
            break
        time.sleep(POLL_SECONDS)
    if child.returncode == 2:
        raise UserError(child.stdout.read().decode().strip())
    if child.returncode == -signal.SIGKILL:
        raise RunError(f"preparing {folder} was killed, perhaps for lack of memory; set a lower data.num_workers")
    if child.returncode not in (None, 0):
        raise RunError(f"preparing {folder} failed with exit code {child.returncode}; its error is printed above")
    return folder


def _background(parent: int) -> None:
    """Run the child process of `start_preparing`; the message of a `UserError` goes to standard output.

    Only the end of `parent` ends it: a launcher signals every process of a job, and the trainer may still need data.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    protect_console()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
    registered, folder, data, tokenizer, progress = pickle.load(sys.stdin.buffer)
    SOURCES.update(registered)
    reply, sys.stdout = sys.stdout, sys.stderr  # nothing else may mix with the message
    try:
        if shard_folder(data, tokenizer) != folder:
            raise UserError("files of the text change during this start; start again when nothing writes to them")
        prepare(data, tokenizer, progress=progress, in_background=True)
    except UserError as error:
        os.write(reply.fileno(), printable(str(error)).encode())  # as the parent decodes it, in any locale
        sys.exit(2)


def shard_folder(data: DataConfig, tokenizer: TokenizerConfig) -> Path:
    """Return data.cache_dir / NAME-HASH; the hash covers the configuration, the source's fingerprint and the format."""
    settings = dataclasses.asdict(dataclasses.replace(data, skip_steps=()))
    for key in ("cache_dir", "num_workers", "bos", "repeat"):  # like skip_steps these do not change a byte
        del settings[key]
    if data.document_characters is None:  # as in folders of versions without this key
        del settings["document_characters"]
    spec = hashlib.sha256(read_spec(tokenizer.path)).hexdigest() if tokenizer.path else None
    source = make_source(data)
    identity = [FORMAT, settings, dataclasses.asdict(tokenizer), spec, source.fingerprint()]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._]+", "_", source.label)[:100]  # a file name has at most 255 bytes
    return Path(data.cache_dir) / f"{name}-{digest}"


def _is_complete(folder: Path) -> bool:
    manifest = find_manifest(folder)
    return manifest is not None and manifest.complete


def text_hash(text: str) -> int:
    """Return 64 bits of the sha256 of `text`, which decide its split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _write_shards(
    data: DataConfig, config: TokenizerConfig, folder: Path, *, progress: bool, in_background: bool
) -> None:
    """Fill `folder`, whose lock is held, from the start or after the last sealed shard."""
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    manifest = find_manifest(folder)
    # on a host of which this process may use a few cores, `tokenizers` keeps to these with any number of threads
    num_threads = data.num_workers or min(MOST_THREADS, os.cpu_count() or 1)
    bar = tqdm(total=data.max_tokens, unit=" tokens", unit_scale=True, disable=not progress)
    with bar, ThreadPoolExecutor(num_threads) as pool:
        if manifest:
            check_files(folder, manifest)
            manifest.error = None
        else:
            bar.set_description("training the tokenizer" if config.train else "loading the tokenizer")
            manifest = _begin(data, config, folder)
        save_manifest(manifest, folder)
        writer = _Writer(folder, manifest, max_tokens=data.max_tokens)
        number = manifest.next_document
        batches = _batches(itertools.islice(_documents(data), number, None))
        name = f"tokenizer.path={config.path}" if config.path else f"tokenizer.hub={config.hub}"
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        encoder = Encoder(tokenizer, name, eos_id=manifest.eos_id, dtype=manifest.dtype)
        pending: deque[Future[list[Document]]] = deque()
        bar.set_description("preparing data")
        bar.update(manifest.train.tokens)
        while writer.room:
            while len(pending) < 2 * num_threads and (batch := next(batches, None)):
                pending.append(pool.submit(_encode, batch, number + 1, encoder))
                number += len(batch)
            if not pending:
                break
            for document in pending.popleft().result():
                if writer.room:
                    writer.add(document)
                    bar.update(len(document.tokens))
            if in_background and manifest.usable:
                bar.close()
        writer.finish()


def _begin(data: DataConfig, config: TokenizerConfig, folder: Path) -> Manifest:
    """Write the tokenizer.json of `folder`, trained on the training split or an existing one; return a manifest."""
    limit = int(data.val_fraction * 2**64)
    of_characters = SOURCES[data.source].OF_CHARACTERS
    if of_characters and not config.train:
        raise UserError(f"data.source={data.source}: each character is a token; set tokenizer=train")
    if config.train:
        texts = (text for text in _documents(data) if text and text_hash(text) >= limit)
        tokenizer = train_tokenizer(texts, config, of_characters=of_characters)
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


def _documents(data: DataConfig) -> Iterator[str]:
    """Yield the documents of the source, in parts of `data.document_characters`.

    Raises `UserError`, before it yields any, unless two of them differ: one of training and one of validation.
    """
    size, early, first = data.document_characters, [], ""
    documents = make_source(data).documents()
    if size:
        documents = itertools.chain.from_iterable(cut(text, size, size // 2, PART_ENDS) for text in documents)
    for text in documents:
        first = first or text
        early.append(first if text else "")  # not a copy each
        if text not in ("", first):
            break
    else:
        if not first:
            raise UserError(f"the corpus is empty: {len(early)} documents, none of them with text")
        raise UserError(
            "the corpus is a single document, and one document is needed for validation; cut it with "
            f"data.document_characters={max(1, min(size or 100_000, len(first)) // 10)}, or split it into several "
            "files or records"
        )
    yield from [*early[:-1], text]
    yield from documents


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of at most BATCH_DOCUMENTS, and of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Document(NamedTuple):
    """An encoded document, or the rest of one."""

    text: str  # "" once it is no longer needed
    tokens: np.ndarray[Any, Any]  # with end-of-text; none for an empty document
    hash: int  # of the text, 64 bits


def _encode(texts: list[str], first: int, encoder: Encoder) -> list[Document]:
    return [Document(*pair, text_hash(pair[0])) for pair in zip(texts, encoder.encode(texts, first=first), strict=True)]


class _NoValidationDocumentError(Exception):
    """The first shard is full and no document is in the validation split."""


class _Writer:
    """Distribute encoded documents over the splits and seal shards; the manifest on disk lists the sealed ones."""

    def __init__(self, folder: Path, manifest: Manifest, *, max_tokens: int | None) -> None:
        self.folder, self.manifest, self.max_tokens = folder, manifest, max_tokens
        self.train: list[Document] = []  # in no shard yet
        self.val: list[Document] = []
        self.num_tokens = 0  # in self.train
        self.num_documents = manifest.next_document
        self.skip = manifest.next_token  # tokens of the next document that are already in a shard

    @property
    def room(self) -> int:
        """Tokens of the next shard when full; 0 once `data.max_tokens` training tokens are written."""
        if self.max_tokens is None:
            return self.manifest.shard_tokens
        return min(self.manifest.shard_tokens, self.max_tokens - self.manifest.train.tokens)

    def add(self, document: Document) -> None:
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
            split.documents, split.bytes = split.documents + 1, split.bytes + len(document.text.encode())
        self.train.append(document._replace(text="", tokens=document.tokens[self.skip :]))
        self.num_tokens += len(self.train[-1].tokens)
        while 0 < self.room <= self.num_tokens:
            self._seal_train(self.room)
        self.skip = 0

    def finish(self) -> None:
        """Seal the rest and mark the folder complete. Raises `UserError` unless each split gets a document."""
        if not self.manifest.usable and not self.train:
            raise UserError(
                f"all {len(self.val)} documents of the corpus are in the validation split; lower data.val_fraction"
            )
        if self.room:
            if self.num_tokens:
                self._seal_train(self.num_tokens)
            self.manifest.next_document, self.manifest.next_token = self.num_documents, 0
        self.manifest.complete = True
        save_manifest(self.manifest, self.folder)

    def _seal_train(self, num_tokens: int) -> None:
        """Write the first `num_tokens` queued tokens as a shard; before the first shard, seal the validation split."""
        val = self.manifest.val
        if not val.shards and not self.val:
            # with this limit the next try holds out the document with the smallest hash, and its copies
            self.manifest.held_out_below = min(document.hash for document in self.train) + 1
            self.manifest.train = Split()
            save_manifest(self.manifest, self.folder)
            raise _NoValidationDocumentError
        if not val.shards:
            self._seal("val", self.val)
            texts = [document.text.encode() for document in self.val]
            val.documents, val.bytes, self.val = len(texts), sum(map(len, texts)), []
            self.manifest.val_gzip_bytes = sum(len(gzip.compress(text, 9)) for text in texts)
        self._seal("train", self.train, num_tokens)
        newest, self.train = self.train[-1], []
        self.manifest.next_document, self.manifest.next_token = self.num_documents, 0
        self.num_tokens -= num_tokens  # of the newest document: without it the queue was shorter than a shard
        if self.num_tokens:
            self.skip += len(newest.tokens) - self.num_tokens
            self.train = [newest._replace(tokens=newest.tokens[-self.num_tokens :])]
            self.manifest.next_document, self.manifest.next_token = self.num_documents - 1, self.skip
        save_manifest(self.manifest, self.folder)

    def _seal(self, name: SplitName, documents: list[Document], num_tokens: int | None = None) -> None:
        """Write the (first `num_tokens`) tokens of `documents` as a shard. It counts once the manifest is saved."""
        shards = self.manifest.split(name).shards
        file = shard_name(name, len(shards))
        tokens = np.concatenate([document.tokens for document in documents])[:num_tokens]
        content = tokens.view(np.uint8).data
        write_atomically(self.folder / file, content)
        shards.append(Shard(file, len(tokens), hashlib.sha256(content).hexdigest()))
