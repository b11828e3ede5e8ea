"""Text in, rows of tokens out: sources -> prepare -> shards on disk -> loader."""

from osp.data.loader import Batch, Loader, Shards, check_rows_per_step, data_step, validation_batches
from osp.data.manifest import Manifest, load_manifest, verify
from osp.data.prepare import prepare, shard_folder, start
from osp.data.sources import SOURCES, Source, documents, holds_documents, make_source
from osp.data.tokenizer import existing_tokenizer, load_tokenizer, token_bytes, tokenizer_hash, vocab_size

__all__ = [
    "SOURCES",
    "Batch",
    "Loader",
    "Manifest",
    "Shards",
    "Source",
    "check_rows_per_step",
    "data_step",
    "documents",
    "existing_tokenizer",
    "holds_documents",
    "load_manifest",
    "load_tokenizer",
    "make_source",
    "prepare",
    "shard_folder",
    "start",
    "token_bytes",
    "tokenizer_hash",
    "validation_batches",
    "verify",
    "vocab_size",
]
