"""Measure the constants of a plan on this machine, and compare planned steps with real ones: seconds and bytes.

    python benchmarks/plan.py --model nano --threads 1 --rows 16 4 32

The constants are keys of `scripts/plan.py` (`machine.KEY=`):

    peak_tflops    products of 2048 x 2048 matrices
    matmul_share   forward and backward pass of the model, without engine and optimizer, over that peak
    ns_share       Newton-Schulz of the model's matrices, over that peak

The pass is measured at the first number of sequences. A step on one rank is then planned with these constants for every
number of sequences, and measured with the real trainer.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_step import run_config

from osp.config import Config
from osp.device import choose_device, native_bf16, prepare_cpu
from osp.distributed import shutdown
from osp.model.transformer import build_model, flops_per_token
from osp.optim.muon import newton_schulz, newton_schulz_flops
from osp.plan.config import MachineConfig, PlanConfig
from osp.plan.memory import peak
from osp.plan.plan import Plan, make_plan
from osp.train.resolve import resolve
from osp.train.setup import setup


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 4, 32], help="numbers of sequences per step")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all cores")
    parser.add_argument("--steps", type=int, default=5, help="measured repetitions, after one for warm-up")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    arguments = parser.parse_args()
    device = choose_device("auto")
    if device.type == "cpu":
        prepare_cpu(arguments.threads)
    configs = [config_of(arguments, rows) for rows in arguments.rows]
    machine = measured(resolve(configs[0], device=device, world_size=1).config, device, arguments.steps)
    shown = [f"machine.{key}={getattr(machine, key):.3g}" for key in ("peak_tflops", "matmul_share", "ns_share")]
    print(f"{machine.name}: {' '.join(shown)}\n")
    print("| sequences | planned s | real s | real / planned | planned GB | real GB |\n|---|---|---|---|---|---|")
    results = []
    for rows, config in zip(arguments.rows, configs, strict=True):
        plan = make_plan(config, PlanConfig(world_size=1, machine=machine))
        seconds, real_bytes = step_of(config, plan, arguments.steps)
        planned, planned_bytes = plan.step["total"], plan.stages[1]["peak"]
        print(f"| {rows} | {planned:.3f} | {seconds:.3f} | {seconds / planned:.2f} ", end="")
        print(f"| {planned_bytes / 1e9:.3f} | {real_bytes / 1e9:.3f} |")
        results.append({"rows": rows, "planned": planned, "real": seconds, "bytes": [planned_bytes, real_bytes]})
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": dataclasses.asdict(machine), "steps": results}, indent=1))
    shutdown()


def config_of(arguments: argparse.Namespace, rows: int) -> Config:
    """Return the configuration of `train_step.py` with this number of sequences per step."""
    given = argparse.Namespace(**{**vars(arguments), "rows": rows, "accumulate": 1, "child": None, "compile": False})
    return run_config(given)


def measured(config: Config, device: torch.device, repeats: int) -> MachineConfig:
    """Measure the constants and return them. There is one rank, so the network is not measured."""
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    square = torch.randn(2048, 2048, device=device).to(dtype)
    best = 2 * 2048**3 / seconds_of(lambda: square @ square, device, repeats)
    model = build_model(config.model, seed=0, device=device)
    model.compute_dtype = dtype
    rows = config.train.tokens_per_step // config.train.seq_len
    ids = torch.zeros(rows, config.train.seq_len, dtype=torch.long, device=device)
    tokens = flops_per_token(config.model, config.train.seq_len) * ids.numel()
    passes = tokens / seconds_of(lambda: model(ids, ids).loss.backward(), device, repeats)
    matrices: dict[torch.Size, list[torch.Tensor]] = {}
    for name, role in model.parameter_roles().items():
        if config.optimizer.rules[role] == "muon":
            matrix = model.get_parameter(name).detach()
            matrices.setdefault(matrix.shape, []).append(matrix)
    stacks = [torch.stack(same) for same in matrices.values()]
    flops = sum(len(stack) * newton_schulz_flops(stack.shape[1:]) for stack in stacks)
    orthogonalized = flops / seconds_of(lambda: [newton_schulz(stack) for stack in stacks], device, repeats)
    return MachineConfig(
        name=torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        device="cuda" if device.type == "cuda" else "cpu",
        bf16=native_bf16(device),
        reserved=0.0,
        peak_tflops=best / 1e12,
        matmul_share=min(1.0, passes / best),
        ns_share=min(1.0, orthogonalized / best),
    )


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of `repeats` calls, after one for warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def step_of(config: Config, plan: Plan, repeats: int) -> tuple[float, float]:
    """Return seconds and peak bytes of a step of the real trainer. On a CPU the bytes of tensors are counted."""
    trainer = setup(config)
    device, numbers = trainer.engine.device, iter(range(100))

    def step() -> Any:
        return trainer.train_step(next(numbers), record=False)

    seconds = seconds_of(step, device, repeats)
    if device.type == "cuda":
        num_bytes = trainer.engine.memory()
    else:
        # weights and optimizer state exist before the step; tests compare their planned bytes with the engine
        num_bytes = peak(step) + plan.stages[1]["weights"] + plan.stages[1]["optimizer_state"]
    trainer.close()
    trainer.engine.close()
    return seconds, num_bytes


if __name__ == "__main__":
    main()
