"""Names and sizes of `osp/`: no two public names are the same, and files and functions stay small."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = sorted((ROOT / "osp").rglob("*.py"))
SHARED_STEMS = {"__init__", "config"}  # each folder may have its own
FIRST_READ = ("config", "model/transformer", "model/norms", "optim/muon", "train/trainer", "monitor/statistics")
MOST_LINES = 16_920  # 16,500 is the aim
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_public_functions_and_classes_have_different_names() -> None:
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_files_have_different_names() -> None:
    stems = Counter(path.stem for path in FILES if path.stem not in SHARED_STEMS)
    assert not [stem for stem, count in stems.items() if count > 1]


def test_files_are_small() -> None:
    assert not {str(path): num_lines(path) for path in FILES if num_lines(path) > 600}
    assert sum(map(num_lines, FILES)) <= MOST_LINES


def test_the_first_six_files_are_a_short_read() -> None:
    assert sum(num_lines(ROOT / "osp" / f"{name}.py") for name in FIRST_READ) <= 2_400


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_on_one_screen(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    assert not {name: length for name, length in lengths.items() if length > 60}
