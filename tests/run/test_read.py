"""Reading a run folder: series, parts of keys, broken lines, and the state of the run."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from osp.errors import UserError
from osp.report.charts import chart_data
from osp.report.page import page
from osp.run.metrics import Site, site_of
from osp.run.read import read_run
from osp.run.verdict import judge_run
from tests.fuzz_inputs import places, value_at
from tests.made_run import made_run, small_run, write_evaluations, write_lines


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
        ("monitor/kurtosis/layer_\u00b2/q", Site("kurtosis", None, "layer_\u00b2/q")),  # a digit, but no decimal
        (f"monitor/kurtosis/layer_{'1' * 5000}/q", Site("kurtosis", None, f"layer_{'1' * 5000}/q")),
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


ODD = [None, "3", [[1, "a"]], {"a": None}, -1, 10**400, math.inf, "\ud800"]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
def test_value_of_any_type_in_any_place_is_a_note(value: Any, tmp_path: Path) -> None:
    """Every value and every table of every file of a run: one place of each file at a time."""
    healthy = write_evaluations(made_run(tmp_path / "run", steps=6, layers=1, probe_every=3))
    for path in healthy.glob("*.jsonl"):
        lines = path.read_text().splitlines()
        changed = [dumped(lines[-1], place, value) for place in places(json.loads(lines[-1]))]
        path.write_text("\n".join([*lines, *changed[:40]]) + "\n")
    files = [*healthy.glob("*.json"), *healthy.glob("evaluation/**/*.json"), healthy / "config.yaml"]
    texts = {path: json.dumps(yaml.safe_load(path.read_text())) for path in files}
    changes = {path: [dumped(text, place, value) for place in places(json.loads(text))] for path, text in texts.items()}
    for number in range(max(map(len, changes.values()))):
        for path, changed in changes.items():
            path.write_text(changed[number % len(changed)])
        run = read_run(healthy)
        assert run.notes
        judge_run(run)
        if number % 20 == 0:
            page([run])


def dumped(text: str, place: tuple[Any, ...], value: Any) -> str:
    """Return JSON with `value` at `place`."""
    tree = json.loads(text)
    replace_at(tree, place, value)
    return json.dumps(tree)


def replace_at(tree: Any, place: tuple[Any, ...], value: Any) -> None:
    value_at(tree, place[:-1])[place[-1]] = value


def test_notes_name_what_was_left_out(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=6, layers=1, probe_every=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tokens": "many", "train/loss": [1], "val/loss": 3}\n{"step": 6.0}\n{"step": -1}\n')
        file.write('{"step": 9007199254740992, "val/loss": 1}\n{"step": 6, "val/loss": 2}\n')
    (folder / "environment.json").write_text('[{"command": "text", "host": "here"}, 3]')
    (folder / "summary.json").write_text('{"gzip_bits_per_byte": "2.4", "steps": 6}')
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["train"]["steps"] = {}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    run = read_run(folder)
    assert run.notes == [
        "metrics.jsonl: 3 unreadable lines skipped (line 25, 26, 27)",
        "metrics.jsonl: lines of another format left out: 1, the first of step 6",
        *(f"{name}: not the format of a run; left out" for name in ("config.yaml", "environment.json", "summary.json")),
    ]
    assert run.last("val/loss") == 2
    assert (run.starts, run.summary, run.config) == ([], {}, {})


@pytest.mark.parametrize("name", ["metrics.jsonl", "probes.jsonl", "events.jsonl", "config.yaml", "environment.json"])
def test_what_is_no_file_is_a_note_or_one_line(name: str, tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=6, layers=1, probe_every=3)
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path), lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink()
        make(folder / name)
        if name == "metrics.jsonl":
            with pytest.raises(UserError, match="nothing to draw"):
                read_run(folder)
        else:
            assert [note.partition(" ")[0] for note in read_run(folder).notes] in ([name], [])
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
        (folder / name).touch()


def test_yaml_that_stands_for_more_than_it_holds_is_left_out(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 40)),
    ]
    for text in ("\n".join(lines), "a: &a [*a]", "[" * 5000, "run: !!python/object/apply:os.getcwd []", "\0", "\xff"):
        (folder / "config.yaml").write_text(text, encoding="latin-1")
        assert read_run(folder).notes == ["config.yaml cannot be read; left out"]


def test_site_with_and_without_a_layer_is_drawn(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    sites = {"monitor/kurtosis/q": 1.0, "monitor/kurtosis/layer_00/q": 1.0, "tokens": None, "monitor/R_L": -0.5}
    write_lines(folder / "metrics.jsonl", *({"step": step, **sites} for step in (1, 2)))
    run = read_run(folder)
    assert run.tokens == 0
    assert chart_data([run], ["a"])["sites"]["kurtosis"]["q"][0]["v"] == [[1, 1], [1, 1]]
    assert judge_run(run).basis in ("early", "unknown", "quiet")
