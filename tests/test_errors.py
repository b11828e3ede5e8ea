"""Common user errors on the real command line: one clear line, exit status 2, no file changed."""

import gzip
import json
import lzma
import os
import re
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import wandb
import zstandard

from osp.config import Config, to_dict
from osp.data.prepare import prepare
from osp.errors import UserError
from osp.train.setup import train
from osp.train.trainer import Trainer
from tests.conftest import ROOT, overrides_of

sys.path.insert(0, str(ROOT / "scripts"))
import entry
from train import main

Tiny = Callable[..., Config]
Change = Callable[[Path], object]  # of a folder, so that it is damaged
Refused = Callable[[Path, Path, tuple[Change, str], Config], None]


def incomplete_files(folder: Path) -> dict[Path, bytes]:
    """Return every file below `folder` with its content, except files of complete shards."""
    complete = {
        path.parent for path in folder.rglob("manifest.json") if b'"complete": true' in path.read_bytes()
    }  # fmt: skip
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.parent not in complete}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return the error line of `python scripts/train.py ARGUMENTS`, which prepares data in the real child process.

    Check that it is one line, that training did not begin, and that no file was written, changed or removed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("osp.distributed.shutdown", lambda: None)  # one process group serves all tests of this process
    monkeypatch.setattr(Trainer, "fit", lambda _: pytest.fail("training began"))

    def run(*arguments: str, config: Config | None = None) -> str:
        if config is not None:  # already composed: parsing a hundred overrides takes longer than most tests
            monkeypatch.setattr(entry, "_compose", lambda *_: [to_dict(config)])
        before = incomplete_files(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry.run(main)
        assert stop.value.code == 2
        output = capsys.readouterr()
        lines = [line for line in output.err.split("\n") if line.startswith("error:")]
        assert len(lines) == 1, lines
        assert "Traceback" not in output.err + output.out
        assert incomplete_files(tmp_path) == before
        return lines[0]

    return run


@pytest.fixture
def error_of(started: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return the same as `started`, but prepare data in this process: a child takes seconds to import."""
    monkeypatch.setattr("osp.train.setup.start_preparing", prepare)
    return started


@pytest.fixture
def damaged_copy_is_refused(error_of: Callable[..., str]) -> Refused:
    """Check that `config`, which reads the damaged copy of a folder, is refused with the message of the case."""

    def check(folder: Path, copy: Path, case: tuple[Change, str], config: Config) -> None:
        change, message = case
        change(Path(shutil.copytree(folder, copy)))
        assert re.search(message, error_of(config=config))

    return check


# --- the command line ---------------------------------------------------------------------------------------------

COMMAND_LINE = [
    # keys and groups
    ("trian.steps=3", r"unknown key 'trian'; did you mean 'train'\?"),
    ("train.step=3", r"unknown key 'train.step'; did you mean 'train.steps'\?"),
    ("+train.step=3", r"unknown key 'train.step'; did you mean 'train.steps'\?"),
    ("norm=rmsnrom", r"Could not find 'norm/rmsnrom' Available options in 'norm': .*rmsnorm"),
    ("norm=None", r"Could not find 'norm/None' Available options in 'norm': .*rmsnorm"),
    ("norm=null", r"group override must be a string .*the arguments were: .*norm=null"),
    ("+norm=rmsnorm", r"Multiple values for norm. To override a value use 'override norm: rmsnorm'"),
    ("norm=rmsnorm,ssnorm", r"norm=rmsnorm,ssnorm: one start takes one value, so start once for each, .*run.name; a l"),
    ("norm.name=rmsnrom", r"unknown norm 'rmsnrom'; choose from .*'rmsnorm'"),
    ("norm=ssnorm norm.kappa=3", r"norm.kappa=3.0: ssnorm has no such option; it has \['eps', 'init'\]"),
    ("norm.final=foo", r"norm.final='foo'; choose from"),
    ("optimizer=sgd", r"Could not find 'optimizer/sgd' Available options in 'optimizer': adamw muon muon_all"),
    ("optimizer.rules.matrix=sgd", r"optimizer.rules.matrix='sgd': unknown rule; choose from adamw, muon, normalized"),
    ("optimizer.rules.matrix=normalized", r"optimizer.rules.matrix=normalized: the rule needs 1-D parameters"),
    ("optimizer=adamw optimizer.per_head=true", r"optimizer.per_head=true does nothing with .*rules.matrix=adamw"),
    ("penalty.scale=0", r"penalty.scale=0: must be at least 0.000001"),
    ("penalty.site=q", r"penalty.site='q': must be 'block_out' or 'down_proj_in'"),
    ("optimizer.rules=null", r"optimizer.rules=None: must be a table"),
    ("optimizer.ns_coefficients=foo", r"ns_coefficients.*foo.*keller_jordan"),
    ("experiment=osp_1b", r"Could not override 'experiment'.*\+experiment=osp_1b"),
    ("+experiment=osp_2b", r"Could not find 'experiment/osp_2b' Available options .* osp_1b"),
    ("model=null", r"group override must be a string .*model=null"),
    ("train=3", r"train=3: must be a table with keys activation_checkpointing, "),
    ("~train", r"the run has no length; set train.steps or train.tokens"),
    # syntax of Hydra
    ("train.steps", r"Error parsing override 'train.steps'.*missing EQUAL.*write KEY=VALUE"),
    ("norm='ssnorm", r"Error parsing override \"norm='ssnorm\": a character there needs quotes"),
    ("run.dir=~nobody-here/x", r"run.dir='~nobody-here/x': must be a path; no user has this name"),
    ("data.paths=[a,b", r"Error parsing override 'data.paths=\[a,b'"),
    ("data.paths={a:b}", r"Error merging override data.paths={a:b}: Cannot merge DictConfig with ListConfig"),
    ("train..steps=3", r"Error parsing override 'train..steps=3'"),
    ("=3", r"the arguments were: .*=3"),
    ("--config-name=nothing", r"Cannot find primary config 'nothing'"),
    ("--config-dir=/nowhere", r"Additional config directory '/nowhere' not found"),
    ("--foo", r"unrecognized arguments: --foo; keys are written KEY=VALUE, see --help"),
    ("--steps=5", r"there is no option --steps; write train.steps=5"),
    (
        "monitor.alerts.R_L={}",
        r"monitor.alerts.R_L={} changes nothing, because .* are merged; remove its entries: ~monitor.alerts.R_L.all",
    ),
    ("monitor.alerts.median.all.above=3", r"unknown key 'monitor.alerts.median'; it must be 'kurtosis'"),
    ("hydra.run.dir=x", r"hydra.run.dir=x: keys of Hydra itself are fixed"),
    ("+hydra.callbacks.x._target_=os.getcwd", r"callbacks.x._target_=os.getcwd: keys of Hydra itself are fixed"),
    ("hydra/job_logging=default", r"hydra/job_logging=default: keys of Hydra itself are fixed"),
    ("--experimental-rerun=x", r"--experimental-rerun reads a pickle"),
    ("--config-path=pkg://os", r"config directory '.*pkg:/os' not found"),
    ("--multirun train.steps=1,2", r"--multirun: one start trains one model"),
    ("train.steps=${foo}", r"Interpolation key 'foo' not found full_key: train.steps"),
    ("run.name=${run.name}", r"Recursive interpolation detected full_key: run.name"),
    ("run.name=${oc.env:OSP_NOWHERE}", r"\${oc.env:OSP_NOWHERE}: variables of the environment are not read"),
    # types and numbers
    ("train.steps=ten", r"train.steps='ten': must be an integer"),
    ("train.steps=1e3.5", r"train.steps='1e3.5': must be an integer"),
    ("train.steps=0", r"train.steps=0: must be at least 1"),
    ("train.steps=nan", r"train.steps=nan: must be an integer"),
    ("train.steps=1e300", r"train.steps=1e\+300: must be an integer"),
    ("train.steps=null", r"the run has no length; set train.steps or train.tokens"),
    ("train.tokens=-5", r"train.tokens=-5: must be at least 1"),
    ("optimizer.lr=1e300", r"optimizer.lr=1e\+300: must be at most 1e18 in size"),
    ("train.minutes=4", r"unknown key 'train.minutes'; choose from .* steps, "),
    ("train.seed=-1", r"train.seed=-1: must be at least 0"),
    ("train.seq_len=1000000000000", r"train.seq_len=1000000000000: must be at most 16777216"),
    ("train.tokens_per_step=32000000000000", r"train.tokens_per_step=32000000000000: must be at most 1073741824"),
    ("model.hidden_size=1000000000", r"model.hidden_size=1000000000: must be at most 1048576"),
    (
        "model.hidden_size=1e30",
        r"model.hidden_size=\d+: must be at most|model.hidden_size=1e\+30: must be an integer",
    ),
    ("model.num_hidden_layers=1000000000", r"model.num_hidden_layers=1000000000: must be at most 1000"),
    ("model.vocab_size=1000000000000", r"model.vocab_size=1000000000000: must be at most 16777216"),
    ("model.max_position_embeddings=0", r"model.max_position_embeddings=0: must be at least 1"),
    ("model.intermediate_size=-8", r"model.intermediate_size=-8: must be at least 1"),
    ("norm.init=nan", r"norm.init=nan: must be a finite number"),
    ("norm=bhyt norm.lam=inf", r"norm.lam=inf: must be a finite number"),
    ("optimizer.lr=inf", r"optimizer.lr=inf: must be a finite number"),
    ("optimizer.adam_betas=[0.9,1.5]", r"optimizer.adam_betas\[1\]=1.5: must be below 1"),
    ("optimizer.ns_steps=1000000", r"optimizer.ns_steps=1000000: must be at most 100"),
    ("data.num_workers=100000", r"data.num_workers=100000: must be at most 1024"),
    ("engine.threads=1000000000", r"engine.threads=1000000000: must be at most 4096"),
    ("debug=yes", r"debug='yes': must be true or false"),
    ("logger.wandb=true", r"logger.wandb=True: must be 'online', 'offline' or 'disabled'"),
    # keys that exclude one another
    ("model.hidden_size=250 model.num_attention_heads=4", r"model.hidden_size=250 is not divisible by"),
    ("model.num_key_value_heads=3", r"model.num_attention_heads=4 is not divisible by model.num_key_value_heads=3"),
    ("train.tokens_per_step=1000", r"train.tokens_per_step=1000 is not a multiple of .*; the nearest is 1024"),
    ("train.micro_batch_size=3", r"train.micro_batch_size=3 does not divide the 16 sequences"),
    ("train.seq_len=4096 train.tokens_per_step=4096", r"train.seq_len=4096 is longer than model.max_position"),
    (
        "data.shard_tokens=256",
        r"data.shard_tokens=256 is too small for one sequence of train.seq_len=256 .*set data.shard_tokens=257",
    ),
    (
        "data.max_tokens=5",
        r"data.max_tokens=5 is too small for one sequence of train.seq_len=256 .*set data.max_tokens=257",
    ),
    ("train.precision=fp16", r"train.precision='fp16': must be 'auto', 'fp32', 'bf16' or 'fp8'"),
    ("train.compile=true engine=zero3", r"train.compile=true does not work with engine.zero_stage=3"),
    ("engine.zero_stage=0", r"engine.zero_stage=0: must be 1, 2 or 3"),
    ("engine.device=cuda", r"engine.device=cuda, but torch finds no GPU here; set engine.device=cpu"),
    ("'schedule.warmup=5 percent'", r"schedule.warmup='5 percent' is not a length; write 100 \(steps\)"),
    ("schedule.warmup=nan%", r"schedule.warmup='nan%' is not a length; write 100 \(steps\)"),
    ("schedule=cosine schedule.decay=x%", r"schedule.decay='x%' is not a length; write 100 \(steps\)"),
    ("schedule.warmup=90% schedule.decay=20%", r"schedule.warmup='90%' .* exceed the run's 150 steps"),
    ("tokenizer.vocab_size=9000", r"tokenizer.vocab_size=9000 is larger than model.vocab_size=4096; set model.voc"),
    ("tokenizer.vocab_size=5", r"tokenizer.vocab_size=5: a byte-level vocabulary holds 256 bytes .*; set 257 or more"),
    ("tokenizer.eos_token=''", r"tokenizer.eos_token='': must be text that is not empty"),
    ("data=text", r"data.paths is empty; name files or folders"),
    ("data=hf", r"data.dataset is not set; name a Hugging Face data set"),
    ("tokenizer=file", r"tokenizer.train=false needs exactly one of tokenizer.path=FILE and tokenizer.hub=NAME"),
    (
        "data.source=mixture data.mixture=[{source:mixture}]",
        r"data.mixture\[0\].source='mixture': unknown source; choose from",
    ),
    ("data.source=mixture data.mixture=[5]", r"data.mixture\[0\]=5: must be a table with keys dataset, "),
    # names and places
    ("run.name=../../x", r"run.name='../../x': must be a name of at most 200 characters without slashes"),
    ("run.name=/etc", r"run.name='/etc': must be a name of at most 200 characters without slashes"),
    ("run.name=..", r"run.name='..': must be a name"),
    ("run.name=", r"run.name='': must be text that is not empty"),
    ("'run.name=\"two\nlines\"'", r"run.name='two\\nlines': control characters"),
    (f"run.name={'x' * 300}", r"must be a name of at most 200 characters"),
    (f"run.dir=runs/{'x' * 300}", r"run.dir='runs/x*\.\.\. \(307 characters\): must be a path whose parts"),
    ("run.dir=''", r"run.dir='': must be text that is not empty"),
    ("run.dir=/dev/null", r"run.dir=/dev/null is a file; choose another run.name or run.dir"),
    ("run.dir=/dev/null/x", r"run.dir=/dev/null/x: /dev/null is a file; choose another run.dir"),
    ("run.dir=/proc/x", r"run.dir=/proc/x: .*do not fit|run.dir=/proc/x: cannot write there"),
    ("data.cache_dir=/proc/x", r"data.cache_dir: cannot write to /proc/x/"),
    ("data.cache_dir=''", r"data.cache_dir='': must be text that is not empty"),
    ("resume=runs/nothing", r"resume=runs/nothing: no checkpoint there; name a run folder"),
    ("resume=.", r"resume=.: no checkpoint there; name a run folder"),
    ("resume=/dev/null", r"resume=/dev/null: no checkpoint there; name a run folder"),
    ("resume=''", r"resume='': must be text that is not empty"),
    ("resume=null", r"resume=None: must be text or true or false"),
    ("resume=true", r"resume=true; write resume=auto, resume=false or the path"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMAND_LINE, ids=[case[0][:60] for case in COMMAND_LINE])
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case wants a machine without a GPU")
def test_mistake_on_the_command_line(arguments: str, message: str, error_of: Callable[..., str]) -> None:
    split = [arguments[1:-1]] if arguments.startswith("'") else arguments.split()
    assert re.search(message, error_of("logger.wandb=disabled", *split))


# --- configuration files ------------------------------------------------------------------------------------------

YAML_FILES = {
    "tab": (b"train:\n\tsteps: 3\n", r"mine.yaml\", line 2"),
    "duplicate key": (b"train:\n  steps: 3\n  steps: 4\n", r"duplicate key steps in .*mine.yaml\", line 3"),
    "not closed": (b"train: [1,\n", r"mine.yaml\", line 2"),
    "NUL": (b"a: \0b\n", r"#x0000: special characters are not allowed in .*mine.yaml"),
    "latin-1": (b"run: {name: caf\xe9}\n", r"'utf-8' codec can't decode byte 0xe9 .*\+experiment=mine"),
    "typing mistake": (b"# @package _global_\ntrain: {step: 3}\n", r"unknown key 'train.step'; did you mean"),
    "unknown group": (b"defaults:\n  - nope\n", r"In 'experiment/mine': Could not load 'experiment/nope'"),
    "a list": (b"- 1\n- 2\n", r"unknown key 'experiment'"),
    "a word": (b"hello\n", r"unknown key 'experiment'"),
    "code": (b"run: !!python/object/apply:os.system ['touch pwned']\n", r"python/object/apply:os.system.*mine.yaml"),
    "code by name": (b"run: !!python/name:os.system\n", r"python/name:os.system.*mine.yaml"),
    "callback of Hydra": (
        b"# @package _global_\nhydra: {callbacks: {x: {_target_: os.system, command: touch pwned}}}\n",
        r"hydra.callbacks: a configuration may not set keys of Hydra itself, which can run code",
    ),
    "launcher of Hydra": (
        b"# @package _global_\nhydra: {launcher: {_target_: os.getcwd}}\n",
        r"hydra.launcher: a configuration may not",
    ),
    "environment of Hydra": (
        b"# @package _global_\nhydra: {job: {env_set: {LD_PRELOAD: pwned.so}}}\n",
        r"hydra.job.env_set: a configuration may not",
    ),
    "variable of the environment": (
        b"# @package _global_\nrun: {name: '${oc.env:HOME}'}\n",
        r"\${oc.env:HOME}: variables of the environment are not read, .* shell insert it, KEY=\$HOME",
    ),
    "number for text": (
        b"# @package _global_\nrun: {name: 12345}\n",
        r"run.name=12345: must be text; write it in quotes",
    ),
    "hydra target": (b"# @package _global_\nrun: {_target_: os.system}\n", r"unknown key 'run._target_'"),
}


@pytest.mark.parametrize("case", YAML_FILES)
def test_configuration_file_that_cannot_be_read(case: str, error_of: Callable[..., str], tmp_path: Path) -> None:
    content, message = YAML_FILES[case]
    own = tmp_path / 'a folder\'s "own"'
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_bytes(content)
    line = error_of(f"--config-dir={own}", "logger.wandb=disabled", "+experiment=mine")
    assert re.search(message, line)


# --- the corpus ---------------------------------------------------------------------------------------------------


def compressed_zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def parquet(**columns: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


RECORDS = b"".join(b'{"text": "the word number %d"}\n' % i for i in range(5000))
ONE = b'{"text": "fine"}\n'

CORPORA = [
    ("empty.jsonl", b"", "the corpus is empty: 0 documents"),
    ("blank.jsonl", b"\n\n   \n", "the corpus is empty: 0 documents"),
    ("hollow.jsonl", b'{"text": ""}\n' * 9, "the corpus is empty: 9 documents, none of them with text"),
    ("hollow.txt", b"", "the corpus is empty: 1 documents, none of them with text"),
    ("single.jsonl", ONE * 3, "the corpus is a single document, .*split it into several"),
    (
        "short.jsonl",
        b'{"text": "a"}\n{"text": "b"}\n',
        r"training split in .* tokens, fewer than one sequence",
    ),
    ("broken.jsonl", ONE + b'{"text": "cut\n', r"broken.jsonl, line 2: malformed JSON"),
    ("array.jsonl", ONE + b'["text"]\n', r"array.jsonl, line 2: expected a JSON object, found list"),
    ("whole.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]\n', r"whole.jsonl, line 1: malformed JSON"),
    ("number.jsonl", b"5\n", r"number.jsonl, line 1: expected a JSON object, found int"),
    ("null.jsonl", ONE + b'{"text": null}\n', r"null.jsonl, line 2: field 'text' holds NoneType, not a string"),
    ("list.jsonl", b'{"text": [["a"], "b"]}\n', r"list.jsonl, line 1: field 'text' holds list, not a string"),
    ("field.jsonl", b'{"body": "text"}\n', r"field.jsonl, line 1: no field 'text'; set data.text_field to .*'body'"),
    ("deep.jsonl", b"[" * 100_000 + b"\n", r"deep.jsonl, line 1: malformed JSON"),
    ("half.jsonl", b'{"text": "\\ud83d"}\n', r"half.jsonl, line 1: field 'text' is no valid Unicode"),
    ("utf16.jsonl", RECORDS.decode().encode("utf-16"), r"utf16.jsonl, line 1: not UTF-8 \(byte 0xff\)"),
    ("nul.jsonl", b'{"text": "a\0b"}\n', r"nul.jsonl, line 1: malformed JSON"),
    ("latin.txt", b"one\ncaf\xe9 au lait", r"latin.txt, line 2: not UTF-8 \(byte 0xe9\)"),
    ("pdf.txt", b"%PDF-1.7\n\x93\x8c", r"pdf.txt, line 2: not UTF-8"),
    (
        "cut.jsonl.gz",
        gzip.compress(RECORDS)[:-200],
        r"cut.jsonl.gz, after line \d+: the archive is damaged",
    ),
    (
        "cut.jsonl.xz",
        lzma.compress(RECORDS)[:-20],
        r"cut.jsonl.xz, after line \d+: the archive is damaged",
    ),
    ("cut.jsonl.zst", compressed_zst(RECORDS)[:-20], r"cut.jsonl.zst, after line \d+: the archive is damaged or cut"),
    ("plain.jsonl.gz", RECORDS, r"plain.jsonl.gz, after line 0: the archive is damaged.*incorrect header"),
    ("plain.jsonl.xz", RECORDS, r"plain.jsonl.xz, after line 0: the archive is damaged"),
    ("plain.jsonl.zst", RECORDS, r"plain.jsonl.zst, after line 0: the archive is damaged"),
    ("packed.jsonl", gzip.compress(RECORDS), r"packed.jsonl, line 1: not UTF-8 \(byte 0x8b\)"),
    ("none.jsonl.gz", b"", r"the corpus is empty|none.jsonl.gz"),
    (
        "other.parquet",
        parquet(body=["a"]),
        r"other.parquet: no column 'text'; set data.text_field to .*'body'",
    ),
    ("int.parquet", parquet(text=[1, 2]), r"int.parquet: column 'text' holds int64, not strings"),
    ("cut.parquet", parquet(text=["a", "b"])[:-9], r"cut.parquet: not a readable parquet file"),
    ("no.parquet", b"", r"no.parquet: not a readable parquet file"),
    ("song.mp3", b"ID3", r"cannot tell the format of song.mp3; its name must end in .txt"),
    ("folder/song.mp3", b"ID3", r"folder folder holds no file that ends in .txt"),
]


@pytest.mark.parametrize(("name", "content", "message"), CORPORA, ids=[case[0] for case in CORPORA])
def test_corpus_that_cannot_be_read(
    name: str, content: bytes, message: str, error_of: Callable[..., str], tiny: Tiny, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    paths = json.dumps([name.split("/")[0]])
    assert re.search(message, error_of(config=tiny(f"data.paths={paths}", "data.cache_dir=shards")))


def test_corpus_that_the_real_preparer_cannot_read(started: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_bytes(ONE + b'{"text": "cut\n')
    line = started("data=text", "data.paths=[broken.jsonl]", "logger.wandb=disabled", "logger.progress=false")
    assert "broken.jsonl, line 2: malformed JSON" in line


@pytest.mark.parametrize("name", ["nowhere.jsonl", "a/b/nowhere.parquet"])
def test_missing_corpus(name: str, error_of: Callable[..., str]) -> None:
    assert f"data.paths: {name} does not exist" in error_of("data=text", f"data.paths=[{name}]")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_corpus_without_permission(error_of: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("text")
    (tmp_path / "secret.txt").chmod(0)
    assert "cannot read secret.txt: Permission denied" in error_of("data=text", "data.paths=[secret.txt]")


def test_data_set_that_cannot_be_reached(error_of: Callable[..., str]) -> None:
    line = error_of("data=hf", "data.dataset=nobody/no-such-data-set", "data.num_workers=1", "logger.wandb=disabled")
    assert "nobody/no-such-data-set" in line


# --- the tokenizer ------------------------------------------------------------------------------------------------


def with_model(spec: dict[str, Any], **model: Any) -> bytes:
    return json.dumps({**spec, "model": {**spec["model"], **model}}).encode()


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "no JSON": (lambda spec: b"{", r"own.json is not a tokenizer.json: EOF"),
    "empty": (lambda spec: b"", r"own.json is not a tokenizer.json: EOF"),
    "other JSON": (lambda spec: b'{"vocab": {"a": 0}}', r"own.json is not a tokenizer.json"),
    "a list": (lambda spec: b"[]", r"own.json is not a tokenizer.json"),
    "binary": (lambda spec: b"\x80\x04\x95", r"cannot read the tokenizer .*own.json: .*utf-8"),
    "unknown model": (lambda spec: with_model(spec, type="Magic"), r"own.json is not a tokenizer.json"),
    "no tokens": (
        lambda spec: json.dumps(
            {**spec, "added_tokens": [], "model": {**spec["model"], "vocab": {}, "merges": []}}
        ).encode(),
        r"tokenizer.eos_token=.* is not in the tokenizer's vocabulary; its special tokens are none",
    ),
    "foreign merges": (lambda spec: with_model(spec, merges=[["qq", "zz"]]), r"own.json is not a tokenizer.json"),
    "no end of text": (
        lambda spec: json.dumps(spec).replace("<|endoftext|>", "<s>").encode(),
        r"tokenizer.eos_token='<\|endoftext\|>' is not in the tokenizer's vocabulary; its special tokens are <s>",
    ),
    "WordPiece": (
        lambda spec: json.dumps(
            {
                **spec,
                "model": {
                    "type": "WordPiece",
                    "unk_token": "[UNK]",
                    "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 100,
                    "vocab": {"<|endoftext|>": 0, "[UNK]": 1, "the": 2},
                },
            }
        ).encode(),
        r"own.json is a WordPiece tokenizer, which loses text",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer_that_cannot_be_used(
    case: str, error_of: Callable[..., str], tiny: Tiny, tiny_shards: Path, tmp_path: Path
) -> None:
    change, message = TOKENIZERS[case]
    (tmp_path / "own.json").write_bytes(change(json.loads((tiny_shards / "tokenizer.json").read_text())))
    config = tiny(
        "tokenizer.train=false", f"tokenizer.path={tmp_path / 'own.json'}", f"data.cache_dir={tmp_path / 'c'}"
    )
    assert re.search(message, error_of(config=config))


@pytest.mark.parametrize(("path", "message"), [("nowhere.json", "nowhere.json"), (".", "Is a directory")])
def test_missing_tokenizer(path: str, message: str, error_of: Callable[..., str]) -> None:
    assert message in error_of("tokenizer=file", f"tokenizer.path={path}", "logger.wandb=disabled")


def test_vocabulary_larger_than_the_models(error_of: Callable[..., str], tiny: Tiny, tiny_shards: Path) -> None:
    config = tiny("tokenizer.train=false", f"tokenizer.path={tiny_shards}/tokenizer.json")
    line = error_of(*overrides_of(config), "model.vocab_size=300")
    assert re.search(r"model.vocab_size=300 is smaller than the tokenizer's \d+; set", line)


# --- shards -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_shards(tiny_values: dict[str, Any]) -> Path:
    """Return the shards of the tiny configuration. Tests that change them work on a copy."""
    from osp.config import from_dict

    config = from_dict({**tiny_values})
    return prepare(config.data, config.tokenizer, progress=False)


def edited(**changes: Any) -> Change:
    """Change keys of a folder's manifest.json; a value of None removes the key."""

    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


def edited_shard(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / "manifest.json").read_text())
        values["train"]["shards"][0].update(changes)
        (folder / "manifest.json").write_text(json.dumps(values))

    return change


def large_id(folder: Path) -> None:
    tokens = np.fromfile(folder / "train-00000.bin", dtype=np.uint16)
    tokens[77] = 60_000
    tokens.tofile(folder / "train-00000.bin")


def without_byte(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


SHARDS: dict[str, tuple[Change, str]] = {
    "no JSON": (written("manifest.json", b'{"form'), r"manifest.json is damaged .*delete .* prepare it again"),
    "empty": (written("manifest.json", b""), r"manifest.json is damaged"),
    "binary": (written("manifest.json", b"\xff\xfe"), r"manifest.json is damaged"),
    "a list": (written("manifest.json", b"[]"), r"manifest.json is not of format 1; delete"),
    "other format": (edited(format=99), r"manifest.json is not of format 1; delete"),
    "missing key": (edited(dtype=None), r"manifest.json is damaged: dtype is missing; delete"),
    "missing split": (edited(train={}), r"fewer than one sequence|manifest.json is damaged"),
    "unknown key": (edited(colour="red"), r"manifest.json is damaged: unknown key 'colour'"),
    "wrong type": (edited(vocab_size="many"), r"manifest.json is damaged: vocab_size='many': must be an integer"),
    "split of another type": (edited(train=[1]), r"manifest.json is damaged: train=\[1\]: must be a table"),
    "shards of another type": (edited(train={"shards": {"a": 1}}), r"manifest.json is damaged: train.shards="),
    "dtype": (edited(dtype="float16"), r"manifest.json is damaged: dtype='float16': must be 'uint16' or 'uint32'"),
    "other dtype": (edited(dtype="uint32"), r"shard .*-00000.bin has \d+ bytes, the manifest says \d+; delete"),
    "vocabulary beyond dtype": (
        edited(vocab_size=10**6),
        r"dtype=uint16 cannot hold the ids of a vocabulary of 10+",
    ),
    "end of text": (edited(eos_id=5000), r"manifest.json is damaged: eos_id=5000 is no id of a vocabulary of"),
    "negative": (edited(next_document=-1), r"manifest.json is damaged: next_document=-1: must be"),
    "count": (edited_shard(tokens=5), r"shard .*train-00000.bin has \d+ bytes, the manifest says 10; delete"),
    "no tokens": (edited_shard(tokens=0), r"manifest.json is damaged: train.shards\[0\].tokens=0: must be at least 1"),
    "huge count": (edited_shard(tokens=10**30), r"train.shards\[0\].tokens=10+: must be at most"),
    "relative path": (
        edited_shard(file="../../etc/passwd"),
        r"file='../../etc/passwd': must be the name of a shard",
    ),
    "absolute path": (edited_shard(file="/etc/passwd"), r"file='/etc/passwd': must be the name of a shard"),
    "other file": (edited_shard(file="tokenizer.json"), r"file='tokenizer.json': must be the name of a shard"),
    "cut shard": (without_byte("train-00000.bin"), r"shard .*train-00000.bin has \d+ bytes, the manifest says"),
    "cut held-out shard": (without_byte("val-00000.bin"), r"shard .*val-00000.bin has \d+ bytes, the manifest says"),
    "missing shard": (lambda f: (f / "train-00000.bin").unlink(), r"shard .*train-00000.bin is missing; delete"),
    "id beyond the vocabulary": (large_id, r"shard .*train-00000.bin holds the token id 60000, beyond its vocabulary"),
    "missing tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer.json is not the tokenizer of the sh"),
    "cut tokenizer": (without_byte("tokenizer.json"), r"tokenizer.json is not the tokenizer of the shards"),
    "other tokenizer": (written("tokenizer.json", b"{}"), r"tokenizer.json is not the tokenizer of the shards"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_are_damaged(
    case: str, damaged_copy_is_refused: Refused, tiny: Tiny, tiny_shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "shards" / tiny_shards.name
    damaged_copy_is_refused(tiny_shards, copy, SHARDS[case], tiny(f"data.cache_dir={copy.parent}"))


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_run(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two steps with one checkpoint. Tests that change it work on a copy."""
    from osp.config import from_dict

    folder = tmp_path_factory.mktemp("trained") / "run"
    train(from_dict({**tiny_values, "train": {**tiny_values["train"], "steps": 2}, "run": {"dir": str(folder)}}))
    return folder


def the_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def in_checkpoint(change: Change) -> Change:
    return lambda run: change(the_checkpoint(run))


def renamed_file(name: str) -> Change:
    """Rename the weights' file to `name` in the manifest and copy it there."""

    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        values = json.loads(path.read_text())
        old = next(key for key in values["files"] if key.startswith("rank"))
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / old, target)
        values["files"][name] = values["files"].pop(old)
        path.write_text(json.dumps(values))

    return change


def pickled(folder: Path) -> None:
    """Replace the weights by a file of torch.save with a valid checksum, which a loader must never unpickle."""
    import hashlib

    path = next(folder.glob("rank*"))
    torch.save({"weight": torch.zeros(3)}, path)
    values = json.loads((folder / "manifest.json").read_text())
    content = path.read_bytes()
    values["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(values))


CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "manifest cut": (in_checkpoint(without_byte("manifest.json")), r"manifest.json: not a manifest"),
    "manifest empty": (in_checkpoint(written("manifest.json", b"")), r"manifest.json: not a manifest"),
    "manifest binary": (in_checkpoint(written("manifest.json", b"\xff\xfe")), r"manifest.json: not a manifest"),
    "manifest of a list": (in_checkpoint(written("manifest.json", b"[]")), r"manifest.json"),
    "other format": (in_checkpoint(edited(format=99)), r"checkpoint format 99; this version reads 1|format 99"),
    "no format": (in_checkpoint(edited(format=None)), r"checkpoint format None"),
    "no files": (in_checkpoint(edited(files=None)), r"manifest.json.*files"),
    "files of a list": (in_checkpoint(edited(files=["a"])), r"manifest.json.*files"),
    "entry of a number": (in_checkpoint(edited(files={"rank_00000.safetensors": 5})), r"manifest.json.*files"),
    "no step": (in_checkpoint(edited(step=None)), r"manifest.json.*step"),
    "step of text": (in_checkpoint(edited(step="two")), r"manifest.json.*step"),
    "step below zero": (in_checkpoint(edited(step=-2)), r"manifest.json.*step"),
    "no shapes": (in_checkpoint(edited(shapes=None)), r"manifest.json.*shapes|other parameters"),
    "shapes of a list": (in_checkpoint(edited(shapes=[1])), r"manifest.json.*shapes|other parameters"),
    "weights cut": (in_checkpoint(without_byte("rank_00000.safetensors")), r"rank_00000.safetensors: damaged"),
    "weights missing": (in_checkpoint(lambda f: (f / "rank_00000.safetensors").unlink()), r"rank_00000.*missing"),
    "weights elsewhere": (in_checkpoint(renamed_file("../../rank.safetensors")), r"rank.safetensors.*(missing|folder)"),
    "weights pickled": (in_checkpoint(pickled), r"rank_00000.safetensors: not a safetensors file"),
    "buffers missing": (in_checkpoint(lambda f: (f / "buffers.safetensors").unlink()), r"buffers.*missing"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint_that_is_damaged(
    case: str, damaged_copy_is_refused: Refused, tiny: Tiny, tiny_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "old" / "run"
    damaged_copy_is_refused(tiny_run, copy, CHECKPOINTS[case], tiny("train.steps=2", f"resume={copy}"))


def test_checkpoint_of_another_model(error_of: Callable[..., str], tiny: Tiny, tiny_run: Path) -> None:
    line = error_of(config=tiny("train.steps=2", "model.hidden_size=64", f"resume={tiny_run}"))
    assert re.search(r"step_00000002: its model has other values .*model.hidden_size: 32 -> 64\); set the old", line)


@pytest.mark.parametrize(
    "content", [{}, {"config.json": "{}", "model.safetensors": "x"}], ids=["empty", "Hugging Face"]
)
def test_resume_from_a_path_without_a_checkpoint(
    content: dict[str, str], error_of: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    for name, text in content.items():
        (tmp_path / "other" / name).write_text(text)
    assert "resume=other: no checkpoint there; name a run folder" in error_of("resume=other", "logger.wandb=disabled")


# --- the run folder -----------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Change, str]] = {
    "configuration damaged": (written("config.yaml", b"train: [1,\n"), r"config.yaml: not valid YAML"),
    "configuration of another kind": (written("config.yaml", b"- 1\n"), r"config.yaml: not the configuration of a run"),
    "configuration empty": (written("config.yaml", b""), r"config.yaml: not the configuration of a run"),
    "configuration of code": (
        written("config.yaml", b"run: !!python/object/apply:os.system ['touch pwned']\n"),
        r"config.yaml: not valid YAML: could not determine a constructor",
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_run_folder_that_is_damaged(
    case: str, damaged_copy_is_refused: Refused, tiny: Tiny, tiny_run: Path, tmp_path: Path
) -> None:
    damaged_copy_is_refused(tiny_run, tmp_path / "run", RUNS[case], tiny("train.steps=2", "run.name=osp"))


def test_run_folder_of_another_configuration(error_of: Callable[..., str], tiny: Tiny, tiny_run: Path) -> None:
    line = error_of(config=tiny("train.steps=2", "model.hidden_size=64", f"run.dir={tiny_run}"))
    assert re.search(
        r"holds a run with another configuration \(model.hidden_size: 32 -> 64\); choose another run", line
    )


def test_run_folder_that_is_a_link_to_nothing(error_of: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    line = error_of("run.dir=link", "logger.wandb=disabled")
    assert line == "error: run.dir=link is a link to nowhere, which does not exist; make that folder"


def test_not_enough_disk_for_a_checkpoint(error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    line = error_of("logger.wandb=disabled")
    assert re.search(r"run.dir=runs/osp_nano: 1 more checkpoint of 0.07 GB, as .* do not fit into the 0.01 GB", line)


def test_wandb_online_without_a_key(error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    line = error_of("logger.wandb=online")
    assert "logger.wandb=online but there is no W&B key; run `wandb login` or use logger.wandb=offline" in line


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "debug=true", "train.steps=0"])
    with pytest.raises(UserError, match=r"train\.steps=0"):
        entry.run(main)
