"""Training speed and memory of this trainer beside transformers' Llama with fused AdamW in a plain loop.

    python benchmarks/train_step.py --model nano --rounds 3
    python benchmarks/train_step.py --model osp_1b --rows 8 --seq-len 2048 --precision bf16    # on a GPU

Same shape, rows, precision and gradient clipping. Each contender runs in a process of its own, so that its peak memory
is its own, and the contenders take turns, so that a machine that drifts slows all of them. Ours is the real trainer,
with its data loader, DeepSpeed engine and loss check; the peer reads the same rows from memory.
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

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS = ("transformers", "osp adamw", "osp muon")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--rows", type=int, default=16, help="rows of one optimizer step and backward pass")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a round, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all cores")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="blocks of ours")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for turn in range(arguments.rounds):
        for name in CONTENDERS:
            figures = run_child(name)
            results[name].append(figures)
            print(f"round {turn + 1}: {name}: {figures['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
    report(arguments, results)


def run_child(name: str) -> dict[str, Any]:
    """The figures of one contender, measured in its own process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def report(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table; write the JSON."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor()} CPU"
    print(
        f"\n{arguments.model}, {arguments.rows} rows of {arguments.seq_len}, {arguments.precision}, {device}, "
        f"torch {torch.__version__}; median of {arguments.rounds} rounds of {arguments.steps} steps\n"
    )
    print("| contender | tokens/s | ratio (per round) | step s | peak GiB | MFU |\n|---|---|---|---|---|---|")
    base = results["transformers"]
    for name, rounds in results.items():
        speeds = [r["tokens_per_second"] for r in rounds]
        ratios = [a / b["tokens_per_second"] for a, b in zip(speeds, base, strict=True)]
        speed, mfu = statistics.median(speeds), rounds[0].get("flops_per_token")
        peak = rounds[0].get("peak_tflops")
        utilization = f"{speed * mfu / peak / 1e12:.1%}" if mfu and peak else ""
        print(
            f"| {name} | {speed:,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {arguments.rows * arguments.seq_len / speed:.3f} | {max(r['peak_gib'] for r in rounds):.2f} "
            f"| {utilization} |"
        )
    if arguments.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        arguments.out.write_text(json.dumps({"settings": settings, "device": device, "results": results}, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second (median step) and peak memory of the contender in this process."""
    import torch

    config = run_config(arguments)
    step = peer_step(config, arguments) if arguments.child == "transformers" else our_step(config)
    seconds = []
    for number in range(arguments.warmup + arguments.steps):
        began = time.perf_counter()
        step(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= arguments.warmup:
            seconds.append(time.perf_counter() - began)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    from osp.model import flops_per_token
    from osp.precision import peak_tflops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "tokens_per_second": arguments.rows * arguments.seq_len / statistics.median(seconds),
        "seconds": seconds,
        "peak_gib": peak / 2**30,
        "flops_per_token": flops_per_token(config.model, arguments.seq_len),
        "peak_tflops": peak_tflops(device),
    }


def run_config(arguments: argparse.Namespace) -> Any:
    """The configuration of one step of `rows` rows, on the standard library's text."""
    import yaml

    from osp.config import from_dict

    def group(name: str, choice: str) -> dict[str, Any]:
        return yaml.safe_load((ROOT / "configs" / name / f"{choice}.yaml").read_text()) or {}

    optimizer = (arguments.child or "muon").removeprefix("osp ").replace("transformers", "adamw")
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


def our_step(config: Any) -> Any:
    from osp.train import setup

    trainer = setup(config)
    return lambda number: trainer.train_step(number, record=False)


def peer_step(config: Any, arguments: argparse.Namespace) -> Any:
    """A plain loop around `LlamaForCausalLM` with `torch.optim.AdamW(fused=True)`."""
    import torch

    from osp.data import Loader, start

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = peer_model(config.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    shards = start(config.data, config.tokenizer, progress=False)
    loader = Loader(shards, seq_len=arguments.seq_len, rows_per_step=arguments.rows, micro_batch_size=arguments.rows)
    bf16 = arguments.precision == "bf16"

    def step(number: int) -> None:
        (batch,) = loader.step(number)
        ids = batch.tokens[:, :-1].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def peer_model(shape: Any) -> Any:
    """transformers' Llama of the same shape; its attention is SDPA by default."""
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
