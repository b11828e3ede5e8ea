"""Who orthogonalizes what, and what travels: figures of the exchange plans that the optimizer really follows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from osp.optim.rules import FP32, Group, WholeRule
from osp.optim.zero import Batch, batches, flat_size
from osp.plan.config import MachineConfig
from osp.train.engine import reduces_to_owners

GIGA = 1e9


@dataclass(frozen=True)
class GroupWork:
    """The update of one group of matrices, or of gains, over the ranks. Bytes are those to and from other ranks."""

    role: str
    rule: str
    shape: tuple[int, ...]
    count: int
    owners: dict[str, int]  # parameter -> the rank that updates it
    num_owned: list[int]  # by rank
    bytes_held: list[int]  # by rank: what it sends to the owners, and gets back as updates
    bytes_owned: list[int]  # by rank: what it gets from others for the parameters it owns, and sends back
    flops: int  # of the Newton-Schulz of one matrix, or of all its heads
    exchanges: int  # all-to-alls of a step
    critical_flops: int  # the batches one after another, each as long as its fullest rank
    critical_bytes: int

    @property
    def num_idle(self) -> int:
        return self.num_owned.count(0)

    @property
    def imbalance(self) -> float:
        """Work of the fullest rank over the mean: 1 is even."""
        return max(self.num_owned) * len(self.num_owned) / self.count


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in an optimizer step, with the ring algorithms of NCCL; of the exchange: the mean."""

    gradients: int
    weights: int
    exchange: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by part; without what overlaps with the passes."""

    passes: float  # forward and backward
    gradients: float
    weights: float
    newton_schulz: float
    exchange: float

    @property
    def total(self) -> float:
        return self.passes + self.gradients + self.weights + self.newton_schulz + self.exchange


def batches_of(group: Group, *, world_size: int, stage: int) -> list[list[Batch]]:
    """The batches of every rank, as `PartitionedOptimizer` builds them; none for an elementwise rule."""
    if not isinstance(group["update_rule"], WholeRule):
        return []
    numel, count = torch.Size(group["shapes"][0]).numel(), len(group["shapes"])
    return [batches(numel, count, world_size=world_size, rank=rank, stage=stage) for rank in range(world_size)]


def group_work(group: Group, ranks: Sequence[Sequence[Batch]]) -> GroupWork:
    """ranks: `batches_of` the group."""
    shape = tuple(group["shapes"][0])
    flops = group["update_rule"].flops(group)
    moved = [[_moved(batch, rank) for batch in work] for rank, work in enumerate(ranks)]
    rounds = max(map(len, ranks))
    return GroupWork(
        role=group["role"],
        rule=group["rule"],
        shape=shape,
        count=len(group["shapes"]),
        owners={
            group["names"][batch.first + i]: rank
            for rank, work in enumerate(ranks)
            for batch in work
            for i in range(batch.num_owned)
        },
        num_owned=[sum(batch.num_owned for batch in work) for work in ranks],
        bytes_held=[sum(held for held, _ in pairs) for pairs in moved],
        bytes_owned=[sum(owned for _, owned in pairs) for pairs in moved],
        flops=flops,
        exchanges=2 * rounds if any(batch.sends for work in ranks for batch in work) else 0,
        critical_flops=flops * sum(max(work[i].num_owned for work in ranks if i < len(work)) for i in range(rounds)),
        critical_bytes=sum(2 * max(max(pairs[i]) for pairs in moved if i < len(pairs)) for i in range(rounds)),
    )


def _moved(batch: Batch, rank: int) -> tuple[int, int]:
    """Bytes that `collect` sends to and gets from other ranks; `distribute` sends and gets the reverse."""
    if batch.sends is None or batch.receives is None:
        return 0, 0
    return FP32 * (sum(batch.sends) - batch.sends[rank]), FP32 * (sum(batch.receives) - batch.receives[rank])


def traffic(
    groups: Sequence[Group], work: Sequence[GroupWork], *, world_size: int, stage: int, accumulation: int
) -> Traffic:
    """Gradients are reduced at stage 1 once a step, at stages 2 and 3 with every micro batch; at stages 1 and 2 by
    all-reduces on more ranks than `reduces_to_owners`. Weights: one all-gather a step; at stage 3 at most two for each
    micro batch.
    """
    others = (world_size - 1) / world_size
    flat = (
        FP32
        * world_size
        * sum(
            flat_size([torch.Size(shape).numel() for shape in group["shapes"]], world_size=world_size, stage=stage)
            for group in groups
        )
    )
    reductions = (1 if stage == 1 else accumulation) * (1 if stage == 3 or reduces_to_owners(world_size) else 2)
    gathers = 2 * accumulation if stage == 3 else 1
    exchange = sum(sum(group.bytes_held) + sum(group.bytes_owned) for group in work) / world_size
    return Traffic(int(flat * others * reductions), int(flat * others * gathers), int(exchange))


def step_time(
    work: Sequence[GroupWork],
    sent: Traffic,
    *,
    flops: float,
    world_size: int,
    stage: int,
    machine: MachineConfig,
    peak_tflops: float,
) -> StepTime:
    """flops: of the passes of one rank. Gradients from stage 2 on, and weights at stage 3, travel while these compute.

    Rings leave a host through all its adapters at once, so that reductions and gathers have the sum of them. In an
    all-to-all each rank has its own.
    """
    one, ring = machine.network, min(machine.host_network, machine.network * machine.ranks_per_host)
    if world_size <= machine.ranks_per_host:
        one = ring = machine.host_network
    one, ring = (GIGA * machine.network_share * bandwidth for bandwidth in (one, ring))
    passes = flops / (1e12 * peak_tflops * machine.matmul_share)
    hidden = (sent.gradients if stage >= 2 else 0) + (sent.weights if stage == 3 else 0)
    return StepTime(
        passes=max(passes, hidden / ring),
        gradients=sent.gradients / ring if stage == 1 else 0.0,
        weights=sent.weights / ring if stage < 3 else 0.0,
        newton_schulz=sum(group.critical_flops for group in work) / (1e12 * peak_tflops * machine.ns_share),
        exchange=sum(group.critical_bytes for group in work) / one,
    )
