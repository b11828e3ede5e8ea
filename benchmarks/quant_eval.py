"""Measure evaluation under every preset of `quant=`: seconds to quantize and to read the text, and memory.

    python benchmarks/quant_eval.py                                                   # CPU, a small model
    python benchmarks/quant_eval.py --hidden 2048 --ffn 5504 --layers 24 --heads 16   # a GPU, osp_1b's blocks

A randomly initialised model reads random tokens: the time does not depend on their values. `none` is the unquantized
forward pass, the reference of `over plain`; the aim is at most 2. Memory is the peak of the GPU, or the growth of the
resident memory of the process, during quantization and forward pass.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from choices import group

from osp.device import prepare_cpu
from osp.evaluation.perplexity import Text, perplexity
from osp.model.transformer import Transformer, build_model
from osp.model_config import ModelConfig, NormConfig
from osp.quant.apply import draw_calibration, quantized
from osp.quant.spec import QuantSpec
from osp.schema import build


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--presets", nargs="+", default=["none", "strict", "osp_paper", "hadamard", "gptq", "quarot"])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        prepare_cpu(None)
    config = ModelConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        max_position_embeddings=arguments.seq_len,
        norm=NormConfig(name="ssnorm"),
    )
    model = build_model(config, seed=0, device=device).eval()
    model.compute_dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    ids = torch.randint(0, arguments.vocab, (arguments.tokens,), generator=torch.Generator().manual_seed(0))
    text = Text("random", ids, torch.ones_like(ids, dtype=torch.int32), sha256="")
    perplexity(model, text, seq_len=arguments.seq_len)  # warms up
    figures = {name: measured(model, text, preset(name, arguments), arguments) for name in arguments.presets}
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"\n{arguments.layers} layers of {arguments.hidden}/{arguments.ffn}, {arguments.tokens:,} tokens in windows of "
        f"{arguments.seq_len}, {arguments.dtype}, {place}, torch {torch.__version__}; fastest of {arguments.repeats}\n"
    )
    print("| preset | quantize, s | read, s | over plain | memory, MiB |\n|---|---|---|---|---|")
    plain = figures[arguments.presets[0]]["read"]
    for name, figure in figures.items():
        ratio = figure["read"] / plain
        print(f"| {name} | {figure['quantize']:.2f} | {figure['read']:.2f} | {ratio:.2f} | {figure['memory']:.0f} |")
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": place, **vars(arguments), "figures": figures}, default=str))


def preset(name: str, arguments: Any) -> QuantSpec:
    """Return the spec of a file of configs/quant, with this benchmark's amount of calibration text."""
    return build(QuantSpec, {**group("quant", name), "calibration_tokens": arguments.calibration_tokens})


def measured(model: Transformer, text: Text, spec: QuantSpec, arguments: Any) -> dict[str, float]:
    """Return seconds to quantize, seconds of the perplexity, and MiB of memory that both add."""
    device = model.embed_tokens.weight.device
    calibration = draw_calibration(text.tokens, spec, seq_len=arguments.seq_len).to(device)
    before = memory(device, reset=True)
    began = clock(device)
    with quantized(model, spec, calibration=calibration):
        entered = clock(device)
        times = []
        for _ in range(arguments.repeats):
            start = clock(device)
            perplexity(model, text, seq_len=arguments.seq_len)
            times.append(clock(device) - start)
    return {"quantize": entered - began, "read": min(times), "memory": (memory(device) - before) / 2**20}


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: torch.device, *, reset: bool = False) -> float:
    """Return bytes: the peak on the GPU since the last reset (with `reset`, the bytes in use), or of the process."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    return float(torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    main()
