"""Run an ablation: train and measure in separate processes, several at a time, and write the tables and the numbers."""

import itertools
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from osp.ablation.config import AblationConfig, check_ablation, parse_rows
from osp.ablation.runs import Compose, Planned, plan
from osp.ablation.table import Records, as_json, collect, contents
from osp.config import COMPARISONS, EVALUATIONS, Weights, leaves
from osp.errors import RunError, StoppedError, UserError, as_user_error
from osp.evaluation.config import CompareConfig
from osp.files import parse_json, write_text
from osp.model.transformer import count_parameters
from osp.run.evaluations import ComparisonRecord, read_comparison
from osp.run.folder import environment
from osp.tables import render_text
from osp.train.launch import Process, failure, training_command
from osp.train.stop import StopRequest

SECONDS_BETWEEN_LOOKS = 0.5
MEASURING = 0.1  # share of a training, for the progress bar and the remaining time
COLUMNS = list(CompareConfig().columns)  # of records without this key

log = logging.getLogger(__name__)


def ablate(config: AblationConfig, compose: Compose, *, scripts: Path, command: Sequence[str]) -> None:
    """Train and measure the runs of `config` that are missing, and write ablation.md and ablation.json.

    The files are also written if runs failed (`RunError`) or a signal asked to stop (`StoppedError`); they then name
    the missing runs.

    Args:
        compose: returns the configuration that scripts/train.py would train with these overrides.
        scripts: the folder of train.py and compare.py.
        command: the command line, for the tables.
    """
    check_ablation(config)
    runs = plan(config, compose)
    with as_user_error(f"dir={config.dir}: cannot write there: ", OSError):
        Path(config.dir).mkdir(parents=True, exist_ok=True)
    execution = Execution(config, runs, scripts=scripts)
    trainings, places = [run.config.train for run in execution.runs], execution.slots
    num_tokens = [train.num_steps * train.tokens_per_step for train in trainings]
    where = f"GPUs {[s.gpus for s in places]}" if places[0].gpus else f"threads per process: {places[0].threads}"
    number = f"{len(execution.runs)} runs of {sum(num_tokens) / len(num_tokens):,.0f} tokens"
    log.info("%s in %s, %d at a time, %s", number, config.dir, len(places), where)
    try:
        execution()
    finally:
        execution.write(command)
    if execution.failures:
        label, why = next(iter(execution.failures.items()))
        raise RunError(
            f"{len(execution.failures)} of {len(execution.runs)} runs failed, {label}: {why}; ablation.md says what "
            "is missing, the same command tries them again"
        )


class Slot(NamedTuple):
    """The threads and GPUs of one run at a time."""

    threads: int
    gpus: tuple[int, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))} if self.gpus else {}
        return {"OMP_NUM_THREADS": str(self.threads), **visible}


def slots(config: AblationConfig, runs: list[Planned]) -> list[Slot]:
    """Return one slot for each run at a time: as many as the GPUs or cores allow with `ranks` processes a run."""
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    on_gpu = gpus > 0 and all(run.config.engine.device != "cpu" for run in runs)
    available = max(1, (gpus if on_gpu else cores) // config.ranks)
    number = min(config.parallel or available, len(runs), available if on_gpu else cores)
    threads, ranks = max(1, cores // (number * config.ranks)), config.ranks
    return [Slot(threads, tuple(range(i * ranks, (i + 1) * ranks)) if on_gpu else ()) for i in range(number)]


class Execution:
    """Trains and measures runs. `failures`: label -> reason; a failed run does not stop the others."""

    def __init__(self, config: AblationConfig, runs: list[Planned], *, scripts: Path):
        self.config, self.planned, self.scripts = config, runs, scripts
        labels = [run.label for run in runs]
        self.runs = [run for i, run in enumerate(runs) if run.label not in labels[:i]]  # equal trainings run once
        self.slots, self.failures = slots(config, self.runs), dict[str, str]()
        self._finished: set[str] = set()  # labels; cached, because the check parses a file
        self._logs = Path(config.dir) / "logs"
        rows = list(parse_rows(config))
        self._with_methods = {"ends": {rows[0], rows[-1]}, "all": set(rows), "none": set[str]()}[config.methods]

    def __call__(self) -> None:
        """Train and measure what is missing; raise `StoppedError` after a signal, when the runs have saved."""
        self._finished = {run.label for run in self.runs if self.trained(run) and self.measured(run)}
        waiting = [run for run in self.runs if run.label not in self._finished]
        free, active = list(self.slots), {}
        if not waiting:
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        stop = StopRequest()
        bar = tqdm(
            desc="ablation",
            total=(1 + MEASURING) * len(self.runs),
            initial=sum(map(self._progress, self.runs)),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}",
            disable=not self.config.progress,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )
        with stop.listen(), bar:
            try:
                while (waiting or active) and not stop:
                    while waiting and free:
                        run, slot = waiting.pop(0), free.pop(0)
                        active[run.label] = (run, slot, self._next(run, slot))
                    for label, (run, slot, process) in list(active.items()):
                        status = process.poll()
                        if status is None:
                            continue
                        del active[label]
                        free.append(slot)
                        if error := failure(process.output, status):
                            self.failures[label] = str(error)
                            bar.write(f"{label} failed: {error}", file=sys.stderr)
                        elif self.measured(run):
                            self._finished.add(label)
                        else:
                            waiting.insert(0, run)
                    done = f"{len(self._finished)} of {len(self.runs)} runs; {', '.join(active)}"
                    bar.set_postfix_str(done, refresh=False)
                    bar.update(sum(map(self._progress, self.runs)) - bar.n)
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            finally:
                for _, _, process in active.values():  # all first, so that they save at the same time
                    process.terminate()
                for _, _, process in active.values():
                    process.stop()
        if stop.signal:
            log.info("stopped; the same command continues each run")
            raise StoppedError("the ablation was asked to stop", signal=stop.signal)

    def write(self, command: Sequence[str]) -> None:
        """Write ablation.md and ablation.json to the folder of the ablation."""
        pairs = itertools.product(filter(self.trained, self.runs), self.config.weights)
        records: Records = {(x.label, weights): record for x, weights in pairs if (record := self.record(x, weights))}
        about = about_lines(self.planned, command)
        results = collect(self.config, self.planned, records, self.failures, about=about)
        folder, template = Path(self.config.dir), Path(__file__).with_name("ablation.md")
        write_text(folder / "ablation.json", json.dumps(as_json(results), indent=1) + "\n")
        write_text(folder / "ablation.md", render_text(template, **contents(results, self.config)))

    def trained(self, run: Planned) -> bool:
        return (run.folder / "summary.json").exists()

    def measured(self, run: Planned) -> bool:
        return all(self.record(run, weights) for weights in self.config.weights)

    def record(self, run: Planned, weights: Weights) -> ComparisonRecord | None:
        """Return the newest record of scripts/compare.py in a run that measured what is wanted, or None."""
        wanted = {key: value for key, value in self._wanted(run, weights).items() if value != "none"}
        for path in sorted((run.folder / EVALUATIONS / COMPARISONS).glob("step_*.json"), reverse=True):
            try:
                record = read_comparison(path)
            except UserError:  # cut short
                continue
            measured = {"columns": COLUMNS, "weights": "trained"} | dict(leaves(record.config))
            if len(record.models) == 1 and all(measured.get(key) == value for key, value in wanted.items()):
                return record
        return None

    def _wanted(self, run: Planned, weights: Weights) -> dict[str, Any]:
        """Return the keys of scripts/compare.py that decide what is measured."""
        return {
            "weights": weights,
            "texts": list(self.config.texts),
            "max_tokens": self.config.max_tokens,
            "columns": list(self.config.columns) or COLUMNS,
            "methods": "last" if run.row in self._with_methods and run.value is None else "none",
            "quant.calibration_tokens": self.config.calibration_tokens,
        }

    def _next(self, run: Planned, slot: Slot) -> Process:
        """Start the training of a run or, after it, the measurement."""
        log_file = self._logs / f"{run.label}.{'compare' if self.trained(run) else 'train'}.log"
        if self.trained(run):
            keys = self._wanted(run, next(weights for weights in self.config.weights if not self.record(run, weights)))
            keys |= {"device": run.config.engine.device, "threads": slot.threads, "progress": False}
            keys |= {"kurtosis_tokens": 1024} if self.config.columns else {}  # the monitor's is shown instead
            overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
            command = [sys.executable, str(self.scripts / "compare.py"), str(run.folder), *overrides]
        else:
            engine = replace(run.config.engine, threads=run.config.engine.threads or slot.threads)
            path, script = self._logs / f"{run.label}.yaml", self.scripts / "train.py"
            config = replace(run.config, engine=engine)
            command = training_command(config, script=script, ranks=self.config.ranks, path=path)
        return Process(command, log_file, environment=slot.environment)

    def _progress(self, run: Planned) -> float:
        """Return the progress of one run, in trainings: 1 plus `MEASURING`; a failed run counts as finished."""
        if run.label in self.failures:
            return 1 + MEASURING
        if self.trained(run):
            return 1 + MEASURING * (run.label in self._finished)
        return last_step(run.folder / "metrics.jsonl") / run.config.train.num_steps


def last_step(path: Path) -> int:
    """Return the step of the last complete line of a metrics.jsonl, 0 before the first."""
    try:
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**16))
            lines = file.read().split(b"\n")[1:-1]
        return min(max((int(parse_json(line)["step"]) for line in lines[-3:]), default=0), 2**53)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0


def about_lines(runs: list[Planned], command: Sequence[str]) -> list[str]:
    """Return lines on the model, the data, the machine, the command and the rows."""
    config, model, train, machine = runs[0].config, runs[0].config.model, runs[0].config.train, environment()
    return [
        f"ours: {count_parameters(model)['total'] / 1e6:.1f} M parameters ({model.num_hidden_layers} layers of "
        f"{model.hidden_size}, {model.norm.name} in the first row), "
        f"{train.num_steps * train.tokens_per_step:,} tokens in steps of {train.tokens_per_step:,}, "
        f"sequences of {train.seq_len}",
        f"data: {' '.join([config.data.source, *config.data.paths])}",
        f"machine: {machine['cpus']} cores, torch {machine['torch']}, Python {machine['python']}",
        f"command: python {shlex.join(command)}",
        *dict.fromkeys(f"row {run.row}: {' '.join(run.overrides)}" for run in runs),
    ]
