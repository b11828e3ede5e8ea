"""`scripts/ablation.py` on two tiny rows, stopped and continued; a failed row does not affect the others."""

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from osp.ablation.config import AblationConfig
from osp.ablation.execute import ablate, last_step
from osp.ablation.runs import plan
from osp.config import Config, from_dict
from osp.errors import RunError, StoppedError
from osp.evaluation.language_model import open_model
from osp.evaluation.perplexity import perplexity
from osp.evaluation.texts import read_text
from osp.schema import build
from osp.train.launch import Process
from osp.train.setup import train
from osp.train.trainer import Trainer
from tests.conftest import ROOT, losses, overrides_of
from tests.distributed import ForkedProcess

sys.path.insert(0, str(ROOT / "scripts"))
import entry

Tiny = Callable[..., Config]


def tiny_ablation(tiny: Tiny, folder: Path, **values: Any) -> AblationConfig:
    skipped = ("run.", "train.precision", "model.embed_proj", "norm.", "optimizer.", "model.norm.")
    common = [override for override in overrides_of(tiny("train.steps=12")) if not override.startswith(skipped)]
    common += ["monitor.enabled=true", "monitor.every=0", "monitor.tokens=64", "optimizer.ns_dtype=fp32"]
    defaults = {"dir": str(folder), "common": common, "rows": ["adam", "osp"], "max_tokens": 256}
    return build(AblationConfig, {**defaults, "calibration_tokens": 256, "progress": False, **values})


def run(config: AblationConfig) -> dict[str, Any]:
    ablate(config, entry.compose, scripts=ROOT / "scripts", command=["scripts/ablation.py"])
    return json.loads((Path(config.dir) / "ablation.json").read_text())


def ask_to_stop(ablation: int) -> None:
    """Let the training in this process ask the process `ablation` to stop, in step 4, and go on when asked to stop."""

    def step_when_asked(self: Trainer, step: int, **options: Any) -> Any:
        if step == 3:
            os.kill(ablation, signal.SIGTERM)
            while not self.stop:
                time.sleep(0.01)
        return train_step(self, step, **options)

    train_step = Trainer.train_step
    Trainer.train_step = step_when_asked


def test_stopped_ablation_continues_with_equal_losses(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses equal an uninterrupted run; finished work is not repeated."""
    started: list[str] = []

    def start(command: list[str], output: Path, **options: Any) -> Process | ForkedProcess:
        """Fork all processes but one; the first one that trains the row osp stops the ablation."""
        started.append("-".join([output.name.split("-")[0], output.name.split(".")[-2]]))
        if started[-1] == "adam-compare":
            return Process(command, output, **options)
        is_first = started.count("osp-train") == 1 and started[-1] == "osp-train"
        prepare = partial(ask_to_stop, os.getpid()) if is_first else None
        return ForkedProcess(command, output, prepare=prepare, **options)

    monkeypatch.setattr("osp.ablation.execute.Process", start)
    config = tiny_ablation(tiny, tmp_path / "table")
    (run_of_osp,) = [planned for planned in plan(config, entry.compose) if planned.row == "osp"]
    metrics = run_of_osp.folder / "metrics.jsonl"
    with pytest.raises(StoppedError):
        run(config)
    assert f"{run_of_osp.label}: not trained yet" in (tmp_path / "table" / "ablation.md").read_text()
    assert last_step(metrics) == 3

    values = run(config)
    rows = {line["row"]: line["cells"] for line in values["rows"]}
    assert list(rows) == ["adam", "osp"]
    assert {"kurtosis", "osp_script", "R_L", "down_proj_max", "loss", "4-4-4", "4-4-4 +Had", "+ QuaRot"} <= set(
        rows["osp"]
    )
    assert values["failures"] == {}
    # on several cores adam trains at the same time, and may be stopped too
    assert set(started) == {"adam-train", "adam-compare", "osp-train", "osp-compare"}
    assert (started.count("osp-train"), started.count("osp-compare")) == (2, 1)
    assert "not trained yet" not in (tmp_path / "table" / "ablation.md").read_text()

    uninterrupted = entry.compose([*config.common, "+experiment=osp", f"run.dir='{tmp_path / 'uninterrupted'}'"])
    train(from_dict(uninterrupted))
    assert losses(metrics.parent) == losses(tmp_path / "uninterrupted")

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "table" / "runs").rglob("*") if path.is_file()}
    assert run(config)["rows"] == values["rows"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_tiny_ablation_on_repeated_text_has_costs_on_both_texts(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at two learning rates, trained, probed and measured by the scripts."""
    monkeypatch.setattr("osp.ablation.execute.Process", ForkedProcess)
    config = tiny_ablation(
        tiny,
        tmp_path / "table",
        rows=["osp"],
        methods="none",
        overrides=["data.repeat=16", "train.steps=2", "monitor.sites=all", "monitor.statistics=all"],
        texts=["held_out", "copied"],
        columns=["16-16-16", "4-4-4", "static 8-8"],
        quantities=["norm_kurtosis", "share_before_gain", "share_after_gain", "attn_sink", "block_out_max"],
        guard={"copied": 0.1},
        sweep={"key": "optimizer.lr", "factors": [2.0]},
    )
    values = run(config)
    numbers = values["rows"][0]["cells"]
    for text in config.texts:
        assert 3 < numbers[f"{text} loss"]["mean"] < 7
        costs = [numbers[f"{text} cost {column}"]["mean"] for column in ("4-4-4", "static 8-8")]
        assert 0 < max(map(abs, costs)) < 0.1
        assert costs[0] != costs[1]
    assert numbers["held_out loss"] != numbers["copied loss"]
    assert all(numbers[name]["mean"] is not None for name in config.quantities), numbers
    assert len(list((tmp_path / "table" / "runs").iterdir())) == 2
    page = (tmp_path / "table" / "ablation.md").read_text()
    assert "| osp (unsolved) |" in page
    assert "| row | optimizer.lr | held_out, 1 x | held_out, 2 x | copied, 1 x | copied, 2 x | bracketed on |" in page


def test_each_run_is_measured_with_its_trained_and_averaged_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training, two measurements, two rows; a quantity of the training is of the trained weights."""
    started: list[str] = []

    def start(command: list[str], output: Path, **options: Any) -> ForkedProcess:
        started.append(output.name.split(".")[-2] + "".join(key for key in command if key.startswith("weights=")))
        return ForkedProcess(command, output, **options)

    monkeypatch.setattr("osp.ablation.execute.Process", start)
    config = tiny_ablation(
        tiny,
        tmp_path / "table",
        rows=["osp"],
        methods="none",
        overrides=["train.steps=4", "average.kind=ema", "average.decay=0.6"],
        texts=["held_out"],
        columns=["16-16-16", "4-4-4"],
        quantities=["loss"],
        weights=["trained", "averaged"],
        compared=[["osp", "osp, averaged"]],
    )
    values = run(config)
    assert started == ["train", 'compareweights="trained"', 'compareweights="averaged"']
    trained, averaged = values["rows"]
    assert (trained["row"], averaged["row"]) == ("osp", "osp, averaged")
    assert trained["missing"] == averaged["missing"] == []
    (folder,) = (tmp_path / "table" / "runs").iterdir()
    for line, subject in ((trained, open_model(folder)), (averaged, open_model(folder, weights="averaged"))):
        text = read_text("held_out", subject)
        nats = math.log(perplexity(subject.model, text, seq_len=32, max_tokens=256).perplexity)
        assert line["cells"]["held_out loss"]["mean"] == pytest.approx(nats, rel=1e-6)
    assert trained["cells"]["held_out loss"] != averaged["cells"]["held_out loss"]
    assert trained["cells"]["loss"]["mean"] > 0
    assert averaged["cells"]["loss"]["mean"] is None
    assert [x["row"] for x in values["runs"]] == ["osp", "osp, averaged"]
    page = (tmp_path / "table" / "ablation.md").read_text()
    assert re.search(r"^\| osp, averaged \| \d", page, flags=re.MULTILINE)
    assert "4-4-4 costs osp " in page
    assert run(config)["rows"] == values["rows"]
    assert len(started) == 3, "measured again"


def test_failed_row_does_not_affect_the_others(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is replaced by a script that fails for one row."""

    class Failing:
        def __init__(self, command: list[str], output: Path, **_: Any):
            self.output = output
            output.write_text("error: no luck\n")
            started.append(output.name)

        def poll(self) -> int:
            return int("muon-" in self.output.name)

        def terminate(self) -> None: ...
        def stop(self) -> None: ...

    started: list[str] = []
    monkeypatch.setattr("osp.ablation.execute.Process", Failing)
    monkeypatch.setattr("osp.ablation.execute.SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr("osp.ablation.execute.Execution.trained", lambda self, run: bool(started))
    monkeypatch.setattr(
        "osp.ablation.execute.Execution.measured", lambda self, run: any(run.label in s for s in started)
    )
    # the learning rate of the experiment adam: the same run
    sweep = {"key": "optimizer.lr", "values": [5e-3], "rows": ["adam"]}
    config = tiny_ablation(tiny, tmp_path / "table", rows=["adam", "muon", "osp"], parallel=1, sweep=sweep)
    with pytest.raises(RunError, match=r"1 of 3 runs failed, muon-seed0-\w+: no luck; ablation.md says what"):
        run(config)
    assert [name.split("-")[0] for name in started] == ["adam", "osp", "muon"]
    assert re.search(r"muon-seed0-\w+: no luck", (tmp_path / "table" / "ablation.md").read_text())
