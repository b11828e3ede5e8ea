"""A new source needs one class and one entry in `SOURCES`: counted sentences, which only this file knows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from osp.config import Config, DataConfig, SourceConfig, TextConfig
from osp.data.manifest import load_manifest
from osp.data.prepare import shard_folder
from osp.data.sources import SOURCES, Source, make_source
from osp.errors import UserError
from osp.train.setup import train
from tests.conftest import losses

NUM_DOCUMENTS = 300


class Counting(Source):
    """Sentences that count; `data.dataset` is the noun."""

    def __init__(self, config: TextConfig, key: str = "data") -> None:
        super().__init__(config, key)
        if not config.dataset:
            raise UserError(f"{key}.dataset is not set; name what to count, for example sheep")

    def documents(self) -> Iterator[str]:
        for number in range(NUM_DOCUMENTS):
            yield " ".join(f"{number + i} {self.config.dataset}." for i in range(60))

    def fingerprint(self) -> Any:
        return NUM_DOCUMENTS


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "counting", Counting)


@pytest.mark.usefixtures("counting")
def test_made_up_source_is_prepared_and_trained_on(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Through the real setup, which prepares shards in a child process."""
    cache = f"data.cache_dir={tmp_path / 'shards'}"
    config = tiny("data.source=counting", "data.dataset=sheep", "data.paths=[]", cache, name="run")
    train(config)
    values = losses(tmp_path / "run")
    assert values[-1] < values[0]
    folder = shard_folder(config.data, config.tokenizer)
    assert folder.name.startswith("counting-")
    manifest = load_manifest(folder)
    assert manifest.complete
    assert manifest.train.documents + manifest.val.documents == NUM_DOCUMENTS


@pytest.mark.usefixtures("counting")
def test_made_up_source_is_a_part_of_a_mixture() -> None:
    parts = tuple(SourceConfig(source="counting", dataset=noun) for noun in ("sheep", "cows"))
    first, second, *_ = make_source(DataConfig(source="mixture", mixture=parts)).documents()
    assert (first[:8], second[:7]) == ("0 sheep.", "0 cows.")


@pytest.mark.usefixtures("counting")
def test_made_up_source_checks_its_own_configuration() -> None:
    with pytest.raises(UserError, match=r"^data.dataset is not set; name what to count"):
        make_source(DataConfig(source="counting"))


def test_unregistered_source_is_refused(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"^data.source='counting': unknown source; choose from python_stdlib, text, h"):
        train(tiny("data.source=counting"))
