"""Normalizers: LayerNorm, RMSNorm, SSNorm, CRMSNorm, BHyT, DyT and Derf.

Every norm maps x (..., D) to (..., D) in the dtype of x. The division by a statistic, or the multiplication by a slope,
is fp32 (fp64 for fp64) and is rounded to the dtype of x before tanh and gain, in Hugging Face's order. The two norms of
a block may share a statistic, as BHyT does: `y, carry = first(x, return_carry=True)`, then `second(x, carry)`.

To add a norm, write one class with its `NORMS` entry, one YAML in `configs/norm` and one test. The class attributes of
`Norm` tell the rest of the project what it needs to know.

Options of the block (D channels, layers l counted from 1):
- `norm.placement=peri` (Peri-LN, arXiv 2502.02732): x + norm_out(f(norm_in(x))), so that the residual stream grows
  linearly with depth. The optional norm of the embedding in that paper is left out.
- `norm.lns=true` (LayerNorm scaling, arXiv 2502.05795): the outputs of the norms of layer l, except the final norm, are
  scaled by 1 / sqrt(l).
- `qk_norm=true`: SSNorm in a model of SSNorms, otherwise RMSNorm, normalizes queries and keys over the K channels of
  each head before RoPE, with one gain for all heads (as in Qwen3 and OLMo 2). It bounds attention logits by
  g_q g_k sqrt(K), so larger learning rates stay stable.
- `ffn_norm=true`: the same choice of norm over the channels of the input of down_proj (Magneto's Sub-LN, arXiv
  2210.06423; `ffn_sub_norm` of BitNet b1.58). Its gain starts at the RMS of this input without the norm in a model of
  initial deviation 1/sqrt(D), so that training starts from blocks of the same strength.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp.errors import UserError
from osp.model.norm_function import Divided, upcast


class Carry(NamedTuple):
    """Statistics that the first BHyT norm of a block passes to the second, fp32."""

    variance: Tensor  # (..., 1) mean square of the block's input
    scale: Tensor  # (1,) (lambda / kappa)^2 of the first norm, and its output scale squared


class Norm(nn.Module):
    """Base class of the norms: subclasses define `normalize`, and class attributes that describe the norm to others."""

    final: ClassVar[str | None] = None  # key of the norm before the head; None: the norm itself
    inner: ClassVar[str] = "rmsnorm"  # key of the norm of heads and of the FFN in a model of these norms
    # Why the norm is no RMSNorm, as a clause. None: it is one, with an `eps` and perhaps gains. Then a stock Llama
    # computes it, its gains fold into the next matrix, and a rotation of the residual stream passes through it.
    not_rmsnorm: ClassVar[str | None] = "it is not an RMSNorm"
    # How a norm that can be converted treats the mean of its input; norms that treat it alike are interchangeable.
    mean: ClassVar[str | None] = None
    one_gain: ClassVar[bool] = False  # one gain for all channels
    refreshes = False  # whether `refresh` derives statistics from weights
    output_scale = 1.0  # of LayerNorm scaling

    def __init__(self, **initial: float) -> None:
        """initial: initial values of parameters and buffers by name, other than 1 for `weight` and 0 for `bias`.

        A subclass creates its parameters afterwards, and then calls `reset_parameters`.
        """
        super().__init__()
        self.initial = {"weight": 1.0, "bias": 0.0, **initial}
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None

    def normalize(self, x: Tensor) -> Tensor:
        """Return the normalized x (..., D) in the dtype of x."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set parameters and buffers to their initial values."""
        for name, tensor in self.state_dict().items():
            tensor.fill_(self.initial[name])

    def refresh(self, v_weight: Tensor, o_weight: Tensor, *, head_dim: int) -> None:
        """Derive statistics from the weights of the attention before the norm; see `BHyT`."""

    def forward(self, x: Tensor, carry: Carry | None = None, *, return_carry: bool = False) -> Any:
        """Return y, or (y, carry) with `return_carry`."""
        y = self._scaled(self.normalize(x))
        return (y, None) if return_carry else y

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.output_scale == 1.0 else y * self.output_scale


class LayerNorm(Norm):
    """y = g * (x - mean) / sqrt(mean((x - mean)^2) + eps) + b; b only with `bias`, g and b only with `affine`.

    Ba et al. 2016 (arXiv 1607.06450); gain starts at `init`, bias at 0. eps is torch's default.
    """

    not_rmsnorm = "it subtracts the mean"
    mean = "subtracts the mean"

    def __init__(
        self, hidden_size: int, *, eps: float = 1e-5, init: float = 1.0, affine: bool = True, bias: bool = False
    ):
        super().__init__(weight=init)
        if bias and not affine:
            raise UserError("norm.bias=true needs norm.affine=true")
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size)) if affine else None
        self.bias = nn.Parameter(torch.empty(hidden_size)) if bias else None
        self.reset_parameters()

    def normalize(self, x: Tensor) -> Tensor:
        # torch's function is fused on every device and keeps only its input for backward
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)


class RMSNorm(Norm):
    """y = g * x / sqrt(mean(x^2) + eps), one gain per channel (none without `affine`), starting at `init`.

    Zhang & Sennrich 2019 (arXiv 1910.07467), as in Hugging Face's LlamaRMSNorm.
    """

    not_rmsnorm = None
    mean = "keeps the mean"

    def __init__(self, hidden_size: int, *, eps: float = 1e-6, init: float = 1.0, affine: bool = True):
        super().__init__(weight=init)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size)) if affine else None
        self.reset_parameters()

    def normalize(self, x: Tensor) -> Tensor:
        return Divided.apply(x, None, None, self.weight, self.eps)[0]


class SSNorm(RMSNorm):
    """Single-Scale RMSNorm: y = g * x / sqrt(mean(x^2) + eps) with ONE scalar gain g.

    OSP (arXiv 2506.19697, eq. 3) writes gamma * x / ||x||_2 with gamma = g sqrt(D); g starts at 1 as in the authors'
    code. Without a gain per channel the norm privileges no channel. With Muon the scalar is trained by the rule
    `normalized`: a step of +-0.2 times the learning rate.
    """

    inner = "ssnorm"
    one_gain = True

    def __init__(self, hidden_size: int, *, eps: float = 1e-6, init: float = 1.0):
        super().__init__(1, eps=eps, init=init)  # (1,), because DeepSpeed cannot broadcast a 0-dim parameter


class CRMSNorm(RMSNorm):
    """Compressed RMSNorm: y = x / sqrt((sum(x^2) + sum(x)^2) / (D + 1) + eps), optionally times a gain per channel.

    This is the RMSNorm of the zero-mean vector (x, -sum(x)) of D + 1 channels without its last channel, hence equal to
    LayerNorm in D + 1 channels (Jiang et al. 2023, arXiv 2305.14858, eq. 5). A model of hidden size D thus equals a
    Pre-LN model of D + 1. No gain by default, as in the paper.
    """

    not_rmsnorm = "its statistic holds a channel that is not stored"
    mean = "counts a channel that is not stored"

    def __init__(self, hidden_size: int, *, eps: float = 1e-5, init: float = 1.0, affine: bool = False):
        super().__init__(hidden_size, eps=eps, init=init, affine=affine)

    def normalize(self, x: Tensor) -> Tensor:
        wide = upcast(x)
        energy = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
        y = (wide * torch.rsqrt(energy / (x.shape[-1] + 1) + self.eps)).to(x.dtype)
        return y if self.weight is None else y * self.weight.to(x.dtype)


class DyT(Norm):
    """Dynamic tanh: y = g * tanh(alpha * x) + b; gain and bias per channel, alpha one learnable scalar.

    Zhu et al. 2025 (arXiv 2503.10622); g starts at `init`, b at 0, alpha at `alpha`. In Llamas the authors start the
    norms before attention at a larger alpha than the others (7B: 0.8 and 0.2; `alpha_attention` and `alpha`) and put a
    learnable scalar sqrt(D) after the embedding (`norm.embed_scale`). Because no statistic fixes the scale of x, DyT is
    reported to need a lower learning rate than RMSNorm (arXiv 2601.22966: 5e-4 at 2B).
    """

    not_rmsnorm = "it is a tanh without a statistic"
    shifts = False
    squash = staticmethod(torch.tanh)
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        *,
        init: float = 1.0,
        alpha: float = 0.5,
        alpha_attention: float | None = None,
        before_attention: bool = False,
    ):
        alpha = alpha_attention if before_attention and alpha_attention is not None else alpha
        super().__init__(weight=init, alpha=alpha, shift=0.0)
        self.alpha = nn.Parameter(torch.empty(1))
        self.shift = nn.Parameter(torch.empty(1)) if self.shifts else None
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def normalize(self, x: Tensor) -> Tensor:
        argument = self.alpha * upcast(x)
        if self.shift is not None:
            argument = argument + self.shift
        return self.squash(argument.to(x.dtype)) * self.weight.to(x.dtype) + self.bias.to(x.dtype)


class Derf(DyT):
    """Dynamic erf: y = g * erf(alpha * x + s) + b; the shift s is a learnable scalar that starts at 0.

    arXiv 2512.10938, whose language models are GPT-2 only. The notes on alpha and learning rates in `DyT` apply.
    """

    not_rmsnorm = "it is an error function without a statistic"
    shifts = True
    squash = staticmethod(torch.erf)


class BHyTStar(Norm):
    """Bounded hyperbolic tanh, exact: y = g * tanh(lambda * x / (kappa * s)), s^2 = mean(x^2) + eps at every norm.

    BHyT* of arXiv 2601.09719 as in its code (`bhytstar`, which assumes mean 0): one learnable scalar lambda per norm,
    gain per channel starting at `init`, no bias. By Chebyshev the argument stays in [-lambda, lambda] with probability
    1 - kappa^-2.

    The output starts with an RMS near lambda / kappa, several times below that after RMSNorm, so learning rates and
    initial values tuned for RMSNorm do not carry over.
    """

    not_rmsnorm = "it bounds activations with a tanh"
    final = "rmsnorm"  # the authors' pretraining scripts (last_layer_lam = 0.0)
    weight: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-6,
        init: float = 1.0,
        lam: float = 1.0,
        kappa: float = 10.0,
        lam_post: float | None = None,
        after_attention: bool = False,
    ):
        """after_attention: whether it is the second norm of its block."""
        super().__init__(weight=init, lam=lam_post if after_attention and lam_post is not None else lam)
        self.eps = eps
        self.kappa = kappa
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.lam = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def approximated(self, carry: Carry | None) -> Tensor | None:
        """Return the mean square (..., 1) approximated from the first norm of the block, fp32; None: measure it."""
        return None

    def carry(self, variance: Tensor) -> Carry | None:
        """Return what the second norm of the block needs."""
        return None

    def forward(self, x: Tensor, carry: Carry | None = None, *, return_carry: bool = False) -> Any:
        argument, variance = Divided.apply(x, self.approximated(carry), self.lam / self.kappa, None, self.eps)
        y = self._scaled(torch.tanh(argument) * self.weight.to(x.dtype))
        return (y, self.carry(variance)) if return_carry else y


class BHyT(BHyTStar):
    """`BHyTStar` that approximates the variance after attention instead of measuring it (arXiv 2601.09719).

    The first norm of a block passes on v, the mean square of its input. The second takes v + a for the variance, where
    a = c * (lambda_first / kappa)^2 with c = ||W_O W_V||_F^2 / (seq_len * D) is the contribution of uniform attention
    over `seq_len` tokens. LayerNorm scaling divides a by l. c is the buffer `attention_gain`, which `refresh` computes
    from the weights; no gradient flows through c and the first norm's lambda. c ignores biases and the 1 of
    `attention.off_by_one`, and treats gates of attention as open. The norm before the head has no carry and measures.
    """

    not_rmsnorm = "it bounds activations with a tanh and shares a statistic between two norms"

    def __init__(self, hidden_size: int, *, seq_len: int | None = None, after_attention: bool = False, **options: Any):
        super().__init__(hidden_size, after_attention=after_attention, **options)
        self.seq_len, self.refreshes = seq_len, after_attention
        if after_attention:
            self.initial["attention_gain"] = 0.0
            self.attention_gain = nn.Buffer(torch.empty(1))
            self.reset_parameters()

    def approximated(self, carry: Carry | None) -> Tensor | None:
        return carry.variance + self.attention_gain * carry.scale if carry and self.refreshes else None

    def carry(self, variance: Tensor) -> Carry:
        return Carry(variance, (self.lam.detach() * (self.output_scale / self.kappa)).square())

    @torch.no_grad()
    def refresh(self, v_weight: Tensor, o_weight: Tensor, *, head_dim: int) -> None:
        """Recompute `attention_gain` of the norm that follows this attention.

        v_weight: (G K, D), o_weight: (D, H K). A value head counts once for each query head that shares it.
        """
        assert self.seq_len is not None, "BHyT needs the sequence length it is trained for"
        hidden_size, value_size = o_weight.shape
        heads_per_value_head = value_size // v_weight.shape[0]
        v = v_weight.float().unflatten(0, (-1, head_dim)).repeat_interleave(heads_per_value_head, 0).flatten(0, 1)
        self.attention_gain.fill_((o_weight.float() @ v).square().sum() / (self.seq_len * hidden_size))


NORMS: dict[str, type[Norm]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "ssnorm": SSNorm,
    "crmsnorm": CRMSNorm,
    "bhyt": BHyT,
    "bhyt_star": BHyTStar,
    "dyt": DyT,
    "derf": Derf,
}
