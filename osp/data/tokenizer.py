"""The tokenizer: a byte-level BPE trained on the data, or an existing tokenizer.json (a file or one of the hub)."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from osp.config import TokenizerConfig
from osp.errors import UserError, as_user_error
from osp.files import parse_json

FILE_NAME = "tokenizer.json"
# Seconds until a hub that does not answer counts as unreachable. The clients retry a dead connection for longer: begin
# with a request that has this timeout.
HUB_TIMEOUT = 10
MOST_BYTES = 2**30  # of a tokenizer.json; a file with 256,000 tokens has 34 million
MOST_TOKENS = 2**24  # as of `tokenizer.vocab_size`
WORD_BYTES = 1000  # the time to train on a word grows with the square of its length
PIECE = 2**20  # characters encoded at once: `tokenizers` takes about 200 bytes of memory for one
WINDOW = 2**14  # last characters of a piece, among which it may end
PIECE_ENDS = (re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])"), re.compile(r"\s(?=\S)"))

logger = logging.getLogger(__name__)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, *, of_characters: bool = False) -> Tokenizer:
    """Train a byte-level BPE of `config.vocab_size` tokens on the first `config.sample_bytes` of `texts`.

    All 256 bytes are in the alphabet, so no text is out of vocabulary; `config.eos_token` has id 0. A small text gives
    a smaller vocabulary; `of_characters` only the 256 bytes and `config.eos_token`.
    """

    def sample() -> Iterator[str]:
        num_bytes = 0
        for text in texts:
            data = text.encode()
            # a document is cut only if it alone is larger than the sample
            yield from cut(data[: config.sample_bytes].decode(errors="ignore"))
            num_bytes += len(data)
            if num_bytes >= config.sample_bytes:
                return

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if config.vocab_size < len(alphabet) + 1:
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size}: a byte-level vocabulary holds {len(alphabet)} bytes and "
            f"tokenizer.eos_token; set {len(alphabet) + 1} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's regular expression
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(WORD_BYTES)])
    tokenizer.decoder = decoders.ByteLevel()
    wanted = len(alphabet) + 1 if of_characters else config.vocab_size
    trainer = trainers.BpeTrainer(
        vocab_size=wanted, special_tokens=[config.eos_token], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.pre_tokenizer = words
    if (size := tokenizer.get_vocab_size()) < wanted:
        logger.warning("the text yields %d tokens, fewer than tokenizer.vocab_size=%d", size, wanted)
    tokenizer.encode_special_tokens = True  # a document that mentions <|endoftext|> is not split in two
    return tokenizer


def cut(
    text: str, size: int = PIECE, window: int = WINDOW, ends: tuple[re.Pattern[str], ...] = PIECE_ENDS
) -> Iterator[str]:
    """Yield `text` in pieces of at most `size` characters.

    A piece ends at the last match of the first of the patterns `ends` that is among its last `window` characters. By
    default it ends before a space between two letters: tokenizers split text there, so the tokens of the pieces are the
    tokens of the text. A piece without such a place ends before other white space or, without any, where it is full.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        places = ([match.start() for match in pattern.finditer(text, end - window, end)] for pattern in ends)
        end = next((found[-1] for found in places if found), end)
        yield text[start:end]
        start = end
    yield text[start:]


def read_spec(path: str | Path) -> bytes:
    """Return the bytes of a tokenizer.json."""
    path = Path(path)
    with as_user_error(f"cannot read the tokenizer {path}: ", OSError):
        if path.is_fifo() or path.is_char_device() or (path.exists() and path.stat().st_size > MOST_BYTES):
            raise UserError(f"{path} is not a tokenizer.json: a device, or more than {MOST_BYTES >> 20} MiB")
        return path.read_bytes()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, set to encode text as it is: without truncation, padding and special tokens."""
    with as_user_error(f"cannot read the tokenizer {path}: ", UnicodeDecodeError):
        spec = read_spec(path).decode()
    with tokenizer_errors(f"{path} is not a tokenizer.json"):
        tokenizer = Tokenizer.from_str(spec)
    if (size := vocab_size(tokenizer)) > MOST_TOKENS:
        raise UserError(f"{path} has the token id {size - 1}; ids must be below {MOST_TOKENS}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@contextmanager
def tokenizer_errors(failure: str) -> Iterator[None]:
    """Turn errors of `tokenizers`, which raises plain exceptions, into a `UserError` that begins with `failure`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
            raise
        raise UserError(f"{failure}: {' '.join(str(error).split())}") from error


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
            failure = f"tokenizer.hub={name}: cannot get its {FILE_NAME} from the Hugging Face hub: "
            with as_user_error(failure, Exception):
                huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT)
                path = huggingface_hub.hf_hub_download(name, FILE_NAME)
    tokenizer = load_tokenizer(path)
    if (kind := json.loads(tokenizer.to_str())["model"]["type"]) not in ("BPE", "Unigram"):
        raise UserError(
            f"{path} is a {kind} tokenizer, which loses text outside its vocabulary; use a BPE or Unigram one"
        )
    names: dict[int, str] = {}
    for token, token_id in tokenizer.get_vocab().items():
        if names.setdefault(token_id, token) != token:
            raise UserError(f"{path}: the tokens {names[token_id]!r} and {token!r} have the same id {token_id}")
    added = tokenizer.get_added_tokens_decoder().get(eos_id(tokenizer, config.eos_token))
    if not (added and added.special):
        tokenizer.add_special_tokens([config.eos_token])  # it stands for no text, and a text may mention it
    if kind == "BPE":
        tokenizer.model.dropout = None  # encode a text the same way every time
    return tokenizer


def eos_id(tokenizer: Tokenizer, eos_token: str) -> int:
    """Return the id of the token that ends a document."""
    if (token_id := tokenizer.token_to_id(eos_token)) is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        raise UserError(
            f"tokenizer.eos_token={eos_token!r} is not in the tokenizer's vocabulary; its special tokens are "
            f"{', '.join(special) or 'none'}"
        )
    return token_id


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest token id: the size of an embedding."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def spec_hash(spec: str) -> str:
    """Return the sha256 of a tokenizer.json, independent of white space and the order of keys."""
    canonical = json.dumps(parse_json(spec), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the bytes of text that each token stands for, int32 (V,); 0 for special and unknown tokens, unused ids.

    The sum over a text is its length in UTF-8 after normalization, with a space that the tokenizer inserts in front.
    """
    sizes = np.zeros(vocab_size(tokenizer), dtype=np.int32)
    model, in_bytes = json.loads(tokenizer.to_str())["model"], byte_level(tokenizer)
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        text = token.removeprefix(prefix).removesuffix(suffix)
        if in_bytes:
            sizes[token_id] = len(text)  # the alphabet spells every byte with one character
        elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            sizes[token_id] = 1
        else:
            sizes[token_id] = len(text.replace("\u2581", " ").encode())  # SentencePiece's sign for a space
    unknown = model.get("unk_token")
    unknown_id = tokenizer.token_to_id(unknown) if unknown else model.get("unk_id")
    if unknown_id is not None:
        sizes[unknown_id] = 0
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        sizes[token_id] = 0 if token.special else len(token.content.encode())
    return sizes


def byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer spells text in the 256 characters of GPT-2 that stand for bytes."""

    def holds(component: Any) -> bool:
        parts = component.values() if isinstance(component, dict) else component if isinstance(component, list) else []
        return component == "ByteLevel" or any(map(holds, parts))

    spec = json.loads(tokenizer.to_str())
    return holds(spec["pre_tokenizer"]) or holds(spec["normalizer"])
