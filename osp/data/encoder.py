"""Documents -> token ids, in pieces of bounded size, and only if the tokens stand for all of the text."""

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders

from osp.data.tokenizer import byte_level, cut, token_bytes, tokenizer_errors
from osp.errors import UserError

Ids = np.ndarray[Any, Any]


class Encoder:
    """Encode documents. A document that loses text in its tokens is refused.

    Text is lost if a character is in no token, or in the token for unknown text. Then the tokens stand for fewer bytes
    than the text has. Normalization changes this number too: `_check` tells the two apart.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, *, eos_id: int, dtype: str) -> None:
        """name: the tokenizer in messages"""
        self.tokenizer, self.name, self.eos_id, self.dtype = tokenizer, name, eos_id, dtype
        self._sizes = token_bytes(tokenizer)
        self._sizes[eos_id] = 0
        self._byte_level = byte_level(tokenizer)
        self._inserted = functools.cache(self._inserted_before)

    def encode(self, texts: list[str], *, first: int) -> list[Ids]:
        """Return the ids of each text, with end-of-text, none if empty; `UserError` if text is lost. first: number"""
        pieces = [list(self._pieces(text)) for text in texts]
        if max(map(len, pieces)) == 1:
            return self._encode(texts, first)
        parts = [[self._encode([piece], number)[0] for piece in group] for number, group in enumerate(pieces, first)]
        return [np.concatenate([*(ids[:-1] for ids in group[:-1]), group[-1]]) for group in parts]

    def _pieces(self, text: str) -> Iterator[str]:
        for number, piece in enumerate(cut(text)):
            # a tokenizer that puts a space in front of every text adds the one that begins this piece
            yield piece[1:] if number and len(piece) > 1 and piece[0] == " " and self._inserted(" ") else piece

    def _encode(self, texts: list[str], first: int) -> list[Ids]:
        with tokenizer_errors(f"{self.name} fails in documents {first} to {first + len(texts) - 1}"):
            # encode_batch_fast lets other threads run, encode does not
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array([*part.ids, self.eos_id] if part.ids else [], dtype=self.dtype) for part in encodings]
        ends = np.cumsum([0, *map(len, ids)])
        sizes = np.diff(np.append(0, np.cumsum(self._sizes[np.concatenate(ids)], dtype=np.int64))[ends]).tolist()
        for number, (text, size) in enumerate(zip(texts, sizes, strict=True), first):
            if size != len(text.encode()) + self._inserted(text[:1]):
                self._check(text, size, number)
        return ids

    def _inserted_before(self, character: str) -> int:
        """Return the bytes that the tokenizer inserts in front of a text that begins with `character`."""
        text = character and character + "a"
        return max(0, self._bytes_read(text) - len(text.encode()))

    def _bytes_read(self, text: str) -> int:
        """Return the bytes of `text` that reach the vocabulary."""
        if self.tokenizer.normalizer:
            text = self.tokenizer.normalizer.normalize_str(text)
        if self.tokenizer.pre_tokenizer:
            text = "".join(part for part, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text))
        return len(text) if self._byte_level else len(text.replace("\u2581", " ").encode())

    def _check(self, text: str, size: int, number: int) -> None:
        """Raise `UserError` if the tokens of `text`, which stand for `size` bytes, lack some of it."""
        lost = self._lost(text)
        if lost or size < self._bytes_read(text):
            num_bytes = len(text.encode())
            share = max(len(lost.encode()), num_bytes - size) / num_bytes
            example = f", such as {lost[0]!r}" if lost else ""
            raise UserError(
                f"{self.name} loses {share:.2%} of document {number}{example}; choose another tokenizer, or leave what "
                "this one does not know out of the text"
            )

    def _lost(self, text: str) -> str:
        """Return the characters of `text` that the vocabulary lacks, or else those removed before they reach it."""
        ids = {character: self.tokenizer.encode(character, add_special_tokens=False).ids for character in set(text)}
        if unknown := {c for c in ids if self._sizes[ids[c]].sum() < self._bytes_read(c)}:
            return "".join(character for character in text if character in unknown)
        normalizer, pre_tokenizer = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        normalized = normalizer.normalize_str(text) if normalizer else text
        readable = decoders.ByteLevel().decode([normalized]) if "ByteLevel" in str(normalizer) else normalized
        removed = Counter(_fold(text)) - Counter(_fold(readable))
        if removed or not pre_tokenizer:
            return "".join(removed.elements())
        spans = [(0, 0), *(span for _, span in pre_tokenizer.pre_tokenize_str(normalized)), (len(normalized), 0)]
        return "".join(normalized[end:start] for (_, end), (start, _) in itertools.pairwise(spans))


def _fold(text: str) -> str:
    """Return `text` without what a normalization may change: case, composition, the kind of white space."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return re.sub(r"[\s\u2581]", " ", folded)
