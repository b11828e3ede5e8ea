"""Where parameters lie in ZeRO's flat tensors, and the exchange that makes them whole.

ZeRO hands the optimizer one flat tensor per rank and parameter group. `rank_intervals` is the only knowledge of
DeepSpeed's layout in the project. K parameters in the group, W ranks.
"""

import functools
import heapq
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of whole parameters that a rank works on at a time: bounds the memory of exchange and Newton-Schulz
WORKSPACE = 2**27


class Interval(NamedTuple):
    """Elements [start, stop) of flattened parameter `index`, at `offset` in a rank's flat tensor."""

    index: int
    start: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def place(self) -> slice:
        return slice(self.offset, self.offset + self.size)


Parts = Sequence[Interval]


def flat_size(numels: Sequence[int], *, world_size: int, stage: int) -> int:
    """Return the elements of the flat tensor that every rank holds for a group, DeepSpeed's padding included."""
    if stage == 3:
        return sum(-(-numel // world_size) for numel in numels)
    alignment = 2 * world_size  # stage_1_and_2.py: nccl_start_alignment_factor
    return -(-sum(numels) // alignment) * 2


def rank_intervals(numels: Sequence[int], *, rank: int, world_size: int, stage: int) -> list[Interval]:
    """Return the intervals of one rank, in the order of its flat tensor.

    Stages 1 and 2: the group is concatenated, padded at its end, and cut into W equal pieces.
    Stage 3: every parameter is cut into W chunks of ceil(numel / W), the last ones padded; a rank holds one of each.
    """
    piece = flat_size(numels, world_size=world_size, stage=stage)
    intervals = []
    begin = 0  # of the parameter: in the concatenation (stages 1, 2), in the flat tensor of each rank (stage 3)
    for index, numel in enumerate(numels):
        if stage == 3:
            chunk = -(-numel // world_size)
            start, stop, offset = rank * chunk, min((rank + 1) * chunk, numel), begin
            begin += chunk
        else:
            start = max(rank * piece - begin, 0)
            stop, offset = min((rank + 1) * piece - begin, numel), begin + start - rank * piece
            begin += numel
        if start < stop:
            intervals.append(Interval(index, start, stop, offset))
    return intervals


class Whole(NamedTuple):
    """A group of parameters that are updated as a whole; all have one shape."""

    numel: int  # of each parameter
    count: int
    cost: int  # of one parameter's update, in any unit


@dataclass(frozen=True)
class Share:
    """What one rank holds and updates of a group in a round."""

    group: int  # number of the group
    numel: int  # of each parameter
    local: slice  # where this rank's parts of the round's parameters lie in its flat tensor
    owned: Sequence[int]  # the parameters that this rank updates, in ascending order

    @property
    def num_held(self) -> int:
        return self.local.stop - self.local.start


@dataclass(frozen=True)
class Round:
    """Parameters that are made whole, updated and sent back together, as one rank sees them."""

    shares: list[Share]
    held: tuple[Interval, ...] = ()  # this rank's parts, by owner; places in the local parts of all shares, one by one
    owned: tuple[
        Interval, ...
    ] = ()  # parts of the owned parameters, by sender; places in those of all shares, one by one
    sends: list[int] | None = None  # elements per rank; None where every rank holds whole parameters
    receives: list[int] | None = None

    def collect(self, values: Tensor) -> list[Tensor]:
        """Return the parameters that this rank owns, (num_owned, numel) of each share. Collective.

        values: the local parts of all shares, one after another; views of them where every rank holds whole parameters.
        """
        sizes = [len(share.owned) * share.numel for share in self.shares]
        if self.sends is not None and self.receives is not None:
            values = _exchange(values, self.held, self.sends, self.receives, self.owned, sum(sizes))
        return [part.view(-1, share.numel) for part, share in zip(values.split(sizes), self.shares, strict=True)]

    def distribute(self, updates: Sequence[Tensor]) -> list[Tensor]:
        """Invert `collect`: return the local part of each share, zero in the padding. Collective.

        updates: (num_owned, ...) of each share; returned as they are where every rank holds whole parameters.
        """
        if self.sends is None or self.receives is None:
            return list(updates)
        sizes = [share.num_held for share in self.shares]
        values = torch.cat([update.reshape(-1).float() for update in updates])
        return list(_exchange(values, self.owned, self.receives, self.sends, self.held, sum(sizes)).split(sizes))


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a parameter group."""

    group: dict[str, Any]  # see `osp.optim.groups.build_groups`; `lr` is the learning rate of this step
    flat: Tensor  # master weights
    state: dict[str, Tensor]  # flat tensors of the update rule by name, zero before the first step
    intervals: list[Interval]


def plan_rounds(
    groups: Sequence[Whole], *, world_size: int, rank: int, stage: int, workspace: int = WORKSPACE
) -> list[Round]:
    """Return the work of one rank on parameters that are updated as a whole.

    A group whose pieces are whole parameters on every rank is updated by each rank by itself, in views. The parameters
    of all other groups are exchanged together in few rounds; every round is a collective in which all ranks take part.
    `assign` chooses the owners. On average a rank owns at most `workspace` elements of a round, or one parameter.
    """
    layout = {"rank": rank, "world_size": world_size, "stage": stage}
    rounds, split = [], []
    for number, (numel, count, _) in enumerate(groups):
        piece, _ = _cut(numel, count, world_size=world_size, stage=stage)
        if piece % numel == 0 or piece >= (numel if stage == 3 else numel * count):
            size, held = max(1, workspace // numel), rank_intervals([numel] * count, **layout)
            for run in (held[i : i + size] for i in range(0, len(held), size)):
                local, owned = slice(run[0].offset, run[-1].place.stop), range(run[0].index, run[-1].index + 1)
                rounds.append(Round([Share(number, numel, local, owned)]))
        else:
            split += [(number, index) for index in range(count)]
    while split:
        sizes = itertools.accumulate(groups[number].numel for number, _ in split)
        length = max(1, sum(size <= workspace * world_size for size in sizes))
        rounds.append(_plan_round(groups, split[:length], **layout))
        split = split[length:]
    return rounds


@functools.lru_cache(maxsize=32)
def assign(costs: tuple[int, ...], world_size: int) -> tuple[int, ...]:
    """Return the rank of each task: the costliest task first, each to the rank with the least cost so far.

    The fullest rank has at most 4/3 of the least possible cost (Graham 1969). Few tasks go to ranks far apart, because
    neighbours may share a network adapter.
    """
    stride = max(1, world_size // max(len(costs), 1))
    loads = [(0, place) for place in range(world_size)]
    ranks = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        load, place = loads[0]
        ranks[task] = place * stride
        heapq.heapreplace(loads, (load + costs[task], place))
    return tuple(ranks)


def _cut(numel: int, count: int, *, world_size: int, stage: int) -> tuple[int, int]:
    """Return the elements of a rank's piece, and the distance from one parameter to the next in what is cut.

    Stages 1 and 2 cut the concatenation of the group. Stage 3 cuts every parameter separately, at distance 0.
    """
    size = flat_size([numel] * count, world_size=world_size, stage=stage)
    return (size // count, 0) if stage == 3 else (size, numel)


def _plan_round(
    groups: Sequence[Whole], parameters: Sequence[tuple[int, int]], *, rank: int, world_size: int, stage: int
) -> Round:
    """Return the round that exchanges these `parameters`, (group, index) in order."""
    owners = dict(zip(parameters, assign(tuple(groups[g].cost for g, _ in parameters), world_size), strict=True))
    shares, parts, wanted = [], [], []  # parts: (owner, what this rank holds); wanted: (sender, what it updates)
    sends, receives = [0] * world_size, [0] * world_size
    place = whole = 0  # in the local parts of all shares, and in their owned parameters
    for number, members in itertools.groupby(parameters, key=lambda parameter: parameter[0]):
        numel, count, _ = groups[number]
        indices = [index for _, index in members]
        held = rank_intervals([numel] * count, rank=rank, world_size=world_size, stage=stage)
        held = [iv for iv in held if indices[0] <= iv.index <= indices[-1]]
        local = slice(held[0].offset, held[-1].place.stop) if held else slice(0, 0)
        for iv in held:
            owner = owners[number, iv.index]
            parts.append((owner, iv._replace(offset=place + iv.offset - local.start)))
            sends[owner] += iv.size
        owned = [index for index in indices if owners[number, index] == rank]
        piece, stride = _cut(numel, count, world_size=world_size, stage=stage)
        for index in owned:
            begin = index * stride
            for sender in range(begin // piece, -(-(begin + numel) // piece)):
                start, stop = max(sender * piece - begin, 0), min((sender + 1) * piece - begin, numel)
                wanted.append((sender, Interval(index, start, stop, whole + start)))
                receives[sender] += stop - start
            whole += numel
        place += local.stop - local.start
        shares.append(Share(number, numel, local, owned))
    # sorting keeps the order of the parts of one rank, which is the same on both sides
    by_rank = (tuple(part for _, part in sorted(some, key=operator.itemgetter(0))) for some in (parts, wanted))
    return Round(shares, *by_rank, sends=sends, receives=receives)


def _exchange(values: Tensor, parts: Parts, sends: list[int], receives: list[int], targets: Parts, size: int) -> Tensor:
    """Send the places `parts` of `values`; return (size,) with the answers at the places `targets`, zero elsewhere.

    Collective, on gloo and NCCL. Places in order without gaps are not copied. sends, receives: elements per rank, or 0
    """
    if not _is_dense(parts, values.numel()):
        values = torch.cat([values[iv.place] for iv in parts]) if parts else values.new_empty(0)
    received = values.new_empty(sum(receives))
    dist.all_to_all_single(received, values.contiguous(), output_split_sizes=receives, input_split_sizes=sends)
    if _is_dense(targets, size):
        return received
    result = values.new_zeros(size)
    for iv, part in zip(targets, received.split([iv.size for iv in targets]), strict=True):
        result[iv.place] = part
    return result


def _is_dense(parts: Parts, size: int) -> bool:
    """Return whether the places of the parts are [0, size) in order."""
    ends = [0, *(iv.place.stop for iv in parts)]
    return [iv.offset for iv in parts] == ends[:-1] and ends[-1] == size
