"""`PartitionedOptimizer`: the loop that applies update rules (rules.py) to the flat tensors that ZeRO hands out.

K matrices of one shape are one group, hence one flat tensor per rank, hence known intervals (zero.py). A step takes the
momentum of the local interval, collects whole matrices (views where ZeRO's pieces are whole already), applies the rule
to a stack of them, and sends the update back. With one rank the exchange is skipped.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from osp.optim.rules import Group, WholeRule
from osp.optim.zero import WORKSPACE, Piece, batches, flat_size, rank_intervals


class PartitionedOptimizer(torch.optim.Optimizer):
    """An optimizer for the groups of `build_groups`, each of which has become one flat fp32 tensor.

    Learning rates and the step number of Adam's bias correction come through `set_step`: the optimizer counts nothing.
    Before the first `set_step`, `step` is a no-op (DeepSpeed may take one on zero gradients while it starts).
    DeepSpeed enables its own Muon hook when the class name contains "muon", so this class avoids the word.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__([{**group, "lr": 0.0} for group in groups], defaults={})
        self._number, self._recording = 0, False
        self.pieces: list[Piece] = []  # of all groups in order; DeepSpeed replaces `param_groups` while it steps
        # This rank's sum of squares of the last recorded update, per role: with learning rate, without weight decay
        self.update_squares: dict[str, Tensor] = {}

    def bind(
        self, flats: Sequence[Tensor], *, stage: int, rank: int = 0, world_size: int = 1, average: bool = False
    ) -> None:
        """Take over `flats`, this rank's flat tensor of each group in ZeRO's layout, and create the state.

        average: keep a running average of the weights too, the state `average`; see osp.optim.average.
        State is created here, not at the first step, so that every rank has the same checkpoint keys from the start.
        """
        self.state.clear()
        self.pieces = []
        for group, flat in zip(self.param_groups, flats, strict=True):
            rule, numels = group["update_rule"], [shape.numel() for shape in group["shapes"]]
            layout = {"world_size": world_size, "stage": stage}
            assert flat.numel() == flat_size(numels, **layout), (group["names"], flat.numel(), numels, layout)
            work = batches(numels[0], len(numels), rank=rank, **layout) if isinstance(rule, WholeRule) else []
            names = (*rule.STATE_NAMES, *(["average"] if average else []))
            self.state[flat] = {name: torch.zeros_like(flat, dtype=torch.float32) for name in names}
            intervals = rank_intervals(numels, rank=rank, **layout)
            self.pieces.append(Piece(group, flat, self.state[flat], intervals, work))

    def set_step(self, number: int, factor: float, *, record: bool = False) -> None:
        """Prepare step `number`, from 1: learning rates become base times `factor`; `record` keeps `update_squares`."""
        assert number >= 1, number
        self._number, self._recording = number, record
        self.update_squares = {}
        for piece in self.pieces:
            piece.group["lr"] = piece.group["base_lr"] * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Apply every group's rule to its flat gradient. Collective where matrices are split between ranks."""
        assert closure is None, "a closure would need gradients that ZeRO has already reduced"
        if self._number == 0:
            return
        pieces = {id(piece.flat): piece for piece in self.pieces}
        for flat in (flat for group in self.param_groups for flat in group["params"]):
            piece = pieces[id(flat)]
            rule, role = piece.group["update_rule"], piece.group["role"]
            squares = rule.step(piece, flat.grad, number=self._number, record=self._recording)
            if squares is not None:
                self.update_squares[role] = self.update_squares.get(role, 0) + squares

    @torch.no_grad()
    def sample_average(self, share: float) -> None:
        """Move the running average by `share` of its distance to the master weights."""
        for piece in self.pieces:
            piece.state["average"].lerp_(piece.flat, share)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the master weights and their running average."""
        for piece in self.pieces:
            for average, flat in zip(piece.state["average"].split(WORKSPACE), piece.flat.split(WORKSPACE), strict=True):
                kept = average.clone()
                average.copy_(flat)
                flat.copy_(kept)

    @torch.no_grad()
    def parameter_squares(self) -> dict[str, Tensor]:
        """Return this rank's sum of squares of the master weights, per role."""
        squares: dict[str, Tensor] = {}
        for piece in self.pieces:
            # ZeRO-3 leaves padding uninitialized: sum over the intervals
            total = squares.setdefault(piece.group["role"], piece.flat.new_zeros(()))
            for interval in piece.intervals:
                total += torch.linalg.vector_norm(piece.flat[interval.place]).square()
        return squares

    def numels(self) -> dict[str, int]:
        """Return the number of elements per role, over all ranks."""
        counts: Counter[str] = Counter()
        for group in self.param_groups:
            counts[group["role"]] += sum(shape.numel() for shape in group["shapes"])
        return counts

    @torch.no_grad()
    def local_state(self) -> Iterator[tuple[str, int, int, dict[str, Tensor]]]:
        """Yield (name, start, stop, {"weight": ..., state...}) for every interval this rank holds.

        The tensors are 1-D fp32 views of elements [start, stop) of the flattened parameter: a checkpoint is copied in.
        """
        for piece in self.pieces:
            tensors = {"weight": piece.flat.detach(), **piece.state}
            for interval in piece.intervals:
                views = {name: tensor[interval.place] for name, tensor in tensors.items()}
                yield piece.group["names"][interval.index], interval.start, interval.stop, views
