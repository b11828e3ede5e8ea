"""Texts of a run are found without its corpus, and texts of one file name are told apart."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from osp.config import Config, from_dict
from osp.data.sources import Backcopy
from osp.errors import UserError
from osp.evaluation.language_model import open_model
from osp.evaluation.perplexity import perplexity
from osp.evaluation.texts import read_text, read_texts, training_text
from osp.run.checkpoint import find
from osp.train.setup import train
from osp.train.validate import stored_summary
from tests.conftest import made_text

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def project(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with corpus.jsonl, its shards and runs/a, trained on them from this folder."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in made_text(100)))
    data = {**tiny_values["data"], "paths": ["corpus.jsonl"], "cache_dir": "data/shards"}
    brief = {"train": {**tiny_values["train"], "steps": 1}, "eval": {"every": 0, "tokens": 64, "sample_tokens": 0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(from_dict({**tiny_values, **brief, "data": data, "run": {"name": "a", "dir": "runs/a"}}))
    return folder


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """Return the project at another place, whose checkpoint names shards that are not at the old one."""
    shutil.copytree(project, tmp_path / "copy")
    edit(tmp_path / "copy", shards="/nowhere/shards")
    return tmp_path / "copy"


def edit(project: Path, **data: Any) -> None:
    """Change what the checkpoint of runs/a records of its text; None removes a key."""
    folder = find(project / "runs" / "a")
    assert folder is not None
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"] = {key: value for key, value in (manifest["data"] | data).items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def shards_of(project: Path) -> Path:
    (folder,) = (project / "data" / "shards").iterdir()
    return folder


@pytest.fixture
def expected(project: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hash of the validation split."""
    return read_text("held_out", open_model(project / "runs" / "a")).sha256


def test_split_is_found_from_another_folder_and_after_the_corpus_grew(
    project: Path, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    corpus, subject = project / "corpus.jsonl", open_model(project / "runs" / "a")
    text = corpus.read_text()
    corpus.write_text(text + "".join(json.dumps({"text": text}) + "\n" for text in made_text(100, seed=1)))
    try:
        assert read_text("held_out", subject).sha256 == expected
        assert read_text(str(project / "runs" / "a"), subject).sha256 == expected
        assert training_text(subject).dtype == torch.int64
        corpus.unlink()
        assert read_text("held_out", subject).sha256 == expected
    finally:
        corpus.write_text(text)


def test_split_is_found_after_the_whole_project_moved(copy: Path, expected: str) -> None:
    (copy / "corpus.jsonl").unlink()
    assert read_text("held_out", open_model(copy / "runs" / "a")).sha256 == expected


def test_shards_that_are_gone_are_prepared_again(copy: Path, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    shutil.rmtree(shards_of(copy))
    assert read_text("held_out", open_model(copy / "runs" / "a")).sha256 == expected


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_text_that_is_gone_is_a_line_that_names_the_key(
    change: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    shutil.rmtree(shards_of(copy))
    if change == "gone":
        (copy / "corpus.jsonl").unlink()
    else:
        (copy / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in made_text(90, seed=3)))
    with pytest.raises(
        UserError, match=r"runs/a: its shards /nowhere/shards are gone, and its text too .*texts=\[FILE"
    ):
        read_text("held_out", open_model(copy / "runs" / "a"))
    with pytest.raises(UserError, match=r"are gone, and its text too .*name a text, quant.calibration=FILE"):
        training_text(open_model(copy / "runs" / "a"))


def test_other_shards_at_the_recorded_place_are_not_taken(
    copy: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    manifest = json.loads((shards_of(copy) / "manifest.json").read_text())
    other = copy / "other"
    shutil.copytree(shards_of(copy), other)
    manifest["val"]["shards"][0]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    edit(copy, shards=str(other))
    assert read_text("held_out", open_model(copy / "runs" / "a")).sha256 == expected


def test_checkpoint_of_an_older_version_prepares_its_text(
    copy: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    edit(copy, shards=None, from_run=None, content=None, next_row=None)
    assert read_text("held_out", open_model(copy / "runs" / "a")).sha256 == expected


def test_texts_of_one_name_are_named_by_their_paths(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subject = open_model(project / "runs" / "a")
    names = [
        "en/test.jsonl",
        "de/test.jsonl",
        "de/x/../test.jsonl",
        "test.jsonl",
        "fr.txt",
        "en/notes.raw",
        "de/notes.raw",
    ]
    for name in names:
        path = Path(name)
        (path.parent).mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": f"words of {path}"}) + "\n")
    named = [text.name for text in read_texts(names, subject)]
    assert named == [
        *("en/test.jsonl", "de/test.jsonl", "de/test.jsonl", f"{tmp_path.name}/test.jsonl", "fr.txt"),
        *("en/notes.raw", "de/notes.raw"),
    ]
    shutil.copytree(project / "runs" / "a", tmp_path / "b" / "a")
    assert [text.name for text in read_texts([str(project / "runs" / "a"), "b/a"], subject)] == [
        "runs/a/held_out",
        "b/a/held_out",
    ]


@pytest.mark.parametrize("kind", ["repeat", "backcopy"])
def test_copied_counts_the_tokens_that_can_be_copied(kind: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    data = {**tiny_values["data"], "cache_dir": str(tmp_path), "val_fraction": 0.1}
    data |= (
        {"repeat": 8} if kind == "repeat" else {"source": "backcopy", "bos": True, "paths": [], "max_tokens": 20_000}
    )
    run = {"name": "a", "dir": str(tmp_path / "a")}
    length = {**tiny_values["train"], "steps": 1, "seq_len": 16, "tokens_per_step": 128}
    brief = {"eval": {"every": 0, "tokens": 640, "sample_tokens": 4}, "train": length}
    train(from_dict({**tiny_values, **brief, "data": data, "run": run}))
    assert ("gzip" in (stored_summary(tmp_path / "a") or "gzip repeat")) == (kind == "backcopy")
    subject = open_model(tmp_path / "a")
    text, copied = read_texts(["held_out", "copied"], subject)
    assert text.row == copied.row == 17
    rows = text.tokens.view(-1, 17)
    assert (rows[:, 0] == subject.eos_id).all()
    counted = torch.zeros(rows.shape, dtype=torch.bool)
    for i, row in enumerate(rows.tolist()):
        symbols = [str(subject.tokenizer.id_to_token(token)) for token in row]
        for j in range(1, 17):
            if kind == "repeat" and j > 8:
                assert row[j] == row[j - 8]
                counted[i, j] = True
            if kind == "backcopy" and j > 2 and symbols[j - 1] in Backcopy.TRIGGERS:
                assert row[j] == row[j - 2] or row[j] == subject.eos_id
                counted[i, j] = True
    assert 0 < counted.sum() < counted.numel()
    with torch.no_grad():
        logits = subject.model(rows[:, :-1]).logits
    assert logits is not None
    losses = F.cross_entropy(logits.double().flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(-1, 16)
    measured = [perplexity(subject.model, part, seq_len=16) for part in (text, copied)]
    assert [part.tokens for part in measured] == [losses.numel(), int(counted.sum())]
    assert measured[0].loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert measured[1].loss == pytest.approx(losses[counted[:, 1:]].mean().item(), rel=1e-5)
    assert training_text(subject).shape[1] == 17  # calibration reads sequences as training does


def test_copied_needs_a_run_that_can_copy(project: Path) -> None:
    with pytest.raises(
        UserError, match=r"copied: .* was trained without data\.repeat and data=backcopy; take held_out"
    ):
        read_text("copied", open_model(project / "runs" / "a"))
