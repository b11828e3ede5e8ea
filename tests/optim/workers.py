"""Functions that the ranks of `test_engine.py` run; spawned processes import this module."""

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from osp.config import Config, EngineConfig, OptimizerConfig, PenaltyConfig, TrainConfig
from osp.distributed import add_up, on_main
from osp.model.transformer import Transformer, build_model
from osp.model_config import ModelConfig, NormConfig
from osp.optim.groups import Trainable
from osp.train.engine import Engine, zero_settings
from osp.train.qk_clip import QkClip
from osp.train.resolve import Resolved
from tests.optim.reference import ROWS, Model, batch, factor

STEPS, CLIP, LR, ADAM_LR, DECAY = 5, 0.05, 0.02, 0.03, 0.1
CONFIG = OptimizerConfig(lr=LR, adam_lr=ADAM_LR, weight_decay=DECAY, ns_dtype="fp32")


def in_parts(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Return settings that partition small parameters too; by default DeepSpeed keeps these whole."""
    return zero_settings(*arguments, **options) | {"stage3_param_persistence_threshold": 0}


def engine_of(
    model: Trainable,
    stage: Any,
    *,
    rows: int,
    accumulation: int = 1,
    partition_small: bool = False,
    clip: float = CLIP,
    optimizer: OptimizerConfig = CONFIG,
) -> Engine:
    resolved = Resolved(
        Config(optimizer=optimizer, engine=EngineConfig(zero_stage=stage), train=TrainConfig(grad_clip=clip)),
        device=torch.device("cpu"),
        world_size=torch.distributed.get_world_size(),
        micro_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        compute_dtype=torch.float32,
        loss_chunk_tokens=8192,
        compiled=False,
        qat=None,
    )
    with patch("osp.train.engine.zero_settings", in_parts if partition_small else zero_settings):
        return Engine(model, resolved)


def build(stage: int, accumulation: int, *, clip: float = CLIP, config: OptimizerConfig = CONFIG) -> Engine:
    """Return an engine of the small model. Under ZeRO-3 with accumulation, weights exist only while they are used."""
    rows, parts = ROWS // accumulation // torch.distributed.get_world_size(), stage == 3 and accumulation > 1
    options: dict[str, Any] = {"partition_small": parts, "clip": clip, "optimizer": config}
    return engine_of(Model(), stage, rows=rows, accumulation=accumulation, **options)


def shares(engine: Engine, step: int) -> Iterator[Tensor]:
    """Yield this rank's micro batches of a step."""
    ids, _ = batch(step)
    return iter(ids.chunk(engine.world_size * engine.gradient_accumulation_steps)[engine.rank :: engine.world_size])


def accumulate(engine: Engine, step: int) -> None:
    count = batch(step)[1]
    for ids in shares(engine, step):
        engine.backward(engine(ids) / count)


def gradient_norms(engine: Engine) -> Tensor:
    """Return the norm of each parameter's raw gradient, before a step. Collective."""
    return add_up(engine.gradient_squares()).sqrt()


def take(engine: Engine, step: int, factor: float, *, record: bool = False) -> float:
    """Take a step with the gradient that is there and return its norm."""
    norm = float(torch.linalg.vector_norm(gradient_norms(engine)))
    engine.step(step + 1, factor, norm=norm, record=record)
    return norm


def run_steps(engine: Engine, steps: range) -> list[float]:
    norms = []
    for step in steps:
        accumulate(engine, step)
        norms.append(take(engine, step, factor(step), record=True))
    return norms


def state(engine: Engine) -> list[tuple[str, int, int, dict[str, Tensor]]]:
    return [
        (name, start, stop, {k: v.clone() for k, v in t.items()})
        for name, start, stop, t in engine.optimizer.local_state()
    ]


def weights(engine: Engine) -> dict[str, Tensor]:
    with engine.gathered_parameters():
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def everything(world_size: int, grid: list[tuple[int, int]], all_checks: bool) -> dict[str, Any]:
    """Run all checks for one world size, or only the trainings of `grid`, in one set of processes."""
    results: dict[str, Any] = {"train": {}, "unclipped": {}, "statistics": {}}
    for stage, accumulation in grid:
        engine = build(stage, accumulation)
        norms = run_steps(engine, range(STEPS))
        results["train"][stage, accumulation] = {"norms": norms, "state": state(engine), "weights": weights(engine)}
        results["statistics"][stage, accumulation] = engine.optimizer_statistics()
        results["settings"] = engine._engine.config
        engine.close()
    if not all_checks:
        return results
    results["synchronizations"] = [synchronizations(stage) for stage in (1, 2, 3)]
    results["per head"] = {stage: per_head(stage, accumulation=4 // world_size) for stage in (1, 2, 3)}
    results["broadcast"] = broadcast()
    for stage in (1, 2, 3):
        accumulation = 4 if world_size == 1 else 2
        engine = build(stage, accumulation, clip=0.0)
        results["unclipped"][stage] = {"norms": run_steps(engine, range(STEPS)), "weights": weights(engine)}
        engine.close()
        results[f"discard {stage}"] = discard(stage, accumulation)
        results[f"round trip {stage}"] = [round_trip(stage, 1), round_trip(stage, accumulation)]
        results[f"backward only {stage}"] = backward_only(stage, accumulation)
        results[f"not finite {stage}"] = not_finite(stage)
    results["penalized"] = {stage: penalized(stage, world_size) for stage in (1, 2, 3)}
    results["tied"] = {stage: tied(stage, world_size) for stage in (1, 2, 3)}
    results["qk clip"] = {stage: qk_clip(stage, world_size) for stage in (1, 2, 3)}
    results["bhyt"] = {stage: bhyt_constants(stage) for stage in (1, 3)}
    return results


def synchronizations(stage: int) -> int:
    """Return how often two steps of two micro batches synchronize the device; DeepSpeed's timers would in each one."""
    from deepspeed.accelerator import get_accelerator

    engine = build(stage, 2)
    run_steps(engine, range(2))  # the timers begin after two steps
    gc.collect()  # engines that are freed synchronize
    with patch.object(type(get_accelerator()), "synchronize") as device, patch("torch.cuda.synchronize") as cuda:
        run_steps(engine, range(2, 4))
    engine.close()
    return device.call_count + cuda.call_count


def per_head(stage: int, accumulation: int) -> dict[str, Tensor]:
    """Return the weights after training head by head in the matrices of attention, and without decay of gains."""
    engine = build(stage, accumulation, config=dataclasses.replace(CONFIG, per_head=True, gain_decay=0.0))
    run_steps(engine, range(STEPS))
    engine.close()
    return weights(engine)


PENALIZED = ModelConfig(17, 16, 24, num_hidden_layers=2, num_attention_heads=4, ffn_norm=True)
PENALTY = PenaltyConfig(weight=0.5, site="down_proj_in", scale="rms")
PENALIZED_IDS = torch.randint(0, 17, (8, 9), generator=torch.Generator().manual_seed(0))


def penalized(stage: int, world_size: int) -> dict[str, float]:
    """Return the gradient norms of one step over two micro batches, with penalty and, above stage 1, checkpointing."""
    model = build_model(PENALIZED, seed=0)
    model.activation_checkpointing = stage > 1
    model.set_penalty(PENALTY)
    rows = len(PENALIZED_IDS) // world_size // 2
    engine = engine_of(model, stage, rows=rows, accumulation=2, partition_small=stage == 3)
    for ids in PENALIZED_IDS.chunk(2 * world_size)[engine.rank :: world_size]:
        loss, _, penalty, *_ = engine(ids[:, :-1], ids[:, 1:])
        engine.backward((loss + PENALTY.weight * penalty) / PENALIZED_IDS[:, 1:].numel())
    norms = dict(zip(engine.names, gradient_norms(engine).tolist(), strict=True))
    engine.close()
    return norms


TIED = ModelConfig(17, 16, 24, num_hidden_layers=2, num_attention_heads=4, tie_embeddings=True)
TIED_OPTIMIZER = dataclasses.replace(CONFIG, rules=dict.fromkeys(CONFIG.rules, "adamw"))
Z_LOSS = 0.05


def tied(stage: int, world_size: int) -> dict[str, Tensor]:
    """Return the weights of a tied model after STEPS steps of AdamW with a z-loss, two micro batches each."""
    model = build_model(TIED, seed=0)
    model.activation_checkpointing, model.lm_head.z_loss = stage > 1, Z_LOSS
    rows = len(PENALIZED_IDS) // world_size // 2
    options: dict[str, Any] = {"clip": 0.0, "optimizer": TIED_OPTIMIZER, "partition_small": stage == 3}
    engine = engine_of(model, stage, rows=rows, accumulation=2, **options)
    for step in range(STEPS):
        for ids in PENALIZED_IDS.chunk(2 * world_size)[engine.rank :: world_size]:
            loss, _, _, squares = engine(ids[:, :-1], ids[:, 1:])
            engine.backward((loss + Z_LOSS * squares) / PENALIZED_IDS[:, 1:].numel())
        take(engine, step, 1.0)
    engine.close()
    return weights(engine)


CLIPPED = ModelConfig(
    17, 16, 24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=4, attention_bias=True,
    initializer_range=0.6,
)  # fmt: skip
TAU = 20.0


def clipped_model() -> Transformer:
    """Return a model whose biases are not 0, as after training."""
    model = build_model(CLIPPED, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.5, 0.5, len(parameter)))
    return model


def qk_clip(stage: int, world_size: int) -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    """Return metrics and weights after each of two steps of two micro batches, whose learning rate is 0."""
    model, results = clipped_model(), []
    model.activation_checkpointing = stage > 1
    rows = len(PENALIZED_IDS) // world_size // 2
    engine = engine_of(model, stage, rows=rows, accumulation=2, partition_small=stage == 3)
    clip = QkClip(engine, TAU)
    for step in range(2):
        clip.largest.fill_(-torch.inf)
        for ids in PENALIZED_IDS.chunk(2 * world_size)[engine.rank :: world_size]:
            engine.backward(engine(ids[:, :-1], ids[:, 1:]).loss)
        take(engine, step, 0.0)
        results.append((clip.apply(), weights(engine)))
    engine.close()
    return results


BHYT = ModelConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, norm=NormConfig("bhyt", seq_len=8))


def bhyt_constants(stage: int) -> list[float]:
    """Return BHyT's constants, refreshed after they were NaN; under ZeRO-3 all weights are partitioned before."""
    model = build_model(dataclasses.replace(BHYT, vocab_size=32, intermediate_size=24, num_hidden_layers=2), seed=0)
    engine = engine_of(model, stage, rows=1, partition_small=stage == 3)
    constants = [buffer for name, buffer in model.named_buffers() if name.endswith("attention_gain")]
    for constant in constants:
        constant.fill_(torch.nan)
    with engine.gathered_parameters():
        model.refresh_norms()
    engine.close()
    return [constant.item() for constant in constants]


def discard(stage: int, accumulation: int) -> dict[str, Tensor]:
    """Return the weights of STEPS steps; between them gradients are discarded after one and after all micro batches."""
    engine = build(stage, accumulation)
    run_steps(engine, range(2))
    for step in (40, 41):
        for micro, ids in enumerate(shares(engine, step)):
            engine.backward(engine(ids))
            if step == 40 and micro == 0:
                break
        engine.discard_gradients()
    run_steps(engine, range(2, STEPS))
    engine.close()
    return weights(engine)


def round_trip(stage: int, accumulation: int) -> dict[str, Any]:
    """Return the weights before a save by name, after the load into another engine, and after the remaining steps."""
    engine = build(stage, accumulation)
    run_steps(engine, range(2))
    saved, before = state(engine), weights(engine)
    run_steps(engine, range(9, 10))
    other = build(stage, accumulation)
    for (name, start, stop, views), (name2, start2, stop2, values) in zip(
        other.optimizer.local_state(), saved, strict=True
    ):
        assert (name, start, stop) == (name2, start2, stop2)
        for key, view in views.items():
            view.copy_(values[key])
    other.sync_weights_from_master()
    after = weights(other)
    run_steps(other, range(2, STEPS))
    engine.close()
    other.close()
    return {"before": before, "after": after, "end": weights(other)}


def backward_only(stage: int, accumulation: int) -> float:
    """Return the largest change of a weight between the start and the end of all backward passes of a step."""
    engine = build(stage, accumulation)
    before = weights(engine)
    accumulate(engine, 0)
    after = weights(engine)
    engine.close()
    return max(float((before[name] - after[name]).abs().max()) for name in before)


def not_finite(stage: int) -> tuple[bool, float, float]:
    """Return (finite, change of weights, error of the next finite step against an engine that never saw a NaN)."""
    engine, good = build(stage, 1), build(stage, 1)
    before = weights(engine)
    for ids in shares(engine, 0):
        engine.backward(engine(ids) * (float("nan") if engine.rank == 0 else 1.0))
    finite = bool(gradient_norms(engine).isfinite().all())
    engine.discard_gradients()
    change = max(float((before[n] - w).abs().max()) for n, w in weights(engine).items())
    run_steps(engine, range(1))
    run_steps(good, range(1))
    reference = weights(good)
    error = max(float((reference[n] - w).abs().max()) for n, w in weights(engine).items())
    engine.close()
    good.close()
    return finite, change, error


def broadcast() -> tuple[Any, float, int]:
    engine = build(1, 1)
    value = on_main(lambda: {"from": engine.rank})
    total = float(add_up(torch.tensor(1.0 + engine.rank)))
    torch.distributed.barrier()
    engine.close()
    return value, total, engine.world_size
