"""Where parameters lie in ZeRO's flat tensors, and the exchange that makes them whole.

ZeRO hands the optimizer one flat tensor per rank and parameter group. `rank_intervals` is the only knowledge of
DeepSpeed's layout in the project. K parameters in the group, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


def flat_size(numels: Sequence[int], *, world_size: int, stage: int) -> int:
    """Return the elements of the flat tensor that every rank holds for a group, DeepSpeed's padding included."""
    if stage == 3:
        return sum(-(-numel // world_size) for numel in numels)
    alignment = 2 * world_size  # stage_1_and_2.py: nccl_start_alignment_factor
    return -(-sum(numels) // alignment) * 2


def rank_intervals(numels: Sequence[int], *, rank: int, world_size: int, stage: int) -> list[Interval]:
    """Return the intervals of one rank, in the order of its flat tensor.

    Stages 1 and 2: the group is concatenated, padded at its end, and cut into W equal pieces.
    Stage 3: every parameter is cut into W chunks of ceil(numel / W), the last ones short or empty; a rank holds its
    chunk of each parameter, short chunks padded.
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
    held: tuple[Interval, ...] = ()  # this rank's parts, by owner; places relative to `local`
    owned: tuple[Interval, ...] = ()  # the parts of the owned parameters, by sender; `index` counts owned parameters
    sends: list[int] | None = None  # elements per rank; None where every rank holds whole parameters
    receives: list[int] | None = None

    def collect(self, values: Tensor) -> Tensor:
        """Return the whole parameters this rank owns, (num_owned, numel). values: the `local` part of a flat tensor"""
        if self.sends is None or self.receives is None:
            return values[: self.num_owned * self.numel].view(self.num_owned, self.numel)
        received = _all_to_all(_pack(values, self.held), sends=self.sends, receives=self.receives)
        targets = [iv.index * self.numel + iv.start for iv in self.owned]
        return _unpack(received, self.owned, targets, self.num_owned * self.numel).view(self.num_owned, self.numel)

    def distribute(self, whole: Tensor) -> Tensor:
        """Invert `collect`: return the `local` part, zero in the padding. whole: (num_owned, numel)"""
        if self.sends is None or self.receives is None:
            return whole.reshape(-1)
        parts = [Interval(0, 0, iv.size, iv.index * self.numel + iv.start) for iv in self.owned]
        received = _all_to_all(_pack(whole.reshape(-1), parts), sends=self.receives, receives=self.sends)
        return _unpack(received, self.held, [iv.offset for iv in self.held], self.local.stop - self.local.start)


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a parameter group."""

    flat: Tensor
    intervals: list[Interval]
    batches: list[MatrixBatch]  # empty for a rule that works elementwise


def batches(
    numel: int, count: int, *, world_size: int, rank: int, stage: int, workspace: int = WORKSPACE
) -> list[MatrixBatch]:
    """Return the work of one rank on a group of `count` parameters of `numel` elements.

    Where ZeRO's pieces are whole parameters each rank works alone, in views. Elsewhere parameter k of a batch of K
    belongs to rank k*W//K, and all ranks take part in every batch, because it is a collective.
    The time is proportional to what the rank holds and owns, not to K W: every rank of a large job does this at start.
    """
    intervals = rank_intervals([numel] * count, rank=rank, world_size=world_size, stage=stage)
    cut = _Cut(numel, count, world_size=world_size, stage=stage)
    if cut.is_whole:
        size = max(1, workspace // numel)
        return [_whole_batch(intervals[i : i + size], numel) for i in range(0, len(intervals), size)]
    size = max(1, workspace // numel) * world_size
    ranges = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return [_exchange_batch(cut, intervals, parameters, rank=rank) for parameters in ranges]


class _Cut:
    """How ZeRO cuts `count` parameters of `numel` elements: which ranks hold which part of one of them."""

    def __init__(self, numel: int, count: int, *, world_size: int, stage: int):
        self.numel, self.world_size = numel, world_size
        piece = flat_size([numel] * count, world_size=world_size, stage=stage)
        # elements from one cut to the next, and from one parameter to the next where cuts run through all of them
        self.piece, self.stride = (piece // count, 0) if stage == 3 else (piece, numel)
        self.is_whole = self.piece % numel == 0 or self.piece >= (numel if stage == 3 else numel * count)

    def parts(self, index: int) -> list[tuple[int, int, int]]:
        """Return (rank, start, stop) of every part of parameter `index`, in order."""
        begin = index * self.stride
        end = begin + self.numel
        return [
            (rank, max(rank * self.piece, begin) - begin, min((rank + 1) * self.piece, end) - begin)
            for rank in range(begin // self.piece, -(-end // self.piece))
        ]


def _whole_batch(intervals: list[Interval], numel: int) -> MatrixBatch:
    first, count = intervals[0], len(intervals)
    local = slice(first.offset, first.offset + count * numel)
    return MatrixBatch(local, first=first.index, num_owned=count, numel=numel)


def _exchange_batch(cut: _Cut, intervals: list[Interval], parameters: range, *, rank: int) -> MatrixBatch:
    count, world_size = len(parameters), cut.world_size
    held = [iv for iv in intervals if iv.index in parameters]
    begin, end = (held[0].place.start, held[-1].place.stop) if held else (0, 0)
    # parameter i of the batch belongs to rank i*W//K: the first one of rank r is ceil(r K / W)
    first, last = (-(-r * count // world_size) for r in (rank, rank + 1))
    parts = sorted((r, k, a, b) for k in range(first, last) for r, a, b in cut.parts(parameters[k]))
    sends, receives = [0] * world_size, [0] * world_size
    for iv in held:
        sends[(iv.index - parameters.start) * world_size // count] += iv.size
    for sender, _, start, stop in parts:
        receives[sender] += stop - start
    return MatrixBatch(
        local=slice(begin, end),
        first=parameters.start + first,
        num_owned=last - first,
        numel=cut.numel,
        held=tuple(iv._replace(offset=iv.offset - begin) for iv in held),
        owned=tuple(Interval(k - first, start, stop, 0) for _, k, start, stop in parts),
        sends=sends,
        receives=receives,
    )


def _all_to_all(values: Tensor, *, sends: list[int], receives: list[int]) -> Tensor:
    """Return what all ranks sent to this one, by sender; parts may be uneven and empty. Works on gloo and NCCL."""
    received = values.new_empty(sum(receives))
    dist.all_to_all_single(received, values, output_split_sizes=receives, input_split_sizes=sends)
    return received


def _pack(values: Tensor, parts: Sequence[Interval]) -> Tensor:
    """Return the parts of `values` one after the other, without a copy where they lie so already."""
    if _consecutive([iv.offset for iv in parts], parts, values.numel()):
        return values.contiguous()
    return torch.cat([values[iv.place] for iv in parts]) if parts else values.new_empty(0)


def _unpack(values: Tensor, parts: Sequence[Interval], targets: Sequence[int], size: int) -> Tensor:
    """Return a tensor of `size` elements with the consecutive parts of `values` at `targets`, zero elsewhere."""
    if _consecutive(targets, parts, size):
        return values
    result = values.new_zeros(size)
    position = 0
    for iv, target in zip(parts, targets, strict=True):
        result[target : target + iv.size] = values[position : position + iv.size]
        position += iv.size
    return result


def _consecutive(offsets: Sequence[int], parts: Sequence[Interval], size: int) -> bool:
    """Return whether parts at these offsets tile [0, size) in order."""
    position = 0
    for offset, part in zip(offsets, parts, strict=True):
        if offset != position:
            return False
        position += part.size
    return position == size
