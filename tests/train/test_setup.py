"""What a run may continue with: its model, its tokenizer, its text, and the place in the text."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from osp.config import Config, from_dict, to_dict
from osp.data.loader import Loader
from osp.errors import UserError
from osp.run.checkpoint import Checkpoint, find
from osp.train.setup import check_continues, check_length, train
from tests.conftest import made_text, read_metrics

Tiny = Callable[..., Config]


@pytest.fixture
def tiny(tiny: Tiny, tmp_path: Path) -> Tiny:
    """The small configuration without validation and sample, with shards beside the run."""
    return partial(tiny, "eval.every=0", "eval.tokens=64", "eval.sample_tokens=0", f"data.cache_dir={tmp_path}/shards")


@pytest.fixture
def checkpoint(plain_run: Path) -> Checkpoint:
    folder = find(plain_run)
    assert folder is not None
    return Checkpoint(folder)


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the sequences that training takes, in order."""
    taken: list[int] = []
    original: Callable[..., Any] = Loader.step

    def step(self: Loader, number: int) -> Any:
        taken.extend((self.first_row(number) + self.indices).tolist())
        return original(self, number)

    monkeypatch.setattr(Loader, "step", step)
    return taken


def corpus_file(path: Path, *, seed: int, num_documents: int = 150) -> Path:
    texts = made_text(num_documents, seed=seed)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def messages(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_attention_heads", 2),
        ("model.hidden_act", "gelu"),
        ("model.rope_theta", 500.0),
        ("model.rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("norm.lns", True),
        ("norm.eps", 0.1),
        ("norm.placement", "peri"),
        ("attention.off_by_one", True),
        ("attention.logit_cap", 30.0),
        ("tokenizer.eos_token", "<s>"),
    ],
)
def test_key_that_changes_what_the_weights_compute_is_refused(key: str, value: Any, checkpoint: Checkpoint) -> None:
    values, (table, name) = to_dict(checkpoint.config), key.split(".")
    changed = from_dict({**values, table: {**values[table], name: value}})
    with pytest.raises(UserError, match=rf"{key}[.a-z_]*: .* -> .*; set the old values"):
        check_continues(changed, checkpoint, checkpoint.shapes)


def test_initial_values_and_the_training_may_change(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    model = dataclasses.replace(config.model, initializer_range=0.5, max_position_embeddings=128)
    norm = dataclasses.replace(config.model.norm, init=2.0, lam=3.0, lam_post=2.0)
    model = dataclasses.replace(model, norm=norm, init="normal", scale_residual_init=True)
    optimizer, training = dataclasses.replace(config.optimizer, lr=1.0), dataclasses.replace(config.train, steps=9)
    changed = dataclasses.replace(config, model=model, optimizer=optimizer, train=training)
    check_continues(changed, checkpoint, checkpoint.shapes)


# --- the text -----------------------------------------------------------------------------------------------------


def test_longer_run_with_another_batch_reads_every_sequence_once(
    tiny: Tiny, tmp_path: Path, rows_read: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(tiny("train.steps=20", name="a"))
    longer = ("train.steps=40", "train.tokens_per_step=512", f"resume={tmp_path / 'a'}")
    train(tiny(*longer, "train.stop_at=30", name="b"))
    assert messages(caplog, "continues with: ") == [
        "continues with: train.steps: 20 -> 40, train.tokens_per_step: 256 -> 512"
    ]
    train(tiny(*longer, name="b"))
    assert rows_read == list(range(20 * 8 + 20 * 16))
    lines = [line for line in read_metrics(tmp_path / "b") if "train/loss" in line]
    assert (lines[0]["step"], lines[0]["tokens"]) == (21, 20 * 256 + 512)
    assert (lines[-1]["step"], lines[-1]["tokens"]) == (40, 20 * 256 + 20 * 512)
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["tokens"] == 20 * 256 + 20 * 512


def test_skip_steps_after_a_change_of_the_batch_names_the_steps_of_the_run(
    tiny: Tiny, tmp_path: Path, rows_read: list[int]
) -> None:
    train(tiny("data.skip_steps=[[2,2]]", "train.steps=3", name="a"))
    longer = ("train.steps=6", "train.tokens_per_step=512", f"resume={tmp_path / 'a'}")
    train(tiny(*longer, "data.skip_steps=[[2,2],[6,6]]", name="b"))
    steps = [range(8), range(16, 24), range(24, 32), range(32, 48), range(64, 80), range(80, 96)]
    assert rows_read == [row for step in steps for row in step]


def test_tokens_of_steps_of_another_size_are_not_counted_as_equal(checkpoint: Checkpoint) -> None:
    training = dataclasses.replace(checkpoint.config.train, steps=None, tokens=6 * 256 + 1000, tokens_per_step=512)
    with pytest.raises(UserError, match=r"train.tokens=2536: .* set train.steps=8 instead"):
        check_length(dataclasses.replace(checkpoint.config, train=training), checkpoint)
    check_length(
        dataclasses.replace(checkpoint.config, train=dataclasses.replace(training, tokens_per_step=256)), checkpoint
    )


@pytest.mark.parametrize("change", ["train.seed=1", "train.seq_len=16"])
def test_unknown_place_in_the_same_text_is_refused(change: str, tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{change.split('=')[0]}: .*; set the old ones, or begin with the weights"):
        train(tiny("train.steps=8", f"resume={plain_run}", change))
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused_and_the_message_names_the_way_to_new_text(
    tiny: Tiny, plain_run: Path, tmp_path: Path, rows_read: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    new = (
        "train.steps=10",
        f"resume={plain_run}",
        f"data.paths=[{json.dumps(str(corpus_file(tmp_path / 'n.jsonl', seed=5)))}]",
    )
    with pytest.raises(UserError, match=r"was trained with another tokenizer than .*; set tokenizer=file tokenizer.pa"):
        train(tiny(*new))
    assert not (tmp_path / "run").exists()
    file = ("tokenizer.train=false", f"tokenizer.path={plain_run / 'tokenizer.json'}", "tokenizer.vocab_size=320")
    train(tiny(*new, *file, "train.stop_at=8"))
    assert len(messages(caplog, "holds another text than")) == 1
    train(tiny(*new, *file))
    assert len(messages(caplog, "holds another text than")) == 1
    assert rows_read == list(range(4 * 8))


def test_changed_text_under_the_same_tokenizer_is_refused(tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    path = corpus_file(tmp_path / "own.jsonl", seed=5)
    tokenizer = ("tokenizer.train=false", f"tokenizer.path={plain_run / 'tokenizer.json'}")
    config = partial(tiny, *tokenizer, f"data.paths=[{json.dumps(str(path))}]")
    train(config("train.stop_at=2"))
    lines = path.read_text().splitlines(keepends=True)
    os.utime(path, (1, 1))  # the same text with another time
    train(config("train.stop_at=3"))
    for changed in (lines[::-1], lines + lines[:50]):
        path.write_text("".join(changed))
        with pytest.raises(UserError, match=r"run.dir=.* was trained on another text than .* holds now; choose"):
            train(config())
    train(config(f"resume={tmp_path / 'run'}", name="goes_on"))
    assert read_metrics(tmp_path / "goes_on")[0]["step"] == 4


def test_checkpoint_of_an_older_version_continues(tiny: Tiny, tmp_path: Path, rows_read: list[int]) -> None:
    """Its manifest names neither the next sequence nor the text."""
    train(tiny("train.stop_at=3"))
    path = tmp_path / "run" / "checkpoints" / "step_00000003" / "manifest.json"
    values = json.loads(path.read_text())
    for key in ("next_row", "shards", "from_run", "content"):
        del values["data"][key]
    path.write_text(json.dumps(values))
    train(tiny())
    assert rows_read == list(range(6 * 8))
