"""Measure the overhead of a run of 10,000 steps at the defaults: waiting, validation, probes, saving.

    python benchmarks/overhead.py --model nano --tokens-per-step 4096 --seq-len 256
    python benchmarks/overhead.py --model osp_1b --tokens-per-step 16384 --seq-len 2048     # on a GPU

One of each is measured with the real trainer of OSP's model: the median step, one validation of the whole validation
split, one probe and one save that is waited for. The number of each follows from the default intervals:
`validation_every`, `checkpoint.every`, and for probes a simulation of `monitor.every=auto` with the measured times. A
save is written in the background; `saving` is the time until training continues, `written` the whole time.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from choices import osp_values

from osp.config import Config, from_dict
from osp.distributed import shutdown
from osp.monitor.monitor import MOST_PROBES, next_probe
from osp.train.setup import setup

RUN_STEPS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after two for warm-up")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all cores")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    arguments = parser.parse_args()
    config = run_config(arguments)
    try:
        seconds, every = measure(config, arguments)
    finally:
        shutil.rmtree(config.run.dir, ignore_errors=True)  # its checkpoint has 14 GB at osp_1b
    counts = {
        "validation": RUN_STEPS // every["validation"],
        "probes": count_probes(seconds["step"], seconds["probe"], max_cost=config.monitor.max_cost),
        "saving": RUN_STEPS // config.checkpoint.every,
    }
    train = RUN_STEPS * seconds["step"]
    spent = {
        "waiting for data": RUN_STEPS * seconds["wait"],
        "validation": counts["validation"] * seconds["validation"],
        "probes": counts["probes"] * seconds["probe"],
        "saving": counts["saving"] * seconds["save"],
    }
    total = train + sum(spent.values()) - spent["waiting for data"]  # already part of the steps
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{arguments.model}, {arguments.tokens_per_step} tokens per step, {place}; step {seconds['step']:.3f} s\n")
    print("| | one, s | times | share of the run |\n|---|---|---|---|")
    one = {"waiting for data": "wait", "validation": "validation", "probes": "probe", "saving": "save"}
    for name, value in spent.items():
        print(f"| {name} | {seconds[one[name]]:.4f} | {counts.get(name, RUN_STEPS):,} | {value / total:.3%} |")
    together = sum(value for name, value in spent.items() if name != "waiting for data")
    print(f"| validation, probes and saving together | | | {together / total:.3%} |")
    print(f"\na save is written in {seconds['written']:.2f} s")
    if arguments.out:
        shares = {name: value / total for name, value in spent.items()}
        figures = {"device": place, "seconds": seconds, "counts": counts, "shares": shares}
        arguments.out.write_text(json.dumps(figures, indent=1))
    shutdown()


def measure(config: Config, arguments: Any) -> tuple[dict[str, float], dict[str, int]]:
    """Return the seconds of one step, wait, validation, probe and save, and the interval of validations."""
    trainer = setup(config)
    trainer.logger = trainer.validator.logger = None
    monitor = trainer.build_monitor()
    steps, waits = [], []
    for number in range(2 + arguments.steps):
        metrics = trainer.train_step(number, record=True)
        assert metrics is not None
        steps.append(metrics["train/step_seconds"])
        waits.append(metrics["train/data_wait_seconds"])
    trainer.step = 2 + arguments.steps
    seconds = {"step": statistics.median(steps[2:]), "wait": statistics.median(waits[2:])}
    validate, forward, asked_to_stop = trainer.validator.validate, trainer._forward, trainer._asked_to_stop
    seconds["validation"] = timed(lambda: validate(trainer.step, forward, asked_to_stop))
    monitor.probe(1, tokens=0, train_seconds=1.0)  # the first probe allocates
    seconds["probe"] = timed(lambda: monitor.probe(2, tokens=0, train_seconds=1.0))
    began = clock()
    trainer.save()
    seconds["save"] = clock() - began
    saved = trainer.saver.finish()
    assert not saved.error, saved.error
    seconds["written"] = saved.write_seconds
    trainer.close()
    return seconds, {"validation": trainer.validator.every}


def count_probes(step_seconds: float, probe_seconds: float, *, max_cost: float) -> int:
    """Return the number of probes with `monitor.every=auto` if every step and every probe takes this time."""
    step, count = 0, 0
    interval = max(1, RUN_STEPS // MOST_PROBES)
    while step < RUN_STEPS:
        count += 1
        wait = (count + 1) * probe_seconds / max_cost - step * step_seconds
        step = next_probe(step, wait=wait, step_seconds=step_seconds, interval=interval)
    return count + 1  # and at the end


def timed(action: Any) -> float:
    began = clock()
    action()
    return clock() - began


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_config(arguments: Any) -> Config:
    return from_dict(
        {
            "run": {"name": "overhead", "dir": tempfile.mkdtemp(prefix="osp-overhead-")},
            "train": {
                "steps": RUN_STEPS,
                "seq_len": arguments.seq_len,
                "tokens_per_step": arguments.tokens_per_step,
            },
            "checkpoint": {"keep_last": 1},  # one is written
            **osp_values(arguments.model, threads=arguments.threads),
        }
    )


if __name__ == "__main__":
    main()
