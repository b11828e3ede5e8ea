"""The shape of a model as dataclasses: every key of the tables `model`, `norm` and `attention`, and their checks."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field

from osp.errors import UserError
from osp.schema import Count, Finite, Int, NotNegative, Positive

Role = Literal["matrix", "embed_proj", "gain", "embedding", "head"]
ROLES: tuple[Role, ...] = get_args(Role)


class Heads(NamedTuple):
    """Layout of an attention matrix: `count` matrices of one head each, concatenated along dimension `dim`."""

    count: int
    dim: int  # 0: output side, shape (heads * head_dim, D); 1: input side, shape (D, heads * head_dim)


@dataclass(frozen=True)
class NormConfig:
    """The normalizer of a model. `None` selects the default of its class in `osp.model.norms`.

    An option that the chosen norm does not have is refused.
    """

    name: str = "ssnorm"  # a key of osp.model.norms.NORMS
    final: str | None = None  # normalizer before the head; None: as in the paper of `name`
    placement: Literal["pre", "peri"] = "pre"  # peri: a second norm after each sublayer, before the residual addition
    lns: bool = False  # scale the norms of layer l, counted from 1, by 1 / sqrt(l)
    embed_scale: bool = False  # a learnable scalar after the embedding, initially sqrt(hidden_size) (DyT)
    eps: NotNegative | None = None  # added to the mean square or the variance, for stability
    init: Finite | None = None  # initial value of every gain
    affine: bool | None = None  # layernorm, rmsnorm, crmsnorm: one gain per channel
    bias: bool | None = None  # layernorm: a learnable bias per channel
    alpha: Finite | None = None  # dyt, derf: initial slope; None: 0.5, for derf with muon 0.3 (arXiv 2604.01563)
    alpha_attention: Finite | None = None  # dyt, derf: initial slope of norms before attention; None: alpha
    lam: Positive | None = None  # bhyt: initial lambda, the bound of the tanh argument
    lam_post: Positive | None = None  # bhyt: initial lambda of norms after attention; None: lam
    kappa: Positive | None = None  # bhyt: Chebyshev factor, standard deviations within the bound
    seq_len: Count | None = None  # bhyt: sequence length in the variance formula; None: train.seq_len


@dataclass(frozen=True)
class AttentionConfig:
    gate: bool = False  # elementwise sigmoid gate on the input of o_proj (arXiv 2505.06708)
    off_by_one: bool = False  # softmax with denominator 1 + sum exp: a head may attend to nothing
    logit_cap: Positive | None = None  # replace each logit s by cap * tanh(s / cap) (arXiv 2408.00118); null: do not
    v_scale: Positive = 1.0  # factor of the gradient of the values, in training (arXiv 2603.17771)
    value_gate: bool = False  # sigmoid gate on each value, computed from the value (arXiv 2510.09017)


@dataclass(frozen=True)
class RopeScaling:
    """RoPE frequencies for longer contexts, as in Hugging Face's `rope_scaling`; see `osp.model.attention`.

    `linear`: divide every frequency by `factor`.

    `llama3` (Llama 3.1): divide by `factor` the frequencies with fewer than `low_freq_factor` turns in
    `original_max_position_embeddings` tokens, keep those with more than `high_freq_factor`, and interpolate between.
    """

    rope_type: Literal["linear", "llama3"]  # which of the two formulas
    factor: Annotated[Positive, Field(ge=1e-6)]  # divisor of the frequencies
    low_freq_factor: Positive = 1.0  # llama3: turns below which a frequency is divided
    high_freq_factor: Positive = 4.0  # llama3: turns above which a frequency is kept
    original_max_position_embeddings: Count = 8192  # llama3: context in tokens in which turns are counted


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama. Names are from Hugging Face's `LlamaConfig`, except `embed_proj` and all fields below it."""

    vocab_size: Annotated[Int, Field(ge=1, le=2**24)] = 4096  # tokens of the embedding and the head
    hidden_size: Annotated[Int, Field(ge=1, le=2**20)] = 256  # channels of the residual stream
    intermediate_size: Annotated[Int, Field(ge=1, le=2**24)] = 768  # channels of the MLP
    num_hidden_layers: Annotated[Int, Field(ge=1, le=1000)] = 6  # number of blocks
    num_attention_heads: Annotated[Int, Field(ge=1, le=2**20)] = 4  # query heads
    # Heads of keys and values; None: num_attention_heads.
    num_key_value_heads: Annotated[Int, Field(ge=1, le=2**20)] | None = None
    # Channels of a head; None: hidden_size / num_attention_heads.
    head_dim: Annotated[Int, Field(ge=1, le=2**20)] | None = None
    max_position_embeddings: Annotated[Int, Field(ge=1, le=2**24)] = 2048  # longest sequence in tokens
    rope_theta: Annotated[Positive, Field(ge=1e-6)] = 10_000.0  # base of the RoPE frequencies
    rope_scaling: RopeScaling | None = None  # RoPE for longer contexts; None: plain
    attention_bias: bool = False  # biases of q_proj, k_proj, v_proj and o_proj
    mlp_bias: bool = False  # biases of gate_proj, up_proj and down_proj
    hidden_act: Literal["silu", "gelu", "relu2", "sigmoid"] = "silu"  # the MLP is down(act(gate(x)) * up(x))
    # Standard deviation of the initial weights. None: 1/sqrt(hidden_size).
    initializer_range: Annotated[Positive, Field(le=100)] | None = None
    # Initial matrices and head. normal: initializer_range. fan_in: deviation 1/sqrt(inputs of the matrix), truncated.
    init: Literal["normal", "fan_in"] = "normal"
    scale_residual_init: bool = False  # o_proj and down_proj: deviation / sqrt(2 * num_hidden_layers)
    embed_proj: bool = False  # a learnable projection after the embedding and before the head (OSP, section 3)
    head_bias: bool = False  # bias of lm_head; folding a final LayerNorm moves its bias here
    tie_embeddings: bool = False  # the head's matrix is the embedding: one parameter instead of two
    norm: NormConfig = field(default_factory=NormConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    qk_norm: bool = False  # normalize queries and keys of every head before RoPE
    ffn_norm: bool = False  # normalize the input of down_proj over its channels

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


def check_model(model: ModelConfig) -> None:
    """Raise `UserError` for an impossible shape, and for options of the blocks that exclude each other."""
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not divisible by "
            f"model.num_attention_heads={model.num_attention_heads}; or set model.head_dim"
        )
    if model.head_size % 2:
        raise UserError(f"head size {model.head_size} (hidden_size / num_attention_heads) is odd; RoPE needs it even")
    if model.num_attention_heads % model.kv_heads:
        raise UserError(
            f"model.num_attention_heads={model.num_attention_heads} is not divisible by "
            f"model.num_key_value_heads={model.num_key_value_heads}"
        )
    if model.init == "fan_in" and model.initializer_range is not None:
        raise UserError(
            f"model.initializer_range={model.initializer_range} with model.init=fan_in, which takes the deviation of a "
            "matrix from its shape; set model.initializer_range=null or model.init=normal"
        )
    if model.tie_embeddings and model.embed_proj:
        raise UserError(
            "model.tie_embeddings=true with model.embed_proj=true: export absorbs the projections into the embedding "
            "and the head, which are two matrices then; set model.embed_proj=false or model.tie_embeddings=false"
        )
    scaling, norm = model.rope_scaling, model.norm
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below "
            f"high_freq_factor={scaling.high_freq_factor}"
        )
    if norm.placement == "peri" and norm.name == "bhyt":
        raise UserError(
            "norm.placement=peri with norm=bhyt: the variance approximation covers the output of attention, not a "
            "norm of it; take norm.name=bhyt_star, which measures the variance"
        )
