"""Write run folders with made-up numbers, without training: `made_run` of any length and depth, `small_run` by hand.

`python -m tests.made_run FOLDER [steps]` writes two runs: one that grows outliers, one that does not.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from osp.run.evaluations import (
    Comparison,
    ComparisonRecord,
    Evaluation,
    Result,
    Score,
    SiteAblation,
    SiteCost,
    write_evaluation,
)

SITES = ("attn_in", "q", "k", "v", "o_proj_in", "mlp_in", "down_proj_in", "block_out")
ROLES = ("matrix", "embed_proj", "gain", "embedding", "head")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS_PER_STEP = 524_288


def made_run(
    folder: Path, *, steps: int = 10_000, layers: int = 12, outliers: bool = True, probe_every: int = 50, seed: int = 0
) -> Path:
    """Write a complete run folder. With `outliers`, channel 17 of the residual stream grows after 30% of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    norm, rule = ("rmsnorm", "adamw") if outliers else ("ssnorm", "muon")
    config: dict[str, Any] = {
        "run": {"name": folder.name, "dir": str(folder)},
        "train": {"steps": steps, "seq_len": 2048, "tokens_per_step": TOKENS_PER_STEP, "precision": "bf16"},
        "model": {"hidden_size": 768, "num_hidden_layers": layers, "vocab_size": 49152, "embed_proj": not outliers},
        "norm": {"name": norm},
        "optimizer": {"lr": 5e-4, "rules": {"matrix": rule}},
        "engine": {"zero_stage": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    start = {
        "time": "2026-05-01T08:00:00+00:00",
        "git": "0123456789abcdef" * 2,
        "command": ["scripts/train.py", f"norm={norm}"],
        "host": "machine",
        "python": "3.12.4",
        "torch": "2.13.0",
        "cpus": 32,
        "world_size": 8,
        "device": "cuda",
    }
    (folder / "environment.json").write_text(json.dumps([start]))
    probe_steps = sorted(
        {2**k for k in range(int(math.log2(steps)) + 1)} | set(range(probe_every, steps + 1, probe_every))
    )
    probed = set(probe_steps)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            lines: list[Mapping[str, float | None]] = [training_line(step, steps, draw, outliers)]
            if step % max(steps // 40, 1) == 0:
                loss = curve(step, steps) + 0.03
                lines.append({"val/loss": loss, "val/bits_per_byte": loss / math.log(2) / 4.4, "val/seconds": 4.0})
                lost = 0.05 + 6 * growth(step, steps, outliers)  # nats
                perplexities = {"16-16-16": math.exp(loss), "4-4-4": math.exp(loss + lost)}
                lines.append({f"quant/perplexity/{bits}": value for bits, value in perplexities.items()})
            if step in probed:
                lines.append(probe_line(step, steps, layers, draw, outliers))
            for line in lines:
                file.write(json.dumps({"step": step, "tokens": step * TOKENS_PER_STEP, **line}) + "\n")
    with (folder / "probes.jsonl").open("w") as file:
        for step in probe_steps:
            file.write(json.dumps(probe_details(step, steps, layers, draw, outliers)) + "\n")
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events(steps, layers, outliers)))
    loss = curve(steps, steps) + 0.03
    summary = {
        "steps": steps,
        "tokens": steps * TOKENS_PER_STEP,
        "val/loss": loss,
        "val/bits_per_byte": loss / math.log(2) / 4.4,
        "tokens_per_second": 412_000.0,
        "train_seconds": steps * TOKENS_PER_STEP / 412_000,
        "gzip_bits_per_byte": 2.4,
        "sample": "",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def curve(step: int, steps: int) -> float:
    return 2.75 + 8.0 * (1 + 60 * step / steps) ** -0.55 - 0.12 * max(0.0, step / steps - 0.8) / 0.2


def rate(step: int, steps: int) -> float:
    return 5e-4 * min(1.0, step / (0.05 * steps), (steps - step + 1) / (0.2 * steps))


def growth(step: int, steps: int, outliers: bool) -> float:
    """Return 0 in a healthy run; 0 to 1 over the last 70% of a run that grows outliers."""
    return 1 / (1 + math.exp(-14 * (step / steps - 0.55))) if outliers else 0.0


def training_line(step: int, steps: int, draw: np.random.Generator, outliers: bool) -> dict[str, float | None]:
    spike = 1.4 * math.exp(-abs(step - 0.62 * steps) / (0.0008 * steps)) if outliers else 0.0
    speed = 412_000 * (1 + 0.015 * draw.standard_normal()) * (0.55 if draw.random() < 0.003 else 1)
    return {
        "train/loss": curve(step, steps) + 0.035 * draw.standard_normal() + spike,
        "train/grad_norm": 0.35 * (1 + 2.5 * math.exp(-20 * step / steps)) * math.exp(0.2 * draw.standard_normal())
        + 9 * spike,
        "train/tokens_per_second": speed,
        "train/step_seconds": TOKENS_PER_STEP / speed,
        "train/data_wait_seconds": 0.002,
        "train/memory_gib": 61.2,
        "train/mfu": 0.43 * speed / 412_000,
        **{f"train/lr/{role}": rate(step, steps) for role in ROLES},
        **{f"train/update_rms/{role}": 0.2 * rate(step, steps) * (1 + 0.3 * i) for i, role in enumerate(ROLES)},
        "train/param_norm": 300 + 250 * (step / steps) ** 0.5,
    }


def probe_line(step: int, steps: int, layers: int, draw: np.random.Generator, outliers: bool) -> dict[str, float]:
    grown, line = growth(step, steps, outliers), {}
    for layer in [None, *range(layers), None]:
        depth = 0.5 if layer is None else (layer + 1) / layers
        names = (
            SITES
            if layer is not None
            else ("final_norm_out",)
            if "monitor/kurtosis/embed_out" in line
            else ("embed_out",)
        )
        for i, kind in enumerate(names):
            site = kind if layer is None else f"layer_{layer:02d}/{kind}"
            strength = grown * depth**2 * (0.2 if kind in ("q", "k", "v", "o_proj_in") else 1.0)
            base = 12.0 if kind == "down_proj_in" else 0.05 + 0.2 * i
            kurtosis = (base + 1800 * strength**2) * math.exp(0.12 * draw.standard_normal())
            line |= {
                f"monitor/kurtosis/{site}": kurtosis - 0.03,
                f"monitor/kurtosis_pooled/{site}": 1.3 * kurtosis,
                f"monitor/kurtosis_channel/{site}": 0.4 * kurtosis,
                f"monitor/max_abs/{site}": 5 + 900 * strength,
                f"monitor/max_over_median/{site}": 7 + 1300 * strength,
                f"monitor/rms/{site}": 1 + 6 * strength,
                f"monitor/top_channel_share/{site}": 0.004 + 0.9 * strength,
                f"monitor/top_token_share/{site}": 0.002 + 0.3 * strength,
                f"monitor/massive_count/{site}": round(40 * strength),
                f"monitor/few_channels/{site}": 1.1 + 600 * strength,
                f"monitor/few_tokens/{site}": 1.4 + 20 * strength,
            }
    for layer in range(layers):
        name, depth = f"layer_{layer:02d}", (layer + 1) / layers
        line[f"monitor/attn_logit_max/{name}"] = 6 + 40 * grown * depth
        line[f"monitor/attn_sink/{name}"] = 0.1 + 0.6 * grown
        line[f"monitor/R_L/{name}"] = 0.05 + 0.9 * grown * depth
        for norm in ("input_layernorm", "post_attention_layernorm"):
            line[f"monitor/gain_max/{name}/{norm}"] = 1 + 5 * grown * depth
        for matrix in MATRICES:
            line[f"monitor/weight_row_max/{name}/{matrix}"] = 1 + 2 * depth * (step / steps) ** 0.5
    kurtoses = [v for k, v in line.items() if k.startswith("monitor/kurtosis/")]
    return line | {
        "monitor/gain_max/norm": 1 + 9 * grown,
        "monitor/weight_row_max/embed_tokens": 2.0 + step / steps,
        "monitor/weight_row_max/lm_head": 1.5 + step / steps,
        "monitor/kurtosis/osp_script": 0.04 + 1500 * grown**2,
        "monitor/R_L": 0.06 + 0.9 * grown,
        "monitor/kurtosis/max": max(kurtoses),
        "monitor/kurtosis/mean": sum(kurtoses) / len(kurtoses),
        "monitor/max_abs/max": 5 + 900 * grown,
        "monitor/seconds": 1.3,
        "monitor/cost": 0.007,
    }


def probe_details(step: int, steps: int, layers: int, draw: np.random.Generator, outliers: bool) -> dict[str, Any]:
    grown, sites = growth(step, steps, outliers), {}
    names = ["embed_out", *(f"layer_{i:02d}/{s}" for i in range(layers) for s in SITES), "final_norm_out"]
    for name in names:
        layer = int(name[6:8]) if name.startswith("layer_") else layers // 2
        strength = grown * ((layer + 1) / layers) ** 2
        planted = strength > 0.01
        sites[name] = {
            "top_channel": 17 if planted else int(draw.integers(768)),
            "top_channel_share": 0.004 + 0.9 * strength,
            "top_value": -(5 + 900 * strength),
            "top_row": 0,
            "top_position": 0 if planted else int(draw.integers(2048)),
            "top_token": 198,
            "top_text": "the end.\n<script>" if planted else " a common word",
            "channels": [[17, 5 + 900 * strength], [301, 4.8]],
        }
    return {"step": step, "tokens": step * TOKENS_PER_STEP, "seconds": 1.3, "sites": sites}


def events(steps: int, layers: int, outliers: bool) -> list[dict[str, Any]]:
    if not outliers:
        return []
    site = f"layer_{layers - 1:02d}/down_proj_in"
    at = int(0.55 * steps)
    return [
        {
            "time": "2026-05-01T11:20:00+00:00",
            "step": at,
            "tokens": at * TOKENS_PER_STEP,
            "kind": "alert",
            "message": f"kurtosis of {site} is 213, above 100",
            "rule": "threshold",
            "key": f"monitor/kurtosis/{site}",
            "site": site,
            "layer": layers - 1,
            "value": 213.0,
            "threshold": 100.0,
        },
        {
            "time": "2026-05-01T11:40:00+00:00",
            "step": int(0.62 * steps),
            "tokens": int(0.62 * steps) * TOKENS_PER_STEP,
            "kind": "spike",
            "message": "loss 4.6 is 1.4 above its recent mean",
        },
    ]


def write_lines(path: Path, *lines: dict[str, Any] | str) -> None:
    """Write values as lines of JSON, and text as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def small_run(folder: Path, **config: Any) -> Path:
    """Write a run with four steps of loss."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"name": folder.name}, **config}))
    (folder / "environment.json").write_text("[]")
    write_lines(folder / "metrics.jsonl", *({"step": s, "tokens": 10 * s, "train/loss": 5.0 - s} for s in (1, 2, 3, 4)))
    return folder


def write_evaluations(folder: Path) -> Path:
    """Write records of an evaluation with an ablation and of a comparison; return the run folder."""
    from osp.evaluation.compare import COLUMNS
    from osp.quant.spec import INNER_SITES, QuantSpec

    spec = QuantSpec().at("4-4-4")
    matrices = INNER_SITES["w"][:7]  # without the gate
    costs = [SiteCost(site, alone=4 * 8.0 ** (i / 6), left_out=64 / (i + 1)) for i, site in enumerate(matrices)]
    ablation = SiteAblation("held_out[len=32]", 4.0, 64.0, (*costs, SiteCost("k", math.inf, 3.0)), (0.1,), 0.2)
    results = (Result("held_out[len=32]", "perplexity", math.inf), Result("tasks <piqa>", "acc", 0.625, 0.0125))
    quant = {"text": str(spec), "hash": spec.hash}
    record = Evaluation(model={"step": 1200}, quant=quant, results=results, ablation=ablation)
    write_evaluation(folder / "evaluation" / f"{record.name}.json", record)
    cells = {bits: Score(12.345 * 10**i, 0.5 if i == 1 else None) for i, bits in enumerate(COLUMNS)}
    methods = {"RTN": Score(98765.0, None), "+ QuaRot": Score(13.5, None)}
    bits, specs = {"": cells, "+Had": cells}, {spec.hash: str(spec)}
    comparison = Comparison(folder.name, "0" * 64, 0.04, "held_out[len=32]", bits, methods, specs)
    write_evaluation(
        folder / "evaluation" / "compare" / "step_00001200.json", ComparisonRecord(step=1200, models=(comparison,))
    )
    return folder


if __name__ == "__main__":
    for name, grows in (("adam", True), ("osp", False)):
        print(
            made_run(Path(sys.argv[1]) / name, steps=int(sys.argv[2]) if len(sys.argv) > 2 else 10_000, outliers=grows)
        )
