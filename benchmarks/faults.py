"""Kill a training repeatedly, restart it with the same command, and check that nothing is lost.

    python benchmarks/faults.py --kills 24 --seed 0 --out faults.json

The real trainer runs on several CPU ranks under torchrun or the deepspeed launcher and saves after every step. SIGKILL
ends each start: all ranks at a random moment, startup included; all ranks during a save; or one rank, after which the
others must end by themselves. The last start finishes. Its weights, optimizer state, losses and data must be
bit-identical to an uninterrupted run.

    python benchmarks/faults.py --fuzz 5000 --seed 0

reads malformed inputs of eight kinds instead, as tests/test_fuzz.py does with a few of each.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from osp.errors import UserError  # noqa: E402
from osp.run.checkpoint import Checkpoint, candidates  # noqa: E402
from tests.fuzzing import KINDS, run_all  # noqa: E402

SECONDS_TO_END = 60.0  # for the remaining ranks after one was killed
SECONDS_OF_GRACE = 10.0  # for helper processes to end after their ranks
MODEL = {  # some MB, so that a save takes long enough to be interrupted
    "model.hidden_size": 256,
    "model.intermediate_size": 512,
    "model.num_hidden_layers": 2,
    "model.vocab_size": 512,
    "tokenizer.vocab_size": 512,
    "train.seq_len": 32,
    "train.tokens_per_step": 256,
    "train.micro_batch_size": 2,
    "train.precision": "fp32",
    "optimizer.ns_dtype": "fp32",
    "data": "text",
    "eval.every": 0,
    "eval.tokens": 32,
    "eval.sample_tokens": 0,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 2,
    "engine.device": "cpu",
    "engine.threads": 1,
    "logger.wandb": "disabled",
    "logger.progress": "false",
}


@dataclass
class Figures:
    """Counts over all starts of a run."""

    kills: int = 0
    inside_saves: int = 0  # kills that left an unfinished or half-removed checkpoint
    of_one_rank: int = 0  # kills of a single rank
    starts: int = 0
    steps: int = 0
    steps_lost: int = 0  # logged but not saved, and therefore repeated
    damaged_checkpoints: int = 0  # reported as damaged by a start
    leftovers: int = 0  # unfinished folders after kills
    leftovers_at_end: int = 0
    survivors: int = 0  # processes alive SECONDS_OF_GRACE after the run was killed or had ended
    slowest_end: float = 0.0  # seconds from the death of one rank to the end of all
    seconds: float = 0.0
    equal: bool = False  # bit-identical to the uninterrupted run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=24, help="starts that are killed")
    parser.add_argument("--fuzz", type=int, default=0, help="malformed inputs to read instead of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the run")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3), help="ZeRO stage")
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--folder", type=Path, default=None, help="where the runs go; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults_"))
    if arguments.fuzz:
        folder.mkdir(parents=True, exist_ok=True)
        fuzz(arguments.fuzz, folder / "fuzz", seed=arguments.seed, out=arguments.out)
        if not arguments.folder:
            shutil.rmtree(folder)
        return
    overrides = MODEL | {"train.steps": 6 * arguments.kills, "engine.zero_stage": arguments.stage}
    text = folder / "text"  # a copy: the sources may change meanwhile, and a run notices
    shutil.copytree(ROOT / "osp", text, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    overrides |= {"data.paths": f"[{text}]", "data.cache_dir": folder / "shards"}
    faults = Faults(
        launcher(arguments.launcher, arguments.ranks),
        [f"{key}={value}" for key, value in overrides.items()],
        folder,
        seed=arguments.seed,
    )
    figures = faults.run(faults.drawn(arguments.kills))
    report = {"figures": dataclasses.asdict(figures), "lives": faults.lives, "command": sys.argv}
    report |= {"torch": torch.__version__, "cores": os.cpu_count(), "host": platform.platform()}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for key, value in dataclasses.asdict(figures).items():
        print(f"{key.replace('_', ' '):<22}{value if not isinstance(value, float) else f'{value:.0f}'}")
    if not figures.equal or figures.survivors or figures.leftovers_at_end:
        sys.exit(f"the run differs, or processes or folders were left behind; the runs are in {folder}")
    if not arguments.folder:
        shutil.rmtree(folder)


def fuzz(number: int, folder: Path, *, seed: int, out: Path | None) -> None:
    """Read about `number` malformed inputs, as many of each kind, and print how they ended."""
    began = time.perf_counter()
    figures = run_all(folder, counts=dict.fromkeys(KINDS, math.ceil(number / len(KINDS))), seed=seed, say=say)
    print(f"{figures.table()}\n{time.perf_counter() - began:.0f} s")
    if out:
        out.write_text(json.dumps(dataclasses.asdict(figures), indent=1) + "\n")
    if figures.failures:
        sys.exit(f"{len(figures.failures)} of {figures.inputs} inputs failed; tests/fuzzing.py says how to repeat one")


def launcher(name: str, ranks: int) -> list[str]:
    if name == "torchrun":
        return [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    binary = str(Path(sys.executable).with_name("deepspeed"))
    return [binary, "--num_gpus", str(ranks), "--master_port", str(random.SystemRandom().randint(20000, 30000))]


class Faults:
    """Start one run many times; `lives` records how each start ended."""

    def __init__(self, launcher: list[str], overrides: list[str], folder: Path, *, seed: int):
        self.command = [*launcher, str(ROOT / "scripts" / "train.py"), *overrides]
        self.folder, self.run_folder, self.reference = folder, folder / "killed", folder / "reference"
        self.lives: list[dict[str, Any]] = []
        self.figures = Figures()
        self._random = random.Random(seed)
        self._seen: dict[int, psutil.Process] = {}  # every process started

    def drawn(self, number: int) -> list[str]:
        """Return `number` kinds of kills in an order that depends on the seed."""
        deaths = (["while saving", "at a moment", "while saving", "one rank"] * math.ceil(number / 4))[:number]
        self._random.shuffle(deaths)
        return deaths

    def run(self, deaths: list[str]) -> Figures:
        """Kill the run in the ways of `deaths`, let it finish, and compare it with an uninterrupted run."""
        try:
            return self._run(deaths)
        finally:  # also on Ctrl-C: leave no process behind
            for process in self._alive():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def _run(self, deaths: list[str]) -> Figures:
        began = time.perf_counter()
        kill = {"while saving": self._while_saving, "at a moment": self._at_a_moment, "one rank": self._one_rank}
        process, log = self._start(self.reference)
        first_step = self._wait(process, lambda: bool(steps_of(self.reference)))
        self._finish(process, log)
        seconds, steps = time.perf_counter() - began, len(steps_of(self.reference))
        say(f"the reference: {steps} steps in {seconds:.0f} s, the first after {first_step:.0f} s")
        for death in deaths:
            process, log = self._start(self.run_folder)
            # one kill in four during startup, the others during the first steps
            last = first_step + 4 * (seconds - first_step) / steps
            span = (0.0, first_step) if self._random.random() < 0.25 else (first_step, last)
            how = kill[death](process, self._random.uniform(*span))
            if not how:  # the run ended before the kill
                self._finish(process, log)  # raises if the training failed
                break
            self._account(log, how)
        process, log = self._start(self.run_folder)
        self._finish(process, log)
        self._count_damage(log)
        self.figures.survivors += len(self._survivors())
        self.figures.steps = len(steps_of(self.run_folder))
        self.figures.leftovers_at_end = len(self._leftovers())
        self.figures.equal = same_run(self.run_folder, self.reference)
        self.figures.seconds = time.perf_counter() - began
        return self.figures

    def _finish(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._wait(process, lambda: False)
        if process.returncode:
            raise RuntimeError(f"the training failed: {log.read_text(errors='replace')[-3000:]}")

    def _start(self, folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
        self.figures.starts += folder == self.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{folder.name}_{self.figures.starts:03d}.log"
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {key: value for key, value in os.environ.items() if key not in names}
        path = [str(Path(sys.executable).parent), os.environ["PATH"]]  # deepspeed looks for python there
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": os.pathsep.join(path)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.command, f"run.name={folder.name}", f"run.dir={folder}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        return process, log

    def _wait(self, process: subprocess.Popen[bytes], until: Callable[[], bool], limit: float = 1200.0) -> float:
        """Wait until the process ends or `until()` is true; return the seconds."""
        began = looked = time.perf_counter()
        while process.poll() is None and not until():
            time.sleep(0.002)
            if time.perf_counter() - looked > 0.25:  # rarely: it reads all of /proc
                self._look(process)
                looked = time.perf_counter()
            if time.perf_counter() - began > limit:
                self._kill_all(process)
                raise TimeoutError(f"the training hangs; see the logs in {self.folder}")
        return time.perf_counter() - began

    def _look(self, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Return the live descendants of the launcher, including orphans seen earlier."""
        try:
            root = psutil.Process(process.pid)
            for child in (root, *root.children(recursive=True)):
                self._seen.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            pass
        return self._alive()

    def _alive(self) -> list[psutil.Process]:
        def runs(process: psutil.Process) -> bool:
            try:
                return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return False

        return [process for process in self._seen.values() if runs(process)]

    def _survivors(self) -> list[str]:
        """Return the command lines of processes that still run SECONDS_OF_GRACE after the end."""
        _, alive = psutil.wait_procs(self._alive(), timeout=SECONDS_OF_GRACE)
        return [" ".join(process.cmdline())[:200] for process in alive if process in self._alive()]

    def _kill_all(self, process: subprocess.Popen[bytes]) -> bool:
        """Kill all processes of this start; return False if it has ended already."""
        if process.poll() is not None:
            return False
        for child in self._look(process):
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()
        return True

    def _signal(self, number: int) -> None:
        """Send a signal to all live processes of this start."""
        for child in self._alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    def _ranks(self, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Return the ranks, without launcher and helpers."""
        ranks = []
        for child in self._look(process):
            try:
                if child.pid != process.pid and child.environ().get("RANK") and "train.py" in " ".join(child.cmdline()):
                    ranks.append(child)
            except psutil.Error:
                continue
        return ranks

    def _at_a_moment(self, process: subprocess.Popen[bytes], moment: float) -> str:
        until = time.perf_counter() + moment
        self._wait(process, lambda: time.perf_counter() >= until)
        return "all at a moment" if self._kill_all(process) else ""

    def _while_saving(self, process: subprocess.Popen[bytes], _: float) -> str:
        saves = self._random.randint(1, 3)
        while process.poll() is None:
            self._wait(process, lambda: not self._leftovers())
            self._wait(process, lambda: bool(self._leftovers()))
            saves -= 1
            if saves > 0:
                continue
            time.sleep(self._random.uniform(0.0, 0.03))
            self._signal(signal.SIGSTOP)  # freeze, because a save may end before all processes are killed
            if self._leftovers():
                return "all while saving" if self._kill_all(process) else ""
            self._signal(signal.SIGCONT)
        return ""

    def _one_rank(self, process: subprocess.Popen[bytes], moment: float) -> str:
        start = len(steps_of(self.run_folder))
        self._wait(process, lambda: len(steps_of(self.run_folder)) > start)
        until = time.perf_counter() + min(1.0, moment / 10)
        self._wait(process, lambda: time.perf_counter() >= until)
        ranks = self._ranks(process)
        if not ranks:
            return ""
        victim = self._random.choice(ranks)
        name = f"only rank {victim.environ()['RANK']}"
        victim.kill()
        self.figures.of_one_rank += 1
        seconds = self._wait(process, lambda: not any(p.is_running() for p in ranks if p != victim), SECONDS_TO_END)
        self.figures.slowest_end = max(self.figures.slowest_end, seconds)
        self._wait(process, lambda: False, SECONDS_TO_END)
        return name

    def _account(self, log: Path, how: str) -> None:
        """Record the state that a killed start leaves."""
        figures, leftovers = self.figures, len(self._leftovers())
        trained, saved = max(steps_of(self.run_folder), default=0), newest_whole(self.run_folder)
        figures.kills += 1
        figures.inside_saves += leftovers > 0
        figures.leftovers += leftovers
        figures.steps_lost += max(0, trained - saved)
        survivors = self._survivors()
        figures.survivors += len(survivors)
        self._count_damage(log)
        self.lives.append(
            {"how": how, "trained": trained, "saved": saved, "leftovers": leftovers, "survivors": survivors}
        )
        say(f"kill {figures.kills}: {how}, step {trained}, saved {saved}, {leftovers} unfinished folders")

    def _count_damage(self, log: Path) -> None:
        self.figures.damaged_checkpoints += log.read_text(errors="replace").count("trying the one before")

    def _leftovers(self) -> list[Path]:
        return list(self.run_folder.glob("checkpoints/.*.tmp"))


def steps_of(folder: Path) -> dict[int, tuple[float, float]]:
    """Return loss and data checksum of every logged step."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    events = [json.loads(line) for line in lines if '"train/loss"' in line]
    return {event["step"]: (event["train/loss"], event["train/rows_checksum"]) for event in events}


def newest_whole(folder: Path) -> int:
    """Return the step of the newest undamaged checkpoint, or 0."""
    for path in candidates(folder):
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify()
            return checkpoint.step
        except UserError:
            continue
    return 0


def same_run(first: Path, second: Path) -> bool:
    """Return whether losses, data, weights and optimizer state of two runs are bit-identical."""
    a, b = Checkpoint(candidates(first)[0]), Checkpoint(candidates(second)[0])
    return (
        steps_of(first) == steps_of(second)
        and (a.step, a.shapes) == (b.step, b.shapes)
        and all(
            a.kinds(name) == b.kinds(name)
            and torch.equal(a.read(kind, name, 0, math.prod(shape)), b.read(kind, name, 0, math.prod(shape)))
            for name, shape in b.shapes.items()
            for kind in b.kinds(name)
        )
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
