"""Where parameters lie in ZeRO's flat tensors, and the exchange that makes them whole.

ZeRO hands the optimizer one flat tensor per rank and parameter group. `rank_intervals` is the only knowledge of
DeepSpeed's layout in the project. K parameters in the group, W ranks.
"""

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


@dataclass(frozen=True)
class MatrixBatch:
    """Parameters of one shape that are made whole, updated and sent back together, as one rank sees them."""

    local: slice  # where this rank's parts of them lie in its flat tensor
    first: int  # first parameter in the group that this rank owns; the others follow
    num_owned: int
    numel: int  # of each parameter
    held: tuple[Interval, ...] = ()  # this rank's parts, by owner; places in `local`
    owned: tuple[Interval, ...] = ()  # parts of the owned parameters, by sender; index and places among those
    sends: list[int] | None = None  # elements per rank; None where every rank holds whole parameters
    receives: list[int] | None = None

    def collect(self, values: Tensor) -> Tensor:
        """Return the whole parameters this rank owns, (num_owned, numel). values: the `local` part of a flat tensor"""
        if self.sends is None or self.receives is None:
            return values[: self.num_owned * self.numel].view(self.num_owned, self.numel)
        size = self.num_owned * self.numel
        whole = _exchange(values, self.held, self.sends, self.receives, self.owned, size)
        return whole.view(self.num_owned, self.numel)

    def distribute(self, whole: Tensor) -> Tensor:
        """Invert `collect`: return the `local` part, zero in the padding. whole: (num_owned, numel)"""
        if self.sends is None or self.receives is None:
            return whole.reshape(-1)
        size = self.local.stop - self.local.start
        return _exchange(whole.reshape(-1), self.owned, self.receives, self.sends, self.held, size)


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a parameter group."""

    group: dict[str, Any]  # see `osp.optim.groups.build_groups`; `lr` is the learning rate of this step
    flat: Tensor  # master weights
    state: dict[str, Tensor]  # flat tensors of the update rule by name, zero before the first step
    intervals: list[Interval]
    batches: list[MatrixBatch]  # empty for a rule that works elementwise


def batches(
    numel: int, count: int, *, world_size: int, rank: int, stage: int, workspace: int = WORKSPACE
) -> list[MatrixBatch]:
    """Return the work of one rank on a group of `count` parameters of `numel` elements.

    Where ZeRO's pieces are whole parameters each rank works by itself, in views. Elsewhere parameter k of a batch of K
    belongs to rank k*W//K, and all ranks take part in every batch, because it is a collective.
    The time is proportional to what the rank holds and owns, not to K W: every rank of a large job does this at start.
    """
    intervals = rank_intervals([numel] * count, rank=rank, world_size=world_size, stage=stage)
    piece, stride = flat_size([numel] * count, world_size=world_size, stage=stage), numel
    if stage == 3:
        piece, stride = piece // count, 0  # every parameter is cut by itself
    if piece % numel == 0 or piece >= (numel if stage == 3 else numel * count):
        size = max(1, workspace // numel)
        runs = [intervals[i : i + size] for i in range(0, len(intervals), size)]
        return [MatrixBatch(slice(run[0].offset, run[-1].place.stop), run[0].index, len(run), numel) for run in runs]
    size = max(1, workspace // numel) * world_size
    work = []
    for begin in range(0, count, size):
        length = min(size, count - begin)
        held = [iv for iv in intervals if begin <= iv.index < begin + length]
        local = slice(held[0].offset, held[-1].place.stop) if held else slice(0, 0)
        # parameter i of the batch belongs to rank i*W//K: the first one of rank r is ceil(r K / W)
        first, last = (-(-r * length // world_size) for r in (rank, rank + 1))
        sends, receives = [0] * world_size, [0] * world_size
        for iv in held:
            sends[(iv.index - begin) * world_size // length] += iv.size
        parts = []
        for index in range(last - first):
            place = (begin + first + index) * stride
            for sender in range(place // piece, -(-(place + numel) // piece)):
                start, stop = max(sender * piece - place, 0), min((sender + 1) * piece - place, numel)
                parts.append((sender, Interval(index, start, stop, index * numel + start)))
                receives[sender] += stop - start
        held = tuple(iv._replace(offset=iv.offset - local.start) for iv in held)
        owned = tuple(part for _, part in sorted(parts))
        work.append(MatrixBatch(local, begin + first, last - first, numel, held, owned, sends, receives))
    return work


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
