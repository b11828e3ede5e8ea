"""Preparation that is killed, signalled, orphaned or out of disk space loses nothing and accepts no partial file."""

import dataclasses
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from osp.config import DataConfig, TokenizerConfig
from osp.data.manifest import load_manifest
from osp.data.prepare import prepare, shard_folder
from osp.errors import UserError
from osp.files import is_locked
from tests.data.stopped import MOMENTS, Moment, becomes_true, die_in_write, waiting_corpus
from tests.data.test_prepare import contents, verify_hashes, with_text

fork = multiprocessing.get_context("fork")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Return whether a process runs and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _prepare_and_die(config: DataConfig, tokenizer: TokenizerConfig, number: int, moment: Moment) -> None:
    die_in_write(number, moment)
    prepare(config, tokenizer, progress=False)


def _exit_code_of(number: int, moment: Moment, config: DataConfig, tokenizer: TokenizerConfig) -> int | None:
    """Prepare in a child process that dies in write number `number`, if there is one."""
    child = fork.Process(target=_prepare_and_die, args=(config, tokenizer, number, moment))
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("num_workers", [1, 2])
def test_preparation_killed_again_and_again_gives_the_same_bytes(
    num_workers: int, data_config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    """About 140 writes: tokenizer.json, 67 shards and the manifest after each. A preparation may make no progress."""
    config = dataclasses.replace(data_config, shard_tokens=2_003, num_workers=num_workers)
    whole = dataclasses.replace(config, cache_dir=str(tmp_path / "whole"))
    killed = dataclasses.replace(config, cache_dir=str(tmp_path / "killed"))
    expected = contents(prepare(whole, tokenizer_config, progress=False))
    folder = shard_folder(killed, tokenizer_config)
    rng = random.Random(num_workers)
    exit_codes = []
    while 0 not in exit_codes:
        exit_codes.append(_exit_code_of(rng.randint(1, 40), rng.choice(MOMENTS), killed, tokenizer_config))
        assert exit_codes[-1] == 0 or not (folder / "manifest.json").exists() or not load_manifest(folder).complete
    assert set(exit_codes[:-1]) == {-signal.SIGKILL}
    assert len(exit_codes) > 5
    resumed = contents(folder)
    for files in (resumed, expected):
        files["manifest.json"] = files["manifest.json"].replace(b"/killed", b"/whole")
    assert resumed == expected
    verify_hashes(folder)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("is_last", [False, True])
def test_preparation_killed_in_its_first_or_last_write_gives_the_same_bytes(
    is_last: bool,
    moment: Moment,
    data_config: DataConfig,
    shards: Path,
    tokenizer_config: TokenizerConfig,
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(data_config, cache_dir=str(tmp_path))
    num_writes = 4 + 2 * len(load_manifest(shards).train.shards)  # tokenizer, manifests of start and end, validation
    number = num_writes if is_last else 1
    assert _exit_code_of(number, moment, config, tokenizer_config) == -signal.SIGKILL
    folder = shard_folder(config, tokenizer_config)
    assert (folder / "tokenizer.json").exists() == (is_last or moment == "renamed")
    if is_last:
        assert load_manifest(folder).complete == (moment == "renamed")
    resumed, expected = contents(prepare(config, tokenizer_config, progress=False)), contents(shards)
    resumed["manifest.json"] = resumed["manifest.json"].replace(
        config.cache_dir.encode(), data_config.cache_dir.encode()
    )
    assert resumed == expected


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the children in /proc")
def test_preparation_survives_signals_and_ends_with_its_trainer(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, texts: list[str], tmp_path: Path
) -> None:
    """A launcher signals every process of a job, and the trainer may need data to finish its step."""
    gates = [tmp_path / "signalled", tmp_path / "never"]
    waiting_corpus(tmp_path / "corpus.jsonl", texts, gates=gates, num_workers=2)
    config = with_text(data_config, tmp_path / "corpus.jsonl", num_workers=2)
    program = (
        "import time; from osp.config import *; from osp.data.prepare import start_preparing; "
        "from tests.data.stopped import register_waiting_files; register_waiting_files(); "
        f"print(start_preparing({config!r}, {tokenizer_config!r}, progress=False), flush=True); time.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env) as trainer:
        assert trainer.stdout is not None
        folder = Path(trainer.stdout.readline().strip())
        (preparer,) = children_of(trainer.pid)
        sealed = len(load_manifest(folder).train.shards)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(preparer, number)
        gates[0].touch()
        assert becomes_true(lambda: len(load_manifest(folder).train.shards) > sealed)
        assert load_manifest(folder).error is None
        assert not load_manifest(folder).complete
        assert alive(preparer)
        trainer.kill()
        trainer.wait()
        assert becomes_true(lambda: not alive(preparer))
    assert becomes_true(lambda: not is_locked(folder))  # its threads end after it


def _prepare_recording_the_error(
    config: DataConfig, tokenizer: TokenizerConfig, notes: Path, max_file_bytes: int = resource.RLIM_INFINITY
) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    try:
        prepare(config, tokenizer, progress=False)
    except UserError as error:
        notes.write_text(str(error))


@pytest.mark.parametrize(
    ("limit", "file"),
    # bytes that a file may have: the tokenizer.json has more than 8,000, a shard of training 32,002
    [(4_000, "tokenizer.json"), (31_000, "train-00000.bin")],
)
def test_full_disk_is_reported_in_one_line_and_leaves_nothing(
    limit: int, file: str, data_config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(data_config, cache_dir=str(tmp_path / "shards"))
    arguments = (config, tokenizer_config, tmp_path / "notes", limit)
    child = fork.Process(target=_prepare_recording_the_error, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
    message = (tmp_path / "notes").read_text()
    assert message == f"cannot write {shard_folder(config, tokenizer_config) / file}: File too large"
    assert list((tmp_path / "shards").iterdir()) == []
    verify_hashes(prepare(config, tokenizer_config, progress=False))


def test_full_disk_that_takes_no_manifest_is_said_by_the_preparation(
    data_config: DataConfig,
    tokenizer_config: TokenizerConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = dataclasses.replace(data_config, cache_dir=str(tmp_path / "shards"))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if (shard_folder(config, tokenizer_config) / "train-00001.bin.tmp").exists():
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    def keep(path: Path, **_: object) -> None:
        """Leave the file whose writing failed, so that the disk stays full."""

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "unlink", keep)
    with pytest.raises(UserError, match=r"^cannot write .*train-00001\.bin: No space left on device$"):
        prepare(config, tokenizer_config, progress=False)
    assert "failed: cannot write" in caplog.text
    monkeypatch.undo()
    verify_hashes(prepare(config, tokenizer_config, progress=False))


def test_full_disk_keeps_sealed_shards_and_continues_later(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills while the third training shard is written; the next start completes the same bytes."""
    config = dataclasses.replace(data_config, cache_dir=str(tmp_path / "shards"))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("train-00002.bin.tmp"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^cannot write .*train-00002\.bin: No space left on device$"):
        prepare(config, tokenizer_config, progress=False)
    monkeypatch.undo()
    folder = shard_folder(config, tokenizer_config)
    manifest = load_manifest(folder)
    assert [shard.file for shard in manifest.train.shards] == ["train-00000.bin", "train-00001.bin"]
    assert manifest.error is not None
    assert not manifest.complete
    assert not list(folder.glob("*.tmp"))
    verify_hashes(folder)
    resumed = contents(prepare(config, tokenizer_config, progress=False))
    expected = contents(prepare(data_config, tokenizer_config, progress=False))
    expected["manifest.json"] = expected["manifest.json"].replace(
        data_config.cache_dir.encode(), config.cache_dir.encode()
    )
    assert resumed == expected
