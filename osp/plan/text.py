"""A plan as a page of text and as JSON."""

import dataclasses
from itertools import groupby
from typing import Any

from osp.config import to_dict
from osp.plan.plan import STAGES, Plan, fits
from osp.plan.work import GroupWork
from osp.tables import text_table

GIB = 2**30
PARTS = {
    "weights": "weights, fp32",
    "gathered_weights": "gathered weights, at most",
    "optimizer_state": "optimizer state",
    "gradients": "gradients",
    "reduction": "buffers of the reduction",
    "activations": "activations",
    "working_set": "logits of a chunk, or one block's backward",
    "reduced_gradients": "at the update: reduced gradients",
    "update": "at the update: exchange, Newton-Schulz",
}


def describe(plan: Plan) -> str:
    """The page: batch, memory, traffic, Muon, time, checkpoint, where the figures of the machine are from, warnings."""
    parts = [_head(plan), _batch(plan), _memory(plan), _traffic(plan), _muon(plan), _time(plan), _machine(plan)]
    return "\n\n".join([*parts, *(f"warning: {text}" for text in plan.warnings)])


def to_json(plan: Plan) -> dict[str, Any]:
    """Every figure, plain; `groups` says of every matrix which rank orthogonalizes it."""
    return dataclasses.asdict(plan) | {
        "config": to_dict(plan.config),
        "fits": {stage: fits(plan, stage) for stage in STAGES},
        "step": dataclasses.asdict(plan.step) | {"total": plan.step.total},
        "groups": [
            dataclasses.asdict(group) | {"num_idle": group.num_idle, "imbalance": group.imbalance}
            for group in plan.groups
        ],
    }


def _head(plan: Plan) -> str:
    config, train = plan.config, plan.config.train
    length = ""
    if train.steps is not None:
        length = f"; {train.steps:,} steps, {train.steps * train.tokens_per_step / 1e9:,.4g} B tokens"
    return (
        f"{config.run.name} on {plan.world_size} x {plan.machine.name}, ZeRO-{config.engine.zero_stage}, "
        f"{train.precision}, blocks {'compiled' if train.compile else 'eager'}: planned from shapes, not measured\n"
        f"{plan.parameters['total'] / 1e6:,.1f} M parameters, {plan.flops_per_token / 1e9:.3g} GFLOP per token{length}"
    )


def _batch(plan: Plan) -> str:
    train = plan.config.train
    rows = train.tokens_per_step // train.seq_len
    return (
        f"a step: {train.tokens_per_step:,} tokens = {rows:,} rows of {train.seq_len:,}; each rank "
        f"{plan.rows_per_rank:,}, {plan.accumulation} (gradient accumulation) times {plan.micro_batch_size}"
    )


def _memory(plan: Plan) -> str:
    stage = plan.config.engine.zero_stage
    rows = [["GiB on the fullest rank", *(f"ZeRO-{s}{' (set)' if s == stage else ''}" for s in STAGES)]]
    for name, words in PARTS.items():
        rows.append([words, *(_gib(getattr(plan.stages[s], name)) for s in STAGES)])
    rows.append(["reserved by the process", *(_gib(plan.machine.reserved * GIB) for _ in STAGES)])
    for words, moment in MOMENTS.items():
        rows.append([words, *(_gib(moment(plan.stages[s], plan.accumulation > 1)) for s in STAGES)])
    rows.append(["peak, reserved included", *(_gib(plan.peaks[s]) for s in STAGES)])
    verdicts = ("fits" if fits(plan, s) else "DOES NOT FIT" for s in STAGES)
    rows.append([f"of {plan.gpu_memory:g} GiB", *verdicts])
    return text_table(rows, left=1)


MOMENTS = {
    "together in the backward pass": lambda memory, accumulated: memory.backward(accumulated=accumulated),
    "together at the reduction": lambda memory, _: memory.reduce,
    "together at the update": lambda memory, _: memory.step,
}


def _traffic(plan: Plan) -> str:
    sent = plan.traffic
    return text_table(
        [
            ["sent per rank and step", "MB"],
            ["gradients", f"{sent.gradients / 1e6:,.1f}"],
            ["weights" + (", at most" if plan.config.engine.zero_stage == 3 else ""), f"{sent.weights / 1e6:,.1f}"],
            ["Muon's exchange, mean", f"{sent.exchange / 1e6:,.1f}"],
        ],
        left=1,
    )


def _muon(plan: Plan) -> str:
    """A line for every group that is updated in whole parameters, and how evenly the ranks share them."""
    rows = [["group", "count", "shape", "owned per rank", "idle ranks", "max/mean", "GFLOP, max", "exchange MB, max"]]
    for group in plan.groups:
        most = max(a + b for a, b in zip(group.bytes_held, group.bytes_owned, strict=True))
        flops = max(group.num_owned) * group.flops / 1e9
        shape = "x".join(map(str, group.shape))
        rows.append(
            [
                f"{group.role} ({group.rule})",
                str(group.count),
                shape,
                owned(group),
                str(group.num_idle),
                f"{group.imbalance:.2f}",
                f"{flops:,.0f}",
                f"{most / 1e6:,.1f}",
            ]
        )
    if not plan.groups:
        return "no group is updated in whole matrices: AdamW works on what each rank holds"
    critical = sum(group.critical_flops for group in plan.groups)
    total = sum(group.flops * group.count for group in plan.groups)
    per_rank = [sum(g.flops * g.num_owned[rank] for g in plan.groups) for rank in range(plan.world_size)]
    lines = [
        text_table(rows, left=1),
        "Groups follow one another, and the exchange of each waits for its fullest rank: the critical path is the sum",
        f"over groups of the most that a rank has, {critical / 1e9:,.0f} GFLOP. The rank with most in all has "
        f"{max(per_rank) / 1e9:,.0f};",
        f"the {total / 1e9:,.0f} GFLOP of a step, evenly shared, are {total / plan.world_size / 1e9:,.0f} on each.",
    ]
    return "\n".join(lines)


def owned(group: GroupWork) -> str:
    """How many parameters on how many ranks: `1 on 96 ranks, 0 on 160`."""
    found = [(number, len(list(ranks))) for number, ranks in groupby(sorted(group.num_owned, reverse=True))]
    (most, ranks), *others = found
    return ", ".join([f"{most} on {ranks} rank{'s' if ranks > 1 else ''}", *(f"{n} on {r}" for n, r in others)])


def _time(plan: Plan) -> str:
    step, train = plan.step, plan.config.train
    rows = [["of a step", "s"]]
    stage = plan.config.engine.zero_stage
    rows += [
        [words, f"{seconds:.4f}"]
        for words, seconds in (
            ("forward and backward", step.passes),
            ("gradient reduction" + (", beside them" if stage > 1 else ""), step.gradients),
            ("weights" + (", beside them" if stage > 2 else ""), step.weights),
            ("Newton-Schulz", step.newton_schulz),
            ("Muon's exchange", step.exchange),
            ("together", step.total),
        )
    ]
    speed = train.tokens_per_step / step.total
    lines = [
        text_table(rows, left=1),
        f"expected {speed:,.0f} tokens/s, {speed / plan.world_size:,.0f} per rank, MFU {plan.mfu:.1%}"
        + ("" if plan.days is None else f"; the run {_days(plan.days)}, without validation and probes"),
        f"a checkpoint is {plan.checkpoint_bytes / 1e9:,.2f} GB, written in {plan.save_seconds:.2g} s while training "
        "goes on",
    ]
    return "\n".join(lines)


def _machine(plan: Plan) -> str:
    machine = plan.machine
    values = {f.name: getattr(machine, f.name) for f in dataclasses.fields(machine)}
    rows = [["machine.", "", "from"]]
    rows += [[f"{key}={values[key]:g}", unit, machine.sources.get(key, "the default")] for key, unit in UNITS.items()]
    return text_table(rows, left=3)


UNITS = {
    "memory": "GiB",
    "reserved": "GiB",
    "peak_tflops": "TFLOP/s",
    "matmul_share": "of the peak",
    "ns_share": "of the peak",
    "network": "GB/s per rank",
    "host_network": "GB/s per rank",
    "network_share": "of both",
    "disk": "GB/s per host",
}


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f}"


def _days(days: float) -> str:
    for size, unit in ((1.0, "days"), (1 / 24, "hours")):
        if days >= size:
            return f"{days / size:,.1f} {unit}"
    return f"{1440 * days:,.1f} minutes"
