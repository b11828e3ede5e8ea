"""The logger: an error of W&B does not end a run."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from osp.config import Config, LoggerConfig
from osp.run.logger import Logger, check_wandb


def test_training_continues_if_panels_cannot_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logged = []

    class Run:
        entity, project = "me", "osp"

        def define_metric(self, *_: Any, **__: Any) -> None: ...
        def finish(self, exit_code: int) -> None: ...
        def log(self, metrics: dict[str, Any]) -> None:
            logged.append(metrics)

    def unreachable() -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    monkeypatch.setattr(wandb, "Api", unreachable)
    caplog.set_level("INFO")
    config = Config(logger=LoggerConfig(wandb="online", progress=False))
    logger = Logger(tmp_path, config, step=0, total_steps=2)
    logger.log({"monitor/kurtosis/layer_00/q": 9.0, "monitor/kurtosis/layer_01/q": 99.0}, step=1, tokens=1)
    logger.close()
    assert "no W&B panels (no route); make them with scripts/panels.py me/osp" in caplog.text
    assert logged[0]["heatmap/kurtosis/q"].histogram == pytest.approx([1.0, 2.0])
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(line) == {"step", "tokens", "monitor/kurtosis/layer_00/q", "monitor/kurtosis/layer_01/q"}


@pytest.mark.parametrize(
    ("name", "value", "argument", "mode"),
    [
        ("WANDB_MODE", "disabled", "train.steps=5", "disabled"),
        ("WANDB_DISABLED", "true", "train.steps=5", "disabled"),
        ("WANDB_MODE", "disabled", "logger.wandb=offline", "offline"),
        ("WANDB_MODE", "offline", "train.steps=5", "offline"),
        ("WANDB_DISABLED", "false", "train.steps=5", "offline"),
    ],
)
def test_variables_of_wandb_disable_it(
    name: str, value: str, argument: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", argument])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(name, value)
    assert check_wandb(LoggerConfig()) == mode
