"""Trained and existing tokenizers: exact byte counts, a stable hash, one-line errors."""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from osp.config import TokenizerConfig
from osp.data.tokenizer import existing_tokenizer, load_tokenizer, spec_hash, token_bytes, train_tokenizer, vocab_size
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
