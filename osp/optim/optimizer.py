"""`PartitionedOptimizer`: the loop that applies update rules (rules.py) to the flat tensors that ZeRO hands out.

K matrices of one shape are one group, hence one flat tensor per rank, hence known intervals (zero.py). A step takes the
momentum of the local intervals of all groups, collects whole matrices in one exchange (views where ZeRO's pieces are
whole already), applies each group's rule to a stack of them, and sends the updates back.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from osp.optim.rules import Group, WholeRule
from osp.optim.zero import WORKSPACE, Piece, Round, Whole, flat_size, plan_rounds, rank_intervals


def momentum_pass(grad: Tensor, buf: Tensor, out: Tensor, clip: float, momentum: float, nesterov: bool) -> None:
    """buf <- clip grad + momentum buf;  out <- clip grad + momentum buf (Nesterov's sum form) or buf."""
    torch.mul(grad, clip, out=out)
    buf.mul_(momentum).add_(out)
    if nesterov:
        out.add_(buf, alpha=momentum)
    else:
        out.copy_(buf)


def update_pass(p: Tensor, update: Tensor, keep: float, rate: Tensor) -> None:
    """p <- keep p + rate update, in the dtype of p. rate: 0-dim; as a number it would be compiled in."""
    p.mul_(keep).addcmul_(update, rate)


def whole_groups(groups: Sequence[Group]) -> list[Group]:
    """Return the groups with a `WholeRule`, in order: `Share.group` counts them."""
    return [group for group in groups if isinstance(group["update_rule"], WholeRule)]


def rank_rounds(groups: Sequence[Group], *, rank: int, world_size: int, stage: int) -> list[Round]:
    """Return the work of one rank on the groups with a `WholeRule`."""
    sizes = [
        Whole(group["shapes"][0].numel(), len(group["shapes"]), max(group["update_rule"].flops(group), 1))
        for group in whole_groups(groups)
    ]
    return plan_rounds(sizes, rank=rank, world_size=world_size, stage=stage)


class PartitionedOptimizer(torch.optim.Optimizer):
    """An optimizer for the groups of `build_groups`, each of which has become one flat fp32 tensor.

    Learning rates and the step number of Adam's bias correction come through `set_step`: the optimizer counts nothing.
    Before the first `set_step`, `step` is a no-op (DeepSpeed may take one on zero gradients while it starts).
    DeepSpeed calls `step` once for each group and takes the gradient back afterwards. Gradients are kept until the last
    group has its own, so that matrices of all groups travel together. compiled: fuse elementwise passes of whole
    parameters by torch.compile, which saves half their memory traffic.
    DeepSpeed enables its own Muon hook when the class name contains "muon", so this class avoids the word.
    """

    def __init__(self, groups: Sequence[Group], *, compiled: bool = False) -> None:
        super().__init__([{**group, "lr": 0.0} for group in groups], defaults={})
        self._number, self._clip, self._recording = 0, 1.0, False
        self._grads: dict[int, Tensor] = {}  # by id of the flat weights, until all are there
        wrap = functools.partial(torch.compile, dynamic=True) if compiled else lambda function: function
        self._momentum_pass, self._update_pass = wrap(momentum_pass), wrap(update_pass)
        self.pieces: list[Piece] = []  # of all groups in order; DeepSpeed replaces `param_groups` while it steps
        self.rounds: list[Round] = []  # of the groups with a `WholeRule`, numbered in order
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
            names = (*rule.STATE_NAMES, *(["average"] if average else []))
            self.state[flat] = {name: torch.zeros_like(flat, dtype=torch.float32) for name in names}
            intervals = rank_intervals(numels, rank=rank, **layout)
            self.pieces.append(Piece(group, flat, self.state[flat], intervals))
        self.rounds = rank_rounds(self.param_groups, rank=rank, world_size=world_size, stage=stage)

    def set_step(self, number: int, factor: float, *, clip: float = 1.0, record: bool = False) -> None:
        """Prepare step `number`, from 1: learning rates become base times `factor`, gradients are multiplied by `clip`.

        `record` keeps `update_squares`.
        """
        assert number >= 1, number
        self._number, self._clip, self._recording = number, clip, record
        self.update_squares = {}
        for piece in self.pieces:
            piece.group["lr"] = piece.group["base_lr"] * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Apply every group's rule, once all have a gradient. Collective where matrices are split between ranks."""
        assert closure is None, "a closure would need gradients that ZeRO has already reduced"
        if self._number == 0:
            return
        self._grads |= {id(flat): flat.grad for group in self.param_groups for flat in group["params"]}
        if len(self._grads) < len(self.pieces):
            return
        whole = []
        for piece in self.pieces:
            rule, grad = piece.group["update_rule"], self._grads[id(piece.flat)]
            if isinstance(rule, WholeRule):
                whole.append((piece, grad))
                continue
            if self._clip != 1:
                grad.mul_(self._clip)
            self._record(piece, rule.step(piece, grad, number=self._number, record=self._recording))
        for work in self.rounds:
            self._take(work, whole)
        self._grads.clear()

    def _take(self, work: Round, whole: Sequence[tuple[Piece, Tensor]]) -> None:
        """Update the parameters of a round. Collective, unless every rank holds whole ones."""
        members = [(share, *whole[share.group]) for share in work.shares]
        values = members[0][1].flat.new_empty(sum(share.num_held for share in work.shares))
        parts = values.split([share.num_held for share in work.shares])
        for (share, piece, grad), part in zip(members, parts, strict=True):
            config, buf = piece.group["update_rule"].config, piece.state["momentum"][share.local]
            self._momentum_pass(grad[share.local], buf, part, self._clip, config.momentum, config.nesterov)
        updates = []
        for (_, piece, _), stack in zip(members, work.collect(values), strict=True):
            group = piece.group
            updates.append(group["update_rule"].direction(stack.view(-1, *group["shapes"][0]), group))
        for (share, piece, _), update in zip(members, work.distribute(updates), strict=True):
            group, lr = piece.group, piece.group["lr"]
            rate = -lr * group["update_rule"].scale(group)
            weights = piece.flat[share.local].view(update.shape)
            rates = 1 - lr * group["weight_decay"], torch.full((), rate, device=update.device)
            self._update_pass(weights, update, *rates)
            if self._recording:
                self._record(piece, torch.linalg.vector_norm(update, dtype=torch.float32).square() * rate**2)

    def _record(self, piece: Piece, squares: Tensor | None) -> None:
        if squares is not None:
            role = piece.group["role"]
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
