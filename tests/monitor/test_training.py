"""Monitoring a run: training is unchanged, readings are written, alerts are raised once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.config import Config, to_dict
from osp.data.prepare import shard_folder
from osp.data.tokenizer import load_tokenizer
from osp.files import read_lines
from osp.model.transformer import build_model
from osp.monitor.monitor import held_out_text
from osp.monitor.probe import probe
from osp.run.checkpoint import load_model
from osp.train.setup import train
from tests.conftest import losses, read_metrics
from tests.distributed import run_distributed
from tests.monitor import workers
from tests.train.test_trainer import interrupt_after

Tiny = Callable[..., Config]

FULL = ("monitor.enabled=true", "monitor.sites=all", "monitor.statistics=all", "monitor.tokens=128")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["engine.zero_stage=2", "train.activation_checkpointing=true"],
        ["engine.zero_stage=3"],
        ["engine.zero_stage=3", "train.activation_checkpointing=true", "norm.name=bhyt", "train.document_mask=true"],
        pytest.param(["train.compile=true"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_training_is_bit_identical_with_and_without_monitor(overrides: list[str], tiny: Tiny, tmp_path: Path) -> None:
    """Probes before, between and after the steps of compiled, checkpointed and partitioned models."""
    overrides = [*overrides, "train.steps=3", "eval.every=0", "checkpoint.every=0"]
    train(tiny(*overrides, name="without"))
    train(tiny(*overrides, *FULL, "monitor.every=1", name="with"))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    a, b = (load_model(tmp_path / name).state_dict() for name in ("with", "without"))
    for name in a:
        assert torch.equal(a[name], b[name]), name
    probes = read_lines(tmp_path / "with" / "probes.jsonl")
    assert [probe["step"] for probe in probes] == [0, 1, 2, 3]
    # under every engine the metrics equal the metrics of the plain model
    config = tiny(*overrides, *FULL)
    text = held_out_text(shard_folder(config.data, config.tokenizer), config)
    assert text.tokens.shape == (4, 32)
    for step, model in ((0, build_model(config.model, seed=0)), (3, load_model(tmp_path / "with"))):
        (line,) = [e for e in read_metrics(tmp_path / "with") if e["step"] == step and "monitor/seconds" in e]
        assert len(probes[step]["sites"]) == 2 + 2 * 8
        for key, value in probe(model, text, config.monitor).metrics.items():
            assert line[key] == pytest.approx(value, rel=1e-9), key


def test_probe_writes_metrics_and_sites(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*FULL, "monitor.every=2", "train.steps=3", "eval.every=0")
    train(config)
    lines = [event for event in read_metrics(tmp_path / "run") if "monitor/seconds" in event]
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert lines[0]["monitor/cost"] == 0
    assert 0 < lines[1]["monitor/cost"] < 100
    assert all(isinstance(value, float | int) for value in lines[0].values())
    probes = read_lines(tmp_path / "run" / "probes.jsonl")
    assert [(probe["step"], probe["tokens"]) for probe in probes] == [(0, 0), (2, 512), (3, 768)]
    site = probes[1]["sites"]["layer_01/down_proj_in"]
    assert len(site["channels"]) == 8
    assert site["channels"][0][1] == abs(site["top_value"]) == lines[1]["monitor/max_abs/layer_01/down_proj_in"]
    tokens = held_out_text(shard_folder(config.data, config.tokenizer), config).tokens[site["top_row"]]
    assert tokens[site["top_position"]] == site["top_token"]
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert site["top_text"].endswith(tokenizer.decode([site["top_token"]]))


def test_monitor_off_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.steps=1"))
    assert not any("monitor" in key for event in read_metrics(tmp_path / "run") for key in event)
    assert not (tmp_path / "run" / "probes.jsonl").exists()


ALERTING = (
    *("monitor.enabled=true", "monitor.tokens=64", "monitor.every=1", "train.steps=4", "eval.every=0"),
    *('monitor.alerts={"max_abs": {"down_proj_in": {"above": 0.001}}}', "checkpoint.every=2"),
)


@pytest.mark.parametrize("stage", [1, 3])
def test_alert_reaches_console_events_wandb_and_forensics_once(
    stage: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    sent = []

    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None: ...
        def log(self, metrics: dict[str, float]) -> None: ...
        def finish(self, exit_code: int) -> None: ...
        def alert(self, title: str, text: str, level: str) -> None:
            sent.append((title, text))

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    caplog.set_level("INFO")
    train(tiny(*ALERTING, "logger.wandb=offline", f"engine.zero_stage={stage}"))
    events = read_lines(tmp_path / "run" / "events.jsonl")
    assert [(e["kind"], e["step"], e["tokens"], e["rule"], e["layer"], e["site"]) for e in events] == [
        ("alert", 1, 256, "above", layer, "down_proj_in") for layer in (0, 1)
    ]
    for event in events:
        assert event["key"] == f"monitor/max_abs/layer_0{event['layer']}/down_proj_in"
        assert event["value"] > event["threshold"] == 0.001
        assert event["message"] in caplog.text
        assert ("outlier alert", event["message"]) in sent
        file = tmp_path / "run" / "forensics" / f"step_00000001_layer_0{event['layer']}_down_proj_in.json"
        contents = json.loads(file.read_text())
        assert contents["alerts"][0]["key"] == event["key"]
        assert abs(contents["value"]) == event["value"]
        assert [step for step, _ in contents["growth"]] == [0, 1]
        assert {w["parameter"] for w in contents["weights"]} == {
            f"layers.{event['layer']}.mlp.{part}_proj.weight" for part in ("gate", "up")
        }
        assert all(w["norm"] > 0 and w["ratio"] > 0 for w in contents["weights"])
        assert f"channel {contents['channel']}" in event["message"]
        assert event["message"].endswith(f"; {contents['mechanism']}; see forensics/")
        assert contents["mechanism"] in file.with_suffix(".md").read_text()
        assert event["place"] == contents["site"] == f"layer_0{event['layer']}/down_proj_in"
        assert f"channel {event['top_channel']} of {event['place']} " in event["message"]
        for name in ("top_channel_share", "top_channel_constancy"):
            assert event[name] == contents["statistics"][name]
        assert file.with_suffix(".md").read_text().startswith(f"# layer_0{event['layer']}/down_proj_in, channel")
    assert len(list((tmp_path / "run" / "forensics").iterdir())) == 4
    assert len(sent) == 2


def test_two_ranks_with_partitioned_weights_write_the_same_readings_and_alerts(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(*ALERTING, *FULL[1:3], name="one"))
    run_distributed(workers.trained, 2, to_dict(tiny(*ALERTING, *FULL[1:3], "engine.zero_stage=3", name="two")))
    first = {}
    for name in ("one", "two"):
        (first[name],) = [e for e in read_metrics(tmp_path / name) if e["step"] == 0 and "monitor/seconds" in e]
        del first[name]["monitor/seconds"]
    assert first["two"] == pytest.approx(first["one"], rel=1e-9)
    alerts = [[(e["step"], e["key"]) for e in read_lines(tmp_path / n / "events.jsonl")] for n in ("one", "two")]
    assert alerts[0] == alerts[1] != []
    for file in (tmp_path / "one" / "forensics").glob("*.json"):
        one, two = (json.loads((tmp_path / name / "forensics" / file.name).read_text()) for name in ("one", "two"))
        assert [w["parameter"] for w in two["weights"]] == [w["parameter"] for w in one["weights"]]
        for a, b in zip(one["weights"], two["weights"], strict=True):
            assert b["norm"] == pytest.approx(a["norm"], rel=1e-3)
        assert (two["channel"], two["row"], two["position"]) == (one["channel"], one["row"], one["position"])


def test_resumed_run_repeats_neither_probes_nor_alerts(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*ALERTING)
    interrupt_after(2, config)  # step 3 is probed, step 2 is the last checkpoint
    assert [probe["step"] for probe in read_lines(tmp_path / "run" / "probes.jsonl")] == [0, 1, 2, 3]
    train(config)
    assert [probe["step"] for probe in read_lines(tmp_path / "run" / "probes.jsonl")] == [0, 1, 2, 3, 4]
    assert [e["step"] for e in read_metrics(tmp_path / "run") if "monitor/seconds" in e] == [0, 1, 2, 3, 4]
    events = read_lines(tmp_path / "run" / "events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "alert"] == [1, 1]


def test_monitoring_may_change_on_resume(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.steps=4", "checkpoint.every=2", "eval.every=0")
    interrupt_after(2, config)
    train(tiny("train.steps=4", "checkpoint.every=2", "eval.every=0", *FULL, "monitor.every=1"))
    assert [probe["step"] for probe in read_lines(tmp_path / "run" / "probes.jsonl")] == [3, 4]


def test_auto_probes_at_powers_of_two_and_the_end(tiny: Tiny, tmp_path: Path) -> None:
    """The steps are so short that a probe never fits into its budget."""
    train(tiny("monitor.enabled=true", "monitor.tokens=512", "train.steps=11", "eval.every=0", "checkpoint.every=0"))
    assert [probe["step"] for probe in read_lines(tmp_path / "run" / "probes.jsonl")] == [0, 1, 2, 4, 8, 11]


BRIEF = ("monitor.sites=[]", 'monitor.statistics=["gain_max"]')


def test_short_validation_split_is_reported(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train(tiny("monitor.enabled=true", "monitor.tokens=1000000", "train.steps=1", *BRIEF))
    assert "monitor.tokens=1000000, but the validation split has only" in caplog.text


def test_sequences_are_no_longer_than_monitor_tokens(tiny: Tiny) -> None:
    config = tiny("monitor.tokens=20", "train.steps=1")
    train(config)
    assert held_out_text(shard_folder(config.data, config.tokenizer), config).tokens.shape == (1, 20)
