"""Measure the cost of monitoring: the time of a probe, and the speed of the training steps around it.

    python benchmarks/monitor.py --model nano --rounds 3
    python benchmarks/monitor.py --model osp_1b --rows 8 --seq-len 2048 --precision bf16    # on a GPU

`monitor=off`, `light` and `full` run the real trainer in separate processes, in turns. Probes run between the measured
steps, so a step slowed by a probe (a hook left behind, a block compiled again) would show. The interval is the limit of
`monitor.every=auto`: probe seconds / (monitor.max_cost x step seconds).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from choices import NO_CHECKPOINTS, group, osp_values

MODES = ("off", "light", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--rows", type=int, default=16, help="sequences per optimizer step and backward pass")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a round, a probe after every second")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="off first, to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per contender")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all cores")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)), flush=True)
        os._exit(0)  # as scripts/entry.py: threads of the process group are still running
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in arguments.modes}
    for turn in range(arguments.rounds):
        for mode in arguments.modes:
            results[mode].append(run_child(mode))
            print(f"round {turn + 1}: {mode}: {results[mode][-1]}", file=sys.stderr)
    report(arguments, results)


def run_child(mode: str) -> dict[str, Any]:
    """Return the figures of one contender, measured in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child", mode], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{mode} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def report(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table; write the JSON."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor()} CPU"
    print(
        f"\n{arguments.model}, {arguments.rows} sequences of {arguments.seq_len}, {arguments.precision}, {device}, "
        f"torch {torch.__version__}; median of {arguments.rounds} rounds of {arguments.steps} steps\n"
    )
    print("| monitor | tokens/s of the steps | ratio (per round) | probe s | in steps | interval at 0.5% |")
    print("|---|---|---|---|---|---|")
    base = [tokens_per_second(arguments, figures) for figures in results[arguments.modes[0]]]
    for mode, rounds in results.items():
        speeds = [tokens_per_second(arguments, figures) for figures in rounds]
        ratios = [speed / off for speed, off in zip(speeds, base, strict=True)]
        step = statistics.median(s for figures in rounds for s in figures["step_seconds"])
        probes = [s for figures in rounds for s in figures["probe_seconds"]]
        probe = statistics.median(probes) if probes else 0.0
        print(
            f"| {mode} | {statistics.median(speeds):,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {probe:.2f} | {probe / step:.2f} | {probe / step / 0.005:,.0f} steps |"
        )
    if arguments.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        arguments.out.write_text(json.dumps({"settings": settings, "device": device, "results": results}, indent=1))


def tokens_per_second(arguments: argparse.Namespace, figures: dict[str, Any]) -> float:
    return arguments.rows * arguments.seq_len / statistics.median(figures["step_seconds"])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every measured step and probe in this process, after warm-up."""
    from osp.train.setup import setup

    trainer = setup(run_config(arguments))
    monitor = trainer.build_monitor()
    steps: list[float] = []
    probes: list[float] = []
    warmup = 4
    for number in range(warmup + arguments.steps):
        began = time.perf_counter()
        trainer.train_step(number, record=False)
        synchronize()
        if number >= warmup:
            steps.append(time.perf_counter() - began)
        if number % 2 and arguments.child != "off":
            began = time.perf_counter()
            monitor.probe(number + 1, tokens=0, train_seconds=trainer.train_seconds)
            synchronize()
            if number >= warmup:
                probes.append(time.perf_counter() - began)
    trainer.loader.close()
    return {"step_seconds": steps, "probe_seconds": probes}


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_config(arguments: argparse.Namespace) -> Any:
    """Return the configuration of OSP's model and optimizer on the standard library's text."""
    from osp.config import from_dict

    return from_dict(
        {
            "run": {"name": "benchmark", "dir": tempfile.mkdtemp(prefix="osp-benchmark-")},
            "train": {
                "steps": 1000,
                "seq_len": arguments.seq_len,
                "tokens_per_step": arguments.rows * arguments.seq_len,
                "micro_batch_size": arguments.rows,
                "precision": arguments.precision,
            },
            **osp_values(arguments.model, threads=arguments.threads),
            "checkpoint": NO_CHECKPOINTS,
            "monitor": group("monitor", arguments.child),
        }
    )


if __name__ == "__main__":
    main()
