"""The manifest of a folder of token shards: its content and the progress of its preparation.

tokenizer.json
manifest.json       replaced atomically whenever a shard is sealed; every shard it lists is complete and on disk
train-00000.bin     raw tokens, uint16 or uint32; every document is followed by end-of-text
val-00000.bin
lock                held by the process that prepares the folder
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from osp.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from osp.data.tokenizer import spec_hash
from osp.errors import UserError, as_user_error
from osp.files import not_a_file, parse_json, write_atomically
from osp.schema import Count, CountOrZero, build

FORMAT = 1
FILE_NAME = "manifest.json"

SplitName = Literal["train", "val"]


def shard_name(split: SplitName, number: int) -> str:
    return f"{split}-{number:05d}.bin"


@dataclass
class Shard:
    file: str  # `shard_name`
    tokens: Count
    sha256: str


@dataclass
class Split:
    shards: list[Shard] = field(default_factory=list)
    documents: CountOrZero = 0
    bytes: CountOrZero = 0  # of the documents' text in UTF-8

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


@dataclass
class Manifest:
    source: dict[str, Any]  # the data configuration, for the reader
    tokenizer_hash: str
    vocab_size: Count
    eos_id: CountOrZero
    dtype: Literal["uint16", "uint32"]
    shard_tokens: Count
    held_out_below: int  # a document is in the validation split if its hash is below this
    format: int = FORMAT
    complete: bool = False
    error: str | None = None  # why the preparation stopped after its first shard
    # where the preparation continues after the last sealed shard
    next_document: CountOrZero = 0  # documents of the source that are finished
    next_token: CountOrZero = 0  # tokens of the next document that are already in a sealed shard
    train: Split = field(default_factory=Split)
    val: Split = field(default_factory=Split)
    val_gzip_bytes: int = 0  # of the validation documents, compressed one by one with gzip -9

    def split(self, name: SplitName) -> Split:
        return self.train if name == "train" else self.val

    @property
    def usable(self) -> bool:
        """Whether a run can start: the validation split and a first training shard are sealed."""
        return bool(self.val.shards and self.train.shards)


def load_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of `folder`. Raises `UserError` if it is missing, damaged or inconsistent."""
    path = Path(folder) / FILE_NAME
    again = f"; delete {folder} and prepare it again"
    if not path.exists():
        raise UserError(f"{folder} holds no prepared shards ({FILE_NAME} is missing)")
    with as_user_error(f"{path} is damaged (", OSError, ValueError, after=f"){again}"):
        if not_a_file(path):
            raise ValueError("not a file")
        values = parse_json(path.read_bytes())
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise damaged(folder, f"{path} is not of format {FORMAT}")
    with as_user_error(f"{path} is damaged: ", UserError, RecursionError, after=again):
        manifest = build(Manifest, values)
        if manifest.eos_id >= manifest.vocab_size:
            raise UserError(f"eos_id={manifest.eos_id} is no id of a vocabulary of {manifest.vocab_size}")
        if manifest.vocab_size - 1 > np.iinfo(manifest.dtype).max:
            raise UserError(f"dtype={manifest.dtype} cannot hold the ids of a vocabulary of {manifest.vocab_size}")
        for name in get_args(SplitName):
            for number, shard in enumerate(manifest.split(name).shards):
                if shard.file != shard_name(name, number):
                    key = f"{name}.shards[{number}].file"
                    raise UserError(f"{key}={shard.file!r}: must be the name of a shard, {shard_name(name, number)}")
    return manifest


def find_manifest(folder: Path) -> Manifest | None:
    return load_manifest(folder) if (folder / FILE_NAME).exists() else None


def save_manifest(manifest: Manifest, folder: Path) -> None:
    write_atomically(folder / FILE_NAME, json.dumps(dataclasses.asdict(manifest), indent=1).encode())


def content(manifest: Manifest) -> list[str]:
    """Return hashes of the tokenizer, the validation split and the training shards sealed so far, in this order.

    Preparation only appends: two lists belong to the same text if the shorter one begins the longer one.
    """
    return [manifest.tokenizer_hash, *(shard.sha256 for shard in manifest.val.shards + manifest.train.shards)]


def same_text(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether two lists of `content` belong to the same text."""
    return all(a == b for a, b in zip(one, other, strict=False))


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise `UserError` if the tokenizer is another one, or a sealed shard is missing or has the wrong size."""
    try:
        if not (folder / TOKENIZER_FILE).is_file():
            raise ValueError("not a file")
        actual = spec_hash((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # no file, no text or no JSON
        actual = None
    if actual != manifest.tokenizer_hash:
        raise damaged(folder, f"{folder / TOKENIZER_FILE} is not the tokenizer of the shards beside it")
    check_sizes(folder, manifest)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise `UserError` for the first sealed shard whose file is missing or has the wrong size."""
    for shard in manifest.val.shards + manifest.train.shards:
        path = folder / shard.file
        expected = shard.tokens * np.dtype(manifest.dtype).itemsize
        if not path.exists():
            raise damaged(folder, f"shard {path} is missing")
        if path.stat().st_size != expected:
            raise damaged(folder, f"shard {path} has {path.stat().st_size} bytes, the manifest says {expected}")


def damaged(folder: str | Path, problem: str) -> UserError:
    """Return the error for a folder of shards that cannot be used."""
    return UserError(f"{problem}; delete {folder} and prepare it again")
