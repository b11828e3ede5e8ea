"""`python scripts/inspect_outliers.py`: a table and a bundle from a run folder, or a one-line error."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.config import Config, from_dict
from osp.errors import UserError
from osp.monitor.inspect import _read_text, inspect
from osp.run.checkpoint import Checkpoint
from osp.train.engine import Engine
from osp.train.setup import train
from tests.conftest import ROOT, run_in_process

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def spiky(tiny_values: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which channel 11 of the embedding is made an outlier at the second step."""
    folder = tmp_path_factory.mktemp("inspect") / "run"
    values = json.loads(json.dumps(tiny_values))
    values |= {"run": {"name": "run", "dir": str(folder)}, "monitor": {"tokens": 64, "every": 1}}
    values["train"]["steps"], values["eval"]["every"] = 3, 0
    values["checkpoint"]["every"] = 1
    values["model"]["embed_proj"] = False
    original = Engine.step

    def step(self: Engine, number: int, factor: float, **options: Any) -> None:
        original(self, number, factor, **options)
        if number == 2:
            for name, start, _, states in self.optimizer.local_state():
                if name == "embed_tokens.weight":
                    assert start == 0
                    states["weight"].view(-1, 32)[:, 11] = 50.0
            self.sync_weights_from_master()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", step)
        train(from_dict(values))
    return folder


def test_inspection_names_the_outlier_and_the_step_since_it_exists(spiky: Path, tmp_path: Path) -> None:
    table, path = inspect(spiky, out=tmp_path)
    (line,) = [line for line in table.split("\n") if line.startswith("embed_out")]
    cells = line.split()
    assert cells[2] == "outlier"
    assert cells[6] == "11"
    assert "step 2" in line
    (words,) = [line for line in table.split("\n") if line.startswith("channel 11 of embed_out ")]
    assert words == "channel 11 of embed_out is constant (100%) and holds 100% of the energy"
    contents = json.loads(path.read_text())
    assert contents["mechanism"] in table
    assert contents["step"] == 3
    assert contents["channel"] == 11
    assert contents["since"] == 2
    steps = dict(contents["growth"])
    assert steps[3] > 10 * (steps[1] or 0.1)
    assert "embed_tokens.weight" in {weight["parameter"] for weight in contents["weights"]}
    assert (tmp_path / path.name).exists()
    assert "| weights that write it | which |" in path.with_suffix(".md").read_text()


def test_inspection_reads_a_given_text_and_an_older_checkpoint(spiky: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words of a user " * 20)
    table, path = inspect(spiky / "checkpoints" / "step_00000001", text, tmp_path)
    assert table.startswith("after step 1:")
    contents = json.loads(path.read_text())
    assert contents["text"] in text.read_text()
    assert max(step for step, _ in contents["growth"]) == 1, "no probe after the checkpoint"


def test_averaged_weights_are_inspected_beside_the_trained_ones(averaged_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(averaged_run, run)
    (table, path), (averaged, other) = inspect(run), inspect(run, weights="averaged")
    assert table.startswith("after step 4: ")
    assert averaged.startswith("averaged weights, after step 4: ")
    assert table.split("\n")[2:] != averaged.split("\n")[2:]
    assert (path.parent, other.parent) == (run / "forensics", run / "forensics_averaged")
    measured = [json.loads(bundle.read_text())["model_weights"] for bundle in (path, other)]
    assert measured == ["trained", "averaged"]
    headings = [bundle.with_suffix(".md").read_text().split("\n")[0] for bundle in (path, other)]
    assert [heading.endswith("after step 4, averaged weights") for heading in headings] == [False, True]


def test_given_text_begins_with_the_start_token_of_the_training(spiky: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words of a user " * 20)
    folder = spiky / "checkpoints" / "step_00000001"
    config = Checkpoint(folder).config
    plain, tokenizer = _read_text(folder, config, tmp_path / "text.txt")
    marked = dataclasses.replace(config, data=dataclasses.replace(config.data, bos=True))
    tokens = _read_text(folder, marked, tmp_path / "text.txt")[0].tokens
    assert tokens.shape == plain.tokens.shape
    assert tokens[:, 0].tolist() == [tokenizer.token_to_id(config.tokenizer.eos_token)] * len(tokens)
    assert torch.equal(tokens[:, 1:], plain.tokens[:, :-1])


def test_command_prints_the_table_without_deepspeed(spiky: Path, tmp_path: Path) -> None:
    """The process cannot import DeepSpeed."""
    code = (
        "import sys, runpy; sys.modules['deepspeed'] = None; "
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r}); "
        f"sys.argv = ['inspect_outliers.py', {str(spiky)!r}, 'out=' + {str(tmp_path)!r}]; "
        f"runpy.run_path({str(ROOT / 'scripts/inspect_outliers.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "kurtosis/osp_script" in done.stdout
    assert "embed_out" in done.stdout
    assert str(tmp_path) in done.stdout


def test_unreadable_input_is_a_one_line_error(spiky: Path, tmp_path: Path) -> None:
    def line(path: Path, text: Path | None = None, out: Path | None = None) -> str:
        with pytest.raises(UserError) as caught:
            inspect(path, text, out)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    assert line(tmp_path) == f"{tmp_path}: neither a run folder with a checkpoint nor a checkpoint"
    assert line(spiky, empty) == f"text={empty}: has 0 tokens; moments over tokens need at least 2"
    assert line(spiky, binary).startswith(f"cannot read text={binary}: ")
    assert line(spiky, None, empty) == f"{empty}: cannot write there: File exists; set out to another folder"
    assert line(spiky, tmp_path / "no.txt").startswith(f"text={tmp_path / 'no.txt'} does not exist")


def test_missing_validation_split_is_a_one_line_error(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.steps=1", "checkpoint.every=0")
    train(config)
    manifest = tmp_path / "run" / "checkpoints" / "step_00000001" / "manifest.json"
    contents = json.loads(manifest.read_text())
    contents["data"] |= {"shards": str(tmp_path / "elsewhere"), "from_run": "elsewhere"}
    contents["config"]["data"]["paths"] = [str(tmp_path / "gone.jsonl")]
    manifest.write_text(json.dumps(contents))
    with pytest.raises(
        UserError, match=r"elsewhere are gone, and its text too \(.*gone.jsonl.*; name a file of text: text="
    ):
        inspect(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: python scripts/inspect_outliers.py RUN_OR_CHECKPOINT [text=FILE] [out=DIR]"),
        (("run", "--text", "a.txt"), "there is no option --text; write text=a.txt"),
        (("run", "--out=folder"), "there is no option --out; write out=folder"),
        (("run", "txt=a.txt"), "unknown key 'txt'; did you mean 'text'?"),
        (("run", "text=[a.txt]"), "text=['a.txt']: must be text; write it in quotes"),
        (("no",), "no: neither a run folder with a checkpoint nor a checkpoint"),
    ],
)
def test_mistyped_command_is_a_one_line_error(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_in_process(monkeypatch, "inspect_outliers", *arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('monitor.sites=["attn_inn"]', "monitor.sites"),
        ('monitor.statistics=["kurtoses"]', "monitor.statistics"),
        ("monitor.tokens=1", "monitor.tokens=1: must be at least 2"),
        ("monitor.every=-1", "monitor.every=-1: must be at least 0"),
        ("monitor.every=often", "monitor.every='often': must be an integer or 'auto'"),
        ("monitor.max_cost=2", "monitor.max_cost=2: must be below 1"),
        ("monitor.alerts.kurtosis.all.above=-1", "monitor.alerts.kurtosis.all.above=-1: must be above 0"),
        (
            "monitor.alerts.kurtosis.everywhere.above=1",
            "unknown key 'monitor.alerts.kurtosis.everywhere'; it must be ",
        ),
        ("monitor.alerts.kurtose.all.above=1", "unknown key 'monitor.alerts.kurtose'; it must be 'kurtosis', "),
        ("monitor.alerts.kurtosis.all.abov=1", "unknown key 'monitor.alerts.kurtosis.all.abov'"),
    ],
)
def test_invalid_monitor_configuration_is_refused(override: str, message: str, tiny: Tiny) -> None:
    with pytest.raises(UserError) as caught:
        tiny(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
