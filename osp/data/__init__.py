"""Text in, rows of tokens out: sources -> prepare -> shards on disk -> loader."""

from osp.data.loader import Batch, Loader, Shards, check_rows_per_step, data_step, validation_batches
from osp.data.manifest import Manifest, load_manifest, verify
from osp.data.prepare import prepare, shard_folder, start
from osp.data.sources import documents, holds_documents
from osp.data.tokenizer import existing_tokenizer, load_tokenizer, token_bytes, tokenizer_hash, vocab_size

__all__ = [
    "Batch",
    "Loader",
    "Manifest",
    "Shards",
    "check_rows_per_step",
    "data_step",
    "documents",
    "existing_tokenizer",
    "holds_documents",
    "load_manifest",
    "load_tokenizer",
    "prepare",
    "shard_folder",
    "start",
    "token_bytes",
    "tokenizer_hash",
    "validation_batches",
    "verify",
    "vocab_size",
]
