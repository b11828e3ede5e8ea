"""Trained and existing tokenizers: exact byte counts, a stable hash, one-line errors."""

import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from osp.config import DataConfig, TokenizerConfig
from osp.data.prepare import shard_folder
from osp.data.tokenizer import (
    WORD_BYTES,
    existing_tokenizer,
    load_tokenizer,
    spec_hash,
    token_bytes,
    train_tokenizer,
    vocab_size,
)
from osp.errors import UserError

SHARED = Path(__file__).parents[2] / "../shared/data/tokenizers"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")


def random_texts(*, seed: int = 0, num_texts: int = 200) -> list[str]:
    """Texts of characters of every length in UTF-8, with runs of spaces and sometimes a special token spelled out."""
    rng = random.Random(seed)
    ranges = [(32, 126), (32, 32), (9, 13), (0xA0, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x10FFFF)]
    texts = []
    for _ in range(num_texts):
        parts = [chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 60))]
        parts.insert(rng.randint(0, len(parts)), rng.choice(["", "<|endoftext|>", "    ", "def f(x):\n"]))
        texts.append("".join(parts))
    return texts


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, TokenizerConfig(vocab_size=500))


def test_training_gives_the_exact_vocabulary_and_no_unknown_text(trained: Tokenizer, texts: list[str]) -> None:
    assert vocab_size(trained) == trained.get_vocab_size() == 500
    assert trained.token_to_id("<|endoftext|>") == 0
    for text in random_texts() + texts:
        assert trained.decode(trained.encode(text).ids) == text
    again = train_tokenizer(texts, TokenizerConfig(vocab_size=500))
    assert spec_hash(again.to_str()) == spec_hash(trained.to_str())


def test_training_stops_reading_after_the_sample() -> None:
    def endless():
        while True:
            yield "some words and more words\n" * 10

    assert train_tokenizer(endless(), TokenizerConfig(vocab_size=260, sample_bytes=5000)).get_vocab_size() == 260


def test_words_of_ordinary_length_give_the_tokenizer_of_the_library(texts: list[str], trained: Tokenizer) -> None:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(texts, trainer)
    assert json.loads(plain.to_str())["model"] == json.loads(trained.to_str())["model"]
    assert json.loads(plain.to_str())["pre_tokenizer"] == json.loads(trained.to_str())["pre_tokenizer"]


@pytest.mark.parametrize("text", ["x" * 50_000, " " * 50_000, "-" * 50_000, "7" * 50_000], ids=["x", " ", "-", "7"])
def test_tokens_are_learned_from_words_of_bounded_length(text: str) -> None:
    """The time grows with the square of the length of a word; a token of more bytes would show a longer one."""
    tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=300))
    assert 256 <= max(map(len, tokenizer.get_vocab())) <= WORD_BYTES


def test_sample_bounds_a_single_document() -> None:
    config = TokenizerConfig(vocab_size=300, sample_bytes=2000)
    head = "été words " * 200
    assert spec_hash(train_tokenizer([head + "another end " * 500], config).to_str()) == spec_hash(
        train_tokenizer([head.encode()[:2000].decode(errors="ignore")], config).to_str()
    )


def test_small_text_gives_a_smaller_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer(["abab"], TokenizerConfig(vocab_size=4096))
    assert 257 <= tokenizer.get_vocab_size() < 270
    assert "fewer than tokenizer.vocab_size=4096" in caplog.text
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=256: .* set 257 or more"):
        train_tokenizer(["abab"], TokenizerConfig(vocab_size=256))


@pytest.mark.parametrize(
    "name", ["trained", pytest.param("gpt2", marks=needs_shared), pytest.param("gpt_neox_20b", marks=needs_shared)]
)
def test_token_bytes_sum_to_the_length_of_the_text(trained: Tokenizer, texts: list[str], name: str) -> None:
    tokenizer = trained if name == "trained" else load_tokenizer(SHARED / f"{name}.json")
    sizes = token_bytes(tokenizer)
    assert sizes.dtype == "int32"
    assert sizes.shape == (vocab_size(tokenizer),)
    assert sizes[tokenizer.token_to_id("<|endoftext|>")] == 0
    for text in random_texts(seed=1) + texts:
        # NeoX normalizes the text before it encodes it
        expected = unicodedata.normalize("NFC", text) if name == "gpt_neox_20b" else text
        if name == "gpt_neox_20b" and tokenizer.normalizer.normalize_str(text) != expected:
            continue  # `tokenizers` carries another version of the Unicode tables
        assert sizes[tokenizer.encode(text, add_special_tokens=False).ids].sum() == len(expected.encode())


def test_special_tokens_inside_a_text_are_plain_text(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (trained, load_tokenizer(tmp_path / "tokenizer.json")):
        assert 0 not in tokenizer.encode("a<|endoftext|>b").ids


def test_truncation_and_padding_of_the_file_are_off(trained: Tokenizer, tmp_path: Path) -> None:
    spec = Tokenizer.from_str(trained.to_str())
    spec.enable_truncation(4)
    spec.enable_padding(length=4)
    spec.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert len(tokenizer.encode("\n".join("abcdefgh")).ids) > 4
    assert len(tokenizer.encode("a").ids) == 1


def test_hash_depends_on_the_content_alone(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    backwards = dict(reversed(json.loads(trained.to_str()).items()))
    path.write_text(json.dumps(backwards, indent=7))
    assert spec_hash(load_tokenizer(path).to_str()) == spec_hash(path.read_text()) == spec_hash(trained.to_str())
    other = train_tokenizer(["another text"], TokenizerConfig(vocab_size=260))
    assert spec_hash(other.to_str()) != spec_hash(trained.to_str())


def changed(tokenizer: Tokenizer, path: Path, **model: Any) -> TokenizerConfig:
    """Write a tokenizer.json with other values in its model; return the configuration that names it."""
    spec = json.loads(tokenizer.to_str())
    spec["model"] |= model
    path.write_text(json.dumps(spec))
    return TokenizerConfig(train=False, path=str(path))


def test_ids_that_cannot_be_used_are_refused(trained: Tokenizer, tmp_path: Path) -> None:
    path, vocabulary = tmp_path / "own.json", json.loads(trained.to_str())["model"]["vocab"]
    with pytest.raises(UserError, match=r"own\.json has the token id 4294967295; ids must be below 16777216"):
        existing_tokenizer(changed(trained, path, vocab=vocabulary | {"zz": 2**32 - 1}))
    for token_id in (2**40, -1, 1.5):
        with pytest.raises(UserError, match=r"own\.json is not a tokenizer\.json: .* expected u32"):
            existing_tokenizer(changed(trained, path, vocab=vocabulary | {"zz": token_id}))
    with pytest.raises(UserError, match=r"own\.json: the tokens '.+' and '.+' have the same id 300"):
        existing_tokenizer(changed(trained, path, vocab=vocabulary | {"zz": 300}))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "deep"])
def test_file_that_is_no_tokenizer_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    config = TokenizerConfig(train=False, path=str(path))
    message = r"own\.json: Is a directory" if kind == "folder" else r"own\.json is not a tokenizer\.json"
    with pytest.raises(UserError, match=message):
        existing_tokenizer(config)
    if kind != "deep":
        with pytest.raises(UserError, match=message):
            shard_folder(DataConfig(), config)


def test_end_of_text_that_is_an_ordinary_token_becomes_special(trained: Tokenizer, tmp_path: Path) -> None:
    """Else it would count as text in bits per byte, and a document that mentions it would be cut there."""
    spec = json.loads(trained.to_str())
    for added in ([], [spec["added_tokens"][0] | {"special": False}]):
        path = tmp_path / "own.json"
        path.write_text(json.dumps(spec | {"added_tokens": added}))
        tokenizer = existing_tokenizer(TokenizerConfig(train=False, path=str(path)))
        assert token_bytes(tokenizer)[0] == 0
        assert 0 not in tokenizer.encode("a<|endoftext|>b").ids
        assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_text_is_encoded_without_dropout(trained: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    tokenizer = existing_tokenizer(changed(trained, tmp_path / "own.json", dropout=0.5))
    for text in texts[:10]:
        assert tokenizer.encode(text).ids == trained.encode(text).ids


def test_parts_of_words_count_without_their_marks() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "##b": 1, "b</w>": 2, "ab</w>": 3, "<0x41>": 4, "<unk>": 5}, []))
    spec = json.loads(tokenizer.to_str())
    spec["model"] |= {"continuing_subword_prefix": "##", "end_of_word_suffix": "</w>", "unk_token": "<unk>"}
    assert token_bytes(Tokenizer.from_str(json.dumps(spec))).tolist() == [1, 1, 1, 2, 6, 0]
    spec["model"]["byte_fallback"] = True
    assert token_bytes(Tokenizer.from_str(json.dumps(spec))).tolist() == [1, 1, 1, 2, 1, 0]


def test_unfit_tokenizers_are_refused(trained: Tokenizer, tmp_path: Path) -> None:
    def load(**options: Any) -> Tokenizer:
        return existing_tokenizer(TokenizerConfig(train=False, **options))

    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        load(path=str(path))
    path.write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json: "):
        load(path=str(path))
    trained.save(str(path))
    with pytest.raises(UserError, match=r"eos_token='</s>' is not in .*; its special tokens are <\|endoftext\|>"):
        load(path=str(path), eos_token="</s>")
    with pytest.raises(UserError, match=r"exactly one of tokenizer\.path=FILE and tokenizer\.hub=NAME"):
        load()


@pytest.mark.timeout(120)  # the libraries' own retries take longer
def test_missing_hub_tokenizer_fails_in_seconds() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.hub=osp-tests/none: cannot get its tokenizer\.json"):
        existing_tokenizer(TokenizerConfig(train=False, hub="osp-tests/none"))
