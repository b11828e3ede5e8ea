"""A run killed while it saves, and on one rank, loses nothing; the benchmark of faults does this in real processes."""

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks.faults import MODEL, SECONDS_TO_END, Faults, launcher, newest_whole, same_run, steps_of
from osp.config import Config, to_dict
from osp.train.setup import train
from tests.distributed import exit_codes, run_distributed
from tests.train.dying import Death, train_until_data_fails, train_until_death

Tiny = Callable[..., Config]


def overrides(corpus: Path, folder: Path, **other: object) -> list[str]:
    values = MODEL | {"data.paths": f"[{corpus}]", "data.cache_dir": folder / "shards", "data.num_workers": 1} | other
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four starts of two ranks
def test_benchmark_kills_real_processes_and_finds_an_equal_run(corpus: Path, tmp_path: Path) -> None:
    """300 steps: also on a fast machine the run lasts until the kills."""
    faults = Faults(launcher("torchrun", 2), overrides(corpus, tmp_path, **{"train.steps": 300}), tmp_path, seed=1)
    figures = faults.run(["while saving", "one rank"])
    assert figures.equal, faults.lives
    assert (figures.kills, figures.of_one_rank, figures.starts) == (2, 1, 3), faults.lives
    assert figures.inside_saves >= 1, faults.lives
    assert figures.steps == 300
    assert (figures.survivors, figures.leftovers_at_end) == (0, 0)
    assert 0 < figures.slowest_end < SECONDS_TO_END


# How the ranks of each start die, the steps of which the newest whole checkpoint may be, and whether an unfinished one
# is left (None: either). Every step is saved, and a start resumes at the newest whole checkpoint.
DEATHS: list[tuple[dict[int, Death], set[int], bool | None]] = [
    ({0: ("tearing a file", 2), 1: ("tearing a file", 2)}, {1}, True),  # all ranks in the save of step 2
    ({0: ("before publishing", 2)}, {2}, True),  # with all files of step 3 written
    ({0: ("after publishing", 2)}, {3}, False),  # before `latest` names step 4
    ({1: ("updating", 3)}, {4, 5}, None),  # in step 6, while step 5 is saved
]


@pytest.mark.timeout(900)
def test_killed_run_equals_undisturbed_run(tiny: Tiny, tmp_path: Path) -> None:
    quick = ("train.steps=10", "checkpoint.every=1", "checkpoint.keep_last=2", "eval.every=0", "eval.sample_tokens=0")
    killed, straight = (to_dict(tiny(*quick, name=name)) for name in ("killed", "straight"))
    checkpoints = tmp_path / "killed" / "checkpoints"
    run_distributed(train_until_death, 2, straight, {})
    for deaths, saved, unfinished in DEATHS:
        codes = exit_codes(train_until_death, 2, killed, deaths)
        assert -signal.SIGKILL in codes
        # the others end by themselves: they report the lost rank, or die as planned
        assert set(codes) <= {-signal.SIGKILL, 1}, codes
        assert newest_whole(tmp_path / "killed") in saved, deaths
        assert unfinished in (None, bool(list(checkpoints.glob(".*.tmp")))), deaths
    run_distributed(train_until_death, 2, killed, {})
    assert same_run(tmp_path / "killed", tmp_path / "straight")
    assert len(steps_of(tmp_path / "killed")) == 10
    assert not list(checkpoints.glob(".*.tmp"))


def test_data_that_fails_on_one_rank_ends_the_run_with_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    values = to_dict(tiny("checkpoint.every=0", "eval.every=0", "eval.sample_tokens=0"))
    errors = run_distributed(partial(train_until_data_fails, values, unreadable=4), 2)
    assert errors == ["step 5: shard 7: no space left on device"] * 2
    marker = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert (marker["step"], marker["reason"]) == (4, errors[0])
    assert newest_whole(tmp_path / "run") == 4


def test_comparison_detects_a_different_run(tiny: Tiny, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny("train.steps=2", "eval.sample_tokens=0", f"train.seed={seed}", name=name))
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert not same_run(tmp_path / "a", tmp_path / "c")
