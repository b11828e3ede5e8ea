"""The plan of a training: what `scripts/plan.py` prints, from a configuration and a machine; nothing is started."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from osp.config import Config
from osp.device import peak_tflops_of
from osp.errors import UserError
from osp.model.transformer import count_parameters, flops_per_token, meta_model
from osp.optim import groups_of
from osp.plan.config import MachineConfig, PlanConfig
from osp.plan.memory import Memory, activations, memory
from osp.plan.work import GIGA, GroupWork, StepTime, Traffic, batches_of, group_work, step_time, traffic
from osp.run.checkpoint import checkpoint_bytes
from osp.train.resolve import resolve
from osp.train.setup import SECONDS_TO_KILL

STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Plan:
    """Bytes, seconds and counts; `describe` in osp.plan.text makes a page of them."""

    config: Config  # every `auto` decided
    machine: MachineConfig
    world_size: int
    gpu_memory: float  # GiB
    parameters: dict[str, int]
    flops_per_token: int
    rows_per_rank: int  # of a step
    micro_batch_size: int
    accumulation: int
    stages: dict[int, Memory]
    peaks: dict[int, int]  # by stage, what the machine reserves included
    groups: list[GroupWork]
    traffic: Traffic
    step: StepTime
    mfu: float
    days: float | None  # None: the length of the run is measured at its start
    checkpoint_bytes: int
    save_seconds: float
    warnings: list[str]


def make_plan(config: Config, options: PlanConfig) -> Plan:
    """Raises `UserError` for what the training itself would refuse on that many ranks."""
    machine, world_size = options.machine, options.world_size
    device = torch.device(machine.device)
    asked = config
    resolved = resolve(config, device=device, world_size=world_size, bf16=machine.bf16)
    config, size, accumulation = resolved.config, resolved.micro_batch_size, resolved.gradient_accumulation_steps
    train, stage = config.train, config.engine.zero_stage
    peak_tflops = machine.peak_tflops or peak_tflops_of(machine.name)
    if peak_tflops is None:
        raise UserError(f"machine.peak_tflops is not set and {machine.name!r} is no GPU of the table; set it")
    rows = size * accumulation
    model = meta_model(config.model)
    model.compute_dtype = resolved.compute_dtype
    groups = groups_of(model, config.optimizer)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    parameters = count_parameters(config.model)
    states = sum(
        torch.Size(shape).numel() * len(group["update_rule"].STATE_NAMES)
        for group in groups
        for shape in group["shapes"]
    )
    compiled = {each: _is_compiled(asked, each, device=device) for each in STAGES}
    kept = {way: activations(config, model, micro_batch_size=size, compiled=way) for way in set(compiled.values())}
    stages, work = {}, []
    for each in STAGES:
        ranks = [batches_of(group, world_size=world_size, stage=each) for group in groups]
        if each == stage:
            work = [group_work(group, rank) for group, rank in zip(groups, ranks, strict=True) if rank]
        layout = {"world_size": world_size, "stage": each, "accumulation": accumulation}
        stages[each] = memory(config, groups, ranks, kept[compiled[each]], native_bf16=machine.bf16, **layout)
    sent = traffic(groups, work, world_size=world_size, stage=stage, accumulation=accumulation)
    per_token = flops_per_token(config.model, train.seq_len)
    computed = per_token * (4 / 3 if train.activation_checkpointing else 1)  # the forward pass a second time
    seconds = step_time(
        work,
        sent,
        flops=computed * rows * train.seq_len,
        world_size=world_size,
        stage=stage,
        machine=machine,
        peak_tflops=peak_tflops,
    )
    num_bytes = checkpoint_bytes(shapes, states / parameters["total"])
    hosts = math.ceil(world_size / machine.ranks_per_host)
    plan = Plan(
        config=config,
        machine=dataclasses.replace(machine, peak_tflops=peak_tflops),
        world_size=world_size,
        gpu_memory=options.gpu_memory or machine.memory,
        parameters=parameters,
        flops_per_token=per_token,
        rows_per_rank=rows,
        micro_batch_size=size,
        accumulation=accumulation,
        stages=stages,
        peaks={s: int(2**30 * machine.reserved) + m.peak(accumulated=accumulation > 1) for s, m in stages.items()},
        groups=work,
        traffic=sent,
        step=seconds,
        mfu=per_token * rows * train.seq_len / (seconds.total * peak_tflops * 1e12),
        days=None if train.steps is None else train.steps * seconds.total / 86400,
        checkpoint_bytes=num_bytes,
        save_seconds=num_bytes / hosts / (machine.disk * GIGA),
        warnings=[],
    )
    return dataclasses.replace(plan, warnings=_warnings(plan))


def fits(plan: Plan, stage: int) -> bool:
    return plan.peaks[stage] <= plan.gpu_memory * 2**30


def _is_compiled(config: Config, stage: int, *, device: torch.device) -> bool:
    """What `resolve` makes of train.compile at another ZeRO stage."""
    compile_, engine = config.train.compile, dataclasses.replace(config.engine, zero_stage=stage)
    train = dataclasses.replace(config.train, compile=False if stage == 3 else compile_)
    config = dataclasses.replace(config, train=train, engine=engine)
    return resolve(config, device=device, world_size=1, bf16=True).compiled


def _warnings(plan: Plan) -> list[str]:
    """What a user would want to change before starting."""
    config, stage = plan.config, plan.config.engine.zero_stage
    found = []
    if not fits(plan, stage):
        found.append(
            f"{plan.peaks[stage] / 2**30:.1f} GiB do not fit into {plan.gpu_memory:g} GiB at ZeRO-{stage}; "
            f"{_remedy(plan)}"
        )
    if plan.save_seconds > SECONDS_TO_KILL:
        found.append(
            f"a checkpoint takes {plan.save_seconds:.0f} s to write, and a launcher kills a run "
            f"{SECONDS_TO_KILL:.0f} s after SIGTERM: the last checkpoint will be that of checkpoint.every"
        )
    share = (plan.step.newton_schulz + plan.step.exchange) / plan.step.total
    if share > 0.05:
        found.append(f"Muon takes {share:.0%} of a step; fewer ranks or more tokens per step make it less")
    if config.train.precision == "fp8":
        found.append("train.precision=fp8: time and memory of the passes are planned as bf16's")
    if config.train.steps is None:
        found.append("train.minutes is turned into steps by a measurement at the start: no days are planned")
    return found


def _remedy(plan: Plan) -> str:
    train = plan.config.train
    others = [stage for stage in STAGES if fits(plan, stage) and stage > plan.config.engine.zero_stage]
    ways = [f"engine=zero{others[0]}"] if others else []
    if not train.activation_checkpointing:
        ways.append("train.activation_checkpointing=true")
    if smaller := [b for b in range(1, plan.micro_batch_size) if plan.rows_per_rank % b == 0]:
        ways.append(f"train.micro_batch_size={smaller[-1]}")
    return f"try {' or '.join(ways)}" if ways else "use more ranks or a smaller model"
