"""Measure how cost grows: tokens/s with layers, width, length and micro batch, time and bytes with the ranks.

    python benchmarks/growth.py --out growth.json                                     # CPU: a few minutes of one core
    python benchmarks/growth.py --scale 8 --curves layers width seq_len micro_batch   # a GPU
    python benchmarks/growth.py --pages-only --out growth.json                        # redraw the page

Writes the figures and, beside them, a page with a chart for each curve: the measurements, and the values expected from
the first point. A point of the first four curves is the median step of the real trainer (Muon, SSNorm,
EmbProj). Expected values follow the flops of a step: `flops_per_token` of its tokens and Newton-Schulz.

The curves over ranks run 1, 2, 4 and 8 gloo processes on the CPU, each with the same number of sequences, at every
ZeRO stage. Bytes are what a rank sends in a step, counted from all collectives that it calls as ring algorithms send
them: an all-reduce of S bytes sends 2 (W - 1) / W S; a reduce-scatter, a reduce or an all-gather half of it. Expected
for P parameters and M elements in matrices, 4 bytes each, times (W - 1) / W:

    ZeRO-1, ZeRO-2   2 P: a reduce-scatter of gradients and an all-gather of weights; and Muon's exchange
    ZeRO-3           3 P: weights are gathered twice; and Muon's exchange
    Muon's exchange  at most 2 M: a matrix goes to the rank that orthogonalizes it, its update comes back

Time is CPU time of a rank, because all ranks share the cores.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from choices import NO_CHECKPOINTS, group
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

from osp.config import Config, from_dict
from osp.model.transformer import count_parameters, flops_per_token
from osp.model_config import ModelConfig
from osp.optim.muon import newton_schulz_flops as flops_of_matrix
from osp.report import page as report_page

BASE = {"layers": 4, "width": 256, "seq_len": 256, "micro_batch": 8}  # 8 sequences per step
POINTS = {
    "layers": [1, 2, 4, 8],
    "width": [128, 256, 384, 512],
    "seq_len": [128, 256, 512, 1024],
    "micro_batch": [1, 2, 4, 8],
}
RANKS = (1, 2, 4, 8)
STAGES = (1, 2, 3)
# a server process imports these once and forks the ranks
PRELOAD = [
    "osp.train.setup",
    "torch.multiprocessing.spawn",
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.original_muon",
]
CURVES = (*POINTS, "ranks")
ON_GPU = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--scale", type=int, default=1, help="factor of width, sequences and sequence length")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a point, after two others")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all cores")
    parser.add_argument("--out", type=Path, default=Path("growth.json"), help="JSON file; the page is beside it")
    parser.add_argument("--pages-only", action="store_true", help="draw the figures in --out, measure nothing")
    arguments = parser.parse_args()
    if not arguments.pages_only:
        figures = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        for curve in arguments.curves:
            began = time.perf_counter()
            figures[curve] = over_ranks(arguments) if curve == "ranks" else over_sizes(curve, arguments)
            print(f"{curve}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
            arguments.out.write_text(json.dumps({**figures, "machine": machine()}, indent=1))
    figures = json.loads(arguments.out.read_text())
    charts = charts_of(figures)
    for chart in charts:
        print(f"{chart['title']}: {chart['words']}")
    arguments.out.with_suffix(".html").write_text(page(charts, figures["machine"]), encoding="utf-8")


# ---- tokens/s against sizes ---------------------------------------------------------------------------


def over_sizes(curve: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Return [{x, tokens_per_second, flops}] with one size varied and the others at BASE; flops: per token."""
    from osp.train.setup import setup

    points = []
    for x in POINTS[curve]:
        config = config_of(**{**BASE, curve: x}, scale=arguments.scale, threads=arguments.threads)
        trainer = setup(config)
        trainer.logger = None
        seconds = []
        for step in range(2 + arguments.steps):
            began = clock(arguments.threads)
            trainer.train_step(step, record=False)
            seconds.append(clock(arguments.threads) - began)
        trainer.close()
        trainer.engine.close()
        tokens = config.train.tokens_per_step
        scaled = x * arguments.scale if curve in ("width", "seq_len", "micro_batch") else x
        flops = flops_per_token(config.model, config.train.seq_len) + newton_schulz_flops(config) / tokens
        points.append({"x": scaled, "tokens_per_second": tokens / statistics.median(seconds[2:]), "flops": flops})
    return points


def clock(threads: int | None) -> float:
    """Return seconds; with one thread CPU time, which other jobs of the machine do not change."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.process_time() if threads == 1 and not ON_GPU else time.perf_counter()


def newton_schulz_flops(config: Config) -> int:
    """Return the flops of Newton-Schulz for all matrices in a step."""
    with torch.device("meta"):
        from osp.model.transformer import Transformer

        model = Transformer(config.model)
    roles = model.parameter_roles()
    shapes = [p.shape for name, p in model.named_parameters() if roles[name] in ("matrix", "embed_proj")]
    return sum(flops_of_matrix(shape, config.optimizer.ns_steps) for shape in shapes)


def config_of(
    *, layers: int, width: int, seq_len: int, micro_batch: int, scale: int = 1, threads: int | None = None
) -> Config:
    """Return OSP's model of this size, with a number of tokens per step that does not depend on the sequence length."""
    width, seq_len, rows = width * scale, seq_len * scale, BASE["micro_batch"] * scale
    tokens = rows * BASE["seq_len"] * scale
    model = {
        "vocab_size": 4096,
        "hidden_size": width,
        "intermediate_size": width * 43 // 16,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": max(2048, seq_len),
        "embed_proj": True,
    }
    size = min(micro_batch * scale, tokens // seq_len)
    return values_of(model, seq_len=seq_len, tokens=tokens, micro_batch=size, threads=threads)


def values_of(
    model: dict[str, Any], *, seq_len: int, tokens: int, micro_batch: int, threads: int | None, **engine: Any
) -> Config:
    return from_dict(
        {
            "run": {"name": "growth", "dir": tempfile.mkdtemp(prefix="osp-growth-")},
            "train": {
                "steps": 1000,
                "seq_len": seq_len,
                "tokens_per_step": tokens,
                "micro_batch_size": micro_batch,
                "loss_chunk_tokens": 2048,
            },
            "model": model,
            "norm": {"name": "ssnorm"},
            "optimizer": {**group("optimizer", "muon"), "lr": 1e-3},
            "checkpoint": NO_CHECKPOINTS,
            "engine": {"threads": threads, **engine},
            "monitor": {"enabled": False},
            "logger": {"wandb": "disabled", "progress": False},
        }
    )


# ---- time and bytes against ranks ---------------------------------------------------------------------


def over_ranks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return [{x, stage, seconds, bytes, expected, muon, ...}] of the rank that sends most, per ranks and stage."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when the server of the processes imports it
    multiprocessing.set_forkserver_preload(PRELOAD)
    points = []
    for world_size in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(
                run_rank, (world_size, folder, arguments.steps), nprocs=world_size, start_method="forkserver", join=True
            )
            figures = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]
        for stage in zip(*figures, strict=True):
            points.append({"x": world_size, **max(stage, key=lambda rank: rank["bytes"])})
    return points


def run_rank(rank: int, world_size: int, folder: str, steps: int) -> None:
    """Run one of the processes and write its figures for every stage to a file."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    figures = [exchange(stage, steps=steps, folder=Path(folder, f"stage{stage}")) for stage in STAGES]
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def exchange(stage: int, *, steps: int, folder: Path) -> dict[str, Any]:
    """Return CPU seconds, bytes sent in a step by kind, and the bytes expected, of this rank at a ZeRO stage."""
    from osp.train.setup import setup

    world_size = dist.get_world_size()
    model = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "embed_proj": True,
    }
    config = values_of(
        model, seq_len=64, tokens=64 * 2 * world_size, micro_batch=2, threads=1, zero_stage=stage, device="cpu"
    )
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
    trainer = setup(config)
    trainer.logger = None
    for step in range(2):
        trainer.train_step(step, record=False)
    seconds, counted = [], Collectives(world_size)
    for step in range(2, 2 + steps):
        began = time.process_time()
        if step == 2:
            with counted:
                trainer.train_step(step, record=False)
        else:
            trainer.train_step(step, record=False)
            seconds.append(time.process_time() - began)
    dist.barrier()
    trainer.close()
    trainer.engine.close()
    total = sum(counted.sent.values())
    muon = counted.sent.get("all_to_all", 0)
    return {
        "stage": stage,
        "seconds": statistics.median(seconds),
        "bytes": total,
        "muon": muon,
        "by_kind": counted.sent,
        **expected_bytes(config.model, stage=stage, world_size=world_size),
    }


def expected_bytes(model: ModelConfig, *, stage: int, world_size: int) -> dict[str, float]:
    """Return the bytes a rank sends in a step: `expected` without Muon, `expected_muon` at most for its exchange."""
    counts = count_parameters(model)
    share = 4 * (world_size - 1) / world_size
    matrices = counts["matrix"] + counts["embed_proj"]
    return {
        "expected": share * counts["total"] * (3 if stage == 3 else 2),
        "expected_muon": share * matrices * 2,
    }


class Collectives(TorchDispatchMode):
    """Count the bytes that this rank sends in collectives, by kind, as ring algorithms send them.

    It sees the operators that every function of torch.distributed ends in. A barrier sends nothing.
    """

    def __init__(self, world_size: int):
        super().__init__()
        self.world_size = world_size
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, sent = self._sent(func._schema.name.removeprefix("c10d::"), args)
            if sent:
                self.sent[kind] = self.sent.get(kind, 0.0) + sent
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: Any) -> tuple[str, float]:
        share = (self.world_size - 1) / self.world_size
        if name in ("allreduce_", "allreduce_coalesced_"):
            return "all_reduce", 2 * share * size_of(args[0])
        if name in ("reduce_", "broadcast_"):
            return name.strip("_"), share * size_of(args[0])
        if name in ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"):
            return "reduce_scatter", share * size_of(args[1])
        if name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"):
            return "all_gather", share * size_of(args[0])
        if name == "alltoall_base_":
            output, _, _, _, sends = args[:5]
            rank = dist.get_rank()
            kept = sends[rank] if sends else output.numel() / self.world_size
            return "all_to_all", 4 * (sum(sends) - kept) if sends else 4 * (output.numel() - kept)
        assert name in ("barrier", "monitored_barrier_"), f"a collective that is not counted: {name}"
        return name, 0.0


def size_of(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size_of(tensor) for tensor in tensors)


# ---- charts ----------------------------------------------------------------------------------------------------------


def charts_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the charts of the page: title, unit, axis, curves of {name, x, y, dashed}, and the verdict in words."""
    charts = []
    for curve in POINTS:
        if points := figures.get(curve):
            first = points[0]
            work = first["tokens_per_second"] * first["flops"]  # flops per second of the first point
            expected = [work / p["flops"] for p in points]
            speeds = [p["tokens_per_second"] for p in points]
            x = [p["x"] for p in points]
            worst = max(e / s for e, s in zip(expected, speeds, strict=True))
            words = (
                f"time per token grows {speeds[0] / speeds[-1]:.2f} times from {x[0]} to {x[-1]}, flops "
                f"{points[-1]['flops'] / first['flops']:.2f} times; at worst {worst:.2f} of the expected time"
            )
            curves = [
                {"name": "measured", "x": x, "y": speeds},
                {"name": "as the flops grow", "x": x, "y": expected, "dashed": True},
            ]
            title = f"Tokens per second against {curve.replace('_', ' ')}"
            charts.append({"title": title, "axis": curve, "unit": "tokens/s", "curves": curves, "words": words})
    if points := figures.get("ranks"):
        charts += rank_charts(points)
    return charts


def rank_charts(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sent, seconds, ratios = [], [], []
    for stage in sorted({p["stage"] for p in points}):
        rows = [p for p in points if p["stage"] == stage]
        x = [p["x"] for p in rows]
        sent.append({"name": f"ZeRO-{stage}", "x": x, "y": [p["bytes"] for p in rows]})
        most = [p["expected"] + p["expected_muon"] for p in rows]
        sent.append({"name": f"ZeRO-{stage}, expected", "x": x, "y": most, "dashed": True})
        seconds.append({"name": f"ZeRO-{stage}", "x": x, "y": [p["seconds"] for p in rows]})
        last = rows[-1]
        ratios.append(
            f"ZeRO-{stage} at {last['x']} ranks {last['bytes'] / 1e6:.2f} MB of {most[-1] / 1e6:.2f} "
            f"({last['muon'] / 1e6:.2f} of them Muon's, at most {last['expected_muon'] / 1e6:.2f})"
        )
    times = "; ".join(
        f"{c['name']} {c['y'][-1] / c['y'][0]:.2f} times from {c['x'][0]} to {c['x'][-1]}" for c in seconds
    )
    return [
        {"title": "Bytes sent by a rank in a step", "axis": "ranks", "unit": "bytes", "curves": sent}
        | {"words": "; ".join(ratios)},
        {"title": "CPU time of a step on a rank, equal sequences", "axis": "ranks", "unit": "s", "curves": seconds}
        | {"words": times},
    ]


def page(charts: list[dict[str, Any]], machine: str) -> str:
    """Return a self-contained page with the style and the plotting library of osp.report."""
    folder = report_page.HERE
    figures = "".join(
        f'<figure class="card"><h3>{c["title"]} <span class="soft">{c["unit"]}</span></h3><div class="plot" role="img" '
        f'aria-label="{c["title"]}: {c["words"]}"></div><figcaption>{c["words"]}</figcaption></figure>'
        for c in charts
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>How cost grows</title><link rel="icon" href="data:,">
<style>{(folder / "page.css").read_text(encoding="utf-8")}</style></head>
<body><header class="top"><p class="eyebrow">benchmarks/growth.py, {machine}</p><h1>How cost grows</h1></header>
<main><section><div class="grid" style="--columns: 2">{figures}</div></section></main>
<script type="application/json" id="data">{json.dumps(charts).replace("<", chr(92) + "u003c")}</script>
<script>{(folder / "echarts.min.js").read_text(encoding="utf-8")}</script>
<script>{SCRIPT}</script></body></html>
"""


SCRIPT = """
"use strict";
const charts = JSON.parse(document.getElementById("data").textContent);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
document.querySelectorAll(".plot").forEach((plot, i) => {
  const { axis, curves } = charts[i], chart = echarts.init(plot), measured = curves.filter((c) => !c.dashed);
  const zero = curves.some((c) => c.y.some((y) => y <= 0));
  chart.setOption({
    animation: false, tooltip: { trigger: "axis" },
    grid: { left: 8, right: 14, top: 34, bottom: 24, containLabel: true },
    legend: { type: "scroll", top: 0, left: 0, textStyle: { color: colour("soft") } },
    xAxis: { type: "log", logBase: 2, name: axis, nameLocation: "middle", nameGap: 24, min: "dataMin", max: "dataMax" },
    yAxis: { type: zero ? "value" : "log" },
    series: curves.map((c) => ({ type: "line", name: c.name, data: c.x.map((x, k) => [x, c.y[k]]),
      color: colour("run" + (measured.findIndex((m) => c.name.startsWith(m.name)) + 6) % 6),
      lineStyle: { type: c.dashed ? "dashed" : "solid" } })),
  });
  addEventListener("resize", () => chart.resize());
});
"""


def machine() -> str:
    if ON_GPU:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    processor = platform.processor() or platform.machine()
    return f"{processor} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
