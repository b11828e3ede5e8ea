"""Shards hold exactly the corpus, with any number of threads, after interruptions and beside other processes."""

import dataclasses
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osp.config import DataConfig, SourceConfig, TokenizerConfig
from osp.data import prepare as prepare_module
from osp.data.loader import Layout, Loader
from osp.data.manifest import load_manifest
from osp.data.prepare import prepare, shard_folder, start_preparing
from osp.data.sources import SOURCES, PythonStdlib, TextFiles
from osp.data.tokenizer import PIECE_ENDS, cut, load_tokenizer, spec_hash
from osp.errors import RunError, UserError
from osp.files import is_locked
from tests.data.stopped import WaitingFiles, becomes_true, waiting_corpus

fork = multiprocessing.get_context("fork")

WriteJsonl = Callable[[Path, list[str]], Path]


def tokens_of(folder: Path, split: str) -> list[np.ndarray[Any, Any]]:
    manifest = load_manifest(folder)
    shards = manifest.train.shards if split == "train" else manifest.val.shards
    return [np.fromfile(folder / shard.file, dtype=manifest.dtype) for shard in shards]


def verify_hashes(folder: Path) -> None:
    """Check the hash of every shard."""
    manifest = load_manifest(folder)
    for shard in manifest.val.shards + manifest.train.shards:
        content = (folder / shard.file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (2 * shard.tokens, shard.sha256), shard.file


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def with_text(config: DataConfig, path: Path, **changes: Any) -> DataConfig:
    return dataclasses.replace(config, paths=(str(path),), cache_dir=str(path.parent / "shards"), **changes)


def held_out(text: str, fraction: float) -> bool:
    return prepare_module.text_hash(text) < fraction * 2**64


@pytest.mark.parametrize("max_tokens", [None, 20_000, 32_002, 40_000])
def test_shards_equal_a_naive_packer(
    texts: list[str], data_config: DataConfig, tokenizer_config: TokenizerConfig, max_tokens: int | None
) -> None:
    config = dataclasses.replace(data_config, max_tokens=max_tokens)
    folder = prepare(config, tokenizer_config, progress=False)
    tokenizer = load_tokenizer(str(tokenizer_config.path))
    train: list[int] = []
    val: list[str] = []
    val_tokens: list[int] = []
    for text in filter(None, texts):
        if max_tokens is not None and len(train) >= max_tokens:
            break
        ids = [*tokenizer.encode(text).ids, 0]
        if not held_out(text, config.val_fraction):
            train += ids
        elif len(train) < config.shard_tokens:  # sealed with the first training shard
            val.append(text)
            val_tokens += ids
    train = train[:max_tokens]
    shards = tokens_of(folder, "train")
    assert np.concatenate(shards).tolist() == train
    assert [len(shard) for shard in shards[:-1]] == [config.shard_tokens] * (len(shards) - 1)
    assert np.concatenate(tokens_of(folder, "val")).tolist() == val_tokens
    manifest = load_manifest(folder)
    assert manifest.complete
    assert manifest.train.tokens == len(train)
    assert manifest.val.documents == len(val) > 1
    assert manifest.val.bytes == sum(len(text.encode()) for text in val)
    assert manifest.val_gzip_bytes == sum(len(gzip.compress(text.encode(), 9)) for text in val)
    assert manifest.dtype == "uint16"
    assert manifest.vocab_size == 400
    assert manifest.eos_id == 0
    assert manifest.tokenizer_hash == spec_hash(load_tokenizer(folder / "tokenizer.json").to_str())
    if max_tokens is None:
        kept = [text for text in texts if text and not held_out(text, config.val_fraction)]
        assert manifest.train.documents == len(kept)
        assert manifest.train.bytes == sum(len(text.encode()) for text in kept)
        assert manifest.next_document == len(texts)
    verify_hashes(folder)


def test_any_number_of_threads_writes_the_same_bytes(
    data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 10_000)  # many batches in flight
    written = []
    for num_workers in (1, 2, 3):
        config = dataclasses.replace(data_config, num_workers=num_workers, cache_dir=str(tmp_path / str(num_workers)))
        written.append(contents(prepare(config, TokenizerConfig(vocab_size=500), progress=False)))
    for other in written[1:]:
        assert {k: v for k, v in other.items() if k != "manifest.json"} == {
            k: v for k, v in written[0].items() if k != "manifest.json"
        }
        a, b = json.loads(written[0]["manifest.json"]), json.loads(other["manifest.json"])
        assert {k: v for k, v in a.items() if k != "source"} == {k: v for k, v in b.items() if k != "source"}


def test_split_depends_on_the_text_and_not_on_its_position(
    texts: list[str],
    data_config: DataConfig,
    tokenizer_config: TokenizerConfig,
    write_jsonl: WriteJsonl,
    tmp_path: Path,
) -> None:
    def split(name: str, texts: list[str]) -> list[list[list[int]]]:
        (tmp_path / name).mkdir()
        path = write_jsonl(tmp_path / name / "corpus.jsonl", texts)
        folder = prepare(with_text(data_config, path, shard_tokens=10**6), tokenizer_config, progress=False)
        return [
            sorted(document.tolist() for document in np.split(tokens, np.flatnonzero(tokens == 0) + 1))
            for tokens in (tokens_of(folder, "train")[0], tokens_of(folder, "val")[0])
        ]

    train, val = split("forward", texts)
    assert split("backward", texts[::-1]) == [train, val]
    twice_train, twice_val = split("twice", texts + texts)
    assert {tuple(d) for d in twice_train} == {tuple(d) for d in train}
    assert {tuple(d) for d in twice_val} == {tuple(d) for d in val}
    assert {tuple(d) for d in train if d}.isdisjoint(tuple(d) for d in val)


@pytest.mark.parametrize("shard_tokens", [3000, 10**6])
def test_validation_split_is_never_empty(
    texts: list[str],
    data_config: DataConfig,
    tokenizer_config: TokenizerConfig,
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    shard_tokens: int,
) -> None:
    few = [text for text in texts[:12] if text]
    few += few  # every text twice, the second time after the first shard where shards are small
    path = write_jsonl(tmp_path / "corpus.jsonl", few)
    config = with_text(data_config, path, val_fraction=1e-9, shard_tokens=shard_tokens)
    folder = prepare(config, tokenizer_config, progress=False)
    manifest = load_manifest(folder)
    chosen = tokens_of(folder, "val")[0].tolist()
    train = np.concatenate(tokens_of(folder, "train")).tolist()
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    seen = [text for text in few if prepare_module.text_hash(text) >= manifest.held_out_below - 1]
    text = min(seen, key=prepare_module.text_hash)
    ids = [*tokenizer.encode(text).ids, 0]
    assert chosen == ids * manifest.val.documents
    assert manifest.val.bytes == len(text.encode()) * manifest.val.documents
    assert manifest.val_gzip_bytes == len(gzip.compress(text.encode(), 9)) * manifest.val.documents
    assert train == [i for other in few if prepare_module.text_hash(other) >= manifest.held_out_below
                     for i in [*tokenizer.encode(other).ids, 0]]  # fmt: skip
    if shard_tokens == 10**6:
        assert text == min(few, key=prepare_module.text_hash)
        assert manifest.val.documents == 2
        assert manifest.train.documents == len(few) - 2


@pytest.mark.parametrize(
    ("corpus_texts", "message"),
    [
        ([], r"the corpus is empty: 0 documents"),
        (["", ""], r"the corpus is empty: 2 documents, none of them with text"),
        (["one", "one", ""], r"the corpus is a single document, .*split it into several files or records"),
        (["one", "two"], r"all 2 documents of the corpus are in the validation split; lower data\.val_fraction"),
    ],
)
def test_corpus_that_cannot_be_split_is_refused_without_leftovers(
    corpus_texts: list[str], message: str, data_config: DataConfig, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    config = with_text(data_config, write_jsonl(tmp_path / "corpus.jsonl", corpus_texts), val_fraction=0.9999)
    with pytest.raises(UserError, match=message):
        prepare(config, TokenizerConfig(), progress=False)
    assert list(Path(config.cache_dir).iterdir()) == []


def test_lone_text_is_refused_before_it_is_encoded_and_the_advice_works(
    data_config: DataConfig, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(texts)
    (tmp_path / "input.txt").write_text(text, newline="")
    config = with_text(data_config, tmp_path / "input.txt", shard_tokens=10**6)
    tokenizer = TokenizerConfig(vocab_size=300)
    with monkeypatch.context() as patch:
        for name in ("prepare._encode", "tokenizer.cut"):
            patch.setattr(f"osp.data.{name}", lambda *_: pytest.fail("work is done on a text that is refused"))
        with pytest.raises(UserError, match="the corpus is a single document") as refusal:
            prepare(config, tokenizer, progress=False)
    advised = re.search(r"data\.document_characters=(\d+)", str(refusal.value))
    assert advised
    size = int(advised[1])
    parts = list(prepare_module._documents(dataclasses.replace(config, document_characters=size)))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= size
    assert min(map(len, parts[:-1])) >= size // 2
    assert sum(part.endswith("\n") for part in parts) > 0.9 * len(parts)
    folder = prepare(dataclasses.replace(config, document_characters=size), tokenizer, progress=False)
    manifest = load_manifest(folder)
    assert manifest.train.documents + manifest.val.documents == len(parts)
    assert manifest.train.bytes + manifest.val.bytes == len(text.encode())


@pytest.mark.parametrize("num_workers", [1, 2])
def test_document_longer_than_a_piece_has_the_tokens_of_the_whole(
    num_workers: int,
    data_config: DataConfig,
    tokenizer_config: TokenizerConfig,
    texts: list[str],
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = ["a short one", "\n".join(texts), "another short one"]
    path = write_jsonl(tmp_path / "corpus.jsonl", documents)
    config = with_text(data_config, path, num_workers=num_workers, shard_tokens=10**6)
    monkeypatch.setattr(cut, "__defaults__", (10_000, 1000, PIECE_ENDS))
    folder = prepare(config, tokenizer_config, progress=False)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    expected = {(*tokenizer.encode(text).ids, 0) for text in documents}
    tokens = np.concatenate(tokens_of(folder, "train") + tokens_of(folder, "val"))
    actual = np.split(tokens, np.flatnonzero(tokens == 0)[:-1] + 1)
    assert {tuple(ids.tolist()) for ids in actual} == expected


def test_preparing_child_imports_nothing_from_the_working_directory(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tqdm", "tokenizers", "osp"):
        (tmp_path / f"{name}.py").write_text(f"open('{tmp_path / 'executed'}', 'w')\nraise ImportError\n")
    folder = start_preparing(
        dataclasses.replace(data_config, cache_dir=str(tmp_path / "shards")), tokenizer_config, progress=False
    )
    assert load_manifest(folder).usable
    assert not (tmp_path / "executed").exists()


def test_preparation_does_not_continue_with_another_tokenizer(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(data_config, cache_dir=str(tmp_path))
    child = fork.Process(target=_prepare_and_die, args=(config, tokenizer_config, "save_manifest", 3))
    child.start()
    child.join()
    folder = shard_folder(config, tokenizer_config)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("endoftext", "endoftexts"))
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer of the shards beside it; delete"):
        prepare(config, tokenizer_config, progress=False)


def test_names_of_shard_folders_do_not_change_between_versions() -> None:
    """A changed name would have every user prepare the same shards again."""
    hub, other = (
        DataConfig(source="hf", dataset="a/b", subset="c d"),
        SourceConfig(source="hf", dataset="c", weight=0.3),
    )
    part = SourceConfig(source="hf", dataset="a/b", weight=0.7)
    mixture = DataConfig(source="mixture", mixture=(part, other), max_tokens=10**9)
    existing = TokenizerConfig(train=False, hub="x/y")
    names = [shard_folder(data, config).name for data in (hub, mixture) for config in (TokenizerConfig(), existing)]
    assert names == [
        "a_b_c_d-b7976bc545ec",
        "a_b_c_d-0631dc0ea1de",
        "mixture-46d6f2301a2f",
        "mixture-d744dcce3d3c",
    ]


def test_prepared_shards_are_reused_until_something_changes(
    data_config: DataConfig,
    tokenizer_config: TokenizerConfig,
    shards: Path,
    jsonl_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(shards)
    monkeypatch.setattr(TextFiles, "documents", lambda source: pytest.fail("the corpus is read again"))
    assert prepare(data_config, tokenizer_config) == shards
    assert start_preparing(data_config, tokenizer_config) == shards
    assert contents(shards) == before

    def folder(tokenizer: TokenizerConfig = tokenizer_config, **changes: Any) -> Path:
        return shard_folder(dataclasses.replace(data_config, **changes), tokenizer)

    assert folder(num_workers=7) == folder(skip_steps=((900, 920),)) == shards
    assert len({shards, folder(val_fraction=0.2), folder(max_tokens=5), folder(tokenizer=TokenizerConfig())}) == 4
    copy = Path(shutil.copy2(str(tokenizer_config.path), tmp_path))
    copied = dataclasses.replace(tokenizer_config, path=str(copy))
    first = folder(tokenizer=copied)
    copy.write_text(copy.read_text() + "\n")
    assert folder(tokenizer=copied) != first  # the same name, another content
    monkeypatch.undo()
    changed = with_text(data_config, Path(shutil.copy2(jsonl_corpus, tmp_path)))
    first = shard_folder(changed, tokenizer_config)
    os.utime(changed.paths[0], (1, 1))
    assert shard_folder(changed, tokenizer_config) != first
    with pytest.raises(UserError, match=r"cannot read the tokenizer nowhere: No such file"):
        folder(tokenizer=TokenizerConfig(train=False, path="nowhere"))


def _prepare_and_die(data: DataConfig, tokenizer: TokenizerConfig, function: str, call: int) -> None:
    """Prepare until call number `call` of `function` returns, then die as in a power failure."""
    original, calls = getattr(prepare_module, function), iter(range(1, 1000))

    def deadly(*args: Any) -> None:
        original(*args)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(prepare_module, function, deadly)
    prepare(data, tokenizer, progress=False)


@pytest.mark.parametrize(
    ("function", "call"),
    # a manifest is saved at the start and per shard; files are the tokenizer, val, train shards
    [("save_manifest", n) for n in (1, 2, 3, 4)] + [("write_atomically", n) for n in (1, 2, 3, 4)],
)
@pytest.mark.parametrize(
    ("shard_tokens", "max_tokens"),
    # 48,003 is three shards; documents span several of the shards of 331
    [(16_001, None), (16_001, 48_003), (16_001, 50_000), (331, 6_000)],
)
def test_killed_preparation_continues_to_the_same_bytes(
    data_config: DataConfig,
    tokenizer_config: TokenizerConfig,
    tmp_path: Path,
    function: str,
    call: int,
    shard_tokens: int,
    max_tokens: int | None,
) -> None:
    whole = dataclasses.replace(data_config, shard_tokens=shard_tokens, max_tokens=max_tokens)
    config = dataclasses.replace(whole, cache_dir=str(tmp_path))
    child = fork.Process(target=_prepare_and_die, args=(config, tokenizer_config, function, call))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    folder = shard_folder(config, tokenizer_config)
    (folder / "train-00009.bin.tmp").write_bytes(b"half")
    assert not (folder / "manifest.json").exists() or not load_manifest(folder).complete
    assert prepare(config, tokenizer_config, progress=False) == folder
    resumed, expected = contents(folder), contents(prepare(whole, tokenizer_config, progress=False))
    for files in (resumed, expected):
        files["manifest.json"] = files["manifest.json"].replace(config.cache_dir.encode(), whole.cache_dir.encode())
    assert resumed == expected


@pytest.mark.parametrize("document_characters", [None, 700])
def test_killed_preparation_of_a_long_document_continues_to_the_same_bytes(
    document_characters: int | None,
    data_config: DataConfig,
    tokenizer_config: TokenizerConfig,
    texts: list[str],
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cut, "__defaults__", (5000, 1000, PIECE_ENDS))
    path = write_jsonl(tmp_path / "corpus.jsonl", ["\n".join(texts), *texts[:20]])
    config = with_text(data_config, path, document_characters=document_characters)
    expected = contents(prepare(config, tokenizer_config, progress=False))
    folder = shard_folder(config, tokenizer_config)
    shutil.rmtree(folder)
    child = fork.Process(target=_prepare_and_die, args=(config, tokenizer_config, "save_manifest", 4))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert load_manifest(folder).usable
    assert contents(prepare(config, tokenizer_config, progress=False)) == expected


def _prepare_and_record(data: DataConfig, tokenizer: TokenizerConfig, notes: Path, at_lock: Any) -> None:
    """Prepare; whoever holds the lock waits until both processes have asked for it."""
    write_shards, flock = prepare_module._write_shards, fcntl.flock

    def counted(*args: Any) -> None:
        at_lock.release()
        flock(*args)

    def recorded(*args: Any, **kwargs: Any) -> None:
        with notes.open("a") as file:
            file.write("prepared\n")
        assert becomes_true(lambda: at_lock.get_value() >= 2)
        write_shards(*args, **kwargs)

    prepare_module.__dict__["_write_shards"] = recorded
    fcntl.flock = counted
    try:
        prepare(data, tokenizer, progress=False)
    except UserError as error:
        with notes.open("a") as file:
            file.write(f"{error}\n")


def test_two_processes_prepare_the_same_shards_once(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(data_config, cache_dir=str(tmp_path / "shards"))
    arguments = (config, tokenizer_config, tmp_path / "notes", fork.Semaphore(0))
    children = [fork.Process(target=_prepare_and_record, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert (tmp_path / "notes").read_text() == "prepared\n"
    verify_hashes(shard_folder(config, tokenizer_config))


def test_waiting_process_prepares_after_the_first_one_failed(
    data_config: DataConfig, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    # the first process removes the folder together with the lock that the second one waits for
    config = with_text(data_config, write_jsonl(tmp_path / "corpus.jsonl", []))
    arguments = (config, TokenizerConfig(), tmp_path / "notes", fork.Semaphore(0))
    children = [fork.Process(target=_prepare_and_record, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    message = "the corpus is empty: 0 documents, none of them with text"
    assert sorted((tmp_path / "notes").read_text().splitlines()) == sorted(["prepared", message] * 2)
    assert list(Path(config.cache_dir).iterdir()) == []


@pytest.fixture
def waiting_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "text", WaitingFiles)


@pytest.mark.usefixtures("waiting_files")
def test_start_returns_after_the_first_shard_and_the_rest_follows(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, texts: list[str], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    waiting_corpus(tmp_path / "corpus.jsonl", texts, gates=[gate])
    config = with_text(data_config, tmp_path / "corpus.jsonl")
    folder = start_preparing(config, tokenizer_config, progress=False)
    manifest = load_manifest(folder)
    assert manifest.usable
    assert not manifest.complete
    loader = Loader(folder, Layout(64), rows_per_step=8, micro_batch_size=4)
    step = len(manifest.train.shards) * (config.shard_tokens // 64) // 8 + 1
    assert not loader.wait(step, seconds=0.1)  # for shards that are not sealed yet
    gate.touch()
    assert len(loader.step(step)) == 2
    prepare(config, tokenizer_config, progress=False)
    loader.close()
    assert load_manifest(folder).complete
    verify_hashes(folder)


@pytest.mark.usefixtures("waiting_files")
def test_start_reports_an_error_of_its_child_process(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("{]\n")
    config = with_text(data_config, path)
    with pytest.raises(UserError, match=r"^\S*corpus\.jsonl, line 1: malformed JSON"):
        start_preparing(config, tokenizer_config, progress=False)
    assert list(Path(config.cache_dir).iterdir()) == []

    gate = tmp_path / "gate"
    waiting_corpus(path, texts, gates=[gate])
    path.write_text(path.read_text() + "{]\n")  # read after the run has started
    folder = start_preparing(config, tokenizer_config, progress=False)
    gate.touch()
    loader = Loader(folder, Layout(64), rows_per_step=8, micro_batch_size=4)
    with pytest.raises(RunError, match=r"preparing .* failed: .*corpus\.jsonl, line \d+: malformed JSON"):
        loader.step(10**6)
    loader.close()


def test_background_preparation_ends_with_its_parent(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, texts: list[str], tmp_path: Path
) -> None:
    waiting_corpus(tmp_path / "corpus.jsonl", texts, gates=[tmp_path / "never"], num_workers=2)
    config = with_text(data_config, tmp_path / "corpus.jsonl", num_workers=2)
    program = (
        "import os; from osp.config import *; from osp.data.prepare import start_preparing; "
        "from tests.data.stopped import register_waiting_files; register_waiting_files(); "
        f"print(start_preparing({config!r}, {tokenizer_config!r}, progress=False), flush=True); os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    folder = Path(parent.stdout.strip())
    assert becomes_true(lambda: not is_locked(folder))
    assert load_manifest(folder).usable
    assert not load_manifest(folder).complete


def test_killed_preparation_is_reported(
    tokenizer_config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "python_stdlib", _Deadly)
    config = DataConfig(cache_dir=str(tmp_path))
    with pytest.raises(RunError, match=r"preparing .* was killed, .*data\.num_workers"):
        start_preparing(config, tokenizer_config, progress=False)


class _Deadly(PythonStdlib):
    def documents(self) -> Iterator[str]:
        yield "a text"
        os.kill(os.getpid(), signal.SIGKILL)


def test_text_that_changes_during_a_start_is_refused(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osp.data.prepare.shard_folder", lambda *_: tmp_path / "before")  # not in the child
    with pytest.raises(
        UserError, match=r"^files of the text change during this start; start again when nothing writes"
    ):
        start_preparing(data_config, tokenizer_config, progress=False)


def test_unwritable_cache_is_reported(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(data_config, cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write to .*file/corpus-"):
        prepare(config, tokenizer_config, progress=False)
