"""Real text for the data tests: modules of the standard library, and a tokenizer trained on them."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from osp.config import DataConfig, TokenizerConfig
from osp.data.prepare import prepare
from osp.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """130 texts, 260 kB: pieces of the standard library's modules, two of them equal, one empty, one with U+2028."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces = [path.read_bytes().decode()[:2000] for path in sorted(root.glob("*.py"))[:127]]
    return [*pieces[:40], "", *pieces[40:80], "cut\u2028here\x85and\rhere\r\nand naïve 🙂", pieces[3], *pieces[80:]]


@pytest.fixture(scope="session")
def jsonl_corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as one jsonl file."""
    return _write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer_config(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    """A tokenizer.json of 400 tokens on disk."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(texts, TokenizerConfig(vocab_size=400, sample_bytes=50_000)).save(str(path))
    return TokenizerConfig(train=False, path=str(path))


@pytest.fixture(scope="session")
def data_config(jsonl_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Shards of 16,001 tokens, so that documents cross from one to the next."""
    cache = str(tmp_path_factory.mktemp("shards"))
    return DataConfig(
        source="text", paths=(str(jsonl_corpus),), cache_dir=cache, shard_tokens=16_001, val_fraction=0.1, num_workers=1
    )


@pytest.fixture(scope="session")
def shards(data_config: DataConfig, tokenizer_config: TokenizerConfig) -> Path:
    """The prepared folder. Tests that change it work on a copy."""
    return prepare(data_config, tokenizer_config, progress=False)


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[str]], Path]:
    return _write_jsonl


def _write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), newline="")
    return path
