"""A short fault benchmark: a run killed while saving, on one rank, and at a random moment loses nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.faults import MODEL, SECONDS_TO_END, Faults, launcher, same_run
from osp.config import Config
from osp.train.setup import train

Tiny = Callable[..., Config]


def overrides(corpus: Path, folder: Path, **other: object) -> list[str]:
    values = MODEL | {"data.paths": f"[{corpus}]", "data.cache_dir": folder / "shards", "data.num_workers": 1} | other
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.timeout(900)  # four starts of two ranks
def test_killed_run_equals_undisturbed_run(corpus: Path, tmp_path: Path) -> None:
    faults = Faults(launcher("torchrun", 2), overrides(corpus, tmp_path, **{"train.steps": 30}), tmp_path, seed=1)
    figures = faults.run(["while saving", "one rank"])
    assert figures.equal, faults.lives
    assert (figures.kills, figures.of_one_rank, figures.starts) == (2, 1, 3), faults.lives
    assert figures.inside_saves >= 1, faults.lives
    assert figures.steps == 30
    assert (figures.survivors, figures.leftovers_at_end) == (0, 0)
    assert 0 < figures.slowest_end < SECONDS_TO_END


def test_comparison_detects_a_different_run(tiny: Tiny, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny("train.steps=2", "eval.sample_tokens=0", f"train.seed={seed}", name=name))
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert not same_run(tmp_path / "a", tmp_path / "c")
