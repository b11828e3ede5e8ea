"""The plan of a training: what `scripts/plan.py` prints, from a configuration and a machine; nothing is started."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from osp.config import Config, to_dict
from osp.device import peak_tflops_of
from osp.errors import UserError
from osp.model.transformer import count_parameters, flops_per_token, meta_model
from osp.optim.groups import build_groups
from osp.plan.config import PlanConfig
from osp.plan.memory import activation_bytes, rank_memory
from osp.plan.work import GIGA, WholeWork, rounds_of, step_time, traffic, whole_work
from osp.run.checkpoint import checkpoint_bytes
from osp.tables import render_text, text_table
from osp.train.resolve import resolve

STAGES = (1, 2, 3)
GIB = 2**30
SECONDS_TO_KILL = 30.0  # between the SIGTERM and the SIGKILL of torchrun, deepspeed and most schedulers


@dataclass(frozen=True)
class Plan:
    """Bytes, seconds and counts; `describe` prints them."""

    config: Config  # every `auto` decided
    options: PlanConfig  # every figure of the machine decided
    parameters: dict[str, int]
    flops_per_token: int
    micro_batch_size: int
    accumulation: int  # micro batches of a step
    stages: dict[int, dict[str, int]]  # bytes by ZeRO stage and part
    fits: dict[int, bool]  # by stage
    updates: WholeWork
    traffic: dict[str, int]
    step: dict[str, float]
    mfu: float
    days: float
    checkpoint_bytes: int
    save_seconds: float


def make_plan(config: Config, options: PlanConfig) -> Plan:
    """Return the plan of `config`. Raises `UserError` for what the training itself would refuse on these ranks."""
    machine, world_size, asked = options.machine, options.world_size, config.train.compile
    resolved = resolve(config, device=torch.device(machine.device), world_size=world_size, bf16=machine.bf16)
    config, size, accumulation = resolved.config, resolved.micro_batch_size, resolved.gradient_accumulation_steps
    train, stage = config.train, config.engine.zero_stage
    if (peak_tflops := machine.peak_tflops or peak_tflops_of(machine.name)) is None:
        raise UserError(f"machine.peak_tflops is not set and {machine.name!r} is no GPU of the table; set it")
    machine, gpu_memory = dataclasses.replace(machine, peak_tflops=peak_tflops), options.gpu_memory or machine.memory
    options = dataclasses.replace(options, machine=machine, gpu_memory=gpu_memory)
    model = meta_model(config.model)
    model.compute_dtype, model.lm_head.chunk_tokens = resolved.compute_dtype, resolved.loss_chunk_tokens
    groups = build_groups(model, config.optimizer)
    compiled = machine.device == "cuda" if asked == "auto" else asked
    kept = {way: activation_bytes(config, model, micro_batch_size=size, compiled=way) for way in {compiled, False}}
    stages, average = {}, config.average.kind != "none"
    rounds = {zero: rounds_of(groups, world_size=world_size, stage=zero) for zero in STAGES}
    for zero, ranks in rounds.items():
        part = {"stage": zero, "num": accumulation, "average": average}
        stages[zero] = rank_memory(groups, ranks, kept[compiled and zero < 3], options, **part)
    work = whole_work(groups, rounds[stage])
    sent = traffic(groups, work, options, stage=stage, accumulation=accumulation)
    flops, tokens = flops_per_token(config.model, train.seq_len), train.tokens_per_step // world_size
    repeated = 4 / 3 if train.activation_checkpointing else 1  # the forward pass a second time
    seconds = step_time(work, sent, options, stage=stage, flops=flops * repeated * tokens)
    parameters = count_parameters(config.model)
    states = sum(len(g["update_rule"].STATE_NAMES) * shape.numel() for g in groups for shape in g["shapes"])
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    num_bytes = checkpoint_bytes(shapes, states / parameters["total"] + average)
    return Plan(
        config=config,
        options=options,
        parameters=parameters,
        flops_per_token=flops,
        micro_batch_size=size,
        accumulation=accumulation,
        stages=stages,
        fits={zero: stages[zero]["peak"] <= gpu_memory * GIB for zero in STAGES},
        updates=work,
        traffic=sent,
        step=seconds,
        mfu=flops * tokens / (seconds["total"] * peak_tflops * 1e12),
        days=train.num_steps * seconds["total"] / 86400,
        checkpoint_bytes=num_bytes,
        save_seconds=num_bytes / -(-world_size // machine.ranks_per_host) / (machine.disk * GIGA),
    )


def describe(plan: Plan) -> str:
    """Return the page: batch, memory, Muon, time and traffic, checkpoint, figures of the machine, warnings."""
    stage, world_size, machine = plan.config.engine.zero_stage, plan.options.world_size, plan.options.machine
    memory = [["GiB on the fullest rank", *(f"ZeRO-{s}{' (set)' if s == stage else ''}" for s in STAGES)]]
    memory += [[p.replace("_", " "), *(f"{plan.stages[s][p] / GIB:,.2f}" for s in STAGES)] for p in plan.stages[stage]]
    fits = ["fits" if plan.fits[s] else "DOES NOT FIT" for s in STAGES]
    memory.append([f"of {plan.options.gpu_memory:g} GiB", *fits])
    muon = [["group", "count", "shape", "owned per rank", "GFLOP, max"]]
    for group in plan.updates.groups:
        shares = sorted(Counter(group.num_owned).items(), reverse=True)
        owned = ", ".join(f"{count} on {ranks} ranks" for count, ranks in shares)
        count, shape = str(len(group.owners)), "x".join(map(str, group.shape))
        gigaflops = f"{max(group.num_owned) * group.flops / GIGA:,.0f}"
        muon.append([f"{group.role} ({group.rule})", count, shape, owned, gigaflops])
    steps = [["of a step", "MB sent per rank", "seconds"]]
    for name, seconds in plan.step.items():
        megabytes = f"{plan.traffic[name] / 1e6:,.1f}" if name in plan.traffic else ""
        steps.append([name.replace("_", " "), megabytes, f"{seconds:.4f}"])
    constants = [["machine.", "from"]]
    floats = {name: value for name, value in dataclasses.asdict(machine).items() if isinstance(value, float)}
    constants += [[f"{name}={value:g}", machine.sources.get(name, "the default")] for name, value in floats.items()]
    return render_text(
        Path(__file__).with_suffix(".txt"),
        plan=plan,
        shared_flops=sum(group.flops * len(group.owners) for group in plan.updates.groups) / world_size,
        memory=text_table(memory, left=1),
        muon=text_table(muon, left=1),
        steps=text_table(steps, left=1),
        constants=text_table(constants),
        warnings=warnings(plan),
    )


def warnings(plan: Plan) -> list[str]:
    """Return what a user would want to change before starting."""
    stage, train = plan.config.engine.zero_stage, plan.config.train
    texts = []
    if not plan.fits[stage]:
        ways = [f"engine=zero{s}" for s in STAGES if s > stage and plan.fits[s]][:1]
        if not train.activation_checkpointing:
            ways.append("train.activation_checkpointing=true")
        per_rank = plan.micro_batch_size * plan.accumulation
        ways += [f"train.micro_batch_size={b}" for b in range(1, plan.micro_batch_size) if per_rank % b == 0][-1:]
        remedy = f"try {' or '.join(ways)}" if ways else "use more ranks or a smaller model"
        needed = f"{plan.stages[stage]['peak'] / GIB:.1f} GiB do not fit into {plan.options.gpu_memory:g} GiB"
        texts.append(f"{needed} at ZeRO-{stage}; {remedy}")
    if plan.save_seconds > SECONDS_TO_KILL:
        texts.append(
            f"a checkpoint takes {plan.save_seconds:.0f} s to write, and a launcher kills a run {SECONDS_TO_KILL:.0f} s"
            " after SIGTERM: the run resumes from the last checkpoint of checkpoint.every"
        )
    if (share := (plan.step["newton_schulz"] + plan.step["exchange"]) / plan.step["total"]) > 0.05:
        texts.append(f"Muon takes {share:.0%} of a step; fewer ranks or more tokens per step make it less")
    if train.precision == "fp8":
        texts.append("train.precision=fp8: time and memory of the passes are planned as bf16's")
    return texts


def to_json(plan: Plan) -> dict[str, Any]:
    """Return every figure; `updates.groups` names the rank that orthogonalizes each matrix."""
    options = dataclasses.asdict(plan.options)
    return dataclasses.asdict(plan) | options | {"config": to_dict(plan.config), "warnings": warnings(plan)}
