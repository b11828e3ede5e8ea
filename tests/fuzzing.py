"""Malformed inputs of eight kinds, each ending well or in one line: `python -m tests.fuzzing FOLDER --count 400`.

Every input is drawn from (seed, kind, number) alone, so that a failure can be repeated:

    python -m tests.fuzzing FOLDER --kinds corpus --seed 0 --first 17 --count 1 --show

An input must end without an error, or in a `UserError` or `RunError`. A failure is anything else: another exception,
more than `SECONDS` of time or `MEMORY` of memory, code of the input that ran, a file opened outside of the input's
folder, a terminal escape that was printed, an element that was added to a page. `run_all` starts a worker process,
reads its lines and starts another one where the input killed it.
"""

import argparse
import contextlib
import faulthandler
import gzip
import hashlib
import html.parser
import importlib.util
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from osp.files import parse_json
from tests.fuzz_inputs import Payloads, change_file, change_folder, change_tree, copied, dump_json

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 20  # for an input; a healthy one takes a tenth of a second
INPUTS_OF_A_WORKER = 500
SECONDS_TO_KILL = 60  # for one that never returns to Python
MEMORY = 3 * 2**30  # beyond what the worker holds before the first input
WORKER = [sys.executable, "-m", "tests.fuzzing"]


class HangError(Exception):
    """Raised by the alarm."""


def void(_: Any) -> None:
    """Accept a result."""


@dataclass(frozen=True)
class Healthy:
    """The folders that inputs are copies of."""

    folder: Path

    corpus = property(lambda self: self.folder / "corpus")
    shards = property(lambda self: next(self.folder.glob("shards/*/manifest.json")).parent)
    run = property(lambda self: self.folder / "run")
    model = property(lambda self: self.folder / "model")
    tokenizer = property(lambda self: self.run / "tokenizer.json")
    values = property(lambda self: yaml.safe_load((self.run / "config.yaml").read_text()))


@dataclass(frozen=True)
class Input:
    """One malformed input: its own folder, which is the working directory, and what draws its changes."""

    healthy: Healthy
    folder: Path
    draw: random.Random
    payloads: Payloads


# ---- the eight kinds -------------------------------------------------------------------------------------------------


def configuration(it: Input) -> None:
    """Run a changed configuration, command line or experiment file as scripts/train.py reads it."""
    import entry

    from osp.config import from_dict
    from osp.plan.config import PlanConfig
    from osp.plan.plan import describe, make_plan

    kind, values = it.draw.random(), it.healthy.values
    if kind < 0.5:
        with contextlib.suppress(ValueError):  # not JSON any more
            values = parse_json(dump_json(change_tree(values, it.draw, it.payloads)))
        if isinstance(values, dict):
            describe(make_plan(from_dict(values), PlanConfig()))
        return
    leaves = [f"{group}.{key}" for group, table in values.items() if isinstance(table, dict) for key in table]
    arguments = []
    for _ in range(it.draw.choice((1, 1, 2))):
        value = it.payloads.values(it.draw)
        text = value if isinstance(value, str) else json.dumps(value)
        key = it.draw.choice([*leaves, "norm", "+experiment", "data", "hydra.run.dir", "run", "+a.b", ""])
        arguments.append(it.draw.choice(["", "", "", "+", "++", "~"]) + key + it.draw.choice("===:") + text)
    if kind > 0.75:
        path = it.folder / "experiment" / "mine.yaml"
        path.parent.mkdir()
        callbacks = {"job_start": {"_target_": "os.system", "command": f"touch {it.payloads.canary}"}}
        tree: dict[str, Any] = {"hydra": {"callbacks": callbacks}} if it.draw.random() < 0.2 else {}
        tree |= {"train": {"steps": 5}, "norm": {"name": "ssnorm"}, "optimizer": {"lr": 0.01}}
        path.write_text(yaml.safe_dump(tree))
        change_file(path, it.draw, it.payloads)
        if path.is_file():
            path.write_bytes(b"# @package _global_\n" + path.read_bytes())
        arguments = ["--config-dir", str(it.folder), "+experiment=mine"]
    sys.argv = ["train.py", *arguments]
    entry.run(lambda values: void(from_dict(values)), "train")


def corpus(it: Input) -> None:
    """Prepare a changed corpus: plain, compressed and columnar files in a folder, named alone or together."""
    folder = copied(it.healthy.corpus, it.folder / "corpus")
    change_folder(
        folder,
        ["*.*"] if it.draw.random() < 0.3 else [it.draw.choice(sorted(os.listdir(folder)))],
        it.draw,
        it.payloads,
    )
    files = sorted(folder.iterdir())
    paths = [folder] if it.draw.random() < 0.4 else it.draw.sample(files, it.draw.choice((1, 2)))
    prepare_text(it, paths, it.healthy.tokenizer if it.draw.random() < 0.8 else None)


def prepare_text(it: Input, paths: Sequence[Path], tokenizer: Path | None) -> None:
    from osp.config import DataConfig, TokenizerConfig
    from osp.data.prepare import prepare

    cache = str(it.folder / "shards")
    data = DataConfig(source="text", paths=tuple(map(str, paths)), val_fraction=0.1, cache_dir=cache, num_workers=1)
    path = str(tokenizer) if tokenizer else None
    prepare(data, TokenizerConfig(train=path is None, path=path, vocab_size=300), progress=False)


def tokenizer(it: Input) -> None:
    """Prepare a healthy corpus with a changed tokenizer, and read tokens and bytes with it."""
    from osp.data.tokenizer import load_tokenizer, token_bytes

    path = it.folder / "tokenizer.json"
    shutil.copyfile(it.healthy.tokenizer, path)
    change_file(path, it.draw, it.payloads)
    prepare_text(it, [it.healthy.corpus / "a.jsonl"], path)
    loaded = load_tokenizer(path)
    loaded.decode(loaded.encode("Some words, \u4e2d and \x1b[31m").ids)
    token_bytes(loaded)


def shards(it: Input) -> None:
    """Read training and validation sequences from changed shards, then prepare them again."""
    from osp.config import from_dict
    from osp.data.loader import Layout, Loader, validation_batches
    from osp.data.prepare import prepare

    cache = copied(it.healthy.shards.parent, it.folder / "shards")
    folder = cache / it.healthy.shards.name
    change_folder(folder, ["*.json", "*.json", "*.bin"], it.draw, it.payloads)
    if it.draw.random() < 0.3:
        values = it.healthy.values
        values["data"]["cache_dir"] = str(cache)
        config = from_dict(values)
        prepare(config.data, config.tokenizer, progress=False)
    loader = Loader(folder, Layout(32), rows_per_step=4, micro_batch_size=2, document_ids=True)
    try:
        loader.step(it.draw.choice((0, 3, 10_000)))
    finally:
        loader.close()
    for batch in validation_batches(folder, Layout(32), batch_size=2, max_tokens=128, document_ids=True):
        void(batch)


def checkpoint(it: Input) -> None:
    """Continue a run folder with a changed checkpoint, and generate with it."""
    from osp.config import from_dict
    from osp.run.checkpoint import Checkpoint, find
    from osp.run.folder import open_run

    run = copied(it.healthy.run, it.folder / "run")
    where = ["checkpoints/*/*", "checkpoints/*/manifest.json", "checkpoints/latest", "tokenizer.json", "config.yaml"]
    change_folder(run, where, it.draw, it.payloads)
    if it.draw.random() < 0.7:
        repair_sums(run)
    open_run(from_dict({**it.healthy.values, "run": {"name": "run", "dir": str(run)}}))
    if folder := find(run):
        Checkpoint(folder).verify()
    generate(run)


def repair_sums(run: Path) -> None:
    """Give the manifests the sizes and checksums of the changed files: a reader then looks further."""
    for path in run.glob("checkpoints/*/manifest.json"):
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
            values = parse_json(path.read_bytes() if path.is_file() else b"")
            for name, entry in values["files"].items():
                data = (path.parent / name).read_bytes() if (path.parent / name).is_file() else b""
                entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            path.write_text(json.dumps(values))


def generate(folder: Path) -> None:
    """Open the model at `folder` and write two tokens."""
    from osp.evaluation.language_model import open_model
    from osp.model.generate import stream

    subject = open_model(folder)
    ids = subject.encode("some words")[:8] or [0]
    for tokens in stream(subject.model, [ids], 2, eos_ids=subject.stop_ids):
        subject.tokenizer.decode([token for token in tokens if token is not None])


def model_folder(it: Input) -> None:
    """Generate with a changed Hugging Face folder."""
    folder = copied(it.healthy.model, it.folder / "model")
    change_folder(folder, ["config.json", "config.json", "*.safetensors", "tokenizer.json"], it.draw, it.payloads)
    if it.draw.random() < 0.2 and (folder / "model.safetensors").exists():
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        index = {"weight_map": {"model.norm.weight": "part.safetensors", "lm_head.weight": "part.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        change_file(folder / "model.safetensors.index.json", it.draw, it.payloads)
    config = folder / "config.json"
    with contextlib.suppress(ValueError):
        values = parse_json(config.read_bytes() if config.is_file() else b"")
        if isinstance(values, dict) and it.draw.random() < 0.2:
            remote = {"AutoConfig": "modeling.Evil", "AutoModelForCausalLM": "modeling.Evil"}
            config.write_text(json.dumps({**values, "auto_map": remote}))
            (folder / "modeling.py").write_text(f"open({str(it.payloads.canary)!r}, 'w')\nclass Evil: ...\n")
    generate(folder)


RUN_FILES = [
    "*.json",
    "*.jsonl",
    "config.yaml",
    "evaluation/*.json",
    "evaluation/compare/*.json",
    "checkpoints/*/*.json",
]


def run_folder(it: Input) -> None:
    """Write the report on a changed run folder alone, beside a healthy one, and read it as the other scripts do."""
    from osp.ablation.execute import last_step
    from osp.convert.export import export
    from osp.monitor.inspect import inspect
    from osp.report.page import write_report
    from osp.run.read import read_run
    from osp.run.verdict import judge_run

    run = copied(it.healthy.run, it.folder / it.draw.choice(["run", HTML_NAME]))
    change_folder(run, [it.draw.choice(RUN_FILES)] if it.draw.random() < 0.8 else RUN_FILES, it.draw, it.payloads)
    last_step(run / "metrics.jsonl")
    if it.draw.random() < 0.1:
        it.draw.choice((inspect, export))(run, out=it.folder / "out")
    page = it.folder / "report.html"
    write_report([run, it.healthy.run] if it.draw.random() < 0.4 else [run], page)
    judge_run(read_run(run))
    check_page(page.read_text(encoding="utf-8"))


HTML_NAME = "run<img src=x onerror=alert(1)>"


def task(it: Input) -> None:
    """Read a changed task file; some are scored with the harness."""
    from osp.evaluation.local_tasks import as_harness_task, read_task

    path = it.folder / f"{it.draw.choice(list(TASKS))}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in 3 * TASKS[path.stem]))
    change_file(path, it.draw, it.payloads)
    read = read_task(path, num_fewshot=it.draw.choice((0, 0, 1, 5)))
    if not importlib.util.find_spec("lm_eval"):
        return
    as_harness_task(read)
    if it.draw.random() < 0.2:
        from osp.evaluation.harness import HarnessModel, evaluate_local_task
        from osp.evaluation.language_model import open_model

        evaluate_local_task(HarnessModel(open_model(it.healthy.model)), read)


TASKS: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"query": "Question: one?", "choices": ["a", "b"], "gold": 1},
        {"query": "x", "choices": ["c", "d"], "gold": 0},
    ],
    "options": [{"context_options": ["a b", "c d"], "continuation": "e", "gold": 0}],
    "continuation": [{"context": "one two", "continuation": "three"}],
    "answers": [{"context": "Who?", "answer": "me", "aliases": ["I"]}],
    "reasoning": [{"context": "1 + 1?", "answer": "2", "chain_of_thought": "One and one."}],
}
KINDS: dict[str, Callable[[Input], None]] = {
    "configuration": configuration,
    "corpus": corpus,
    "tokenizer": tokenizer,
    "shards": shards,
    "checkpoint": checkpoint,
    "model folder": model_folder,
    "run folder": run_folder,
    "task": task,
}


class Page(html.parser.HTMLParser):
    """Collects what a payload would add to a page."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: Iterable[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag in ("img", "iframe", "object", "embed") or any(name.startswith("on") for name, _ in attrs):
            self.foreign.append(tag)


def check_page(text: str) -> None:
    """Raise `AssertionError` if a page has elements that its template does not have."""
    page = Page()
    page.feed(text)
    assert not page.foreign, f"foreign elements on the page: {page.foreign}"
    assert page.scripts == 3, f"{page.scripts} scripts on the page"


# ---- healthy folders -------------------------------------------------------------------------------------------------


def make_healthy(folder: Path) -> Healthy:
    """Write the folders that inputs are copies of: a corpus, its shards, a run of two steps, its export."""
    import pyarrow.parquet

    from osp.config import Config, from_dict, to_dict
    from osp.convert.export import export
    from osp.train.setup import train
    from tests.conftest import made_text
    from tests.made_run import made_run, write_evaluations

    healthy = Healthy(folder)
    if (folder / "done").exists():
        return healthy
    texts = made_text(60)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    healthy.corpus.mkdir(parents=True)
    (healthy.corpus / "a.jsonl").write_bytes(lines)
    (healthy.corpus / "b.txt").write_text(texts[0] + "caf\u00e9 \u4e2d\n")
    (healthy.corpus / "c.jsonl.gz").write_bytes(gzip.compress(lines[: len(lines) // 2]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[:9]}), healthy.corpus / "d.parquet")
    compressed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(compressed, "zstd") as stream:
        stream.write(lines)
    (healthy.corpus / "e.jsonl.zst").write_bytes(compressed.getvalue().to_pybytes())
    values: Any = to_dict(Config())
    changes = {
        "model": {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
        "train": {"steps": 2, "seq_len": 32, "tokens_per_step": 64, "micro_batch_size": 2, "compile": False}
        | {"precision": "fp32"},
        "data": {"source": "text", "paths": [str(healthy.corpus / "a.jsonl")], "cache_dir": str(folder / "shards")}
        | {"num_workers": 1, "val_fraction": 0.1},
        "tokenizer": {"vocab_size": 300},
        "eval": {"every": 2, "tokens": 64, "sample_tokens": 4},
        "monitor": {"enabled": True, "every": 1, "sites": "all", "statistics": "all", "tokens": 64},
        "logger": {"wandb": "disabled", "progress": False},
        "engine": {"device": "cpu", "threads": 1},
        "run": {"name": "run", "dir": str(healthy.run)},
    }
    for group, table in changes.items():
        values[group] |= table
    train(from_dict(values))
    export(healthy.run, healthy.model)
    longer = made_run(folder / "longer", steps=24, layers=2, probe_every=4)
    for name in ("metrics.jsonl", "probes.jsonl", "events.jsonl"):
        with (healthy.run / name).open("a") as file:
            file.write((longer / name).read_text())
    write_evaluations(healthy.run)
    (folder / "done").touch()
    return healthy


# ---- worker ----------------------------------------------------------------------------------------------------------


class Watch:
    """Notes what an input does that it must not: an audit hook, which lasts as long as the process."""

    def __init__(self, folder: Path, payloads: Payloads) -> None:
        self.folder, self.payloads = folder, payloads
        self.active, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or event not in ("open", "os.system", "subprocess.Popen", "os.exec", "pickle.find_class"):
            return
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, str | bytes):
                return
            path = os.path.realpath(os.fsdecode(path))
            writes = any(letter in (mode or "") for letter in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
            inside = path.startswith((str(self.folder), "/dev/null"))
            if path == str(self.payloads.secret) or (writes and not inside):
                self.seen.append(f"opened {path}")
        elif event != "subprocess.Popen" or "git" not in str(arguments[0]):
            self.seen.append(f"{event} {str(arguments)[:200]}")


@dataclass
class Worker:
    """Runs inputs in this process."""

    healthy: Healthy
    folder: Path
    seed: int
    show: bool = False

    def __post_init__(self) -> None:
        self.payloads = Payloads(self.folder / "canary", self.folder / "secret.txt")
        self.payloads.secret.write_text("secret\n")
        self.watch = Watch(self.folder, self.payloads)

    def run(self, kind: str, number: int) -> tuple[str, str]:
        """Return how an input ended: ("accepted" or "refused", its line) or (kind of failure, what was seen)."""
        from osp.errors import RunError, UserError

        folder = self.folder / "input"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        it = Input(self.healthy, folder, random.Random(f"{self.seed} {kind} {number}"), self.payloads)
        output, outcome, line = io.StringIO(), "accepted", ""
        argv, home = sys.argv, os.getcwd()
        handler = logging.StreamHandler(output)
        logging.getLogger().addHandler(handler)
        os.chdir(folder)
        signal.alarm(SECONDS)
        faulthandler.dump_traceback_later(SECONDS_TO_KILL, exit=True)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                self.watch.active = True
                KINDS[kind](it)
        except (UserError, RunError) as error:
            import entry

            outcome, line = "refused", entry._on_one_line(error)
        except SystemExit:  # of `entry.run`, which has printed the line
            outcome, line = "refused", output.getvalue().strip()
        except HangError:
            outcome, line = "hang", last_lines(traceback.format_exc())
        except MemoryError:
            outcome, line = "memory", last_lines(traceback.format_exc())
        except BaseException as error:
            memory = "allocate memory" in str(error) or "MemoryError" in repr(error)
            outcome, line = "memory" if memory else "traceback", last_lines(traceback.format_exc())
            if self.show:
                traceback.print_exc()
        finally:
            self.watch.active = False
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
            logging.getLogger().removeHandler(handler)
            sys.argv = argv
            os.chdir(home)
        if outcome == "refused" and ("\n" in line or not line):
            outcome = "traceback"
        if outcome in ("accepted", "refused") and "\x1b" in line + output.getvalue():
            outcome, line = "escape", (line + output.getvalue())[-500:]
        if self.watch.seen:
            outcome, line = "path" if self.watch.seen[0].startswith("opened") else "code", self.watch.seen[0]
            self.watch.seen.clear()
        if self.payloads.canary.exists():
            outcome, line = "code", "made the canary"
            self.payloads.canary.unlink()
        return outcome, line


def last_lines(text: str) -> str:
    """Return the innermost place in osp/ of a traceback, and its last line."""
    found = re.findall(r'File "[^"]*/(osp/[^"]*|scripts/[^"]*)", line (\d+)', text)
    place = f"{found[-1][0]}:{found[-1][1]}" if found else "outside osp"
    return f"{place}: {text.strip().splitlines()[-1][:300]}"


def work(arguments: argparse.Namespace) -> None:
    """Run inputs one after the other; print a line of JSON before and after each."""
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / "scripts"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "HF_DATASETS_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    healthy = make_healthy(folder / "healthy")
    worker = Worker(healthy, folder, arguments.seed, show=arguments.show)

    def hang(*_: Any) -> None:
        raise HangError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    numbers = range(arguments.first, arguments.first + arguments.count)
    for kind, number in arguments.inputs or [(kind, number) for kind in arguments.kinds for number in numbers]:
        print(json.dumps({"kind": kind, "number": number}), flush=True)
        outcome, line = worker.run(kind, number)
        print(json.dumps({"kind": kind, "number": number, "outcome": outcome, "line": line}), flush=True)
    os._exit(0)  # as scripts/entry.py does


# ---- supervisor ------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """Counts over all inputs."""

    inputs: int = 0
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)  # kind -> outcome -> count
    failures: list[dict[str, Any]] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        return sum(counts.get(outcome, 0) for counts in self.outcomes.values())

    def add(self, entry: dict[str, Any], seed: int) -> None:
        self.inputs += 1
        counts = self.outcomes.setdefault(entry["kind"], {})
        counts[entry["outcome"]] = counts.get(entry["outcome"], 0) + 1
        if entry["outcome"] not in ("accepted", "refused"):
            self.failures.append(entry | {"seed": seed})

    def table(self) -> str:
        """Return the counts as a Markdown table and a line for each failure."""
        columns = list(dict.fromkeys(["accepted", "refused", *(f["outcome"] for f in self.failures)]))
        rows = [["kind", "inputs", *columns]]
        for kind, counts in self.outcomes.items():
            rows.append([kind, str(sum(counts.values())), *(str(counts.get(column, 0)) for column in columns)])
        rows.append(["all", str(self.inputs), *(str(self.count(column)) for column in columns)])
        rows.insert(1, ["---"] * len(rows[0]))
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines += [f"{f['outcome']}: {f['kind']} {f['number']} (seed {f['seed']}): {f['line']}" for f in self.failures]
        return "\n".join(lines)


def run_all(folder: Path, *, counts: dict[str, int], seed: int, say: Callable[[str], None] = void) -> Figures:
    """Run `counts[kind]` inputs of each kind in worker processes; `folder` keeps the healthy folders between calls."""
    figures, inputs = Figures(), [(kind, number) for kind, count in counts.items() for number in range(count)]
    while inputs:
        entries, status = _run_some(folder, inputs[:INPUTS_OF_A_WORKER], seed)
        if entries and "outcome" not in entries[-1]:  # this input killed the worker
            entries[-1] |= {"outcome": "killed", "line": f"status {status}"}
        elif len(entries) < len(inputs[:INPUTS_OF_A_WORKER]):
            raise RuntimeError(f"the worker ended with status {status} between inputs; see {folder}.log")
        for entry in entries:
            figures.add(entry, seed)
        del inputs[: len(entries)]
        say(f"{figures.inputs} of {figures.inputs + len(inputs)} inputs, {len(figures.failures)} failures")
    return figures


def _run_some(folder: Path, inputs: list[tuple[str, int]], seed: int) -> tuple[list[dict[str, Any]], int]:
    """Return what a worker printed about each input, up to the last or to one that killed it, and its exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, entries = (
        [*WORKER, str(folder), "--seed", str(seed), "--inputs", json.dumps(inputs)],
        list[dict[str, Any]](),
    )
    with Path(f"{folder}.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith('{"kind"'):
                entry = json.loads(text)
                entries[len(entries) - ("outcome" in entry) :] = [entry]
        return entries, process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10, help="inputs of each kind")
    parser.add_argument("--inputs", type=json.loads, default=None, help="pairs of kind and number, instead")
    parser.add_argument("--show", action="store_true", help="print tracebacks")
    work(parser.parse_args())


if __name__ == "__main__":
    main()
