"""The import order of the wings of `osp`, read from the sources without importing them."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports from its own wing and from earlier ones. The modules directly in `osp` are wings of one file.
GROUND_FLOOR = ("errors", "tables", "schema", "model_config", "config", "files", "process", "device", "distributed")
WINGS = (
    *("data", "optim", "model", "run", "quant", "monitor"),
    *("evaluation", "report", "train", "convert", "plan", "ablation"),
)
ORDER = (*GROUND_FLOOR, *WINGS)
# Third-party packages that one file hides from the rest.
ONLY_IN = {
    "deepspeed": {"osp/distributed.py", "osp/train/engine.py"},
    "wandb": {"osp/run/logger.py"},
    "wandb_workspaces": {"osp/run/metrics.py"},
    "hydra": {"scripts/entry.py"},
    "omegaconf": {"scripts/entry.py"},
}
VAGUE = {"utils", "util", "common", "base", "helpers", "misc", "core", "tools"}

SOURCES = sorted(path.relative_to(ROOT) for folder in ("osp", "scripts") for path in (ROOT / folder).rglob("*.py"))
MODULES = [path for path in SOURCES if path.parts[0] == "osp" and path != Path("osp/__init__.py")]


def wing_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def imports(source: str, package: tuple[str, ...] = ("osp",)) -> Iterator[tuple[str, ...]]:
    """Return the dotted names that a source imports, also inside functions, as tuples: ("osp", "optim", "muon")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*start, *(node.module.split(".") if node.module else ()))
            # `from osp import optim` and `from osp.optim import muon` name modules too
            yield from ((*module, alias.name) for alias in node.names)


def violations(wing: str, source: str, package: tuple[str, ...] = ("osp",)) -> list[str]:
    """Return the imports of a source in `wing` that point to a later wing."""
    names = (name for name in imports(source, package) if name[0] == "osp")
    return [
        f"{wing} imports {'.'.join(name)}"
        for name in names
        if name[1] not in ORDER or ORDER.index(name[1]) > ORDER.index(wing)
    ]


def test_every_wing_has_its_place() -> None:
    assert {wing_of(path) for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_to_earlier_wings(path: Path) -> None:
    assert violations(wing_of(path), (ROOT / path).read_text(), path.parts[:-1]) == []


def test_there_is_no_import_cycle() -> None:
    names = {path.with_suffix("").parts: path for path in MODULES}
    names |= {path.parent.parts: path for path in MODULES if path.name == "__init__.py"}
    edges = {
        path: {
            names[name[:length]]
            for name in imports((ROOT / path).read_text(), path.parts[:-1])
            for length in range(2, len(name) + 1)
            # a package may import its own modules
            if name[:length] in names and name[:length] != path.parent.parts
        }
        - {path}
        for path in MODULES
    }
    while leaves := {path for path, others in edges.items() if not others & edges.keys()}:
        edges = {path: others for path, others in edges.items() if path not in leaves}
    assert not edges, sorted(map(str, edges))


@pytest.mark.parametrize(("package", "allowed"), ONLY_IN.items())
def test_third_party_package_is_imported_by_one_file(package: str, allowed: set[str]) -> None:
    users = {str(path) for path in SOURCES if any(name[0] == package for name in imports((ROOT / path).read_text()))}
    assert users == allowed


def test_osp_does_not_import_scripts_or_tests() -> None:
    outside = {"scripts", "tests", "entry", "benchmarks"}
    users = {
        str(path)
        for path in SOURCES
        if path.parts[0] == "osp" and any(name[0] in outside for name in imports((ROOT / path).read_text()))
    }
    assert not users


def test_configuration_is_checked_without_torch() -> None:
    """A misspelt key is reported without loading torch: config and errors do not import it."""
    allowed = set(sys.stdlib_module_names) | {"osp", "pydantic", "pydantic_core"}
    for module in ("osp/config.py", "osp/model_config.py", "osp/schema.py", "osp/errors.py", "osp/__init__.py"):
        tree = ast.parse((ROOT / module).read_text())
        top_level = "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        assert {name[0] for name in imports(top_level)} <= allowed, module


def test_no_file_has_a_vague_name() -> None:
    assert not [path for path in SOURCES if path.stem in VAGUE or path.parent.name in VAGUE]


@pytest.mark.parametrize(
    ("wing", "source", "expected"),
    [
        ("optim", "from osp.model.norms import SSNorm", ["optim imports osp.model.norms.SSNorm"]),
        ("data", "from osp import model", ["data imports osp.model"]),
        ("model", "def f():\n    import osp.train.engine", ["model imports osp.train.engine"]),
        ("data", "from ..train import setup", ["data imports osp.train.setup"]),
        ("model", "from osp.model.norms import SSNorm\nfrom osp.config import Config\nimport torch", []),
        ("train", "from osp.nowhere import x", ["train imports osp.nowhere.x"]),
    ],
)
def test_the_rules_find_a_violation(wing: str, source: str, expected: list[str]) -> None:
    package = ("osp", wing)
    assert violations(wing, source, package) == expected
