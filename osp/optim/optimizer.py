"""`PartitionedOptimizer`: Muon, OSP's rule for gains and AdamW over the flat tensors that ZeRO hands out.

K matrices of one shape are one group, hence one flat tensor per rank, hence known intervals (zero.py). A step takes the
momentum where the interval lies, makes matrices whole (a view where ZeRO's pieces are whole already), applies the
mathematics (muon.py) to a stack of them, and brings the update back. World size 1 is the case without the exchange.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from osp.optim.groups import Group
from osp.optim.muon import (
    merge_heads,
    newton_schulz,
    newton_schulz_dtype,
    split_heads,
    unit_vectors,
    update_scale,
    whole_shape,
)
from osp.optim.zero import Batch, Interval, batches, flat_size, rank_intervals

STATE_NAMES = {"muon": ("momentum",), "normalized": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a group."""

    flat: Tensor
    intervals: list[Interval]
    batches: list[Batch]  # empty for adamw, which works element by element


class PartitionedOptimizer(torch.optim.Optimizer):
    """An optimizer for the groups of `build_groups`, each of which has become one flat fp32 tensor.

    Rates and Adam's bias correction come from outside, through `set_step`: nothing counts steps in here. Until the
    first `set_step` a `step` changes nothing (DeepSpeed may take one on zero gradients while it starts).
    The class is not called after Muon: DeepSpeed runs its own Muon on optimizers that are (design.md).
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__([{**group, "lr": 0.0} for group in groups], defaults={})
        self._number = 0
        self._recording = False
        self._pieces: list[Piece] = []
        self._squares: dict[str, Tensor] = {}
        self._sources = list(self.param_groups)  # DeepSpeed replaces `param_groups` while it steps

    def bind(self, flats: Sequence[Tensor], *, stage: int, rank: int = 0, world_size: int = 1) -> None:
        """Take over `flats`, this rank's flat tensor of each group in ZeRO's layout, and create their state.

        State is created here, not at the first step, so that every rank has the same checkpoint keys from the start.
        """
        assert len(flats) == len(self._sources), (len(flats), len(self._sources))
        self.state.clear()
        self._pieces = []
        for group, flat in zip(self._sources, flats, strict=True):
            numels = [torch.Size(shape).numel() for shape in group["shapes"]]
            layout = {"world_size": world_size, "stage": stage}
            assert flat.numel() == flat_size(numels, **layout), (group["names"], flat.numel(), numels, layout)
            work = [] if group["rule"] == "adamw" else batches(numels[0], len(numels), rank=rank, **layout)
            self._pieces.append(Piece(flat, rank_intervals(numels, rank=rank, **layout), work))
            self.state[flat] = {
                name: torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
                for name in STATE_NAMES[group["rule"]]
            }

    def set_step(self, number: int, factor: float, *, record: bool = False) -> None:
        """Prepare optimizer step `number`, counted from 1: every rate becomes its base times `factor`.

        record: keep the sum of squares of the update for `update_squares`.
        """
        assert number >= 1, number
        self._number, self._recording = number, record
        self._squares = {}
        for group in self._sources:
            group["lr"] = group["base_lr"] * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None, "a closure would need gradients that ZeRO has already reduced"
        if self._number == 0:
            return
        work = {id(piece.flat): piece for piece in self._pieces}
        for group in self.param_groups:
            for flat in group["params"]:
                squares = _RULES[group["rule"]](
                    work[id(flat)], flat.grad, self.state[flat], group, number=self._number, record=self._recording
                )
                if squares is not None:
                    total = self._squares.get(group["role"])
                    self._squares[group["role"]] = squares if total is None else total + squares

    def update_squares(self) -> dict[str, Tensor]:
        """This rank's sum of squares, per role, of the last recorded update: rate and scale included, decay not."""
        return self._squares

    @torch.no_grad()
    def parameter_squares(self) -> dict[str, Tensor]:
        """This rank's sum of squares of the master weights, per role."""
        squares: dict[str, Tensor] = {}
        for group, piece in zip(self._sources, self._pieces, strict=True):
            # ZeRO-3 leaves padding uninitialized: sum over the intervals
            total = squares.setdefault(group["role"], piece.flat.new_zeros(()))
            for iv in piece.intervals:
                total += torch.linalg.vector_norm(piece.flat[iv.place]).square()
        return squares

    def numels(self) -> dict[str, int]:
        """Number of elements per role, over all ranks."""
        counts: dict[str, int] = {}
        for group in self._sources:
            counts[group["role"]] = counts.get(group["role"], 0) + sum(torch.Size(s).numel() for s in group["shapes"])
        return counts

    def rates(self) -> dict[str, float]:
        """The learning rate of each role at this step."""
        return {group["role"]: group["lr"] for group in self._sources}

    def intervals(self) -> list[list[tuple[str, Interval]]]:
        """Per group, in the order of its flat tensor: each parameter this rank holds a part of, and which part."""
        return [
            [(group["names"][interval.index], interval) for interval in piece.intervals]
            for group, piece in zip(self._sources, self._pieces, strict=True)
        ]

    @torch.no_grad()
    def local_state(self) -> Iterator[tuple[str, int, int, dict[str, Tensor]]]:
        """(name, start, stop, {"weight": ..., state...}) for every interval this rank holds.

        The tensors are writable 1-D fp32 views of elements [start, stop) of the flattened parameter: copying into them
        loads a checkpoint.
        """
        for group, piece in zip(self._sources, self._pieces, strict=True):
            tensors = {"weight": piece.flat.detach(), **self.state[piece.flat]}
            for iv in piece.intervals:
                yield group["names"][iv.index], iv.start, iv.stop, {k: t[iv.place] for k, t in tensors.items()}


def _structured_step(
    piece: Piece, grad: Tensor, state: dict[str, Tensor], group: Group, *, number: int, record: bool
) -> Tensor | None:
    """OSP's rule for parameters that are updated as wholes; grad is not changed.

    buf = g + momentum buf;  u = g + momentum buf (Nesterov's sum form) or buf;  p -= lr (scale direction(u) + decay p)
    """
    shape = group["shapes"][0]
    rate, scale = group["lr"], update_scale(whole_shape(shape, group["heads"]))
    squares = None
    for batch in piece.batches:
        g, buf, p = grad[batch.local], state["momentum"][batch.local], piece.flat[batch.local]
        buf.mul_(group["momentum"]).add_(g)
        u = torch.add(g, buf, alpha=group["momentum"]) if group["nesterov"] else buf
        update = batch.distribute(_direction(batch.collect(u).view(-1, *shape), group).flatten(1))
        p.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * scale)
        if record:
            total = torch.linalg.vector_norm(update, dtype=torch.float32).square() * (rate * scale) ** 2
            squares = total if squares is None else squares + total
    return squares


def _direction(stack: Tensor, group: Group) -> Tensor:
    """The update before scaling of a stack of whole parameters. stack: (k, *shape)"""
    if group["rule"] == "normalized":
        return unit_vectors(stack)
    method, heads = group["ns_method"], group["heads"]
    dtype = newton_schulz_dtype(stack.device, method=method, choice=group["ns_dtype"])
    matrices = stack if heads is None else split_heads(stack, heads)
    matrices = newton_schulz(matrices, group["ns_steps"], method, group["ns_coefficients"], dtype=dtype)
    return matrices if heads is None else merge_heads(matrices, heads)


def _adamw_step(
    piece: Piece, grad: Tensor, state: dict[str, Tensor], group: Group, *, number: int, record: bool
) -> Tensor | None:
    """torch's fused AdamW on the flat tensor; the fused kernel leaves no trace of the update, so it is taken again."""
    (beta1, beta2), rate, eps = group["betas"], group["lr"], group["eps"]
    count = torch.full((), number - 1, dtype=torch.float32, device=grad.device)  # the kernel adds the 1
    adamw(
        [piece.flat],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [count],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=rate,
        weight_decay=group["weight_decay"],
        eps=eps,
        maximize=False,
    )
    if not record:
        return None
    denominator = (state["exp_avg_sq"] / (1 - beta2**number)).sqrt_().add_(eps)
    return torch.linalg.vector_norm(state["exp_avg"] / denominator).square() * (rate / (1 - beta1**number)) ** 2


_RULES = {"muon": _structured_step, "normalized": _structured_step, "adamw": _adamw_step}
