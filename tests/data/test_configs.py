"""Every data and tokenizer YAML builds, except for the keys that the user must set."""

from pathlib import Path

import pytest
import yaml

from osp.config import DataConfig, TokenizerConfig, from_dict
from osp.data.sources import make_source
from osp.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
INCOMPLETE = {"data/text": "data.paths is empty", "data/hf": "data.dataset is not set", "tokenizer/file": "FILE"}


@pytest.mark.parametrize("path", sorted([*CONFIGS.glob("data/*.yaml"), *CONFIGS.glob("tokenizer/*.yaml")]), ids=str)
def test_yaml_builds_a_source(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    group = path.parent.name
    name = f"{group}/{path.stem}"
    whole = {"train": {"steps": 1}, "model": {"vocab_size": 49152}, group: values}
    if name in INCOMPLETE:
        with pytest.raises(UserError, match=INCOMPLETE[name]):
            make_source(from_dict(whole).data)
    else:
        make_source(from_dict(whole).data)


def test_defaults_are_those_of_the_dataclass() -> None:
    def load(name: str) -> dict[str, object]:
        return {"train": {"steps": 1}, name.split("/")[0]: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())}

    assert from_dict(load("data/python_stdlib")).data == DataConfig()
    assert from_dict(load("tokenizer/train")).tokenizer == TokenizerConfig()


def test_smollm_weights() -> None:
    mixture = yaml.safe_load((CONFIGS / "data/smollm_corpus.yaml").read_text())["mixture"]
    assert [part["weight"] for part in mixture] == [0.70, 0.15, 0.08, 0.06, 0.01]
