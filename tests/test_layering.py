"""Who may import whom inside `osp`, read from the sources: nothing is imported here."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: a part imports parts of lower layers. Parts are the modules and packages directly in `osp`.
LAYERS = (
    {"config"},
    {"cpu", "fp8", "growth", "precision", "preemption", "spikes", "tables"},
    {"attention", "loss", "norms", "panels", "penalty", "quantize"},
    {"model"},
    {"convert"},
    {"checkpoint", "data", "engine", "generate", "hf", "launcher", "logger", "optim", "run"},
    {"evaluation", "monitor", "report", "verify_resume"},
    {"ablation", "certificate", "completion"},
    {"model_card"},
    {"conversion", "export", "trainer"},
    {"train"},
    {"plan"},
)
# Parts of one layer do not know each other, except:
SIBLINGS = {("engine", "optim"), ("run", "checkpoint"), ("hf", "data"), ("evaluation", "monitor")}
# Lower, and still not to be known: the optimizer is mathematics and layout, data is text and tokens.
FORBIDDEN = {("optim", "model"), ("optim", "norms"), ("data", "model"), ("logger", "model"), ("engine", "model")}
# Third parties with one door each.
ONLY_IN = {"deepspeed": {"osp/engine.py"}, "wandb": {"osp/logger.py"}, "hydra": {"scripts/entry.py"}}
ONLY_IN["wandb_workspaces"] = {"osp/panels.py"}
ONLY_IN["rich"] = {"osp/report/terminal.py", "scripts/watch.py"}
ONLY_IN["omegaconf"] = ONLY_IN["hydra"]
VAGUE = {"utils", "util", "common", "base", "helpers", "misc", "core", "tools"}

PARTS = set[str]().union(*LAYERS)
SOURCES = sorted(path.relative_to(ROOT) for folder in ("osp", "scripts") for path in (ROOT / folder).rglob("*.py"))


def imports(source: str, package: tuple[str, ...] = ("osp",)) -> Iterator[tuple[str, ...]]:
    """Dotted names that a source imports anywhere, functions included, as tuples: ("osp", "optim", "muon")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*start, *(node.module.split(".") if node.module else ()))
            # `from osp import optim` and `from osp.optim import muon` name modules too
            yield from ((*module, alias.name) for alias in node.names)


def violations(part: str, source: str, package: tuple[str, ...] = ("osp",)) -> list[str]:
    """What a source of `part` imports from `osp` against the tables above."""
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    found = []
    for name in imports(source, package):
        if name[0] != "osp" or name[1] == part:
            continue
        other = name[1]
        allowed = layer.get(other, len(LAYERS)) < layer[part] or (part, other) in SIBLINGS
        if not allowed or (part, other) in FORBIDDEN:
            found.append(f"{part} imports {'.'.join(name)}")
    return found


def test_every_part_has_one_layer() -> None:
    parts = {path.parts[1].removesuffix(".py") for path in SOURCES if path.parts[0] == "osp"} - {"__init__"}
    assert parts == PARTS, "give a new part of osp its layer in LAYERS"
    assert sum(map(len, LAYERS)) == len(PARTS)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] == "osp" and p.parts[1] != "__init__.py"], ids=str)
def test_imports_point_downwards(path: Path) -> None:
    part = path.parts[1].removesuffix(".py")
    assert violations(part, (ROOT / path).read_text(), path.parts[:-1]) == []


def test_exceptions_are_in_use() -> None:
    """An exception that nobody needs any more leaves the table."""
    used = {
        (path.parts[1].removesuffix(".py"), name[1])
        for path in SOURCES
        if path.parts[0] == "osp"
        for name in imports((ROOT / path).read_text(), path.parts[:-1])
        if name[0] == "osp"
    }
    assert used >= SIBLINGS


@pytest.mark.parametrize(("package", "allowed"), ONLY_IN.items())
def test_third_party_has_one_door(package: str, allowed: set[str]) -> None:
    users = {str(path) for path in SOURCES if any(name[0] == package for name in imports((ROOT / path).read_text()))}
    assert users == allowed


def test_osp_does_not_know_scripts_or_tests() -> None:
    forbidden = {"scripts", "tests", "benchmarks", *(p.stem for p in SOURCES if p.parts[0] == "scripts")}
    for path in SOURCES:
        if path.parts[0] == "osp":
            assert not {name[0] for name in imports((ROOT / path).read_text(), path.parts[:-1])} & forbidden, path


def test_configuration_needs_no_torch() -> None:
    """A typing mistake is reported before torch is loaded."""
    loaded = {name[0] for name in imports((ROOT / "osp/config.py").read_text())}
    assert loaded <= sys.stdlib_module_names, loaded - sys.stdlib_module_names


def test_files_say_what_they_hold() -> None:
    assert not [str(path) for path in SOURCES if VAGUE & {part.removesuffix(".py") for part in path.parts}]


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("model", "from osp.trainer import train", ["model imports osp.trainer.train"]),
        ("model", "def f():\n    import osp.engine", ["model imports osp.engine"]),
        ("norms", "from osp.loss import IGNORE", ["norms imports osp.loss.IGNORE"]),
        ("optim", "from osp import model", ["optim imports osp.model"]),
        ("optim", "from ..model import Linear", ["optim imports osp.model.Linear"]),
        ("data", "from osp.newcomer import x", ["data imports osp.newcomer.x"]),
        ("optim", "from osp.optim.muon import x\nfrom .zero import y\nimport torch", []),
        ("engine", "from osp.optim import build_groups", []),
    ],
)
def test_the_check_itself(part: str, source: str, found: list[str]) -> None:
    package = ("osp", part) if part in ("optim", "data") else ("osp",)
    assert violations(part, source, package) == found
