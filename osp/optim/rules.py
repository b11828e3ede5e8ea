"""Update rules: one class per rule, registered in `RULES` under the name that `optimizer.rules.ROLE` uses.

To add a rule, subclass `ElementwiseRule` (it works on flat slices) or `WholeRule` (it needs whole parameters, which
ZeRO's ranks exchange) and add the class to `RULES`. Groups, optimizer state, checkpoints, the table printed at
start and the plan ask the class for everything else.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from osp.config import OptimizerConfig
from osp.errors import UserError
from osp.optim.muon import COEFFICIENTS, newton_schulz, newton_schulz_dtype, newton_schulz_flops, whole_shape
from osp.optim.zero import Piece

Group = dict[str, Any]  # a parameter group; its keys are listed at `osp.optim.groups.build_groups`
FP32 = 4  # bytes


class UpdateRule(ABC):
    """Turn gradients into updates of the parameters of a group."""

    STATE_NAMES: tuple[str, ...]  # fp32 tensors of the parameters' shapes, named as in checkpoints
    UPDATE_RMS: str  # RMS of an update divided by the learning rate, for the table printed at start
    NDIM: int | None = None  # dimensions a parameter must have; None: any
    TAKES_HEADS = False  # `optimizer.per_head` applies

    def __init__(self, config: OptimizerConfig) -> None:
        """Raises `UserError` for an option that the rule does not have."""
        self.config = config

    @property
    def base_lr(self) -> float:
        """Peak learning rate."""
        return self.config.lr


class ElementwiseRule(UpdateRule):
    """A rule that may see any slice of a parameter."""

    ELEMENT_BYTES = FP32  # that `step` allocates per element: here one update

    @abstractmethod
    def step(self, piece: Piece, grad: Tensor, *, number: int, record: bool) -> Tensor | None:
        """Update this rank's part of a group in place; `grad`, the clipped flat gradient, is not used afterwards.

        piece: the group, the flat master weights and state, and where parameters lie in them. number: of the step, from
        1. record: return the sum of squares of the update: learning rate and scale included, weight decay excluded.
        """


class WholeRule(UpdateRule):
    """OSP's rule for parameters that are updated as a whole; all parameters of a group have one shape.

    buf = g + momentum buf;  u = g + momentum buf (Nesterov's sum form) or buf;  p -= lr (scale direction(u) + decay p)
    """

    STATE_NAMES = ("momentum",)

    @abstractmethod
    def direction(self, stack: Tensor, group: Group) -> Tensor:
        """Return the update before scaling of a stack of whole parameters, in any dtype. stack: (k, *shape) fp32"""

    def scale(self, group: Group) -> float:
        """Return the factor of `direction` that gives an orthogonal matrix or a unit vector AdamW's RMS of 0.2."""
        return 0.2 * max(whole_shape(group["shapes"][0], group["heads"])) ** 0.5

    def flops(self, group: Group) -> int:
        """Return the floating point operations of one parameter's matrix products."""
        return 0

    def direction_bytes(self, group: Group, number: int, *, native_bf16: bool) -> tuple[int, int]:
        """Return the most bytes that `direction` allocates for `number` parameters, and the bytes of its result.

        Here two fp32 tensors, and one.
        """
        result = FP32 * number * group["shapes"][0].numel()
        return 2 * result, result


class Muon(WholeRule):
    """Orthogonalized momentum; see `osp.optim.muon`."""

    UPDATE_RMS = "0.2 (full rank)"  # 0.2 sqrt(max(m, n)) times an orthogonal matrix of RMS 1/sqrt(max(m, n))
    NDIM = 2
    TAKES_HEADS = True

    def __init__(self, config: OptimizerConfig) -> None:
        super().__init__(config)
        if (name := config.ns_coefficients) not in COEFFICIENTS:
            raise UserError(f"optimizer.ns_coefficients={name!r}: choose from {', '.join(COEFFICIENTS)}")

    def direction(self, stack: Tensor, group: Group) -> Tensor:
        config, heads = self.config, group["heads"]
        dtype = newton_schulz_dtype(stack.device, method=config.ns_method, choice=config.ns_dtype)
        if heads is not None:  # (k, m, n) -> (k, H, head_dim, n) or (k, H, m, head_dim)
            stack = stack.unflatten(heads.dim + 1, (heads.count, -1)).movedim(heads.dim + 1, 1)
        update = newton_schulz(stack, config.ns_steps, config.ns_method, config.ns_coefficients, dtype=dtype)
        return update if heads is None else update.movedim(1, heads.dim + 1).flatten(heads.dim + 1, heads.dim + 2)

    def flops(self, group: Group) -> int:
        heads, config = group["heads"], self.config
        flops = newton_schulz_flops(whole_shape(group["shapes"][0], heads), config.ns_steps, config.ns_method)
        return flops if heads is None else heads.count * flops

    def direction_bytes(self, group: Group, number: int, *, native_bf16: bool) -> tuple[int, int]:
        """Return the bytes of Newton-Schulz: X, next X, A, b A + c A^2; and of X."""
        config, heads = self.config, group["heads"]
        planned = "bf16" if native_bf16 else "fp32"
        choice = planned if config.ns_dtype == "auto" else config.ns_dtype
        size = newton_schulz_dtype(torch.device("meta"), method=config.ns_method, choice=choice).itemsize
        numel, count = group["shapes"][0].numel(), 1 if heads is None else heads.count
        grams = count * min(whole_shape(group["shapes"][0], heads)) ** 2
        return 2 * number * size * (numel + grams), number * size * numel


class Normalized(WholeRule):
    """Momentum divided by its norm: OSP's rule for 1-D parameters."""

    UPDATE_RMS = "0.2"  # 0.2 sqrt(d) times a unit vector
    NDIM = 1

    def direction(self, stack: Tensor, group: Group) -> Tensor:
        return stack / (torch.linalg.vector_norm(stack, dim=-1, keepdim=True) + 1e-8)


class AdamW(ElementwiseRule):
    """`torch.optim.AdamW`, fused, on the flat tensor."""

    STATE_NAMES = ("exp_avg", "exp_avg_sq")
    UPDATE_RMS = "<= ~1"
    ELEMENT_BYTES = 0  # the fused kernel updates in place

    @property
    def base_lr(self) -> float:
        return self.config.lr if self.config.adam_lr is None else self.config.adam_lr

    def step(self, piece: Piece, grad: Tensor, *, number: int, record: bool) -> Tensor | None:
        (beta1, beta2), eps = self.config.adam_betas, self.config.adam_eps
        lr, decay = piece.group["lr"], piece.group["weight_decay"]
        mean, square = piece.state["exp_avg"], piece.state["exp_avg_sq"]
        count = torch.full((), number - 1, dtype=torch.float32, device=grad.device)  # the kernel adds the 1
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay}
        modes = {"fused": True, "amsgrad": False, "maximize": False}
        adamw([piece.flat], [grad], [mean], [square], [], [count], **modes, **options)
        if not record:
            return None
        # the fused kernel does not return the update, so it is computed a second time
        denominator = (square / (1 - beta2**number)).sqrt_().add_(eps)
        return torch.linalg.vector_norm(mean / denominator).square() * (lr / (1 - beta1**number)) ** 2


RULES: dict[str, type[UpdateRule]] = {"muon": Muon, "normalized": Normalized, "adamw": AdamW}
