"""All of a text is in its tokens, or the text is refused."""

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from osp.config import TokenizerConfig
from osp.data.encoder import Encoder
from osp.data.tokenizer import PIECE_ENDS, cut, eos_id, token_bytes, train_tokenizer
from osp.errors import UserError
from tests.data.test_tokenizer import random_texts

EOS = "<|endoftext|>"
SPACE = "\u2581"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")


def bpe(texts: list[str], **parts: Any) -> Tokenizer:
    """Train a BPE whose parts of a tokenizer.json are `parts`, on the characters that `texts` have."""
    options = {name: parts.pop(name) for name in ("unk_token", "initial_alphabet") if name in parts}
    alphabet, unknown = options.get("initial_alphabet", []), options.get("unk_token")
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    special = [EOS, *([unknown] if unknown else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def llama(texts: list[str], **parts: Any) -> Tokenizer:
    """Return a tokenizer like Llama 2's: spaces as U+2581 with one in front, 256 tokens for bytes."""
    characters = sorted({SPACE, *"".join(texts)} - {" "})
    vocabulary = {"<unk>": 0, EOS: 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    merges = []
    for token in [*characters, SPACE + "t", SPACE + "a", "th", "in", SPACE + "th"]:
        vocabulary.setdefault(token, len(vocabulary))
        if len(token) > 1:
            merges.append((token[:-1], token[-1]))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens([EOS, "<unk>"])
    tokenizer.encode_special_tokens = True
    return tokenizer


def in_bytes(**parts: Any) -> Callable[[list[str]], Tokenizer]:
    return lambda texts: bpe(texts, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **parts)


SEQUENCE = pre_tokenizers.Sequence([WORDS, BYTES])
NESTED = pre_tokenizers.Sequence([pre_tokenizers.Sequence([WORDS]), pre_tokenizers.Sequence([BYTES])])
PREPEND = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
METASPACE, METASPACE_INSIDE = pre_tokenizers.Metaspace(), pre_tokenizers.Metaspace(prepend_scheme="never")
# tokenizers that lose nothing, and what they put in front of a text that does not begin with white space
WHOLE: dict[str, tuple[Callable[[list[str]], Tokenizer], str]] = {
    "trained": (lambda texts: train_tokenizer(texts, TokenizerConfig(vocab_size=400)), ""),
    "ByteLevel": (in_bytes(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)), ""),
    "ByteLevel, decoder": (in_bytes(pre_tokenizer=SEQUENCE, decoder=decoders.ByteLevel()), ""),
    "Split, ByteLevel": (in_bytes(pre_tokenizer=SEQUENCE), ""),
    "nested": (in_bytes(pre_tokenizer=NESTED), ""),
    "ByteLevel with a space": (in_bytes(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), " "),
    "normalizer": (in_bytes(normalizer=normalizers.ByteLevel()), ""),
    "Prepend": (lambda texts: llama(texts, normalizer=PREPEND), " "),
    "Metaspace": (lambda texts: llama(texts, pre_tokenizer=pre_tokenizers.Metaspace()), " "),
    "Metaspace, never": (
        lambda texts: llama(texts, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")),
        "",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_tokens_stand_for_every_byte(name: str, texts: list[str]) -> None:
    make, inserted = WHOLE[name]
    tokenizer = make(texts[:20])
    sizes, eos = token_bytes(tokenizer), eos_id(tokenizer, EOS)
    encoder = Encoder(tokenizer, name, eos_id=eos, dtype="uint16")
    cases = [text.replace(EOS, "").replace(SPACE, "") for text in random_texts(seed=2) + texts[20:40]]
    for text, ids in zip(cases, encoder.encode(cases, first=1), strict=True):
        size = len(text.encode())
        assert sizes[ids].sum() - size in ({len(inserted), 0} if text[:1].isspace() else {len(inserted)}), text
        assert ids.tolist() == [*tokenizer.encode(text, add_special_tokens=False).ids, eos]
    (nothing,) = encoder.encode([""], first=1)
    assert nothing.tolist() == []


# the tokens of "normalizer" cross words
@pytest.mark.parametrize("name", [name for name in WHOLE if name != "normalizer"])
def test_pieces_of_a_long_text_give_the_tokens_of_the_whole(
    name: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = WHOLE[name][0](texts[:20])
    text = "\n".join(texts[20:60]).replace(EOS, "")
    eos = eos_id(tokenizer, EOS)
    monkeypatch.setattr(cut, "__defaults__", (5000, 1000, PIECE_ENDS))
    assert len(list(cut(text))) > 10
    encoder = Encoder(tokenizer, name, eos_id=eos, dtype="uint16")
    short, long = encoder.encode(["a b", text], first=1)
    assert long.tolist() == [*tokenizer.encode(text, add_special_tokens=False).ids, eos]
    assert short.tolist() == [*tokenizer.encode("a b", add_special_tokens=False).ids, eos]


@pytest.mark.parametrize("text", ["x" * 5000, "北京" * 2500, "\n" * 5000, "a b\n" * 2000, "- " * 2500, ""])
def test_pieces_add_up_to_the_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "__defaults__", (700, 50, PIECE_ENDS))
    pieces = list(cut(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 700
    assert all(len(piece) > 600 for piece in pieces[:-1])


def added(*tokens: AddedToken) -> Callable[[list[str]], Tokenizer]:
    def make(texts: list[str]) -> Tokenizer:
        tokenizer = in_bytes(pre_tokenizer=SEQUENCE)(texts)
        tokenizer.add_tokens(list(tokens))
        return tokenizer

    return make


def without_byte_token(texts: list[str]) -> Tokenizer:
    spec = json.loads(llama(texts, normalizer=PREPEND).to_str())
    del spec["model"]["vocab"]["<0xCE>"]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    return tokenizer


def unigram(texts: list[str]) -> Tokenizer:
    pieces = [("<unk>", 0.0), (EOS, 0.0), *((character, -3.0) for character in sorted({SPACE, *"".join(texts)}))]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", EOS])
    tokenizer.encode_special_tokens = True
    return tokenizer


TEXT = "The ship sails on.\n\tIt is late: naïve Ωμέγα, 北京 "
ASCII = ["The ship sails on the sea.\n\tIt is late: 12,345 words and <tags> of every kind"]
# tokenizers that lose some of TEXT: how they are made, and the first character that is lost
LOSSY: dict[str, tuple[Callable[[list[str]], Tokenizer], str]] = {
    "bytes without alphabet": (lambda texts: bpe(texts, pre_tokenizer=SEQUENCE), "ï"),
    "characters": (lambda texts: bpe(texts, pre_tokenizer=WORDS), "ï"),
    "characters, unknown": (lambda texts: bpe(texts, pre_tokenizer=WORDS, unk_token="<unk>"), "ï"),
    "byte fallback without a byte": (without_byte_token, "Ω"),
    "Unigram": (unigram, "ï"),
    "white space is removed": (in_bytes(pre_tokenizer=pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), BYTES])), " "),
    "letters are removed": (in_bytes(pre_tokenizer=pre_tokenizers.Sequence(
        [pre_tokenizers.Split("s", "removed"), BYTES])), "s"),
    "stripped": (in_bytes(normalizer=normalizers.Strip(), pre_tokenizer=SEQUENCE), " "),
    "replaced by nothing": (in_bytes(
        normalizer=normalizers.Replace(Regex("[^ -~]"), ""), pre_tokenizer=SEQUENCE), " "),
    "swallowed": (added(AddedToken("sails", lstrip=True, rstrip=True)), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSY)
def test_lost_text_is_refused_with_its_share_and_an_example(name: str) -> None:
    make, example = LOSSY[name]
    tokenizer = make(ASCII)
    encoder = Encoder(tokenizer, "tokenizer.path=own.json", eos_id=eos_id(tokenizer, EOS), dtype="uint16")
    with pytest.raises(UserError) as refusal:
        encoder.encode(["The", TEXT], first=41)
    message = str(refusal.value)
    assert message.startswith("tokenizer.path=own.json loses ")
    example = f", such as {example!r}" if example else ""
    assert f"% of document 42{example}; choose another tokenizer, or leave what" in message


def test_share_of_lost_text_is_right() -> None:
    tokenizer = bpe(ASCII, pre_tokenizer=SEQUENCE)
    encoder = Encoder(tokenizer, "it", eos_id=0, dtype="uint16")
    with pytest.raises(UserError, match=r"^it loses 66\.67% of document 1, such as 'Ω'"):
        encoder.encode(["the Ωμέγ"], first=1)


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD(), normalizers.Lowercase()],
    ids=lambda normalizer: type(normalizer).__name__,
)
def test_normalization_is_no_loss(normalizer: Any, texts: list[str]) -> None:
    tokenizer = in_bytes(normalizer=normalizer, pre_tokenizer=SEQUENCE)(texts[:20])
    encoder = Encoder(tokenizer, "it", eos_id=0, dtype="uint16")
    forms = ("NFC", "NFD", "NFKC", "NFKD")
    cases = [TEXT, "İstanbul K ﬁ ½", *(unicodedata.normalize(form, TEXT) for form in forms), *texts[20:30]]
    sizes = token_bytes(tokenizer)
    for text, ids in zip(cases, encoder.encode(cases, first=1), strict=True):
        assert sizes[ids].sum() == len(normalizer.normalize_str(text).encode())


def test_error_inside_the_tokenizer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bpe(ASCII, pre_tokenizer=SEQUENCE)
    encoder = Encoder(tokenizer, "it", eos_id=0, dtype="uint16")

    class PanicException(BaseException):
        """As pyo3 names the end of a thread of Rust."""

    class Failing:
        def encode_batch_fast(self, *_: Any, **__: Any) -> Any:
            raise PanicException("index out of\nbounds")

    monkeypatch.setattr(encoder, "tokenizer", Failing())
    with pytest.raises(UserError, match=r"^it fails in documents 7 to 8: index out of bounds$"):
        encoder.encode(["a", "b"], first=7)
