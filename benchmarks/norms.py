"""Measure every normalizer: forward and backward beside a copy and torch's own norms, and whole training steps.

    python benchmarks/norms.py                                                        # only the norms
    python benchmarks/norms.py --train nano --rows 16 --seq-len 256                   # and a training step with each
    python benchmarks/norms.py --train osp_1b --rows 8 --seq-len 2048                 # on a GPU, bf16

Only the norms, eager and compiled: x (tokens, D) forward, then backward from a given gradient to x and the gains. The
minimal memory traffic is 5 D values per token (read x, write y; read x and dy, write dx), and 2 D for a copy; the
column `of copy` is the ratio of the two bandwidths on the same x. `bhyt, after attention` takes its variance from the
norm before. On a GPU the time is the median of a queue of calls, between events in the stream: while the GPU is busy,
no launch is part of it. The default size is beyond the GPU's cache. On a CPU it is the fastest call, at a smaller size.

A training step is one of the real trainer; each norm runs in a separate process, in turns.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from choices import CONFIGS, NO_CHECKPOINTS, group
from torch import Tensor, nn

ON_GPU = torch.cuda.is_available()
AFTER_ATTENTION = "bhyt, after attention"
PEERS: dict[str, Callable[[int], nn.Module]] = {"torch layer_norm": nn.LayerNorm, "torch rms_norm": nn.RMSNorm}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=131_072 if ON_GPU else 2048)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024, 2048, 4096] if ON_GPU else [256, 2048])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16" if ON_GPU else "fp32")
    parser.add_argument("--repeats", type=int, default=50 if ON_GPU else 10)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--train", default=None, help="also whole training steps of this choice of configs/model")
    parser.add_argument("--norms", nargs="+", default=None, help="norms to train with; default: all of configs/norm")
    parser.add_argument("--rows", type=int, default=16, help="sequences per training step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="measured training steps per round, after two for warm-up")
    parser.add_argument("--rounds", type=int, default=2, help="rounds per norm in training")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all cores")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(training_steps(arguments)), flush=True)
        os._exit(0)  # as scripts/entry.py: threads of the process group are still running
    if not ON_GPU:
        from osp.device import prepare_cpu

        prepare_cpu(arguments.threads)  # as training does: freed memory is kept instead of returned and zeroed again
    place = torch.cuda.get_device_name() if ON_GPU else f"{platform.processor()} CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.tokens} tokens, {arguments.dtype}, {place}, torch {torch.__version__}; ", end="")
    print("median of " if ON_GPU else "the fastest of ", end="")
    modes = ("eager", "compiled") if arguments.compile else ("eager",)
    print(f"{arguments.repeats}\n\n| D | norm |{''.join(f' {mode} us | GB/s | of copy |' for mode in modes)}")
    print(f"|---|---|{'---|---|---|' * len(modes)}")
    isolated = [row for hidden in arguments.hidden for row in measured(arguments, hidden, modes)]
    steps = train_in_turns(arguments) if arguments.train else {}
    if arguments.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        arguments.out.write_text(json.dumps({"settings": settings, "device": place, "alone": isolated, "train": steps}))


# --- only the norms -----------------------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace, hidden: int, modes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the figures of every norm at one width, and print each as it is measured."""
    device = "cuda" if ON_GPU else "cpu"
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    x = torch.randn(arguments.tokens, hidden, device=device, dtype=dtype)
    target, dy = torch.empty_like(x), torch.randn_like(x)
    size = x.numel() * x.element_size()
    copy_speed = 2 * size / seconds_of(lambda: target.copy_(x), arguments.repeats)
    rows = []
    for name, norm in contenders(hidden, device).items():
        row: dict[str, Any] = {"hidden": hidden, "norm": name, "copy_bytes_per_second": copy_speed}
        for mode in modes:
            call = torch.compile(norm, dynamic=False) if mode == "compiled" else norm
            leaf = x.detach().requires_grad_()
            seconds = seconds_of(lambda call=call, leaf=leaf: call(leaf).backward(dy), arguments.repeats)
            row |= {f"{mode}_seconds": seconds, f"{mode}_bytes_per_second": 5 * size / seconds}
        torch.compiler.reset()
        cells = [
            f"{row[f'{mode}_seconds'] * 1e6:,.0f} | {row[f'{mode}_bytes_per_second'] / 1e9:,.1f} "
            f"| {row[f'{mode}_bytes_per_second'] / copy_speed:.0%}"
            for mode in modes
        ]
        print(f"| {hidden} | {name} | {' | '.join(cells)} |", flush=True)
        rows.append(row)
    return rows


def contenders(hidden: int, device: str) -> dict[str, nn.Module]:
    from osp.model.build_norms import build_norm
    from osp.model.norms import NORMS, BHyT, Carry

    class AfterAttention(nn.Module):
        """The second norm of a block, which receives its variance."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = build_norm("bhyt", hidden, after_attention=True)
            _, carry = build_norm("bhyt", hidden)(torch.ones(1, hidden), return_carry=True)
            for key, value in carry._asdict().items():
                self.register_buffer(key, value.detach())

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.norm, BHyT)
            variance = self.get_buffer("variance").expand(x.shape[0], 1)
            return self.norm(x, Carry(variance, self.get_buffer("scale")))

    ours = {name: build_norm(name, hidden) for name in NORMS}
    peers = {name: make(hidden) for name, make in PEERS.items()}
    return {name: norm.to(device) for name, norm in {**peers, **ours, AFTER_ATTENTION: AfterAttention()}.items()}


def seconds_of(action: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of a call after three for warm-up: the fastest on a CPU, the median on a GPU."""
    for _ in range(3):
        action()
    if ON_GPU:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            action()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3
    times = []
    for _ in range(repeats):
        began = clock()
        action()
        times.append(clock() - began)
    return min(times)


def clock() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


# --- training -----------------------------------------------------------------------------------------------------


def train_in_turns(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return the rounds of training steps of every norm, and print the table."""
    norms = arguments.norms or sorted(path.stem for path in (CONFIGS / "norm").glob("*.yaml"))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ["rmsnorm", *norms]}
    for _ in range(arguments.rounds):
        for name in results:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
            results[name].append(json.loads(done.stdout.strip().split("\n")[-1]))
    rounds_of_steps = f"{arguments.rounds} rounds of {arguments.steps} steps"
    print(f"\n{arguments.train}, {arguments.rows} sequences of {arguments.seq_len}; median of {rounds_of_steps}\n")
    print("| norm | step s | over rmsnorm (per round) | peak GiB |\n|---|---|---|---|")
    for name, rounds in results.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(rounds, results["rmsnorm"], strict=True)]
        print(
            f"| {name} | {statistics.median(r['seconds'] for r in rounds):.3f} | {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) | {max(r['peak_gib'] for r in rounds):.2f} |"
        )
    return results


def training_steps(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of a training step with one norm, and the peak memory of this process."""
    from osp.config import from_dict
    from osp.train.setup import setup

    config = from_dict(
        {
            "run": {"name": "benchmark", "dir": tempfile.mkdtemp(prefix="osp-benchmark-")},
            "train": {
                "steps": 1000,
                "seq_len": arguments.seq_len,
                "tokens_per_step": arguments.rows * arguments.seq_len,
                "micro_batch_size": arguments.rows,
                "precision": arguments.dtype,
            },
            "model": group("model", arguments.train),
            "norm": group("norm", arguments.child),
            "optimizer": {**group("optimizer", "adamw"), "lr": 1e-3},
            "checkpoint": NO_CHECKPOINTS,
            "engine": {"threads": arguments.threads},
            "monitor": {"enabled": False},
            "logger": {"wandb": "disabled", "progress": False},
        }
    )
    trainer = setup(config)
    seconds = []
    for number in range(2 + arguments.steps):
        began = clock()
        trainer.train_step(number, record=False)
        seconds.append(clock() - began)
    return {"seconds": statistics.median(seconds[2:]), "peak_gib": trainer.engine.memory() / 2**30}


if __name__ == "__main__":
    main()
