"""How a model is quantized, as one frozen value that is printed and hashed beside every number made with it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from osp.config import ModelConfig, build
from osp.errors import UserError

# Where a model can be quantized. Names are those of the monitor's sites and of the model's own modules.
WEIGHT_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GATE_SITES = ("attention_gate",)  # one more matrix of blocks that have it
ACTIVATION_SITES = ("attn_in", "o_proj_in", "mlp_in", "down_proj_in")
CACHE_SITES = ("k", "v")
END_WEIGHT_SITES = ("embed_tokens", "lm_head")
END_ACTIVATION_SITES = ("head_in",)
SITES = (*WEIGHT_SITES, *GATE_SITES, *ACTIVATION_SITES, *CACHE_SITES, *END_WEIGHT_SITES, *END_ACTIVATION_SITES)

# A rotation R of the residual stream passes through a norm whose only gain can be folded into the next matrix.
ROTATABLE_NORMS = ("rmsnorm", "ssnorm")


@dataclass(frozen=True)
class QuantSpec:
    """The quantization of a model: keys of the group `quant`. 16 bits leave a tensor untouched, bit for bit.

    W are the weights of the blocks, A the inputs of their matrices, KV keys and values as a cache would hold them,
    the keys after RoPE. A rotation is applied only where something in its basis is quantized.
    """

    w_bits: int = 16
    a_bits: int = 16
    kv_bits: int = 16
    w_symmetric: bool = True
    w_group_size: int | None = None  # input channels that share a scale; None: all those of an output channel
    w_clip: bool = True  # narrow the range of each scale to where its rounding error is least
    a_symmetric: bool = False
    a_group_size: int | None = None  # channels of a token that share a scale; None: all
    o_proj_by_head: bool = True  # the input of o_proj has one scale per head
    kv_symmetric: bool = False
    kv_group_size: int | None = None  # channels of a head that share a scale; None: all
    embedding_and_head: bool = False  # the embedding and the head at w_bits too, the head's input at a_bits
    ffn_hadamard: bool = False  # online Hadamard transform of the input of down_proj
    qk_hadamard: bool = True  # online Hadamard transform of queries and keys after RoPE
    method: Literal["rtn", "gptq"] = "rtn"  # how weights are rounded
    act_order: bool = False  # gptq: channels with the largest inputs first
    damping: float = 0.01  # gptq: share of the Hessian's mean diagonal that is added to its diagonal
    rotation: Literal["none", "quarot", "spinquant"] = (
        "none"  # of the residual stream and of values, fused into weights
    )
    rotation_steps: int = 100  # spinquant: steps of the optimization
    rotation_lr: float = 1.5  # spinquant: its first rate; falls linearly to 0
    calibration: str = "train"  # gptq, spinquant: name of the text; train: the training split. Never the test text
    calibration_tokens: int = 262_144  # 128 rows of 2048, the number in QuaRot's code
    seed: int = 0  # of calibration rows and random rotations

    def __post_init__(self) -> None:
        for key in ("w_bits", "a_bits", "kv_bits"):
            bits = getattr(self, key)
            if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
                raise UserError(f"quant.{key}={bits}: must be an integer from 2 to 16; 16 leaves the tensor as it is")
        for key in ("w_group_size", "a_group_size", "kv_group_size", "calibration_tokens", "rotation_steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"quant.{key}={value}: must be at least 1")
        for key in ("damping", "rotation_lr"):
            if not 0 < getattr(self, key) < float("inf"):
                raise UserError(f"quant.{key}={getattr(self, key)}: must be a finite number above 0")
        if self.seed < 0:
            raise UserError(f"quant.seed={self.seed}: must be 0 or more")
        if not self.calibration:
            raise UserError("quant.calibration is empty; name the text, or write train for the training split")
        if self.act_order and self.method != "gptq":
            raise UserError(f"quant.act_order=true does nothing with quant.method={self.method}; set quant.method=gptq")

    @property
    def bits(self) -> str:
        """W-A-KV as the papers write it: "4-8-16"."""
        return f"{self.w_bits}-{self.a_bits}-{self.kv_bits}"

    @property
    def is_identity(self) -> bool:
        return min(self.w_bits, self.a_bits, self.kv_bits) == 16

    @property
    def needs_calibration(self) -> bool:
        """Whether the quantizer looks at calibration text."""
        return (self.method == "gptq" and self.w_bits < 16) or (self.rotation == "spinquant" and not self.is_identity)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 of all fields."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def at(self, bits: str) -> "QuantSpec":
        """This spec at other bits, "4-8-16" for W-A-KV."""
        parts = bits.split("-")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise UserError(f"bits {bits!r}: write weights-activations-cache such as 4-8-16")
        w, a, kv = map(int, parts)
        return dataclasses.replace(self, w_bits=w, a_bits=a, kv_bits=kv)

    def __str__(self) -> str:
        """One line that says everything which has an effect."""
        if self.is_identity:
            return "16-16-16 (not quantized)"
        parts = [f"{self.bits} {self._method()}"]
        if self.w_bits < 16:
            parts.append(_kind("W", self.w_symmetric, self.w_group_size, "channel") + (" clip" if self.w_clip else ""))
        if self.a_bits < 16:
            by_head = " (o_proj by head)" if self.o_proj_by_head else ""
            parts.append(_kind("A", self.a_symmetric, self.a_group_size, "token") + by_head)
        if self.kv_bits < 16:
            hadamard = " (K Hadamard)" if self.qk_hadamard else ""
            parts.append(_kind("KV", self.kv_symmetric, self.kv_group_size, "head") + hadamard)
        if self.embedding_and_head and min(self.w_bits, self.a_bits) < 16:
            parts.append("embedding and head too")
        if self.needs_calibration:
            parts.append(f"calibration {self.calibration} {self.calibration_tokens} tokens")
        if self.needs_calibration or self.rotation != "none":
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)

    def _method(self) -> str:
        """Rounding and rotations: "gptq act-order + quarot + ffn Hadamard"."""
        rounding = "rtn"
        if self.method == "gptq" and self.w_bits < 16:
            rounding = f"gptq{' act-order' if self.act_order else ''} damping {self.damping:g}"
        rotation = self.rotation
        if rotation == "spinquant":
            rotation = f"spinquant {self.rotation_steps} steps lr {self.rotation_lr:g}"
        hadamard = self.ffn_hadamard and min(self.w_bits, self.a_bits) < 16
        return " + ".join(
            [rounding, *([rotation] if rotation != "none" else []), *(["ffn Hadamard"] if hadamard else [])]
        )


def spec_from_dict(values: dict[str, Any]) -> QuantSpec:
    """The checked spec that the group `quant` of a configuration describes, or a `UserError` naming the key."""
    return build(QuantSpec, values, path="quant")


def active_sites(spec: QuantSpec, model: ModelConfig) -> frozenset[str]:
    """The sites of a model of this shape that `spec` quantizes."""
    ends = spec.embedding_and_head
    sites: list[str] = []
    if spec.w_bits < 16:
        gate = GATE_SITES if model.attention.gate else ()
        sites += (*WEIGHT_SITES, *gate, *(END_WEIGHT_SITES if ends else ()))
    if spec.a_bits < 16:
        sites += (*ACTIVATION_SITES, *(END_ACTIVATION_SITES if ends else ()))
    if spec.kv_bits < 16:
        sites += CACHE_SITES
    return frozenset(sites)


def check_spec(spec: QuantSpec, model: ModelConfig) -> None:
    """Raise `UserError` where `spec` cannot be applied to a model of this shape: groups that do not divide, norms."""
    widths = {"hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size}
    widths["num_attention_heads * head_dim"] = model.num_attention_heads * model.head_size
    for key, bits in (("w_group_size", spec.w_bits), ("a_group_size", spec.a_bits)):
        size = getattr(spec, key)
        for name, width in widths.items():
            if bits < 16 and size is not None and width % size:
                raise UserError(f"quant.{key}={size} does not divide model.{name}={width}")
    size = spec.kv_group_size
    if spec.kv_bits < 16 and size is not None and model.head_size % size:
        raise UserError(f"quant.kv_group_size={size} does not divide the head size {model.head_size}")
    if spec.rotation != "none" and not spec.is_identity:
        for name in (model.norm.name, model.norm.final or model.norm.name):
            if name not in ROTATABLE_NORMS:
                raise UserError(
                    f"quant.rotation={spec.rotation}: a rotation does not pass through the norm {name}, only through "
                    f"{' and '.join(ROTATABLE_NORMS)}; set quant.rotation=none"
                )
        if model.norm.placement == "peri" and model.norm.name == "rmsnorm" and model.norm.affine is not False:
            raise UserError(
                f"quant.rotation={spec.rotation}: a rotation does not pass through the gains of norms after a sublayer "
                "(norm.placement=peri), which no next matrix can take in; set quant.rotation=none"
            )


def _kind(name: str, symmetric: bool, group_size: int | None, whole: str) -> str:
    return f"{name} {'sym' if symmetric else 'asym'}/{f'group {group_size}' if group_size else whole}"
