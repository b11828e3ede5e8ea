"""Mistakes that people make, typed as they type them: one clear line, status 2, nothing half-written."""

import json
import lzma
import re
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import wandb

from osp.config import Config, UserError
from osp.trainer import train
from tests.conftest import ROOT, overrides_of

sys.path.insert(0, str(ROOT / "scripts"))
import entry
from train import main

Tiny = Callable[..., Config]


@pytest.fixture
def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """The line that `python scripts/train.py ARGUMENTS` prints; checks that it is one, and that nothing was written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("osp.engine.shutdown", lambda: None)  # one process group serves all tests of this process

    def files(folder: Path) -> set[Path]:
        return {path for path in folder.rglob("*") if path.is_file() and "shards" not in path.parts}

    def run(*arguments: str) -> str:
        before = files(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry.launch(main)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error:")]
        assert len(lines) == 1, lines
        assert files(tmp_path) == before
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian.steps=3"], r"unknown key 'trian'; did you mean 'train'\?"),
        (["train.step=3"], r"unknown key 'train.step'; did you mean 'train.steps'\?"),
        (["+train.step=3"], r"unknown key 'train.step'; did you mean 'train.steps'\?"),
        (["norm=rmsnrom"], r"Could not find 'norm/rmsnrom' Available options in 'norm': .*rmsnorm"),
        (["norm.name=rmsnrom"], r"unknown norm 'rmsnrom'; choose from .*'rmsnorm'"),
        (["norm=ssnorm", "norm.kappa=3"], r"norm.kappa=3.0: ssnorm has no such option; it has \['eps', 'init'\]"),
        (["norm.final=foo"], r"norm.final='foo'; choose from"),
        (["optimizer=sgd"], r"Could not find 'optimizer/sgd' Available options in 'optimizer': adamw muon muon_all"),
        (["optimizer.rules.matrix=sgd"], r"optimizer.rules.matrix='sgd'; choose from muon, normalized, adamw"),
        (["optimizer.ns_coefficients=foo"], r"ns_coefficients.*foo.*keller_jordan"),
        (["experiment=osp_1b"], r"Could not override 'experiment'.*\+experiment=osp_1b"),
        (["+experiment=osp_2b"], r"Could not find 'experiment/osp_2b' Available options .* osp_1b"),
        (["model.hidden_size=250", "model.num_attention_heads=4"], r"model.hidden_size=250 is not divisible by"),
        (
            ["model.num_key_value_heads=3"],
            r"model.num_attention_heads=4 is not divisible by model.num_key_value_heads=3",
        ),
        (["train.tokens_per_step=1000"], r"train.tokens_per_step=1000 is no multiple of .*; the nearest is 1024"),
        (["train.micro_batch_size=3"], r"train.micro_batch_size=3 does not divide the 16 rows"),
        (["train.steps=0"], r"train.steps=0: must be at least 1"),
        (["train.steps=ten"], r"train.steps='ten': expected int or null"),
        (["train.steps=null"], r"the run has no length; set train.steps, train.tokens or train.minutes"),
        (["train.minutes=-1"], r"train.minutes=-1.0: must be a finite number above 0"),
        (["train.seq_len=4096", "train.tokens_per_step=4096"], r"train.seq_len=4096 is longer than model.max_position"),
        (["train.precision=fp16"], r"train.precision='fp16'; choose from auto, fp32, bf16|expected .*fp16"),
        (["train.compile=true", "engine=zero3"], r"train.compile=true does not work with engine.zero_stage=3"),
        (["engine.zero_stage=0"], r"engine.zero_stage=0; choose from 1, 2, 3"),
        (["engine.device=cuda"], r"engine.device=cuda, but torch finds no GPU here; set engine.device=cpu"),
        (["schedule.warmup=5 percent"], r"schedule.warmup='5 percent' is no length; write 100 \(steps\)"),
        (["schedule.warmup=90%", "schedule.decay=20%"], r"schedule.warmup='90%' .* exceed the run's 150 steps"),
        (
            ["tokenizer.vocab_size=9000"],
            r"tokenizer.vocab_size=9000 is larger than model.vocab_size=4096; set model.voc",
        ),
        (["data=text"], r"data.paths is empty; name files or folders"),
        (["data=hf"], r"data.dataset is not set; name a Hugging Face data set"),
        (["data=text", "data.paths=[nowhere.jsonl]"], r"nowhere.jsonl"),
        (["tokenizer=file", "tokenizer.path=nowhere.json"], r"nowhere.json"),
        (["tokenizer=file"], r"tokenizer.train=false needs exactly one of tokenizer.path=FILE and tokenizer.hub=NAME"),
        (["resume=runs/nothing"], r"resume=runs/nothing: no checkpoint there; name a run folder"),
        (["resume=true"], r"resume=true; write resume=auto, resume=false or the path"),
        (["train.steps"], r"Error parsing override 'train.steps'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case wants a machine without a GPU")
def test_mistake_on_the_command_line(arguments: list[str], message: str, error_of: Callable[..., str]) -> None:
    assert re.search(message, error_of(*arguments, "logger.wandb=disabled"))


def test_data_set_that_cannot_be_reached(error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = error_of("data=hf", "data.dataset=nobody/no-such-data-set", "logger.wandb=disabled")
    assert "nobody/no-such-data-set" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "no documents|empty|no text"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": "cut\n', r"broken.jsonl.*line 2|broken.jsonl:2"),
        ("field.jsonl", b'{"body": "text"}\n', r"field.jsonl.*'?text'?"),
        ("latin.txt", b"caf\xe9 au lait", "latin.txt"),
        ("cut.jsonl.xz", lzma.compress(b'{"text": "word"}\n' * 5000)[:-20], "cut.jsonl.xz"),
        ("song.mp3", b"ID3", "song.mp3"),
    ],
)
def test_corpus_that_cannot_be_read(
    name: str, content: bytes, message: str, error_of: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(message, error_of("data=text", f"data.paths=[{name}]", "logger.wandb=disabled"))


def test_vocabulary_larger_than_the_models(error_of: Callable[..., str], tiny: Tiny) -> None:
    config = tiny("train.steps=1")
    train(config)
    shard_folder = next(Path(config.data.cache_dir).iterdir())
    arguments = [
        *overrides_of(tiny("train.steps=1", "tokenizer.train=false", f"tokenizer.path={shard_folder}/tokenizer.json")),
        "model.vocab_size=300",
        "run.dir=other",
    ]
    assert re.search(r"model.vocab_size=300 is smaller than the tokenizer's \d+; set", error_of(*arguments))


def test_tokenizer_that_is_not_the_shards(error_of: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.steps=1", f"data.cache_dir={tmp_path / 'shards'}")
    train(config)
    tokenizer = next((tmp_path / "shards").iterdir()) / "tokenizer.json"
    spec = json.loads(tokenizer.read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(spec))
    arguments = overrides_of(tiny("train.steps=1", f"data.cache_dir={tmp_path / 'shards'}", name="second"))
    assert re.search(r"tokenizer.json is not the tokenizer of the shards", error_of(*arguments))


def test_tokenizer_that_is_not_the_runs(error_of: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.steps=1")
    train(config)
    stored = tmp_path / "run" / "tokenizer.json"
    stored.write_text(stored.read_text() + " ")
    assert re.search(r"run.dir=.*run was trained with another tokenizer", error_of(*overrides_of(config)))


def test_run_folder_of_another_configuration(error_of: Callable[..., str], tiny: Tiny) -> None:
    train(tiny("train.steps=1"))
    line = error_of(*overrides_of(tiny("train.steps=1", "model.hidden_size=64")))
    assert re.search(
        r"holds a run with another configuration \(model.hidden_size: 32 -> 64\); choose another run", line
    )


def test_not_enough_disk_for_a_checkpoint(error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    line = error_of("logger.wandb=disabled")
    assert re.search(r"run.dir=runs/osp_nano: 2 checkpoints of 0.07 GB do not fit into the 0.01 GB free", line)


def test_wandb_online_without_a_key(error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    line = error_of("logger.wandb=online")
    assert "logger.wandb=online but there is no W&B key; run `wandb login` or use logger.wandb=offline" in line


def test_damaged_checkpoint_is_named(error_of: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.steps=2", "checkpoint.every=1")
    train(config)
    file = tmp_path / "run" / "checkpoints" / "step_00000002" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert re.search(r"rank_00000.safetensors: damaged, its checksum", error_of(*overrides_of(config)))


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "debug=true", "train.steps=0"])
    with pytest.raises(UserError, match=r"train\.steps=0"):
        entry.launch(main)
