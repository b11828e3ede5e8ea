"""Current code reads files written by version d86633d: run, shards, evaluations, export and conversion.

tests/old_run/make.py made the archive.
"""

import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import osp
from osp.config import from_dict
from osp.run.read import read_run
from osp.train.setup import train
from tests.conftest import ROOT, losses, run_in_process

TOLERANCE = 2e-4  # relative; on another CPU vector units and BLAS round differently, and training amplifies it


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive, unpacked into the working directory."""
    with tarfile.open(ROOT / "tests" / "old_run" / "d86633d.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`script("report", "runs/a")`: run scripts/report.py in this process."""
    return partial(run_in_process, monkeypatch)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Return logits, losses and a text as computed by d86633d."""
    with tarfile.open(ROOT / "tests" / "old_run" / "d86633d.tar.xz") as archive:
        file = archive.extractfile("expected.json")
        assert file is not None
        return json.load(file)


@torch.no_grad()
def test_models_of_an_old_run_and_an_old_export_are_loaded(home: Path, expected: dict[str, Any]) -> None:
    ids = torch.tensor(expected["ids"])
    for name, logits in expected["logits"].items():
        model = osp.load_hf(home / name) if name == "exported" else osp.load_model(home / "runs" / name)
        torch.testing.assert_close(model(ids).logits[0, -1], torch.tensor(logits), rtol=TOLERANCE, atol=1e-5)


def test_resumed_old_run_has_the_losses_of_its_version(home: Path, expected: dict[str, Any]) -> None:
    """The shards are read unchanged, the folder has moved, and the stored configuration is used."""
    values = yaml.safe_load((home / "runs" / "stopped" / "config.yaml").read_text())
    (home / "runs" / "stopped").rename(home / "moved")
    (shards,) = (home / "shards").iterdir()
    written = (shards / "manifest.json").stat().st_mtime_ns
    values["run"]["dir"] = "moved"
    values["train"]["stop_at"] = None
    train(from_dict(values))
    assert losses(home / "moved")[:6] == expected["losses"][:6]
    torch.testing.assert_close(losses(home / "moved"), expected["losses"], rtol=TOLERANCE, atol=0)
    assert (shards / "manifest.json").stat().st_mtime_ns == written
    assert list((home / "shards").iterdir()) == [shards]
    former = len(json.loads((home / "runs" / "finished" / "environment.json").read_text()))
    assert len(json.loads((home / "moved" / "environment.json").read_text())) == former + 1
    assert json.loads((home / "moved" / "stopped.json").read_text())["step"] == 12


def test_finished_old_run_trains_no_further_step(home: Path) -> None:
    values = yaml.safe_load((home / "runs" / "finished" / "config.yaml").read_text())
    before = losses(home / "runs" / "finished")
    train(from_dict(values))
    assert losses(home / "runs" / "finished") == before


def test_old_run_is_reported_with_its_evaluations(home: Path, script: Callable[..., None]) -> None:
    run = read_run(home / "runs" / "finished")
    assert not run.notes
    assert run.state == "complete"
    assert {e["kind"] for e in run.events} == {"alert"}
    measured = {(m.what.split("[")[0], m.metric) for record in run.evaluations for m in record.results}
    assert {("held_out", "perplexity"), ("essay.txt", "perplexity"), ("quiz", "acc"), ("answers", "exact_match")} <= (
        measured
    )
    (record,) = run.evaluations
    assert record.ablation is not None
    assert len(record.ablation.sites) > 5
    assert run.comparison is not None
    script("report", "runs/finished", "out=page.html")
    page = (home / "page.html").read_text()
    for words in ("channel 15 of embed_out", "4-4-4", "essay.txt", "quiz"):
        assert words in page, words


def test_old_run_is_evaluated_as_before(home: Path, script: Callable[..., None]) -> None:
    """A new record holds the numbers of the old one, and the report reads both."""
    (old,) = (home / "runs" / "finished" / "evaluation").glob("*.json")
    before = json.loads(old.read_text())
    options = ["texts=[held_out,essay.txt]", "seq_len=32", "max_tokens=512", "device=cpu", "threads=1"]
    script("evaluate", "runs/finished", "quant=osp_paper", "ablate=true", "progress=false", "out=now.json", *options)
    now = json.loads((home / "now.json").read_text())
    assert now["model"]["sha256"] == before["model"]["sha256"]
    assert now["quant"]["hash"] == before["quant"]["hash"]
    assert now["texts"] == before["texts"]
    assert perplexities(now) == pytest.approx(perplexities(before), rel=TOLERANCE)


def perplexities(record: dict[str, Any]) -> dict[str, float]:
    """Return text -> perplexity of a record."""
    return {r["what"]: r["value"] for r in record["results"] if r["metric"] == "perplexity"}


def test_old_run_is_compared_and_exported(home: Path, script: Callable[..., None], expected: dict[str, Any]) -> None:
    options = ["texts=[essay.txt]", "seq_len=32", "max_tokens=256", "quant.calibration_tokens=2048", "device=cpu"]
    script("compare", "runs/finished", "methods=none", "threads=1", "progress=false", *options)
    script("export", "runs/finished", "out=again", "device=cpu")
    with torch.no_grad():
        logits = osp.load_hf(home / "again")(torch.tensor(expected["ids"])).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]["exported"]), rtol=TOLERANCE, atol=1e-5)


def test_old_run_writes_the_same_text(
    home: Path, script: Callable[..., None], expected: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    script("generate", "runs/finished", "Say", "temperature=0", "max_new_tokens=16", "device=cpu", "threads=1")
    assert capfd.readouterr().out == expected["generated"]


def test_old_run_is_inspected(home: Path, script: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    script("inspect_outliers", "runs/finished")
    assert "down_proj_in" in capfd.readouterr().out


def test_training_begins_from_an_old_conversion(home: Path) -> None:
    values = yaml.safe_load((home / "runs" / "finished" / "config.yaml").read_text())
    values["run"] = {"name": "continued", "dir": "continued"}
    values["checkpoint"]["init_from"] = "converted"
    values["train"]["steps"] = 2
    train(from_dict(values))
    assert osp.load_model(home / "continued").config.norm.name == "rmsnorm"
    assert losses(home / "continued")[0] < losses(home / "runs" / "finished")[0] - 0.5
