"""Normalizers: LayerNorm, RMSNorm, SSNorm, CRMSNorm, BHyT and DyT, and how a model builds them from its config.

Shapes: x (..., D) -> (..., D), in the dtype of x. Statistics are fp32 and are rounded to the dtype of x before the
gain is applied, which is Hugging Face's order. A norm is an ordinary module, `y = norm(x)`. Two norms of one block may
share a statistic (BHyT does): `y, carry = first(x, return_carry=True)`, then `second(x, carry)`; other norms carry
nothing. To add a norm: one class with its NORMS entry, one YAML in `configs/norm`, one test.
"""

import dataclasses
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osp.config import ModelConfig, NormConfig, UserError


class Carry(NamedTuple):
    """What BHyT's first norm of a block hands to the second: fp32, no gradient through `scale`."""

    variance: Tensor  # (..., 1) mean square of the block's input
    scale: Tensor  # (1,) (lambda / kappa)^2 of the first norm


class Norm(nn.Module):
    """Base of the norms: subclasses give `normalize`, and `final`, the key of the norm that goes before the head."""

    final: str | None = None  # None: the norm itself

    def normalize(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor, carry: Carry | None = None, *, return_carry: bool = False) -> Any:
        """y, or (y, carry) when `return_carry`."""
        y = self.normalize(x)
        return (y, None) if return_carry else y


class LayerNorm(Norm):
    """y = g * (x - mean) / sqrt(mean((x - mean)^2) + eps) + b; b only with `bias`, g and b only with `affine`.

    Ba et al. 2016 (arXiv 1607.06450); gain starts at `init`, bias at 0. eps is torch's default.
    """

    def __init__(
        self, hidden_size: int, *, eps: float = 1e-5, init: float = 1.0, affine: bool = True, bias: bool = False
    ):
        super().__init__()
        if bias and not affine:
            raise UserError("norm.bias=true needs norm.affine=true")
        self.eps, self.init = eps, init
        self.weight = nn.Parameter(torch.empty(hidden_size)) if affine else None
        self.bias = nn.Parameter(torch.empty(hidden_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, self.init)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def normalize(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        if self.weight is not None:
            y = y * self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class RMSNorm(Norm):
    """y = g * x / sqrt(mean(x^2) + eps), one gain per channel (none without `affine`), gains start at `init`.

    Zhang & Sennrich 2019 (arXiv 1910.07467), as in Hugging Face's LlamaRMSNorm.
    """

    def __init__(self, hidden_size: int, *, eps: float = 1e-6, init: float = 1.0, affine: bool = True):
        super().__init__()
        self.eps, self.init = eps, init
        self.weight = nn.Parameter(torch.empty(hidden_size)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, self.init)

    def normalize(self, x: Tensor) -> Tensor:
        y = _divide_by_rms(x, self.eps)
        return y if self.weight is None else y * self.weight.to(x.dtype)


class SSNorm(Norm):
    """Single-Scale RMSNorm: y = g * x / sqrt(mean(x^2) + eps) with ONE scalar gain g.

    OSP (arXiv 2506.19697, eq. 3) writes gamma * x / ||x||_2; g = gamma / sqrt(D), and g starts at 1 as in the authors'
    code. Without a gain per channel no channel is privileged by the norm. Under Muon the scalar takes the rule
    `normalized`: a step of +-0.2 times the learning rate.
    """

    def __init__(self, hidden_size: int, *, eps: float = 1e-6, init: float = 1.0):
        super().__init__()
        self.eps, self.init = eps, init
        self.weight = nn.Parameter(torch.empty(1))  # not 0-dim: DeepSpeed cannot broadcast a 0-dim parameter
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.init)

    def normalize(self, x: Tensor) -> Tensor:
        return _divide_by_rms(x, self.eps) * self.weight.to(x.dtype)


class CRMSNorm(Norm):
    """Compressed RMSNorm: y = x / sqrt((sum(x^2) + sum(x)^2) / (D + 1) + eps), optionally times a gain per channel.

    The RMSNorm of the zero-mean vector (x, -sum(x)) in D + 1 channels whose last channel is left out, hence equal to
    LayerNorm in D + 1 (Jiang et al. 2023, arXiv 2305.14858, eq. 5). For training the authors advise to keep the
    hidden size D, which then equals a Pre-LN model of D + 1. No gain by default, as in the paper.
    """

    def __init__(self, hidden_size: int, *, eps: float = 1e-5, init: float = 1.0, affine: bool = False):
        super().__init__()
        self.eps, self.init = eps, init
        self.weight = nn.Parameter(torch.empty(hidden_size)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, self.init)

    def normalize(self, x: Tensor) -> Tensor:
        wide = x.float()
        energy = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
        y = (wide * torch.rsqrt(energy / (x.shape[-1] + 1) + self.eps)).to(x.dtype)
        return y if self.weight is None else y * self.weight.to(x.dtype)


class DyT(Norm):
    """Dynamic tanh: y = g * tanh(alpha * x) + b; gain and bias per channel, alpha one learnable scalar.

    Zhu et al. 2025 (arXiv 2503.10622); g starts at `init`, b at 0, alpha at 0.5.
    """

    def __init__(self, hidden_size: int, *, init: float = 1.0, alpha: float = 0.5):
        super().__init__()
        self.init, self.initial_alpha = init, alpha
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.initial_alpha)
        nn.init.constant_(self.weight, self.init)
        nn.init.zeros_(self.bias)

    def normalize(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.alpha * x.float()).to(x.dtype)
        return y * self.weight.to(x.dtype) + self.bias.to(x.dtype)


class BHyT(Norm):
    """Bounded hyperbolic tanh: y = g * tanh(lambda * x / (kappa * s)), s^2 = mean(x^2) + eps.

    arXiv 2601.09719 and its code: one learnable scalar lambda per norm, gain per channel starting at `init`, no bias.
    By Chebyshev the argument stays in [-lambda, lambda] with probability 1 - kappa^-2. The first norm of a block
    measures s^2; the second takes it from the carry and adds what uniform attention over `seq_len` tokens contributes:
    s'^2 = s^2 + c * (lambda_first / kappa)^2, c = ||W_O W_V||_F^2 / (seq_len * D). c is `attention_gain`, which
    `refresh` recomputes from the weights; gradients flow through neither c nor lambda_first. A norm without a carry
    (alone, or before the head) measures.

    Its output starts with an RMS near lambda / kappa, several times below RMSNorm's. With `learnable_lambda=False`
    lambda is a buffer: stored, never trained.
    """

    final = "rmsnorm"  # the authors' pretraining scripts (last_layer_lam = 0.0)
    lam: Tensor
    attention_gain: Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-6,
        init: float = 1.0,
        lam: float = 1.0,
        kappa: float = 10.0,
        learnable_lambda: bool = True,
        seq_len: int | None = None,
    ):
        super().__init__()
        if not (lam > 0 and kappa > 0):
            raise UserError(f"norm.lam={lam} and norm.kappa={kappa}: both must be above 0")
        self.eps, self.init, self.initial_lam, self.kappa, self.seq_len = eps, init, lam, kappa, seq_len
        self.weight = nn.Parameter(torch.empty(hidden_size))
        if learnable_lambda:
            self.lam = nn.Parameter(torch.empty(1))
        else:
            self.register_buffer("lam", torch.empty(1))
        self.register_buffer("attention_gain", torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.init)
        with torch.no_grad():
            self.lam.fill_(self.initial_lam)
            self.attention_gain.zero_()

    def forward(self, x: Tensor, carry: Carry | None = None, *, return_carry: bool = False) -> Any:
        wide = x.float()
        if carry is None:
            variance = wide.square().mean(-1, keepdim=True)
        else:
            variance = carry.variance + self.attention_gain * carry.scale
        argument = wide * (torch.rsqrt(variance + self.eps) * (self.lam / self.kappa))
        y = torch.tanh(argument).to(x.dtype) * self.weight.to(x.dtype)
        if not return_carry:
            return y
        return y, Carry(variance, (self.lam.detach() / self.kappa).square())

    @torch.no_grad()
    def refresh(self, v_weight: Tensor, o_weight: Tensor, *, head_dim: int) -> None:
        """Recompute `attention_gain` of the norm that follows this attention.

        v_weight: (kv_heads * head_dim, D), o_weight: (D, heads * head_dim). A value head that several query heads
        share counts once for each of them.
        """
        assert self.seq_len is not None, "BHyT needs the sequence length it is trained for"
        hidden_size, value_size = o_weight.shape
        heads_per_value_head = value_size // v_weight.shape[0]
        v = v_weight.float().unflatten(0, (-1, head_dim)).repeat_interleave(heads_per_value_head, 0).flatten(0, 1)
        energy = (o_weight.float() @ v).square().sum()
        self.attention_gain.fill_(energy / (self.seq_len * hidden_size))


NORMS: dict[str, type[Norm]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "ssnorm": SSNorm,
    "crmsnorm": CRMSNorm,
    "bhyt": BHyT,
    "dyt": DyT,
}


def build_norm(name: str, hidden_size: int, **options: Any) -> Norm:
    """The normalizer `name` over `hidden_size` channels; `options` are the keywords of its class.

    Raises `UserError` for an unknown name or an option that this normalizer does not have.
    """
    if name not in NORMS:
        raise UserError(f"unknown norm {name!r}; choose from {sorted(NORMS)}")
    valid = _options(NORMS[name])
    for key in options:
        if key not in valid:
            raise UserError(f"norm.{key}={options[key]!r}: {name} has no such option; it has {sorted(valid)}")
    return NORMS[name](hidden_size, **options)


def block_norm(config: ModelConfig) -> Norm:
    """One norm of a block of the model that `config` describes."""
    return build_norm(config.norm.name, config.hidden_size, **_given(config.norm))


def final_norm(config: ModelConfig) -> Norm:
    """The norm before the head: `norm.final`, or the one that the source of `norm.name` uses there."""
    block = block_norm(config)
    name = config.norm.final or block.final or config.norm.name
    if name not in NORMS:
        raise UserError(f"norm.final={name!r}; choose from {sorted(NORMS)}")
    given = {key: value for key, value in _given(config.norm).items() if key in _options(NORMS[name])}
    return build_norm(name, config.hidden_size, **given)


def bound_warning(config: ModelConfig) -> str | None:
    """A sentence when BHyT's bound lambda / kappa < 1 / sqrt(num_hidden_layers) does not hold at the start, else None.

    Below the bound the output variance of every layer stays under that of LayerNorm scaling (arXiv 2601.09719).
    """
    norm = block_norm(config)
    if not isinstance(norm, BHyT):
        return None
    ratio, bound = norm.initial_lam / norm.kappa, 1 / math.sqrt(config.num_hidden_layers)
    if ratio < bound:
        return None
    return (
        f"norm.lam / norm.kappa = {ratio:.3g} is not below 1 / sqrt(num_hidden_layers) = {bound:.3g}: "
        "BHyT's variance bound does not hold at this depth"
    )


def _divide_by_rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis: statistics fp32 (fp64 of fp64), result in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _options(norm: type[Norm]) -> set[str]:
    return {p.name for p in inspect.signature(norm).parameters.values() if p.kind is p.KEYWORD_ONLY}


def _given(config: NormConfig) -> dict[str, Any]:
    """The options the user set."""
    values = dataclasses.asdict(config)
    return {key: value for key, value in values.items() if key not in ("name", "final") and value is not None}
