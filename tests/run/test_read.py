"""Reading a run folder: series, parts of keys, broken lines, and the state of the run."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from osp.run.metrics import Site, site_of
from osp.run.read import read_run
from tests.made_run import small_run, write_lines


def test_series_are_the_numbers_of_the_lines(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    write_lines(
        folder / "metrics.jsonl",
        {"step": 1, "tokens": 10, "train/loss": 4.0},
        {"step": 2, "tokens": 20, "train/loss": None},
        {"step": 2, "tokens": 20, "val/loss": 3.5},
        {"step": 3, "tokens": 30, "train/loss": 2.0},
        {"step": 3, "tokens": 30, "train/loss": 1.5},  # a resumed run took the step again
    )
    run = read_run(folder)
    assert run.series["train/loss"].steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(run.series["train/loss"].values, [4.0, math.nan, 1.5])
    assert run.series["val/loss"].steps.tolist() == [2]
    assert (run.step, run.tokens) == (3, 30)


@pytest.mark.parametrize(
    ("key", "site"),
    [
        ("monitor/kurtosis/layer_03/attn_in", Site("kurtosis", 3, "attn_in")),
        ("monitor/max_abs/embed_out", Site("max_abs", None, "embed_out")),
        ("monitor/attn_sink/layer_11", Site("attn_sink", 11, "")),
        ("monitor/R_L/layer_00", Site("R_L", 0, "")),
        ("monitor/gain_max/norm", Site("gain_max", None, "norm")),
        ("monitor/weight_row_max/layer_00/down_proj", Site("weight_row_max", 0, "down_proj")),
        ("monitor/R_L", None),
        ("monitor/kurtosis/osp_script", None),
        ("monitor/cost", None),
        ("train/loss", None),
    ],
)
def test_keys_of_the_monitor_are_split_into_parts(key: str, site: Site | None) -> None:
    assert site_of(key) == site


def test_broken_lines_are_skipped_with_a_note(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 5, "train/loss"\n[1, 2]\n{"train/loss": 3}\n{"step": 6, "tokens": 60, "train/loss": 0.5}\n'
        )
        file.write('{"step": 7, "tokens": 70, "train/lo')  # being written: no note
    write_lines(folder / "probes.jsonl", "not json")
    run = read_run(folder)
    assert run.series["train/loss"].steps.tolist() == [1, 2, 3, 4, 6]
    assert run.notes == [
        "metrics.jsonl: 3 unreadable lines skipped (line 5, 6, 7)",
        "probes.jsonl: 1 unreadable line skipped (line 1)",
    ]


def test_state_of_a_run(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run", train={"steps": 8})
    assert read_run(folder).state == "running"
    os.utime(folder / "metrics.jsonl", (0, 0))
    assert read_run(folder).state == "interrupted"
    (folder / "summary.json").write_text('{"steps": 8}')
    assert read_run(folder).state == "complete"
