"""Measure the optimizer step on osp_1b's matrices: ours, `torch.optim.Muon`, and DeepSpeed's MuonWithAuxAdam.

    python benchmarks/muon_step.py --layers 1                  # CPU
    python benchmarks/muon_step.py --layers 24                 # a GPU

One rank, the matrices of the blocks only (4 of D x D, 3 of D x F per layer), random fp32 gradients. Optimizers take
turns. torch and DeepSpeed run Newton-Schulz in bf16 and offer no other dtype; ours runs in the dtype of `--ns-dtype`
(auto: bf16 where the hardware has it). `floor` is the time of the same products, 5 steps, as plain matrix
multiplications in that dtype.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from osp.config import OptimizerConfig
from osp.device import prepare_cpu
from osp.model_config import Heads
from osp.optim.groups import build_groups
from osp.optim.muon import newton_schulz_dtype
from osp.optim.optimizer import PartitionedOptimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5504)
    parser.add_argument("--methods", nargs="+", choices=("standard", "gram"), default=["standard", "gram"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ns-dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        prepare_cpu(None)
    d, f = arguments.hidden, arguments.ffn
    shapes = [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]
    dtype = newton_schulz_dtype(device, choice=arguments.ns_dtype)
    steps: dict[str, Callable[[], object]] = {
        **{f"osp ({method})": ours(shapes, arguments, device, method=method) for method in arguments.methods},
        "torch.optim.Muon": torch_muon(shapes, arguments.layers, device),
        "DeepSpeed MuonWithAuxAdam": deepspeed_muon(shapes, arguments.layers, device),
        f"floor ({str(dtype).removeprefix('torch.')})": products(shapes, arguments.layers, device, dtype),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.repeats + 1):
        for name, step in steps.items():
            elapsed = timed(step, device)
            if turn:  # the first turn warms up
                seconds[name].append(elapsed)
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"\n{arguments.layers} layers of {d}/{f}, {place}, torch {torch.__version__}; median of {arguments.repeats}\n"
    )
    print("| step | ms | over torch.optim.Muon | over DeepSpeed |\n|---|---|---|---|")
    peers = [statistics.median(times) for name, times in seconds.items() if "Muon" in name]
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median * 1e3:,.1f} | {median / peers[0]:.2f} | {median / peers[1]:.2f} |")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"device": place, "layers": arguments.layers, "seconds": seconds}, indent=1)
        )


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Return seconds; with one thread CPU time, which other jobs of the machine do not change."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def parameters(shapes: list[tuple[int, int]], layers: int, device: torch.device) -> list[nn.Parameter]:
    made = []
    for _ in range(layers):
        for shape in shapes:
            parameter = nn.Parameter(torch.randn(shape, device=device) * 0.02)
            parameter.grad = torch.randn(shape, device=device) * 1e-3
            made.append(parameter)
    return made


class Matrices(nn.ParameterList):
    """Matrices as a model for `build_groups`."""

    def parameter_roles(self) -> dict[str, str]:
        return {name: "matrix" for name, _ in self.named_parameters()}

    def parameter_heads(self) -> dict[str, Heads]:
        return {}


def ours(
    shapes: list[tuple[int, int]], arguments: argparse.Namespace, device: torch.device, *, method: str
) -> Callable[[], object]:
    config = OptimizerConfig(ns_method=method, ns_dtype=arguments.ns_dtype)  # type: ignore[arg-type]
    optimizer = PartitionedOptimizer(build_groups(Matrices(parameters(shapes, arguments.layers, device)), config))
    flats: list[Tensor] = []
    for group in optimizer.param_groups:  # as ZeRO does it: one flat tensor per group
        flat = torch.cat([p.detach().flatten() for p in group["params"]])
        flat.grad = torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None])
        group["params"] = [flat]
        flats.append(flat)
    optimizer.bind(flats, stage=1)
    optimizer.set_step(1, 1.0)
    return optimizer.step


def torch_muon(shapes: list[tuple[int, int]], layers: int, device: torch.device) -> Callable[[], object]:
    made = parameters(shapes, layers, device)
    return torch.optim.Muon(made, lr=5e-4, weight_decay=0.01, adjust_lr_fn="match_rms_adamw").step


def deepspeed_muon(shapes: list[tuple[int, int]], layers: int, device: torch.device) -> Callable[[], object]:
    from deepspeed.runtime.zero.muon.original_muon import SingleDeviceMuonWithAuxAdam

    made = parameters(shapes, layers, device)
    group = {"params": made, "lr": 5e-4, "weight_decay": 0.01, "momentum": 0.95, "use_muon": True}
    return SingleDeviceMuonWithAuxAdam([group]).step


def products(
    shapes: list[tuple[int, int]], layers: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """Return a function that computes the matrix products of 5 standard steps and nothing else."""
    made = [torch.randn(min(s), max(s), device=device, dtype=dtype) for _ in range(layers) for s in shapes]
    grams = [x @ x.mT for x in made]
    outs = [torch.empty_like(x) for x in made]

    def step() -> None:
        for x, gram, out in zip(made, grams, outs, strict=True):
            square = torch.empty_like(gram)
            for _ in range(5):
                torch.mm(x, x.mT, out=square)
                torch.mm(gram, gram, out=square)
                torch.mm(gram, x, out=out)

    return step


if __name__ == "__main__":
    main()
