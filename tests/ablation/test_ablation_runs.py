"""The plan of an ablation: which runs are trained, and one-line errors before anything starts."""

import dataclasses
import hashlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from osp.ablation.config import AblationConfig, check_ablation, parse_rows, settings_of
from osp.ablation.execute import slots
from osp.ablation.runs import plan
from osp.errors import UserError
from osp.schema import build
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import entry

LABELS = {  # of published presets -> hash of the names of their runs
    "1b": "d7e958081320",
    "60m": "bc45fce2d1c8",
    "backcopy": "c99f9ce7d40e",
    "nano": "c3a26dcfa084",
    "nano_endings": "3eae9a122559",
    "nano_past": "d398cbfbe233",
    "nano_recipes": "f4e7a6131c4c",
    "outliers": "fb92eda6cc3e",
    "osp_weakness": "4d9a3f9c5ad6",
    "twice": "c27f0219beef",
    "twice_wide": "9680f11c1bc0",
}
SMALL = ("train.steps=4", "train.seq_len=32", "train.tokens_per_step=64", "engine.device=cpu")


def config(folder: Path = Path("ablations/test"), **values: Any) -> AblationConfig:
    return build(AblationConfig, {"dir": str(folder), "common": SMALL, "rows": ("adam", "osp"), **values})


def test_order_labels_and_overrides_of_the_runs(tmp_path: Path) -> None:
    """Seed by seed, first and last row first; later overrides win: common, settings, row, command line, sweep."""
    settings = {"tuned": {"adam": ("optimizer.lr=1e-3",)}}
    sweep = {"key": "optimizer.lr", "values": [0.02, 0.5], "rows": ["osp"]}
    runs = plan(
        config(
            tmp_path,
            rows=["adam", "muon", "osp", "adam_fast: +experiment=adam optimizer.lr=7e-3 train.grad_clip=2"],
            seeds=[3, 5], settings=settings, rates=["tuned", "paper"], overrides=["train.grad_clip=0.5"], sweep=sweep,
        ),
        entry.compose,
    )  # fmt: skip
    planned = {(run.row, run.rates, run.seed, run.value): run.config for run in runs}
    order = [(run.row, run.rates, run.seed, run.value) for run in runs]
    assert order[:4] == [(row, "tuned", 3, None) for row in ("adam", "adam_fast", "muon", "osp")]
    assert order[4:6] == [("adam", "paper", 3, None), ("adam_fast", "paper", 3, None)]
    assert order[-2:] == [("osp", "sweep", 3, 0.02), ("osp", "sweep", 3, 0.5)]
    assert len(order) == len(planned) == 2 * 2 * 4 + 2
    assert planned["adam", "tuned", 5, None].optimizer.lr == 1e-3
    assert planned["adam", "paper", 5, None].optimizer.lr == 5e-3  # its experiment's
    assert planned["osp", "sweep", 3, 0.5].optimizer.lr == 0.5
    assert planned["adam_fast", "tuned", 3, None].optimizer.lr == 7e-3  # the row's override wins over the settings
    assert {c.train.grad_clip for c in planned.values()} == {0.5}
    assert planned["muon", "paper", 5, None].train.seed == 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": ["adam", "ospp"]}, r"row ospp: Could not find 'experiment/ospp'(?s:.)*adam"),
        ({"rows": ["adam", "adam"]}, r"rows: 'adam' is repeated"),
        ({"rows": []}, r"rows=\[\]: name at least one"),
        ({"rows": ["a b"]}, r"rows: 'a b'; write the name of an experiment, or 'NAME: OVERRIDE OVERRIDE'"),
        ({"rows": ["x: 'y"]}, r"rows: \"x: 'y\": No closing quotation"),
        ({"rows": ["x: optimizer.lrr=1"]}, r"row x: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'\?"),
        ({"rows": ["x: optimizer.lr=-1"]}, r"row x: optimizer.lr=-1"),
        ({"seeds": []}, r"seeds=\[\]: name at least one"),
        ({"seeds": [1, 2, 1]}, r"seeds=\[1, 2, 1\]: 1 is repeated and would be the same run"),
        ({"seeds": [-1]}, r"seeds\[0\]=-1: must be"),
        ({"rates": ["best"]}, r"rates=\['best'\]: 'best'; choose from \['paper'\]"),
        ({"rates": ["paper", "paper"]}, r"rates=\['paper', 'paper'\]: paper is repeated"),
        ({"rates": []}, r"nothing to train"),
        ({"sweep": {"key": "optimizer.lr"}}, r"a sweep needs both"),
        ({"sweep": {"values": [1]}}, r"a sweep needs both"),
        ({"sweep": {"key": "optimizer.lr", "values": [1, 1]}}, r"sweep.values=\[1, 1\]: 1 is repeated"),
        (
            {"sweep": {"key": "optimizer.lr", "values": [1], "rows": ["muon"]}},
            r"sweep.rows=\['muon'\]: no such rows; choose from",
        ),
        (
            {"sweep": {"key": "optimizer.lr", "values": [1], "factors": [2]}},
            r"sweep.factors=\[2.0\]: needs sweep.values=\[\]",
        ),
        (
            {"sweep": {"key": "optimizer.lr", "factors": [2]}, "rates": []},
            r"sweep.factors=\[2.0\]: needs .* and rates=\[NAME\]",
        ),
        ({"sweep": {"key": "optimizer.lr", "factors": [0]}}, r"sweep.factors\[0\]=0: must be"),
        (
            {"sweep": {"key": "optimizer.name", "factors": [2]}},
            r"sweep.factors: row adam has optimizer.name=None, no number; set sweep.values instead",
        ),
        ({"quantities": ["kurtos"]}, r"quantities=\['kurtos'\]: 'kurtos'; choose from \['kurtosis', "),
        ({"columns": ["16-16-16", "4-4"]}, r"columns\[1\]='4-4': must be one of 16-16-16, "),
        ({"columns": ["16-16-16", "NVFP4"]}, r"columns=\['16-16-16', 'NVFP4'\]: add 4-4-4; the tables compare with it"),
        ({"guard": {"copied": 0.1}}, r"guard.copied: add copied to texts=\[\], and name columns=\[...\]"),
        ({"parallel": 0}, r"parallel=0: must be at least 1"),
        ({"methods": "some"}, r"methods='some': must be 'ends', 'all' or 'none'"),
        ({"scale": "nano"}, r"unknown key 'scale'"),
        (
            {"rows": ["adam", "longer: +experiment=osp train.steps=5"]},
            r"rows adam and longer do not compare: train.steps=4 and 5; rows must agree in this key",
        ),
        ({"rows": ["adam", "osp_1b"]}, r"rows adam and osp_1b do not compare: \S+="),
    ],
)
def test_mistake_is_one_line_before_anything_is_written(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    def checked() -> None:
        wanted = config(tmp_path, **values)
        check_ablation(wanted)
        plan(wanted, entry.compose)

    with pytest.raises(UserError, match=message):
        checked()
    assert not list(tmp_path.iterdir())


def test_factors_of_a_sweep_multiply_the_own_value_of_each_row(tmp_path: Path) -> None:
    """The own value is a run of the sweep too, the same training as in the table."""
    settings = {"tuned": {"adam": ("optimizer.lr=2e-3",), "osp": ("optimizer.lr=5e-3", "optimizer.gain_decay=0")}}
    sweep = {"key": "optimizer.lr", "factors": [2.0, 0.5]}
    rows = ["adam", "osp_fast: +experiment=osp optimizer.lr=0.1"]
    runs = plan(
        config(tmp_path, rows=rows, seeds=[3, 5], settings=settings, rates=["tuned"], sweep=sweep), entry.compose
    )
    swept = [(run.row, run.value, run.config.optimizer.lr, run.seed) for run in runs if run.value is not None]
    assert swept == [
        ("adam", 0.001, 0.001, 3),
        ("osp_fast", 0.05, 0.05, 3),
        ("adam", 0.002, 0.002, 3),
        ("osp_fast", 0.1, 0.1, 3),
        ("adam", 0.004, 0.004, 3),
        ("osp_fast", 0.2, 0.2, 3),
    ]
    assert {run.config.optimizer.gain_decay for run in runs if run.row == "osp_fast"} == {0}, "settings of the rates"
    own = {run.label for run in runs if run.value is None and run.seed == 3}
    assert own == {run.label for run in runs if run.value in (0.002, 0.1)}


def test_settings_of_a_row() -> None:
    settings = {"muon": ("a=1",), "muon_ssnorm": ("a=2",), "osp": ("a=3",)}
    overrides = [settings_of(row, overrides, settings) for row, overrides in parse_rows(config(rows=[
        "adam", "muon", "muon_all", "muon_ssnorm", "ospx", "osp_gate", "bhyt: +experiment=osp norm=bhyt", "osp: x=1",
    ])).items()]  # fmt: skip
    assert overrides == [(), ("a=1",), ("a=1",), ("a=2",), (), ("a=3",), ("a=3",), ("a=3",)]


def test_equal_trainings_share_one_run(tmp_path: Path) -> None:
    """Another learning rate, seed or row is another run."""
    settings = {"same": {"osp": ("optimizer.lr=5e-4",)}}
    sweep = {"key": "optimizer.lr", "values": [5e-4, 1e-3], "rows": ["osp"]}
    runs = plan(config(tmp_path, seeds=[0, 1], settings=settings, rates=["paper", "same"], sweep=sweep), entry.compose)
    osp = [run.label for run in runs if run.row == "osp"]
    assert len(osp) == 6
    assert len(set(osp)) == 3
    assert all(re.fullmatch(r"osp-seed[01]-[0-9a-f]{8}", label) for label in osp)
    assert {run.folder for run in runs} == {tmp_path / "runs" / run.label for run in runs}
    other = plan(config(tmp_path, overrides=["engine.zero_stage=2", "monitor.every=7"]), entry.compose)
    assert {run.label for run in other} <= {run.label for run in runs}  # these keys do not change the result
    other = plan(config(tmp_path, overrides=["train.grad_clip=2"]), entry.compose)
    assert not {run.label for run in other} & {run.label for run in runs}


def test_trainings_have_the_folders_of_version_0_1_0() -> None:
    """An ablation that was begun with it goes on; a key added since must not enter the name at its default."""
    nano = "model.intermediate_size=688"  # the default of that version
    runs = plan(config(rows=["adam", "osp", "bhyt: +experiment=osp norm=bhyt"], overrides=[nano]), entry.compose)
    assert [run.label for run in runs] == ["adam-seed0-1c561186", "bhyt-seed0-b72d9c9c", "osp-seed0-54fa6066"]
    (other,) = plan(config(rows=["osp"], overrides=[nano, "optimizer.gain_decay=0"]), entry.compose)
    assert other.label not in {run.label for run in runs}


def preset(scale: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Return the keys of `scripts/ablation.py scale=SCALE`."""
    monkeypatch.setattr("sys.argv", ["ablation.py", f"scale={scale}", f"dir={folder}"])
    composed: list[dict[str, Any]] = []
    entry.run(composed.append, "ablation", defaults=dataclasses.asdict(AblationConfig()))
    return composed[0]


@pytest.mark.parametrize("scale", [path.stem for path in (ROOT / "configs" / "scale").iterdir()])
def test_every_preset_composes(scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every preset, with its experiments and the settings of its rows, is a set of runs."""
    keys = preset(scale, monkeypatch, tmp_path)
    rates = keys["rates"] if keys["sweep"]["factors"] else ["paper", *keys["settings"]]
    wanted = build(AblationConfig, {**keys, "overrides": ["data.paths=[corpus.jsonl]"], "rates": rates})
    check_ablation(wanted)
    runs = plan(wanted, entry.compose)
    digest = hashlib.sha256(" ".join(run.label for run in runs).encode()).hexdigest()
    assert LABELS.get(scale, digest[:12]) == digest[:12], "a finished ablation would be trained again"
    sweep = wanted.sweep
    swept = len(sweep.rows or wanted.rows) * len(sweep.values or {1.0, *sweep.factors} if sweep.key else ())
    assert len(runs) == len(wanted.rows) * len(wanted.seeds) * len(wanted.rates) + swept
    assert any(run.row.startswith("osp") for run in runs)


def test_weights_are_checked_before_a_run_trains(tmp_path: Path) -> None:
    wanted = config(tmp_path, rows=["adam", "osp: +experiment=osp average=ema"], weights=["trained", "averaged"])
    with pytest.raises(
        UserError, match=r"weights=\['trained', 'averaged'\]: row adam keeps no average; add average=ema"
    ):
        plan(wanted, entry.compose)
    with pytest.raises(UserError, match=r"weights=\['averaged', 'averaged'\]: averaged is repeated"):
        check_ablation(config(weights=["averaged", "averaged"]))
    with pytest.raises(UserError, match=r"weights=\[\]: must have at least 1 item"):
        config(weights=[])


def test_measured_weights_and_the_last_learning_rate_of_a_row(tmp_path: Path) -> None:
    """What is measured leaves the names of the runs as they are; rows may end at different learning rates."""
    rows = ["osp: +experiment=osp average=ema", "high: +experiment=osp average=ema schedule.final_ratio=0.3"]
    runs = plan(config(tmp_path, rows=rows, weights=["trained", "averaged"]), entry.compose)
    assert [run.label for run in runs] == [run.label for run in plan(config(tmp_path, rows=rows), entry.compose)]
    assert {run.row: run.config.schedule.final_ratio for run in runs} == {"osp": 0.0, "high": 0.3}


def test_preset_of_endings_crosses_its_switches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = preset("nano_endings", monkeypatch, tmp_path)
    rows = plan(build(AblationConfig, {**keys, "seeds": [0]}), entry.compose)
    crossed = {
        (run.row.split("_final")[0], run.config.optimizer.lr, run.config.schedule.final_ratio, decay)
        for run in rows
        if run.row.endswith(f"_wd{(decay := run.config.optimizer.weight_decay):g}")
    }
    rates, choices = {"adam": 2e-3, "osp": 5e-3, "osp_plus": 1e-2}, itertools.product((0, 0.1, 0.3), (0.01, 0.1))
    assert crossed == {(row, rates[row], *choice) for choice in choices for row in rates}
    averages = {(run.config.average.kind, run.config.average.horizon, run.config.train.num_steps) for run in rows}
    assert averages == {("ema", "10%", 1500)}


def test_slots_share_the_cores_or_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As many runs at a time as there are GPUs or cores for their ranks."""
    monkeypatch.setattr("osp.ablation.execute.os.cpu_count", lambda: 8)
    runs = plan(config(tmp_path, rows=["adam", "muon", "osp"], common=[*SMALL[:3]]), entry.compose)
    assert [slot.threads for slot in slots(config(), runs)] == [2, 2, 2]
    assert [slot.threads for slot in slots(config(ranks=4), runs)] == [1, 1]
    assert [slot.threads for slot in slots(config(parallel=1), runs)] == [8]
    monkeypatch.setattr("osp.ablation.execute.torch.cuda.device_count", lambda: 4)
    assert [slot.gpus for slot in slots(config(), runs)] == [(0,), (1,), (2,)]
    assert [slot.gpus for slot in slots(config(ranks=2), runs)] == [(0, 1), (2, 3)]
    assert slots(config(ranks=2), runs)[1].environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert [slot.gpus for slot in slots(config(), plan(config(tmp_path), entry.compose))] == [
        (),
        (),
    ]  # engine.device=cpu
