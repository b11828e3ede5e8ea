"""Measure speed and memory of a training step, beside transformers' Llama with fused AdamW in a plain loop.

    python benchmarks/train_step.py --model nano --rounds 3
    python benchmarks/train_step.py --model osp_1b --rows 8 --seq-len 2048 --precision bf16 --profile    # on a GPU

Shape, sequences, precision and gradient clipping are equal. Each contender runs in a separate process, which separates
their peak memory, and they take turns, so that a drift of the machine affects all of them. Ours is the real trainer
with data loader, DeepSpeed engine and loss check; the peer reads the same sequences. In bf16 the peer keeps fp32
weights and runs in `torch.autocast`, so both have the same master weights.

MFU counts 6 flops per token for each weight in a matrix product, and causal attention (flops_per_token), over the
dense bf16 peak of the GPU (osp.device.PEAK_TFLOPS: 989 TFLOP/s for an H100 and an H200). `--profile` adds the time
and the memory of a step by part (breakdown.py). With `--threads 1` on a CPU the time is the CPU time of the process,
which excludes other jobs.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from choices import group

CONTENDERS = ("transformers", "osp adamw", "osp muon")
COMPILED = "transformers compiled"  # layers compiled as ours are with --compile; not a default contender
PEERS = ("transformers", COMPILED)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--rows", type=int, default=16, help="sequences per optimizer step and backward pass")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), default="fp32")
    parser.add_argument("--steps", type=int, default=8, help="measured steps per round, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="rounds per contender")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all cores")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="blocks of ours")
    parser.add_argument("--contenders", nargs="+", choices=(*CONTENDERS, COMPILED), default=list(CONTENDERS))
    parser.add_argument("--profile", action="store_true", help="time by part of the step, memory by part")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--child", choices=(*CONTENDERS, COMPILED), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.contenders}
    failed: dict[str, str] = {}
    for turn in range(arguments.rounds):
        for name in [name for name in arguments.contenders if name not in failed]:
            figures = run_child(name)
            if isinstance(figures, str):  # for example out of memory; the others are still measured
                failed[name] = figures
                print(f"{name} failed:\n{figures}", file=sys.stderr)
                continue
            results[name].append(figures)
            print(f"round {turn + 1}: {name}: {figures['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
    report(arguments, {name: rounds for name, rounds in results.items() if name not in failed}, failed)
    sys.exit(1 if failed else 0)


def run_child(name: str) -> dict[str, Any] | str:
    """Return the figures of one contender, measured in a separate process, or the end of its stderr if it failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.strip().split("\n")[-1]) if done.returncode == 0 else done.stderr[-4000:]


def report(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]], failed: dict[str, str]) -> None:
    """Print the tables; write the JSON."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor()} CPU"
    timed = "CPU time" if measures_cpu_time(arguments) else "wall time"
    print(
        f"\n{arguments.model}, {arguments.rows} sequences of {arguments.seq_len}, {arguments.precision}, {device}, "
        f"torch {torch.__version__}, {timed}; median of {arguments.rounds} rounds of {arguments.steps} steps\n"
    )
    print(
        "| contender | tokens/s | ratio to the first, per round | step s | peak GiB | MFU |\n|---|---|---|---|---|---|"
    )
    for name, rounds in results.items():
        speeds = [r["tokens_per_second"] for r in rounds]
        base = next(iter(results.values()))
        ratios = [a / b["tokens_per_second"] for a, b in zip(speeds, base, strict=True)]
        speed, flops, peak = statistics.median(speeds), rounds[0]["flops_per_token"], rounds[0]["peak_tflops"]
        utilization = f"{speed * flops / peak / 1e12:.1%}" if peak else ""
        print(
            f"| {name} | {speed:,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {arguments.rows * arguments.seq_len / speed:.3f} | {max(r['peak_gib'] for r in rounds):.2f} "
            f"| {utilization} |"
        )
    for name in failed:
        print(f"| {name} | failed | | | | |")
    for title, key, unit in (("seconds of a step", "time", "s"), ("memory", "memory", "GiB")):
        if parts := {name: rounds[0][key] for name, rounds in results.items() if key in rounds[0]}:
            columns = list(next(iter(parts.values())))
            print(f"\n| {title} | {' | '.join(columns)} | sum, {unit} |\n|---|{'---|' * (len(columns) + 1)}")
            for name, values in parts.items():
                cells = " | ".join(f"{values[column]:.3f}" for column in columns)
                print(f"| {name} | {cells} | {sum(values.values()):.3f} |")
    if arguments.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        figures = {"settings": settings, "device": device, "results": results, "failed": failed}
        arguments.out.write_text(json.dumps(figures, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second (median step) and peak memory of the contender in this process."""
    import torch

    config = run_config(arguments)
    contender = Peer(config, arguments) if arguments.child in PEERS else Ours(config)
    clock = time.process_time if measures_cpu_time(arguments) else time.perf_counter
    seconds = []
    for number in range(arguments.warmup + arguments.steps):
        began = clock()
        contender.step(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= arguments.warmup:
            seconds.append(clock() - began)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    from osp.device import peak_tflops_of
    from osp.model.transformer import flops_per_token

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    number, parts = arguments.warmup + arguments.steps, {}
    if arguments.profile:
        from breakdown import mark_norms, parts_of_memory, parts_of_time

        memory = parts_of_memory(contender.forward, contender.model, contender.state(), logits=contender.logits_bytes())
        if not contender.compiled:
            mark_norms(contender.model)
        parts = {
            "memory": memory,
            "time": parts_of_time(lambda: contender.step(number), statistics.median(seconds)),
        }
    return {
        **parts,
        "tokens_per_second": arguments.rows * arguments.seq_len / statistics.median(seconds),
        "seconds": seconds,
        "peak_gib": peak / 2**30,
        "flops_per_token": flops_per_token(config.model, arguments.seq_len),
        "peak_tflops": peak_tflops_of(name),
    }


def measures_cpu_time(arguments: argparse.Namespace) -> bool:
    """Return whether to measure CPU time: on a CPU with one thread, where nothing overlaps."""
    import torch

    return arguments.threads == 1 and not torch.cuda.is_available()


def run_config(arguments: argparse.Namespace) -> Any:
    """Return the configuration of steps of `rows` sequences on the standard library's text."""
    from osp.config import from_dict

    optimizer = "adamw" if arguments.child in PEERS else (arguments.child or "osp muon")[4:]
    return from_dict(
        {
            "run": {"name": "benchmark", "dir": tempfile.mkdtemp(prefix="osp-benchmark-")},
            "train": {
                "steps": 1000,
                "seq_len": arguments.seq_len,
                "tokens_per_step": arguments.rows * arguments.seq_len,
                "micro_batch_size": arguments.rows,
                "precision": arguments.precision,
                "compile": "auto" if arguments.compile is None else arguments.compile,
            },
            "model": group("model", arguments.model),
            "norm": {"name": "rmsnorm"},
            "optimizer": {**group("optimizer", optimizer), "lr": 1e-3},
            "engine": {"threads": arguments.threads},
            "logger": {"wandb": "disabled", "progress": False},
        }
    )


class Ours:
    """The real trainer."""

    def __init__(self, config: Any):
        from osp.train.setup import setup

        self.trainer = setup(config)
        self.model = self.trainer.model
        self.compiled = self.trainer.resolved.compiled
        self.logger, self.trainer.logger = self.trainer.logger, None  # nothing is logged in measured steps

    def step(self, number: int) -> None:
        self.trainer.train_step(number, record=False)

    def forward(self) -> Any:
        return self.trainer._forward(self.trainer.loader.step(0)[0]).loss

    def state(self) -> list[Any]:
        shares = self.trainer.engine.optimizer.local_state()
        return [tensor for *_, states in shares for name, tensor in states.items() if name != "weight"]

    def logits_bytes(self) -> int:
        """Return the bytes of one chunk: logits and their gradient in the compute dtype, probabilities in fp32."""
        train = self.trainer.config.train
        rows = min(train.loss_chunk_tokens, train.tokens_per_step)
        return rows * self.trainer.config.model.vocab_size * (2 * self.model.compute_dtype.itemsize + 4)


class Peer:
    """A plain loop around `LlamaForCausalLM` with `torch.optim.AdamW(fused=True)`."""

    def __init__(self, config: Any, arguments: argparse.Namespace):
        import torch

        from osp.data.loader import Layout, Loader
        from osp.data.prepare import start_preparing

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = peer_model(config.model).to(self.device)
        self.compiled = arguments.child == COMPILED
        if self.compiled:
            for layer in self.model.model.layers:
                layer.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        shards, rows = start_preparing(config.data, config.tokenizer, progress=False), arguments.rows
        self.loader = Loader(shards, Layout(arguments.seq_len), rows_per_step=rows, micro_batch_size=rows)
        self.bf16 = arguments.precision != "fp32"  # the peer does not support fp8

    def forward(self, number: int = 0) -> Any:
        import torch

        (batch,) = self.loader.step(number)
        ids = batch.tokens[:, :-1].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(input_ids=ids, labels=ids).loss

    def step(self, number: int) -> None:
        import torch

        loss = self.forward(number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()

    def state(self) -> list[Any]:
        return [tensor for state in self.optimizer.state.values() for tensor in state.values()]

    def logits_bytes(self) -> int:
        return 0  # autograd keeps them, where they are counted


def peer_model(shape: Any) -> Any:
    """Return transformers' Llama of the same shape, with SDPA attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.max_position_embeddings,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


if __name__ == "__main__":
    main()
