"""Measure tokens per second of generation, prompt and new tokens apart, per norm and beside transformers' `generate`.

    python benchmarks/generate.py                                   # CPU: nano
    python benchmarks/generate.py --model osp_1b --dtype bf16       # a GPU, compiled into CUDA graphs

Models and prompts are random: the time does not depend on their values. The contenders take turns; a figure is the
median over rounds. The peer is the exported rmsnorm model in `transformers`, with its static cache where ours is
compiled. A CPU run uses one thread and reports its CPU time, which excludes other jobs; a GPU run reports wall time.
`over rmsnorm` and `over transformers` compare the generation of new tokens.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from choices import group
from torch import Tensor

from osp.convert.hf_export import write_llama
from osp.device import prepare_cpu
from osp.model.generate import Decoder, Sampling, choose, prepare_for_generation
from osp.model.transformer import build_model
from osp.model_config import ModelConfig, NormConfig
from osp.schema import build

PEER = "transformers"


class Contender(Protocol):
    def run(self) -> tuple[float, float]:
        """Return the seconds until the first token, and the seconds of all following tokens."""
        ...


class Ours:
    def __init__(self, config: ModelConfig, prompts: Tensor, arguments: Any):
        device = prompts.device
        model = build_model(config, seed=0, device=device)
        prepare_for_generation(model, DTYPES[arguments.dtype])
        self.prompts, self.new_tokens = prompts.tolist(), arguments.new_tokens
        length = prompts.shape[1] + arguments.new_tokens
        self.decoder = Decoder(model, len(prompts), length, compile=arguments.compile)

    def run(self) -> tuple[float, float]:
        began = clock()
        tokens = choose(self.decoder.read(self.prompts), GREEDY, 0.0)
        tokens.tolist()
        first = clock()
        for _ in range(self.new_tokens - 1):
            tokens = choose(self.decoder.read_next(tokens), GREEDY, 0.0)
            tokens.tolist()  # as streaming does
        return first - began, clock() - first


class Transformers:
    """The peer. Time to the first token: a `generate` call for one new token. The rest: a longer call minus that."""

    def __init__(self, config: ModelConfig, prompts: Tensor, arguments: Any):
        from transformers import LlamaForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            model = build_model(config, seed=0)
            write_llama(model, Path(folder), dtype="fp32", bos_id=None, eos_id=None)
            loaded = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[arguments.dtype])
        self.model: Any = loaded.to(prompts.device).eval()  # pyright: ignore
        self.prompts, self.new_tokens = prompts, arguments.new_tokens
        # with a static cache `generate` compiles the forward pass by itself, on a GPU
        self.options = {"cache_implementation": "static"} if arguments.compile else {}

    def run(self) -> tuple[float, float]:
        first = self._seconds(1)
        return first, self._seconds(self.new_tokens) - first

    def _seconds(self, new_tokens: int) -> float:
        began = clock()
        self.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **self.options,
        )
        return clock() - began


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GREEDY = Sampling()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--norms", nargs="+", default=["rmsnorm", "ssnorm", "layernorm", "bhyt", "bhyt_star", "dyt"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        prepare_cpu(1)
    figures: list[dict[str, Any]] = []
    for batch in arguments.batch:
        figures += measured(batch, device, arguments)
    place = torch.cuda.get_device_name() if device.type == "cuda" else "1 CPU thread"
    print(
        f"\n{arguments.model}, {arguments.prompt_tokens} tokens read and {arguments.new_tokens} written, "
        f"{arguments.dtype}, {'compiled' if arguments.compile else 'eager'}, {place}, torch {torch.__version__}; "
        f"median of {arguments.rounds} rounds\n"
    )
    print("| batch | contender | read, tokens/s | written, tokens/s | over rmsnorm | over transformers |")
    print("|---|---|---|---|---|---|")
    for row in figures:
        ratios = [f"{row[key]:.2f}" if row.get(key) else "" for key in ("over_rmsnorm", "over_transformers")]
        print(f"| {row['batch']} | {row['name']} | {row['read']:,.0f} | {row['written']:,.1f} | {' | '.join(ratios)} |")
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": place, **vars(arguments), "figures": figures}, default=str))


def measured(batch: int, device: torch.device, arguments: Any) -> list[dict[str, Any]]:
    """Return tokens per second of every contender at one batch size; ratios are medians over rounds."""
    shape = build(ModelConfig, group("model", arguments.model), path="model")
    values = {**vars(shape), "embed_proj": False}
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, shape.vocab_size, (batch, arguments.prompt_tokens), generator=generator).to(device)
    contenders: dict[str, Contender] = {}
    for name in arguments.norms:
        norm = NormConfig(name=name, seq_len=arguments.prompt_tokens if name == "bhyt" else None)
        contenders[name] = Ours(ModelConfig(**{**values, "norm": norm}), prompts, arguments)
    if not arguments.no_peer:
        rmsnorm = NormConfig(name="rmsnorm")
        contenders[PEER] = Transformers(ModelConfig(**{**values, "norm": rmsnorm}), prompts, arguments)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_ in range(arguments.rounds + 1):
        for name, contender in contenders.items():
            seconds = contender.run()
            if round_:  # the first round warms up and compiles
                times[name].append(seconds)
    rows = []
    for name, measured_times in times.items():
        row: dict[str, Any] = {
            "batch": batch,
            "name": name,
            "read": batch * arguments.prompt_tokens / statistics.median(first for first, _ in measured_times),
            "written": batch * (arguments.new_tokens - 1) / statistics.median(rest for _, rest in measured_times),
        }
        for peer in ("rmsnorm", PEER):
            if peer in times and peer != name:
                ratios = [theirs / ours for (_, ours), (_, theirs) in zip(measured_times, times[peer], strict=True)]
                row[f"over_{peer}"] = statistics.median(ratios)
        rows.append(row)
    return rows


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
