"""Who orthogonalizes what, bytes sent and seconds: figures of the exchange that the optimizer performs."""

from collections.abc import Sequence
from dataclasses import dataclass

from osp.optim.rules import FP32, Group, WholeRule
from osp.optim.zero import MatrixBatch, batches, flat_size
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
    bytes_sent: list[int]  # by rank: its parts to their owners, and the updates of what it owns to the others
    flops: int  # Newton-Schulz of one parameter
    critical_flops: int  # batch after batch, each as long as its fullest rank
    critical_bytes: int


def batches_of(group: Group, *, world_size: int, stage: int) -> list[list[MatrixBatch]]:
    """Return the batches of every rank, as `PartitionedOptimizer` builds them; none for an elementwise rule."""
    if not isinstance(group["update_rule"], WholeRule):
        return []
    numel, count = group["shapes"][0].numel(), len(group["shapes"])
    return [batches(numel, count, world_size=world_size, rank=rank, stage=stage) for rank in range(world_size)]


def group_work(group: Group, ranks: Sequence[Sequence[MatrixBatch]]) -> GroupWork:
    """Return the work of a group from `batches_of` it."""
    owners: dict[str, int] = {}
    sent: list[list[tuple[int, int]]] = []  # by rank and batch: bytes of `collect`, and of `distribute`
    for rank, work in enumerate(ranks):
        sent.append([])
        for batch in work:
            owners |= dict.fromkeys(group["names"][batch.first : batch.first + batch.num_owned], rank)
            pair = [sum(sizes) - sizes[rank] if sizes is not None else 0 for sizes in (batch.sends, batch.receives)]
            sent[rank].append((FP32 * pair[0], FP32 * pair[1]))
    flops, rounds = group["update_rule"].flops(group), range(max(map(len, ranks)))
    fullest = [max(work[i].num_owned for work in ranks if i < len(work)) for i in rounds]
    return GroupWork(
        role=group["role"],
        rule=group["rule"],
        shape=tuple(group["shapes"][0]),
        owners=owners,
        num_owned=[sum(batch.num_owned for batch in work) for work in ranks],
        bytes_sent=[sum(map(sum, pairs)) for pairs in sent],
        flops=flops,
        critical_flops=flops * sum(fullest),
        critical_bytes=sum(2 * max(max(pairs[i]) for pairs in sent if i < len(pairs)) for i in rounds),
    )


def traffic(
    groups: Sequence[Group], work: Sequence[GroupWork], options: PlanConfig, *, stage: int, accumulation: int
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
    exchange = sum(sum(group.bytes_sent) for group in work) // world_size
    return {"gradients": flat * reductions, "weights": flat * gathers, "exchange": exchange}


def step_time(
    work: Sequence[GroupWork], sent: dict[str, int], options: PlanConfig, *, stage: int, flops: float
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
        "newton_schulz": sum(group.critical_flops for group in work) / (tera * machine.ns_share),
        "exchange": sum(group.critical_bytes for group in work) / one,
    }
    return seconds | {"total": sum(seconds.values())}
