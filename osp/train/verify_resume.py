"""The certificate that runs of a configuration resume exactly: N + M steps equal N steps, stop, resume, M steps.

Every run is the real `scripts/train.py` in processes of its own, a few steps long. On the same ranks and ZeRO stage an
interrupted run must be the uninterrupted one bit for bit. On others the order of sums changes, and nothing tells how
far apart that may lead two runs of a given model, precision and learning rate. So it is measured: how far uninterrupted
runs on these ranks and stages lie apart is the yardstick for a run that changed from one to the other in its middle.
In bf16, which drives runs apart, that is a blunt one: train.precision=fp32 optimizer.ns_dtype=fp32 sharpens it.
"""

import dataclasses
import hashlib
import json
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from osp.config import Config, ScheduleConfig, VerifyResumeConfig, length_in_steps, to_dict
from osp.errors import RunError, UserError
from osp.files import write_text
from osp.run.checkpoint import Checkpoint, find
from osp.run.folder import STOPPED, environment
from osp.train.launch import Process, training_command

SLACK = 4.0  # how many times the yardstick a run may deviate that changed its ranks or stage
MAX_ATTEMPTS = 5  # to send SIGTERM before a short run is over

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """What a run is spread over."""

    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} x ZeRO-{self.stage}"


@dataclass(frozen=True)
class Difference:
    """What tells two runs apart over the steps that both took."""

    rows: bool  # the same rows were read in every step
    rates: bool  # the same learning rates
    loss: float  # max over steps of |a - b|
    weights: float  # max over parameters of ||a - b|| / ||b||, after the last step
    state: float  # the same of momentum and Adam's moments
    bitwise: bool  # losses, weights and state are the same bits

    def within(self, bound: "Difference", slack: float) -> bool:
        """Whether this is no more than `slack` times `bound`: nothing at all if that is nothing."""
        if bound.bitwise:
            return self.bitwise
        return all(getattr(self, name) <= slack * getattr(bound, name) + 1e-12 for name in ("loss", "weights", "state"))


EQUAL = Difference(rows=True, rates=True, loss=0.0, weights=0.0, state=0.0, bitwise=True)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    case: str
    before: Topology
    after: Topology
    difference: Difference
    yardstick: Difference | None  # of uninterrupted runs on `before` and `after`; None: this is one
    passed: bool
    seconds: float


def verify(config: Config, options: VerifyResumeConfig, *, script: Path) -> None:
    """Run all cases, print them as a table and write the certificate. Raises `RunError` if one fails.

    script: scripts/train.py.
    """
    home = Path(options.dir or config.run.dir)
    try:
        home.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="verify_resume_", dir=home))
    except OSError as error:
        raise UserError(f"{'verify' if options.dir else 'run'}.dir={home}: cannot write there: {error}") from error
    gpus = 0 if config.engine.device == "cpu" else torch.cuda.device_count()
    verification = Verification(config, options, folder, Subprocesses(script, folder), gpus=gpus)
    results = []
    try:
        log.info(HEADER)
        for result in verification.results():
            results.append(result)
            log.info(line_of(result))
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
            if not any(home.iterdir()):
                home.rmdir()
    out = Path(options.out) if options.out else home / "verify_resume.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(certificate(verification.config, options, results), indent=1) + "\n")
    failed = [result for result in results if not result.passed]
    if failed:
        names = "; ".join(f"{r.case}, {r.before} -> {r.after}" for r in failed[:3])
        raise RunError(f"{len(failed)} of {len(results)} cases failed ({names}); see {out}")
    log.info("all %d cases passed; certificate: %s", len(results), out)


class Start(Protocol):
    """Trains `config` in `ranks` processes until they end; SIGTERM is sent to them once `stop()` holds."""

    def __call__(self, config: Config, ranks: int, stop: Callable[[], bool] | None = None) -> None: ...


class Subprocesses:
    """Starts trainings by `script`, scripts/train.py; their configurations and logs stay in `folder`."""

    def __init__(self, script: Path, folder: Path):
        self.script, self.folder = script, folder

    def __call__(self, config: Config, ranks: int, stop: Callable[[], bool] | None = None) -> None:
        """Raises what ended the training, unless it was sent SIGTERM: `UserError` for a mistake, else `RunError`."""
        signalled, number = False, len(list(self.folder.glob("*.yaml")))
        path = self.folder / f"start_{number:03d}.yaml"
        process = Process(
            training_command(config, script=self.script, ranks=ranks, path=path), path.with_suffix(".log")
        )
        try:
            while process.running:
                if stop and stop():
                    process.terminate()
                    signalled, stop = True, None
                time.sleep(0.005 if stop else 0.1)
        finally:
            process.stop()
        if not signalled and (error := process.error(hint=" (verify.keep=true keeps it)")):
            raise error


class Verification:
    """All cases of one configuration; runs go into folders below `folder`.

    between: called with the checkpoint that the next run resumes from; how a test breaks what it wants to see found.
    """

    def __init__(
        self,
        config: Config,
        options: VerifyResumeConfig,
        folder: Path,
        start: Start,
        *,
        gpus: int = 0,
        between: Callable[[Path], None] = lambda checkpoint: None,
    ):
        """gpus: of this host that the runs use; 0: they run on the CPU."""
        self.options, self.folder, self._start, self._between, self._gpus = options, folder, start, between, gpus
        ranks = options.ranks or [n for n in (1, 2, 4) if not gpus or n <= gpus]
        self.topologies = [Topology(n, stage) for stage in options.stages for n in ranks]
        self.config = shortened(config, options, max_ranks=max(ranks))
        self.first, self.total = options.steps[0], sum(options.steps)
        self._references: dict[Topology, Path] = {}
        self._noise: Difference | None = None  # of two runs of one command; nothing at all on a CPU
        self._random = random.Random(options.seed)

    def results(self) -> Iterator[Result]:
        """Every case, when it is through."""
        yield self.again()
        for topology in self.topologies:
            yield self.once(topology)
        for topology in dict.fromkeys((self.topologies[0], self.topologies[-1])):
            yield self.twice(topology)
            yield self.signalled(topology)
        yield from self.across()

    def again(self) -> Result:
        """One uninterrupted run twice: whether this machine computes the same twice is what the rest is held to."""
        topology, began, folder = self.topologies[0], time.perf_counter(), self.folder / "same"
        reference = self.reference(topology)
        self._train(folder, topology)
        self._noise = compare(folder, reference)
        passed = self._noise.rows and self._noise.rates and (self._noise.bitwise or self._gpus > 0)
        self._remove(folder)
        return Result("not interrupted", topology, topology, self._noise, None, passed, time.perf_counter() - began)

    def once(self, topology: Topology) -> Result:
        def run(folder: Path) -> None:
            self._train(folder, topology, stop_at=self.first)
            self._resume(folder, topology)

        return self._same("interrupted once", topology, run)

    def twice(self, topology: Topology) -> Result:
        def run(folder: Path) -> None:
            self._train(folder, topology, stop_at=self.first)
            self._resume(folder, topology, stop_at=min(self.first + 1, self.total))
            self._resume(folder, topology)

        return self._same("interrupted twice", topology, run)

    def signalled(self, topology: Topology) -> Result:
        """SIGTERM while some step is under way, and again during the first step after that."""
        seconds = steps_of(self.reference(topology))[self.total]["train/step_seconds"]

        def run(folder: Path) -> None:
            for attempt in range(MAX_ATTEMPTS):
                after = self._random.randint(1, max(1, self.total - 2)) if attempt == 0 else 1
                moment = Moment(folder / "metrics.jsonl", after, self._random.uniform(0, seconds))
                self._train(folder, topology, stop=moment)
                if stopped_by(folder) == "SIGTERM":
                    break
                self._remove(folder)  # it was through before the signal came
            else:
                raise RunError(f"{topology}: {self.total} steps are over before SIGTERM comes; raise verify.steps")
            events = folder / "events.jsonl"
            resumed = Moment(events, len(lines_of(events)) + 1, self._random.uniform(0, seconds))
            self._resume(folder, topology, stop=resumed)
            self._resume(folder, topology)

        return self._same("SIGTERM at random", topology, run)

    def across(self) -> Iterator[Result]:
        """What one topology has saved, resumed by others."""
        yardsticks = {
            (a, b): compare(self.reference(a), self.reference(b)) for a in self.topologies for b in self.topologies
        }
        for before, after in self._pairs():
            began, folder = time.perf_counter(), self.folder / "across"
            checkpoint = self.reference(before) / "checkpoints" / f"step_{self.first:08d}"
            self._between(checkpoint)
            self._train(folder, after, resume=str(checkpoint))
            difference, pair = compare(folder, self.reference(before), after=self.first), yardsticks[before, after]
            # one pair may lie close by chance: the largest deviation counts, unless two topologies compute the same
            bound = pair if pair.bitwise else worst(yardsticks.values())
            passed = difference.rows and difference.rates and difference.within(bound, SLACK)
            self._remove(folder)
            yield Result("resumed by others", before, after, difference, pair, passed, time.perf_counter() - began)

    def reference(self, topology: Topology) -> Path:
        """The uninterrupted run on `topology`, with the checkpoint after the first N steps; trained when asked for."""
        if topology not in self._references:
            folder = self.folder / f"reference_{topology.ranks}_{topology.stage}"
            self._train(folder, topology, every=self.first)
            self._references[topology] = folder
        return self._references[topology]

    def _same(self, case: str, topology: Topology, run: Callable[[Path], None]) -> Result:
        """`run` trains into a folder what must be the same run as the reference on `topology`."""
        reference, began, folder = self.reference(topology), time.perf_counter(), self.folder / "same"
        run(folder)
        difference = compare(folder, reference)
        bound = self._noise or EQUAL
        passed = difference.rows and difference.rates and difference.within(bound, SLACK)
        self._remove(folder)
        return Result(case, topology, topology, difference, bound, passed, time.perf_counter() - began)

    def _resume(self, folder: Path, topology: Topology, **options: Any) -> None:
        checkpoint = find(folder)
        assert checkpoint is not None
        self._between(checkpoint)
        self._train(folder, topology, **options)

    def _train(
        self,
        folder: Path,
        topology: Topology,
        *,
        resume: str = "auto",
        every: int = 0,
        stop_at: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        config = dataclasses.replace(
            self.config,
            run=dataclasses.replace(self.config.run, name=folder.name, dir=str(folder)),
            engine=dataclasses.replace(self.config.engine, zero_stage=topology.stage),
            checkpoint=dataclasses.replace(self.config.checkpoint, every=every),
            train=dataclasses.replace(self.config.train, stop_at=stop_at),
            resume=resume,
        )
        log.info("  training on %s to step %d", topology, stop_at or self.total)
        self._start(config, topology.ranks, stop)

    def _pairs(self) -> list[tuple[Topology, Topology]]:
        """Which topology's checkpoint is resumed by which."""
        topologies = self.topologies
        if self.options.pairs == "all":
            return [(a, b) for a in topologies for b in topologies if a != b]
        return [(a, b) for a, b in zip(topologies, topologies[1:] + topologies[:1], strict=True) if a != b]

    def _remove(self, folder: Path) -> None:
        if self.options.keep:
            number = len(list(self.folder.glob(f"{folder.name}_*")))
            folder.rename(folder.with_name(f"{folder.name}_{number:03d}"))
        else:
            shutil.rmtree(folder)


class Moment:
    """True from `delay` seconds after the file has `num_lines` lines."""

    def __init__(self, path: Path, num_lines: int, delay: float):
        self.path, self.num_lines, self.delay = path, num_lines, delay
        self._since: float | None = None

    def __call__(self) -> bool:
        if self._since is None and len(lines_of(self.path)) >= self.num_lines:
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since >= self.delay


def shortened(config: Config, options: VerifyResumeConfig, *, max_ranks: int) -> Config:
    """`config` with steps of a few rows, as few as `options` says, and the schedule squeezed into them.

    So the rates change in the steps that are taken, and every rank has several micro batches in each.
    """
    train, total = config.train, sum(options.steps)
    rows = options.rows or 2 * max_ranks
    full = train.num_steps or total
    return dataclasses.replace(
        config,
        train=dataclasses.replace(
            train,
            steps=total,
            tokens=None,
            minutes=None,
            stop_at=None,
            tokens_per_step=rows * train.seq_len,
            micro_batch_size=1,
        ),
        schedule=squeezed(config.schedule, full, total, tokens_per_step=train.tokens_per_step),
        eval=dataclasses.replace(config.eval, every=0, tokens=train.seq_len, sample_tokens=0),
        checkpoint=dataclasses.replace(config.checkpoint, keep_last=0, keep_every=0),
        logger=dataclasses.replace(config.logger, every=1, wandb="disabled", progress=False),
        debug=False,
    )


def squeezed(schedule: ScheduleConfig, full: int, steps: int, *, tokens_per_step: int) -> ScheduleConfig:
    """`schedule` of a run of `full` steps with the same shares of `steps`."""

    def share(key: str, length: str | int) -> int:
        whole = length_in_steps(f"schedule.{key}", length, tokens_per_step=tokens_per_step, total_steps=full)
        return math.ceil(whole * steps / full)

    warmup = min(share("warmup", schedule.warmup), steps)
    decay = min(share("decay", schedule.decay), steps - warmup)
    return dataclasses.replace(schedule, warmup=warmup, decay=decay)


def compare(run: Path, reference: Path, *, after: int = 0) -> Difference:
    """How `run`, which took the steps after `after`, differs from `reference`, which took all."""
    a, b = steps_of(run), {step: event for step, event in steps_of(reference).items() if step > after}
    if a.keys() != b.keys():
        return Difference(False, False, math.inf, math.inf, math.inf, bitwise=False)
    rates = [key for event in b.values() for key in event if key.startswith("train/lr/")]
    losses = [abs(a[step]["train/loss"] - b[step]["train/loss"]) for step in b]
    deviations = dict(state_deviations(newest(run), newest(reference)))
    weights = [value for key, value in deviations.items() if key.startswith("weight/")]
    states = [value for key, value in deviations.items() if not key.startswith("weight/")]
    return Difference(
        rows=all(a[step]["train/rows_checksum"] == b[step]["train/rows_checksum"] for step in b),
        rates=all(a[step].get(key) == b[step].get(key) for step in b for key in rates),
        loss=max(losses),
        weights=max(weights),
        state=max(states),
        bitwise=max(losses + weights + states) == 0.0,
    )


def worst(differences: Any) -> Difference:
    """The largest of each deviation."""
    every = list(differences)
    return Difference(
        rows=all(d.rows for d in every),
        rates=all(d.rates for d in every),
        loss=max(d.loss for d in every),
        weights=max(d.weights for d in every),
        state=max(d.state for d in every),
        bitwise=all(d.bitwise for d in every),
    )


def state_deviations(first: Checkpoint, second: Checkpoint) -> Iterator[tuple[str, float]]:
    """KIND/NAME of everything stored of each parameter, with ||a - b|| / ||b||: 0 only for the same bits."""
    for name, shape in second.shapes.items():
        kinds, numel = second.kinds(name), math.prod(shape)
        for kind in kinds:
            if kind not in first.kinds(name):
                yield f"{kind}/{name}", math.inf
                continue
            a, b = first.read(kind, name, 0, numel), second.read(kind, name, 0, numel)
            if torch.equal(a, b):
                yield f"{kind}/{name}", 0.0
            else:
                a, b = a.double(), b.double()
                distance = (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()
                yield f"{kind}/{name}", distance if math.isfinite(distance) else math.inf


HEADER = (
    f"{'case':<18}{'saved by':<12}{'resumed by':<12}{'rows':<6}{'rates':<7}{'max |d loss|':>13}{'d weights':>11}"
    f"{'d state':>10}  verdict (of uninterrupted runs: the same three)"
)


def line_of(result: Result) -> str:
    """One line of the table below `HEADER`; 0 means the same bits."""
    found, pair = result.difference, result.yardstick
    numbers = f"{found.loss:>13.2g}{found.weights:>11.2g}{found.state:>10.2g}"
    beside = f" ({pair.loss:.2g} {pair.weights:.2g} {pair.state:.2g})" if pair and not pair.bitwise else ""
    same = ["same" if equal else "OTHER" for equal in (found.rows, found.rates)]
    verdict = ("bit for bit" if found.bitwise else "ok") if result.passed else "FAILED"
    return (
        f"{result.case:<18}{result.before!s:<12}{result.after!s:<12}{same[0]:<6}{same[1]:<7}{numbers}  "
        f"{verdict}{beside}, {result.seconds:.0f} s"
    )


def certificate(config: Config, options: VerifyResumeConfig, results: list[Result]) -> dict[str, Any]:
    """What was verified, of which configuration, where and with what."""
    values = to_dict(config)
    return {
        "passed": all(result.passed for result in results),
        "slack": SLACK,
        "results": [dataclasses.asdict(result) for result in results],
        "options": dataclasses.asdict(options),
        "environment": environment(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "config_sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
        "config": values,
    }


def newest(run: Path) -> Checkpoint:
    folder = find(run)
    if folder is None:
        raise RunError(f"{run}: the run has left no checkpoint")
    return Checkpoint(folder)


def steps_of(run: Path) -> dict[int, dict[str, float]]:
    """The line of metrics.jsonl of every training step."""
    events = [json.loads(line) for line in lines_of(run / "metrics.jsonl")]
    return {event["step"]: event for event in events if "train/loss" in event}


def stopped_by(run: Path) -> str | None:
    """The reason in the marker that a run leaves when it ends; None if it was killed."""
    path = run / STOPPED
    return json.loads(path.read_text(encoding="utf-8"))["reason"] if path.exists() else None


def lines_of(path: Path) -> list[str]:
    """The whole lines of a file that may not be there yet."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
