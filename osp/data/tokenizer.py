"""The tokenizer: a byte-level BPE trained on the data, or an existing tokenizer.json (a file or one of the hub)."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from osp.config import TokenizerConfig
from osp.errors import UserError

FILE_NAME = "tokenizer.json"
HUB_TIMEOUT = 10  # seconds until a hub that does not answer counts as unreachable

logger = logging.getLogger(__name__)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train a byte-level BPE of `config.vocab_size` tokens on the first `config.sample_bytes` of `texts`.

    All 256 bytes are in the alphabet, so no text is out of vocabulary; `config.eos_token` has id 0. A small text gives
    a smaller vocabulary.
    """

    def sample() -> Iterator[str]:
        num_bytes = 0
        for text in texts:
            yield text
            num_bytes += len(text.encode())
            if num_bytes >= config.sample_bytes:
                return

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if config.vocab_size < len(alphabet) + 1:
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size}: a byte-level vocabulary holds {len(alphabet)} bytes and "
            f"tokenizer.eos_token; set {len(alphabet) + 1} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's regular expression
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[config.eos_token], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample(), trainer)
    size = tokenizer.get_vocab_size()
    if size < config.vocab_size:
        logger.warning("the text yields %d tokens, fewer than tokenizer.vocab_size=%d", size, config.vocab_size)
    tokenizer.encode_special_tokens = True  # a document that mentions <|endoftext|> is not split in two
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, set to encode text as it is: without truncation, padding and special tokens."""
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UserError(f"{path} is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def existing_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer that `config.path` or `config.hub` names."""
    assert not config.train
    if (config.path is None) == (config.hub is None):
        raise UserError("tokenizer.train=false needs exactly one of tokenizer.path=FILE and tokenizer.hub=NAME")
    path, name = config.path, str(config.hub)
    if path is None:
        import huggingface_hub

        path = huggingface_hub.try_to_load_from_cache(name, FILE_NAME)
        if not isinstance(path, str):
            with ask_hub(f"tokenizer.hub={name}: cannot get its {FILE_NAME}"):
                huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT)
                path = huggingface_hub.hf_hub_download(name, FILE_NAME)
    tokenizer = load_tokenizer(path)
    kind = json.loads(tokenizer.to_str())["model"]["type"]
    if kind not in ("BPE", "Unigram"):
        raise UserError(
            f"{path} is a {kind} tokenizer, which loses text outside its vocabulary; use a BPE or Unigram one"
        )
    eos_id(tokenizer, config.eos_token)
    return tokenizer


def eos_id(tokenizer: Tokenizer, eos_token: str) -> int:
    """Return the id of the token that ends a document."""
    token_id = tokenizer.token_to_id(eos_token)
    if token_id is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        raise UserError(
            f"tokenizer.eos_token={eos_token!r} is not in the tokenizer's vocabulary; its special tokens are "
            f"{', '.join(special) or 'none'}"
        )
    return token_id


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest token id: the size of an embedding."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def spec_hash(spec: str) -> str:
    """Return the sha256 of a tokenizer.json, independent of white space and the order of keys."""
    canonical = json.dumps(json.loads(spec), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the bytes of text that each token stands for, int32 (V,); 0 for special tokens and unused ids.

    The sum over a text is its length in UTF-8 for byte-level tokenizers, after normalization; bits per byte is exact.
    SentencePiece-like tokenizers may count the space that they insert in front.
    """
    sizes = np.zeros(vocab_size(tokenizer), dtype=np.int32)
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    byte_level = "ByteLevel" in [part["type"] for part in decoder.get("decoders", [decoder]) if part]
    for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        if byte_level:
            sizes[token_id] = len(token)  # the alphabet spells every byte with one character
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            sizes[token_id] = 1
        else:
            sizes[token_id] = len(token.replace("\u2581", " ").encode())  # SentencePiece's sign for a space
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        sizes[token_id] = 0 if token.special else len(token.content.encode())
    return sizes


@contextmanager
def ask_hub(failure: str) -> Iterator[None]:
    """Turn errors of requests to the Hugging Face hub into a `UserError` that begins with `failure`.

    The clients retry a dead connection for many seconds: begin with a request that has a `timeout`.
    """
    try:
        yield
    except Exception as error:  # the hub's client raises the errors of whichever HTTP library it is built on
        raise UserError(f"{failure} from the Hugging Face hub: {' '.join(str(error).split())}") from error
