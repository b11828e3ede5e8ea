"""Measure speed and memory of a training step, beside transformers' Llama with fused AdamW in a plain loop.

    python benchmarks/train_step.py --model nano --rows 16 --rounds 3
    python benchmarks/train_step.py --model osp_1b --rows 8 --accumulate 4 --seq-len 2048 --precision bf16    # on a GPU

A step is --accumulate micro batches of --rows sequences and one update. Shape, sequences, precision and gradient
clipping are equal. Each contender runs in a separate process, which separates their peak memory, and they take turns,
so that a drift of the machine affects all of them; --out is rewritten after each. Ours is the real trainer with data
loader, DeepSpeed engine and loss check; the peer reads the same sequences. In bf16 the peer keeps fp32 weights and runs
in `torch.autocast`, so both have the same master weights. `compiled` after a name compiles the blocks or layers.

A step is split into the micro batches, each one forward and backward pass, and the tail, which happens once: gradient
norms, clipping, the optimizer (`split_step`). The two predict a step of 524,288 tokens, the default of
`train.tokens_per_step`, from fewer. With CUDA the passes are timed by events in the stream, which do not wait.

MFU counts 6 flops per token for each weight in a matrix product, and causal attention (flops_per_token), over the
dense bf16 peak of the GPU (osp.device.PEAK_TFLOPS: 989 TFLOP/s for an H100 and an H200). `--profile` adds the time
and the memory of a step by part (breakdown.py). With `--threads 1` on a CPU the time is the CPU time of the process,
which excludes other jobs.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from choices import NO_CHECKPOINTS, group

from osp.files import write_text

DEFAULTS = ("transformers", "osp adamw", "osp muon")
COMPILED = " compiled"
CONTENDERS = tuple(name + suffix for name in DEFAULTS for suffix in ("", COMPILED))  # in the order of the tables
FIGURES = "figures of this contender: "  # begins the lines that a child prints for its parent
STEP_TOKENS = 524_288  # of the step that is predicted
OWN_SETTINGS = {"contenders", "keep", "profile", "out", "child"}  # may differ where --keep adds contenders to a file

Results = dict[str, list[dict[str, Any]]]  # the figures of each round by contender


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--rows", type=int, default=16, help="sequences per micro batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro batches per optimizer step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), default="fp32")
    parser.add_argument("--steps", type=int, default=8, help="measured steps per round, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="rounds per contender")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all cores")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="our blocks; default: on a GPU"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(DEFAULTS))
    parser.add_argument("--profile", action="store_true", help="time by part of the step, memory by part")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--keep", action="store_true", help="keep what --out has of other contenders, same settings")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        for figures in measure(arguments):
            print(FIGURES + json.dumps(figures), flush=True)
        os._exit(0)  # as scripts/entry.py: threads of the process group are still running
    results: Results = {name: [] for name in arguments.contenders}
    failed: dict[str, str] = {}
    if arguments.keep and arguments.out and arguments.out.exists():
        try:
            results = kept_results(arguments) | results
        except ValueError as error:
            parser.error(str(error))
    results = {name: results[name] for name in CONTENDERS if name in results}
    for turn in range(arguments.rounds):
        for name in [name for name in arguments.contenders if name not in failed]:
            for figures in run_child(name):
                if isinstance(figures, str):  # for example out of memory; the others are still measured
                    failed[name] = figures
                    print(f"{name} failed:\n{figures}", file=sys.stderr)
                else:
                    results[name][turn:] = [figures]
                    text = "profiled" if "time" in figures else f"{figures['tokens_per_second']:,.0f} tokens/s"
                    print(f"round {turn + 1}: {name}: {text}", file=sys.stderr)
                if arguments.out:
                    write(arguments, results, failed)
    report(arguments, {name: rounds for name, rounds in results.items() if len(rounds) == arguments.rounds}, failed)
    sys.exit(1 if failed else 0)


def run_child(name: str) -> Iterator[dict[str, Any] | str]:
    """Yield the figures of one contender as a separate process measures them, and the end of its stderr if it fails."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            for line in child.stdout or ():
                if line.startswith(FIGURES):
                    yield json.loads(line.removeprefix(FIGURES))
        if child.returncode:
            errors.seek(0)
            yield errors.read()[-4000:] or f"exit status {child.returncode}"


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}


def kept_results(arguments: argparse.Namespace) -> Results:
    """Return what --out holds of contenders that are not measured now. Raises `ValueError` if a setting differs."""
    before = json.loads(arguments.out.read_text())
    for key, value in settings_of(arguments).items():
        if key not in OWN_SETTINGS and (old := before["settings"].get(key)) != value:
            option = key.replace("_", "-")
            raise ValueError(f"--keep: {arguments.out} has --{option} {old}, not {value}; choose another --out")
    return {name: rounds for name, rounds in before["results"].items() if rounds and name not in arguments.contenders}


def write(arguments: argparse.Namespace, results: Results, failed: dict[str, str]) -> None:
    """Write the figures measured so far."""
    ratios = {f"{muon} over {adamw}": values for muon, adamw, values in muon_over_adamw(results)}
    figures = {"settings": settings_of(arguments), "results": results, "muon_over_adamw": ratios, "failed": failed}
    write_text(arguments.out, json.dumps(figures, indent=1))


def muon_over_adamw(results: Results) -> list[tuple[str, str, list[float]]]:
    """Return (Muon's contender, AdamW's, ratio of the predicted steps per round) where both were measured."""
    pairs = [("osp muon" + suffix, "osp adamw" + suffix) for suffix in ("", COMPILED)]
    return [
        (muon, adamw, [a["predicted_seconds"] / b["predicted_seconds"] for a, b in rounds])
        for muon, adamw in pairs
        if (rounds := list(zip(results.get(muon, ()), results.get(adamw, ()), strict=False)))
    ]


def report(arguments: argparse.Namespace, results: Results, failed: dict[str, str]) -> None:
    """Print the tables."""
    rounds = [figures for rounds in results.values() for figures in rounds]
    devices, base = sorted({figures["device"] for figures in rounds}), next(iter(results.values()), [])
    print(
        f"\n{arguments.model}, {arguments.accumulate} x {arguments.rows} sequences of {arguments.seq_len}, "
        f"{arguments.precision}, {' and '.join(devices)}; "
        f"median of {arguments.rounds} rounds of {arguments.steps} steps\n"
    )
    if len(devices) > 1:
        print("The contenders ran on different devices: ratios compare the devices as well.\n")
    print(
        "| contender | tokens/s | ratio to the first, per round | step s | peak GiB | MFU |\n|---|---|---|---|---|---|"
    )
    for name, rounds in results.items():
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(rounds, base, strict=True)]
        print(
            f"| {name} | {median_of(rounds, 'tokens_per_second'):,.0f} | {spread(ratios)} "
            f"| {median_of(rounds, 'step_seconds'):.3f} | {max(r['peak_gib'] for r in rounds):.2f} "
            f"| {percent(rounds, 'mfu')} |"
        )
    for name in [name for name in failed if name not in results]:
        print(f"| {name} | failed | | | | |")
    print(
        f"\n| contender | micro batch s | its MFU | tail s | after the last backward s | {STEP_TOKENS:,} tokens s ",
        end="",
    )
    print("| its MFU |\n|---|---|---|---|---|---|---|")
    for name, rounds in results.items():
        print(
            f"| {name} | {median_of(rounds, 'micro_seconds'):.4f} | {percent(rounds, 'micro_mfu')} "
            f"| {median_of(rounds, 'tail_seconds'):.4f} | {median_of(rounds, 'after_seconds'):.4f} "
            f"| {median_of(rounds, 'predicted_seconds'):.3f} | {percent(rounds, 'predicted_mfu')} |"
        )
    for muon, adamw, ratios in muon_over_adamw(results):
        print(f"\n{muon} over {adamw}, a step of {STEP_TOKENS:,} tokens: {spread(ratios, digits=4)}")
    for title, key, unit in (("seconds of a step", "time", "s"), ("memory", "memory", "GiB")):
        if parts := {name: rounds[0][key] for name, rounds in results.items() if key in rounds[0]}:
            columns = list(next(iter(parts.values())))
            print(f"\n| {title} | {' | '.join(columns)} | sum, {unit} |\n|---|{'---|' * (len(columns) + 1)}")
            for name, values in parts.items():
                cells = " | ".join(f"{values[column]:.3f}" for column in columns)
                print(f"| {name} | {cells} | {sum(values.values()):.3f} |")
    for name, rounds in results.items():
        total, step = sum(rounds[0].get("time", {}).values()), rounds[0]["step_seconds"]
        if total > 1.02 * step:
            print(
                f"\n{name}: the parts add up to {total:.3f} s and a step takes {step:.3f} s: kernels run side by side"
            )


def median_of(rounds: list[dict[str, Any]], key: str) -> float:
    return statistics.median(figures[key] for figures in rounds)


def percent(rounds: list[dict[str, Any]], key: str) -> str:
    """Return the median of an MFU, or nothing where the peak of the device is unknown."""
    return "" if rounds[0][key] is None else f"{median_of(rounds, key):.1%}"


def spread(ratios: list[float], digits: int = 2) -> str:
    return f"{statistics.median(ratios):.{digits}f} ({min(ratios):.{digits}f} to {max(ratios):.{digits}f})"


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of the contender in this process (medians of its steps and their parts, and peak memory), and
    once more with its profile, which takes a while.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    config = run_config(arguments)
    clock = time.process_time if measures_cpu_time(arguments) else time.perf_counter
    marks = Marks(clock)
    is_peer = arguments.child.startswith("transformers")
    contender = Peer(config, arguments, marks) if is_peer else Ours(config, marks)
    seconds, spans = [], []
    for number in range(arguments.warmup + arguments.steps):
        began = clock()
        contender.step(number)
        marks.add()
        if on_gpu:
            torch.cuda.synchronize()
        ended = clock()
        of_step = marks.take_spans()
        if number >= arguments.warmup:
            seconds.append(ended - began)
            spans.append(of_step)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    from osp.device import peak_tflops_of
    from osp.model.transformer import flops_per_token

    name = torch.cuda.get_device_name() if on_gpu else f"{platform.processor()} CPU"
    timed = "CPU time" if measures_cpu_time(arguments) else "wall time"
    figures = {
        **speeds(
            seconds,
            [of_step[:-1] for of_step in spans],
            micro_tokens=arguments.rows * arguments.seq_len,
            flops_per_token=flops_per_token(config.model, arguments.seq_len),
            peak_tflops=peak_tflops_of(name) if on_gpu else None,
        ),
        "after_seconds": statistics.median(of_step[-1] for of_step in spans),
        "seconds": seconds,
        "spans": spans,
        "peak_gib": peak / 2**30,
        "device": f"{name}, torch {torch.__version__}, {timed}",
    }
    yield figures
    if arguments.profile:
        from breakdown import mark_norms, parts_of_memory, parts_of_time

        memory = parts_of_memory(contender.forward, contender.model, contender.state(), logits=contender.logits_bytes())
        if not contender.compiled:
            mark_norms(contender.model)
        number = arguments.warmup + arguments.steps
        yield figures | {
            "memory": memory,
            "time": parts_of_time(lambda: contender.step(number), figures["step_seconds"]),
        }


def speeds(
    seconds: list[float],
    micros: list[list[float]],
    *,
    micro_tokens: int,
    flops_per_token: float,
    peak_tflops: float | None,
) -> dict[str, Any]:
    """Return speed and MFU of a step, of a micro batch and of a step of STEP_TOKENS. For the arguments: split_step."""
    step, (micro, tail) = statistics.median(seconds), split_step(seconds, micros)
    predicted = micro * STEP_TOKENS / micro_tokens + tail
    tokens = len(micros[0]) * micro_tokens

    def mfu(tokens: int, seconds: float) -> float | None:
        return tokens * flops_per_token / seconds / peak_tflops / 1e12 if peak_tflops else None

    return {
        "tokens_per_second": tokens / step,
        "step_seconds": step,
        "mfu": mfu(tokens, step),
        "micro_seconds": micro,
        "micro_mfu": mfu(micro_tokens, micro),
        "tail_seconds": tail,
        "predicted_seconds": predicted,
        "predicted_mfu": mfu(STEP_TOKENS, predicted),
        "flops_per_token": flops_per_token,
        "peak_tflops": peak_tflops,
    }


def split_step(seconds: list[float], micros: list[list[float]]) -> tuple[float, float]:
    """Return the seconds of a micro batch and of the tail, all else in a step. seconds: of each step. micros: of its
    forward and backward passes.

    The first micro batch of a step has no gradient to add to, and the last one reduces the gradients. Both are left out
    where there are others, and the tail includes what they take more or less: it happens once per step as well.
    """
    micro = statistics.median(span for of_step in micros for span in of_step[1:-1] or of_step[:1])
    return micro, statistics.median(seconds) - len(micros[0]) * micro


class Marks:
    """Points in time: events in the stream of the GPU, or readings of a clock on a CPU."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.points: list[Any] = []

    def add(self) -> None:
        import torch

        if torch.cuda.is_available():
            self.points.append(torch.cuda.Event(enable_timing=True))
            self.points[-1].record()
        else:
            self.points.append(self.clock())

    def begin(self) -> None:
        """Add the first point of a step."""
        if not self.points:
            self.add()

    def take_spans(self) -> list[float]:
        """Return the seconds from each point to the next, and forget the points. The GPU must have passed them."""
        points, self.points = self.points, []
        if isinstance(points[0], float):
            return [after - before for before, after in itertools.pairwise(points)]
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(points)]


def measures_cpu_time(arguments: argparse.Namespace) -> bool:
    """Return whether to measure CPU time: on a CPU with one thread, where nothing overlaps."""
    import torch

    return arguments.threads == 1 and not torch.cuda.is_available()


def run_config(arguments: argparse.Namespace) -> Any:
    """Return the configuration of steps of `accumulate` times `rows` sequences on the standard library's text."""
    from osp.config import from_dict

    name = arguments.child or "osp muon"
    compile = True if name.endswith(COMPILED) else arguments.compile
    return from_dict(
        {
            "run": {"name": "benchmark", "dir": tempfile.mkdtemp(prefix="osp-benchmark-")},
            "train": {
                "steps": 1000,
                "seq_len": arguments.seq_len,
                "tokens_per_step": arguments.accumulate * arguments.rows * arguments.seq_len,
                "micro_batch_size": arguments.rows,
                "precision": arguments.precision,
                "compile": "auto" if compile is None else compile,
            },
            "model": group("model", arguments.model),
            "norm": {"name": "rmsnorm"},
            "optimizer": {**group("optimizer", "muon" if "muon" in name else "adamw"), "lr": 1e-3},
            "checkpoint": NO_CHECKPOINTS,
            "engine": {"threads": arguments.threads},
            "logger": {"wandb": "disabled", "progress": False},
        }
    )


class Ours:
    """The real trainer."""

    def __init__(self, config: Any, marks: Marks):
        from osp.train.setup import setup

        self.trainer = setup(config)
        self.model = self.trainer.model
        self.compiled = self.trainer.resolved.compiled
        self.logger, self.trainer.logger = self.trainer.logger, None  # nothing is logged in measured steps
        forward, backward = self.trainer._forward, self.trainer.engine.backward

        def marked_forward(batch: Any) -> Any:
            marks.begin()
            return forward(batch)

        def marked_backward(loss: Any) -> None:
            backward(loss)
            marks.add()

        self.trainer._forward, self.trainer.engine.backward = marked_forward, marked_backward

    def step(self, number: int) -> None:
        if self.trainer.train_step(number, record=False) is None:
            raise RuntimeError(f"step {number + 1} was not taken: {self.trainer.failure}")

    def forward(self) -> Any:
        return self.trainer._forward(self.trainer.loader.step(0)[0]).loss

    def state(self) -> list[Any]:
        shares = self.trainer.engine.optimizer.local_state()
        return [tensor for *_, states in shares for name, tensor in states.items() if name != "weight"]

    def logits_bytes(self) -> int:
        """Return the bytes of the logits of one chunk, which their gradient overwrites."""
        rows = min(self.trainer.resolved.loss_chunk_tokens, self.trainer.config.train.tokens_per_step)
        return rows * self.trainer.config.model.vocab_size * self.model.compute_dtype.itemsize


class Peer:
    """A plain loop around `LlamaForCausalLM` with `torch.optim.AdamW(fused=True)`."""

    def __init__(self, config: Any, arguments: argparse.Namespace, marks: Marks):
        import torch

        from osp.data.loader import Layout, Loader
        from osp.data.prepare import start_preparing

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = peer_model(config.model).to(self.device)
        self.compiled = arguments.child.endswith(COMPILED)
        if self.compiled:
            for layer in self.model.model.layers:
                layer.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        shards, rows = start_preparing(config.data, config.tokenizer, progress=False), arguments.rows
        per_step = arguments.accumulate * rows
        self.loader = Loader(shards, Layout(arguments.seq_len), rows_per_step=per_step, micro_batch_size=rows)
        self.bf16 = arguments.precision != "fp32"  # the peer does not support fp8
        self.marks = marks

    def forward(self, batch: Any = None) -> Any:
        import torch

        batch = self.loader.step(0)[0] if batch is None else batch
        ids = batch.tokens[:, :-1].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(input_ids=ids, labels=ids).loss

    def step(self, number: int) -> None:
        import torch

        losses, batches = [], self.loader.step(number)
        self.marks.begin()
        for batch in batches:
            loss = self.forward(batch) / len(batches)
            loss.backward()
            self.marks.add()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().item()

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
