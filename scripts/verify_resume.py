"""Verify that runs of a configuration resume exactly: `python scripts/verify_resume.py +experiment=osp model=nano`.

The property: N + M steps equal N steps, a stop, a resume and M steps. Every run is a few steps of scripts/train.py in
separate processes. On the same ranks and ZeRO stage, an interrupted run must be bit-identical to the uninterrupted one;
on a GPU, where two runs of the same command may differ, it may differ as much as those.
On another topology the order of summation changes, so the tolerance is measured: the deviation between uninterrupted
runs on these topologies (the yardstick) bounds the deviation of a run that changed topology midway. bf16 drives runs
apart and makes the yardstick loose; train.precision=fp32 optimizer.ns_dtype=fp32 tightens it.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from entry import launch

from osp.config import Config, ScheduleConfig, from_dict, to_dict
from osp.errors import RunError, UserError
from osp.files import read_lines, write_out
from osp.optim.schedule import length_in_steps
from osp.run.checkpoint import Checkpoint, find
from osp.run.folder import STOPPED, environment
from osp.schema import Count, FilePath, Int, ZeroStage, build
from osp.train.launch import Process, failure, training_command

TRAIN = Path(__file__).with_name("train.py")
SLACK = 4.0  # largest deviation of a run that changed ranks or stage, over the yardstick
MAX_ATTEMPTS = 5  # to send SIGTERM before a short run ends

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifyResumeConfig:
    """Keys of the group `verify`."""

    steps: tuple[Count, Count] = (3, 3)  # steps before and after the interruption
    rows: Count | None = None  # sequences per step; None: two per rank of the largest topology
    ranks: tuple[Count, ...] | None = None  # numbers of ranks; None: 1, 2 and 4, as far as the GPUs of this host go
    stages: tuple[ZeroStage, ...] = (1, 2, 3)  # ZeRO stages
    # Topologies that resume a checkpoint of another one. cycle: the next one; all: all others.
    pairs: Literal["cycle", "all"] = "cycle"
    seed: Int = 0  # of the random moments of SIGTERM
    dir: FilePath | None = None  # folder of the short runs; None: a temporary folder in run.dir
    keep: bool = False  # keep the short runs and their logs
    out: FilePath | None = None  # JSON file of the certificate; None: verify_resume.json in run.dir


def main(values: dict[str, Any]) -> None:
    options = build(VerifyResumeConfig, values.pop("verify"), path="verify")
    verify(from_dict(values), options)


@dataclass(frozen=True)
class Topology:
    """Ranks and ZeRO stage of a run."""

    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} x ZeRO-{self.stage}"


@dataclass(frozen=True)
class Difference:
    """The difference between two runs over the steps that both took."""

    rows: bool = True  # every step read the same sequences
    rates: bool = True  # every step used the same learning rates
    loss: float = 0.0  # max over steps of |a - b|
    weights: float = 0.0  # max over parameters of ||a - b|| / ||b||, after the last step
    state: float = 0.0  # the same of momentum and Adam's moments
    bitwise: bool = True  # losses, weights and state have the same bits

    def within(self, bound: "Difference") -> bool:
        """Return whether data and learning rates agree and no deviation exceeds `SLACK` times the one in `bound`."""
        if not (self.rows and self.rates):
            return False
        if bound.bitwise:
            return self.bitwise
        return all(getattr(self, name) <= SLACK * getattr(bound, name) + 1e-12 for name in ("loss", "weights", "state"))


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    case: str
    before: Topology
    after: Topology
    difference: Difference
    yardstick: Difference | None  # between uninterrupted runs on `before` and `after`; None: this is such a run
    passed: bool
    seconds: float


def verify(config: Config, options: VerifyResumeConfig) -> None:
    """Run all cases, log them as a table and write the certificate. Raises `RunError` if a case fails."""
    home = Path(options.dir or config.run.dir)
    try:
        home.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="verify_resume_", dir=home))
    except OSError as error:
        raise UserError(f"{'verify' if options.dir else 'run'}.dir={home}: cannot write there: {error}") from error
    gpus = 0 if config.engine.device == "cpu" else torch.cuda.device_count()
    verification = Verification(config, options, folder, Subprocesses(folder), gpus=gpus)
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
    write_out(out, json.dumps(certificate(verification.config, options, results), indent=1) + "\n")
    failed = [result for result in results if not result.passed]
    if failed:
        names = "; ".join(f"{r.case}, {r.before} -> {r.after}" for r in failed[:3])
        raise RunError(f"{len(failed)} of {len(results)} cases failed ({names}); see {out}")
    log.info("all %d cases passed; certificate: %s", len(results), out)


@dataclass(frozen=True)
class Subprocesses:
    """Train in separate processes; their configurations and logs go to `folder`."""

    folder: Path

    def __call__(self, config: Config, ranks: int, stop: Callable[[], bool] | None = None) -> None:
        """Train `config` on `ranks` processes; send them SIGTERM once `stop()` is true.

        Raises the error that ended the training, a `UserError` or a `RunError`, unless it was sent SIGTERM.
        """
        path = self.folder / f"start_{len(list(self.folder.glob('*.yaml'))):03d}.yaml"
        command = training_command(config, script=TRAIN, ranks=ranks, path=path)
        process = Process(command, path.with_suffix(".log"))
        signalled = False
        try:
            while process.poll() is None:
                if stop and stop():
                    process.terminate()
                    signalled, stop = True, None
                time.sleep(0.005 if stop else 0.1)
        finally:
            process.stop()
        if not signalled and (error := failure(process.output, process.wait(), hint=" (verify.keep=true keeps it)")):
            raise error


class Verification:
    """All cases of one configuration. Runs go to folders below `folder`.

    Args:
        start: `start(config, ranks, stop)` trains, as `Subprocesses` does.
        gpus: Number of GPUs of this host that the runs use; 0: they run on the CPU.
        between: Called with the checkpoint that the next run resumes from. Tests damage it here.
    """

    def __init__(
        self,
        config: Config,
        options: VerifyResumeConfig,
        folder: Path,
        start: Callable[..., None],
        *,
        gpus: int = 0,
        between: Callable[[Path], None] = lambda checkpoint: None,
    ):
        self.options, self.folder, self._start, self._between, self._gpus = options, folder, start, between, gpus
        ranks = options.ranks or [n for n in (1, 2, 4) if not gpus or n <= gpus]
        self.topologies = [Topology(n, stage) for stage in options.stages for n in ranks]
        self.config = shortened(config, options, max_ranks=max(ranks))
        self.first, self.total = options.steps[0], sum(options.steps)
        self._references: dict[Topology, Path] = {}
        self._noise = Difference()  # between two runs of the same command; zero on a CPU
        self._random = random.Random(options.seed)

    def results(self) -> Iterator[Result]:
        """Yield the result of every case as it finishes."""
        yield self.again()
        for topology in self.topologies:
            yield self.interrupted(topology, self.first)
        for topology in dict.fromkeys((self.topologies[0], self.topologies[-1])):
            yield self.interrupted(topology, self.first, min(self.first + 1, self.total))
            yield self.signalled(topology)
        yield from self.across()

    def again(self) -> Result:
        """Repeat an uninterrupted run: the deviation is the noise of this machine, which bounds the cases below."""
        topology = self.topologies[0]
        result = self._same("not interrupted", topology, lambda folder: self._train(folder, topology))
        self._noise = result.difference
        passed = self._noise.rows and self._noise.rates and (self._noise.bitwise or self._gpus > 0)
        return dataclasses.replace(result, yardstick=None, passed=passed)

    def interrupted(self, topology: Topology, *stops: int) -> Result:
        """Stop after each of the steps `stops` and resume."""

        def run(folder: Path) -> None:
            self._train(folder, topology, stop_at=stops[0])
            for stop_at in (*stops[1:], None):
                self._resume(folder, topology, stop_at=stop_at)

        return self._same(f"interrupted {('once', 'twice')[len(stops) - 1]}", topology, run)

    def signalled(self, topology: Topology) -> Result:
        """Send SIGTERM during a random step, and again during the first step after the resume."""
        seconds = steps_of(self.reference(topology))[self.total]["train/step_seconds"]

        def run(folder: Path) -> None:
            for attempt in range(MAX_ATTEMPTS):
                after = self._random.randint(1, max(1, self.total - 2)) if attempt == 0 else 1
                moment = Moment(folder / "metrics.jsonl", after, self._random.uniform(0, seconds))
                self._train(folder, topology, stop=moment)
                if stopped_by(folder) == "SIGTERM":
                    break
                self._remove(folder)  # the run ended before the signal arrived
            else:
                raise RunError(f"{topology}: {self.total} steps end before SIGTERM arrives; raise verify.steps")
            events = folder / "events.jsonl"
            resumed = Moment(events, len(read_lines(events)) + 1, self._random.uniform(0, seconds))
            self._resume(folder, topology, stop=resumed)
            self._resume(folder, topology)

        return self._same("SIGTERM at random", topology, run)

    def across(self) -> Iterator[Result]:
        """Resume the checkpoint of one topology on others."""
        topologies = self.topologies
        yardsticks = {(a, b): compare(self.reference(a), self.reference(b)) for a in topologies for b in topologies}
        # one pair may be close by chance, so the largest deviation of all pairs is the bound
        worst = Difference(
            loss=max(d.loss for d in yardsticks.values()),
            weights=max(d.weights for d in yardsticks.values()),
            state=max(d.state for d in yardsticks.values()),
            bitwise=all(d.bitwise for d in yardsticks.values()),
        )
        following = topologies[1:] + topologies[:1]
        pairs = yardsticks.keys() if self.options.pairs == "all" else zip(topologies, following, strict=True)
        for before, after in pairs:
            if before == after:
                continue
            began, folder = time.perf_counter(), self.folder / "across"
            checkpoint = self.reference(before) / "checkpoints" / f"step_{self.first:08d}"
            self._between(checkpoint)
            self._train(folder, after, resume=str(checkpoint))
            difference, pair = compare(folder, self.reference(before), after=self.first), yardsticks[before, after]
            passed = difference.within(pair if pair.bitwise else worst)
            self._remove(folder)
            yield Result("resumed by others", before, after, difference, pair, passed, time.perf_counter() - began)

    def reference(self, topology: Topology) -> Path:
        """Return the uninterrupted run on `topology`, with a checkpoint after the first N steps; train it once."""
        if topology not in self._references:
            folder = self.folder / f"reference_{topology.ranks}_{topology.stage}"
            self._train(folder, topology, every=self.first)
            self._references[topology] = folder
        return self._references[topology]

    def _same(self, case: str, topology: Topology, run: Callable[[Path], None]) -> Result:
        """Compare the run that `run(folder)` trains with the reference on the same topology."""
        reference, began, folder = self.reference(topology), time.perf_counter(), self.folder / "same"
        run(folder)
        difference = compare(folder, reference)
        passed = difference.within(self._noise)
        self._remove(folder)
        return Result(case, topology, topology, difference, self._noise, passed, time.perf_counter() - began)

    def _resume(self, folder: Path, topology: Topology, **options: Any) -> None:
        self._between(newest(folder).folder)
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

    def _remove(self, folder: Path) -> None:
        if self.options.keep:
            number = len(list(self.folder.glob(f"{folder.name}_*")))
            folder.rename(folder.with_name(f"{folder.name}_{number:03d}"))
        else:
            shutil.rmtree(folder)


@dataclass
class Moment:
    """True from `delay` seconds after the file at `path` has `num_lines` lines."""

    path: Path
    num_lines: int
    delay: float
    _since: float | None = field(default=None, init=False)

    def __call__(self) -> bool:
        if self._since is None and len(read_lines(self.path)) >= self.num_lines:
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since >= self.delay


def shortened(config: Config, options: VerifyResumeConfig, *, max_ranks: int) -> Config:
    """Return `config` with few and small steps, and the schedule squeezed into them.

    The learning rate changes within the steps taken, and every rank has several micro batches per step.
    """
    train, total = config.train, sum(options.steps)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(
            train,
            steps=total,
            tokens=None,
            stop_at=None,
            tokens_per_step=(options.rows or 2 * max_ranks) * train.seq_len,
            micro_batch_size=1,
        ),
        schedule=squeezed(config.schedule, train.num_steps, total, tokens_per_step=train.tokens_per_step),
        eval=dataclasses.replace(config.eval, every=0, tokens=train.seq_len, sample_tokens=0),
        checkpoint=dataclasses.replace(config.checkpoint, keep_last=0, keep_every=0),
        logger=dataclasses.replace(config.logger, every=1, wandb="disabled", progress=False),
        debug=False,
    )


def squeezed(schedule: ScheduleConfig, full: int, steps: int, *, tokens_per_step: int) -> ScheduleConfig:
    """Return the `schedule` of a run of `full` steps with the same proportions over `steps`."""

    def share(key: str, length: str | int) -> int:
        whole = length_in_steps(f"schedule.{key}", length, tokens_per_step=tokens_per_step, total_steps=full)
        return math.ceil(whole * steps / full)

    warmup = min(share("warmup", schedule.warmup), steps)
    decay = min(share("decay", schedule.decay), steps - warmup)
    return dataclasses.replace(schedule, warmup=warmup, decay=decay)


def compare(run: Path, reference: Path, *, after: int = 0) -> Difference:
    """Return the difference between `run`, which took the steps after `after`, and `reference`, which took all."""
    a, b = steps_of(run), {step: event for step, event in steps_of(reference).items() if step > after}
    if a.keys() != b.keys():
        return Difference(False, False, math.inf, math.inf, math.inf, bitwise=False)
    rates = [key for event in b.values() for key in event if key.startswith("train/lr/")]
    loss = max(abs(a[step]["train/loss"] - b[step]["train/loss"]) for step in b)
    deviations = dict(state_deviations(newest(run), newest(reference)))
    weights = max(value for key, value in deviations.items() if key.startswith("weight/"))
    state = max(value for key, value in deviations.items() if not key.startswith("weight/"))
    return Difference(
        rows=all(a[step]["train/rows_checksum"] == b[step]["train/rows_checksum"] for step in b),
        rates=all(a[step].get(key) == b[step].get(key) for step in b for key in rates),
        loss=loss,
        weights=weights,
        state=state,
        bitwise=loss == weights == state == 0.0,
    )


def state_deviations(first: Checkpoint, second: Checkpoint) -> Iterator[tuple[str, float]]:
    """Yield (KIND/NAME, ||a - b|| / ||b||) of every tensor stored for a parameter: 0 only if the bits are equal."""
    for name, shape in second.shapes.items():
        for kind in second.kinds(name):
            distance = math.inf
            if kind in first.kinds(name):
                a, b = (checkpoint.read(kind, name, 0, math.prod(shape)) for checkpoint in (first, second))
                a, b, equal = a.double(), b.double(), torch.equal(a, b)
                norms = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)
                distance = 0.0 if equal else norms.item()
            yield f"{kind}/{name}", distance if math.isfinite(distance) else math.inf


HEADER = (
    f"{'case':<18}{'saved by':<12}{'resumed by':<12}{'rows':<6}{'rates':<7}{'max |d loss|':>13}{'d weights':>11}"
    f"{'d state':>10}  verdict (in brackets: the same three between uninterrupted runs)"
)


def line_of(result: Result) -> str:
    """Return one line of the table below `HEADER`; 0 means identical bits."""
    difference, pair = result.difference, result.yardstick
    numbers = f"{difference.loss:>13.2g}{difference.weights:>11.2g}{difference.state:>10.2g}"
    beside = f" ({pair.loss:.2g} {pair.weights:.2g} {pair.state:.2g})" if pair and not pair.bitwise else ""
    rows, rates = ("same" if equal else "OTHER" for equal in (difference.rows, difference.rates))
    verdict = ("bit for bit" if difference.bitwise else "ok") if result.passed else "FAILED"
    return (
        f"{result.case:<18}{result.before!s:<12}{result.after!s:<12}{rows:<6}{rates:<7}{numbers}  "
        f"{verdict}{beside}, {result.seconds:.0f} s"
    )


def certificate(config: Config, options: VerifyResumeConfig, results: list[Result]) -> dict[str, Any]:
    """Return the results with the configuration, the options, the machine and the versions that they hold for."""
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
    """Return the newest checkpoint of a run."""
    folder = find(run)
    if folder is None:
        raise RunError(f"{run}: the run wrote no checkpoint")
    return Checkpoint(folder)


def steps_of(run: Path) -> dict[int, dict[str, float]]:
    """Return the line of metrics.jsonl of every training step."""
    return {event["step"]: event for event in read_lines(run / "metrics.jsonl") if "train/loss" in event}


def stopped_by(run: Path) -> str | None:
    """Return the reason in the run's end marker; None if it was killed."""
    path = run / STOPPED
    return json.loads(path.read_text(encoding="utf-8"))["reason"] if path.exists() else None


if __name__ == "__main__":
    launch(main, "verify_resume", defaults=to_dict(Config()) | {"verify": dataclasses.asdict(VerifyResumeConfig())})
