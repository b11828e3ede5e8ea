"""What a run prints: at its start the sizes, at its end the figures, a sample of generated text and the report page."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from osp.config import Config
from osp.data.loader import validation_batches
from osp.data.manifest import load_manifest
from osp.model.generate import Sampling, generate
from osp.model.transformer import Transformer, count_parameters, flops_per_token
from osp.optim.groups import describe_groups
from osp.report import write_report
from osp.train.engine import Engine
from osp.train.resolve import Resolved

PROMPT_TOKENS = 32


def describe_start(resolved: Resolved, engine: Engine, shards: Path, tflops: float | None) -> str:
    """Return the sizes of the run, its engine, and the table of the optimizer's groups."""
    config = resolved.config
    parameters, flops = count_parameters(config.model)["total"], flops_per_token(config.model, config.train.seq_len)
    text = (
        f"{config.run.name}: {parameters / 1e6:.1f} M parameters, norm {config.model.norm.name}, "
        f"{flops / 1e6:.0f} MFLOP per token; {resolved.world_size} x {resolved.device.type}, "
        f"{config.train.precision}, ZeRO-{config.engine.zero_stage}; {resolved.total_steps:,} steps of "
        f"{config.train.tokens_per_step:,} tokens from {shards}\n{describe_groups(engine.groups)}"
    )
    return f"{text}\nMFU is measured against {tflops:g} TFLOP/s per rank" if tflops else text


def compare_and_sample(model: Transformer, config: Config, shards: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the bits per byte of gzip on the validation split, and a text that `model` continues."""
    manifest = load_manifest(shards)
    gzip = 8 * manifest.val_gzip_bytes / max(manifest.val.bytes, 1)
    return {"gzip_bits_per_byte": gzip, "sample": _sample(model, config, shards, tokenizer)}


def describe_summary(summary: dict[str, Any], folder: Path) -> str:
    """Return summary.json as text, after writing the report page of the run."""
    lines = [
        "",
        f"trained             {summary['steps']:,} steps, {summary['tokens']:,} tokens",
        f"validation loss     {summary['val/loss']:.4f} nats per token",
        f"bits per byte       {summary['val/bits_per_byte']:.4f}   "
        f"(gzip -9, file by file: {summary['gzip_bits_per_byte']:.4f})",
        f"tokens per second   {summary['tokens_per_second']:,.0f}",
        f"run folder          {folder}",
        f"report              {_write_page(folder)}",
    ]
    if summary["sample"]:
        lines += ["sample, continuing a held-out text:", *(f"    {line}" for line in summary["sample"].split("\n"))]
    return "\n".join(lines)


def _write_page(folder: Path) -> str:
    """Write the report page; return its path, or why there is none. A finished run must not fail here."""
    path = folder / "report.html"
    try:
        write_report([folder], path)
    except Exception as error:
        return f"not written, {type(error).__name__}: {error}"
    return str(path)


def _sample(model: Transformer, config: Config, shards: Path, tokenizer: Tokenizer) -> str:
    """Return a prompt from the validation split and its continuation by `model`; empty with eval.sample_tokens=0."""
    num_tokens, seq_len = config.eval.sample_tokens, config.train.seq_len
    if not num_tokens:
        return ""
    batches = validation_batches(
        shards, seq_len=seq_len, batch_size=1, rank=0, world_size=1, max_tokens=seq_len, document_ids=False
    )
    prompt = next(iter(batches)).tokens[0, : min(PROMPT_TOKENS, (seq_len + 1) // 2)].tolist()
    sampling = Sampling(temperature=0.8, seed=config.train.seed)
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # torch.compile would compile every length
        (tokens,) = generate(model, [prompt], min(num_tokens, seq_len - len(prompt)), sampling=sampling)
    model.train()
    return tokenizer.decode([*prompt, *tokens])
