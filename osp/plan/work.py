"""Who orthogonalizes what, bytes sent and seconds: figures of the exchange that the optimizer performs."""

from collections.abc import Sequence
from dataclasses import dataclass

from osp.optim.optimizer import rank_rounds, whole_groups
from osp.optim.rules import FP32, Group
from osp.optim.zero import Round, flat_size
from osp.plan.config import PlanConfig
from osp.train.engine import reduces_to_owners

GIGA = 1e9


@dataclass(frozen=True)
class GroupWork:
    """The update of one group of whole parameters over the ranks."""

    role: str
    rule: str
    shape: tuple[int, ...]
    owners: dict[str, int]  # parameter -> the rank that updates it
    num_owned: list[int]  # by rank
    flops: int  # Newton-Schulz of one parameter


@dataclass(frozen=True)
class WholeWork:
    """The updates of all groups of whole parameters, round after round, each as long as its fullest rank."""

    groups: list[GroupWork]
    bytes_sent: list[int]  # by rank: its parts to their owners, and the updates of what it owns to the others
    critical_flops: int
    critical_bytes: int


def rounds_of(groups: Sequence[Group], *, world_size: int, stage: int) -> list[list[Round]]:
    """Return the rounds of every rank, as `PartitionedOptimizer` plans them."""
    return [rank_rounds(groups, rank=rank, world_size=world_size, stage=stage) for rank in range(world_size)]


def whole_work(groups: Sequence[Group], ranks: Sequence[Sequence[Round]]) -> WholeWork:
    """Return the work of the groups with a `WholeRule` from `rounds_of` all groups."""
    whole = whole_groups(groups)
    costs = [group["update_rule"].flops(group) for group in whole]
    owners: list[dict[str, int]] = [{} for _ in whole]
    num_owned = [[0] * len(ranks) for _ in whole]
    alone = [0] * len(ranks)  # flops of each rank before it waits for others
    together: list[list[tuple[int, int, int]]] = []  # by rank and exchange: flops, bytes of `collect`, of `distribute`
    for rank, rounds in enumerate(ranks):
        together.append([])
        for work in rounds:
            for share in work.shares:
                owners[share.group] |= {whole[share.group]["names"][index]: rank for index in share.owned}
                num_owned[share.group][rank] += len(share.owned)
            flops = sum(costs[share.group] * len(share.owned) for share in work.shares)
            if work.sends is None or work.receives is None:
                alone[rank] += flops
            else:
                first, second = (FP32 * (sum(sizes) - sizes[rank]) for sizes in (work.sends, work.receives))
                together[-1].append((flops, first, second))
    exchanges = list(zip(*together, strict=True))  # each with an entry per rank
    return WholeWork(
        groups=[
            GroupWork(group["role"], group["rule"], tuple(group["shapes"][0]), owners[i], num_owned[i], costs[i])
            for i, group in enumerate(whole)
        ],
        bytes_sent=[sum(first + second for _, first, second in parts) for parts in together],
        critical_flops=max(alone) + sum(max(flops for flops, *_ in parts) for parts in exchanges),
        critical_bytes=sum(2 * max(max(sent) for _, *sent in parts) for parts in exchanges),
    )


def traffic(
    groups: Sequence[Group], work: WholeWork, options: PlanConfig, *, stage: int, accumulation: int
) -> dict[str, int]:
    """Return the bytes that a rank sends in a step with NCCL's ring algorithms; `exchange` is the mean over ranks.

    Gradients are reduced once a step at stage 1, else per micro batch; weights gathered once, at stage 3 twice per one.
    """
    world_size, flat = options.world_size, 0
    for group in groups:
        numels = [shape.numel() for shape in group["shapes"]]
        flat += FP32 * (world_size - 1) * flat_size(numels, world_size=world_size, stage=stage)
    reductions = (1 if stage == 1 else accumulation) * (1 if stage == 3 or reduces_to_owners(world_size) else 2)
    gathers = 2 * accumulation if stage == 3 else 1
    exchange = sum(work.bytes_sent) // world_size
    return {"gradients": flat * reductions, "weights": flat * gathers, "exchange": exchange}


def step_time(
    work: WholeWork, sent: dict[str, int], options: PlanConfig, *, stage: int, flops: float
) -> dict[str, float]:
    """Return the seconds of a step by part; what overlaps with the passes counts as 0. flops: of a rank's passes.

    Gradients from stage 2 on, and weights at stage 3, travel during the passes. A ring leaves a host through all its
    adapters at once; in an all-to-all each rank has its own.
    """
    machine = options.machine
    assert machine.peak_tflops is not None
    one, ring = machine.network, min(machine.host_network, machine.network * machine.ranks_per_host)
    if options.world_size <= machine.ranks_per_host:
        one = ring = machine.host_network
    one, ring = (GIGA * machine.network_share * bandwidth for bandwidth in (one, ring))
    tera = 1e12 * machine.peak_tflops
    hidden = (sent["gradients"] if stage >= 2 else 0) + (sent["weights"] if stage == 3 else 0)
    seconds = {
        "passes": max(flops / (tera * machine.matmul_share), hidden / ring),
        "gradients": sent["gradients"] / ring if stage == 1 else 0.0,
        "weights": sent["weights"] / ring if stage < 3 else 0.0,
        "newton_schulz": work.critical_flops / (tera * machine.ns_share),
        "exchange": work.critical_bytes / one,
    }
    return seconds | {"total": sum(seconds.values())}
