"""The examples of docs/extending.md work: each class joins its module, its YAML file selects it, and its tests pass."""

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml

from osp.config import from_dict
from osp.data.sources import SOURCES, make_source
from osp.model.norms import NORMS
from osp.model.transformer import meta_model
from osp.optim.groups import build_groups
from osp.optim.rules import RULES
from osp.quant.formats import FORMATS
from osp.quant.spec import QuantSpec
from osp.schema import build
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TABLES: dict[str, dict[str, Any]] = {"norm": NORMS, "optimizer": RULES, "data": SOURCES, "quant": FORMATS}
BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
SECTIONS = {
    title.strip(): BLOCK.findall(text) for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}
EXAMPLES = {title: blocks for title, blocks in SECTIONS.items() if blocks}


@pytest.fixture
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Yield the module that the example extends, and take the example out of it afterwards."""
    path = request.param
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    names = set(vars(module))
    before = [dict(table) for table in TABLES.values()]
    yield module
    for name in set(vars(module)) - names:
        delattr(module, name)
    for table, entries in zip(TABLES.values(), before, strict=True):
        table.clear()
        table.update(entries)


def test_there_is_an_example_of_every_choice() -> None:
    assert [path.split("/")[1] for blocks in EXAMPLES.values() for path, _ in blocks if path.endswith("yaml")] == [
        *TABLES
    ]
    assert len(re.findall("^```python", PAGE, flags=re.MULTILINE)) == 2 * len(TABLES), "a block without a title"


@pytest.mark.parametrize(
    ("module", "title"), [(blocks[0][0], title) for title, blocks in EXAMPLES.items()], indirect=["module"]
)
def test_example_works(
    module: ModuleType, title: str, tiny_values: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    (path, code), (config, values), (tests, test_code) = EXAMPLES[title]
    known = {name: set(table) for name, table in TABLES.items()}
    exec(compile(code, path, "exec"), vars(module))
    group, name = config.removesuffix(".yaml").split("/")[1:]
    assert set(TABLES[group]) - known[group] == {name}, "the dict has an entry with the name of the YAML file"
    assert name in values
    choose(group, yaml.safe_load(values), tiny_values)

    namespace: dict[str, Any] = {}
    exec(compile(test_code, tests, "exec"), namespace)
    functions = [function for name, function in namespace.items() if name.startswith("test_")]
    assert len(functions) >= 2
    for function in functions:
        function(**{key: request.getfixturevalue(key) for key in inspect.signature(function).parameters})


def choose(group: str, values: dict[str, Any], tiny_values: dict[str, Any]) -> None:
    """Check a YAML file of `configs/GROUP` as the scripts do before they start. Raises `UserError` if it is wrong."""
    if group == "quant":
        build(QuantSpec, values, path="quant")
        return
    if "paths" in values:
        assert values.pop("paths") == [], "the user names them"
    config = from_dict({**tiny_values, group: {**tiny_values.get(group, {}), **values}})
    build_groups(meta_model(config.model), config.optimizer)
    make_source(config.data)
