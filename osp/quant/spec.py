"""The quantization of a model as one frozen value, printed and hashed beside every number made with it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import AfterValidator

from osp.errors import UserError
from osp.model_config import ModelConfig
from osp.schema import Count, CountOrZero, Int, Positive, Text, build

if TYPE_CHECKING:
    from torch import Tensor

    from osp.quant.formats import NumberFormat

Part = Literal["w", "a", "kv"]  # weights, activations and cache: prefix of their keys
PARTS: tuple[Part, ...] = get_args(Part)
# Where a model can be quantized: sites (osp.model.sites), and for weights the modules of the model.
INNER_SITES: dict[Part, tuple[str, ...]] = {
    "w": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "attention_gate"),
    "a": ("attn_in", "o_proj_in", "mlp_in", "down_proj_in"),
    "kv": ("k", "v"),
}
END_SITES: dict[Part, tuple[str, ...]] = {"w": ("embed_tokens", "lm_head"), "a": ("head_in",), "kv": ()}
SITES = tuple(site for table in (INNER_SITES, END_SITES) for sites in table.values() for site in sites)


def _bits(bits: int) -> int:
    if not 2 <= bits <= 16:
        raise ValueError("must be an integer from 2 to 16; 16 leaves the tensor as it is")
    return bits


Bits = Annotated[Int, AfterValidator(_bits)]


@dataclass(frozen=True)
class QuantSpec:
    """The quantization of a model: keys of the group `quant`. 16 bits leave a tensor untouched, bit for bit.

    W are the weights of the blocks, A the inputs of their matrices, KV keys (after RoPE) and values as a cache holds
    them. A rotation is applied only where something in its basis is quantized.
    """

    w_bits: Bits = 16  # bits of weights
    a_bits: Bits = 16  # bits of activations
    kv_bits: Bits = 16  # bits of keys and values
    w_symmetric: bool = True  # a scale and no zero point
    w_group_size: Count | None = None  # input channels that share a scale; None: all of an output channel
    w_clip: bool = True  # narrow the range of each scale to the least rounding error
    a_symmetric: bool = False  # a scale and no zero point
    a_group_size: Count | None = None  # channels of a token that share a scale; None: all
    static_activations: bool = False  # one scale per site for all tokens, from the extremes on calibration text
    o_proj_by_head: bool = True  # the input of o_proj has one scale per head
    kv_symmetric: bool = False  # a scale and no zero point
    kv_group_size: Count | None = None  # channels of a head that share a scale; None: all
    embedding_and_head: bool = False  # quantize the embedding and the head too, and the input of the head
    ends_format: str | None = None  # number format of embedding and head, if not w_format
    fold_gains: bool = False  # fold the gains of norms into the matrices that read them; a rotation does so itself
    ffn_hadamard: bool = False  # online Hadamard transform of the input of down_proj
    qk_hadamard: bool = True  # online Hadamard transform of queries and keys after RoPE
    method: Literal["rtn", "gptq"] = "rtn"  # how weights are rounded
    act_order: bool = False  # gptq: channels with the largest inputs first
    damping: Positive = 0.01  # gptq: share of the Hessian's mean diagonal that is added to its diagonal
    # Rotation of the residual stream and the values, fused into the weights.
    rotation: Literal["none", "quarot"] = "none"
    # gptq, static ranges: name of a text, not the test text; train: the training split
    calibration: Text = "train"
    calibration_tokens: Count = 262_144  # tokens of it: 128 sequences of 2048, as in QuaRot's code
    seed: CountOrZero = 0  # of calibration sequences and random rotations
    w_format: str | None = None  # number format, a key of osp.quant.formats.FORMATS; None: as w_symmetric says
    a_format: str | None = None  # number format, a key of osp.quant.formats.FORMATS; None: as a_symmetric says
    kv_format: str | None = None  # number format, a key of osp.quant.formats.FORMATS; None: as kv_symmetric says

    def __post_init__(self) -> None:
        for part in (*PARTS, "ends"):
            if getattr(self, f"{part}_format") is not None:
                self._check_format(part)
        if self.static_activations:
            self._check_static()
        if self.act_order and self.method != "gptq":
            raise UserError(f"quant.act_order=true does nothing with quant.method={self.method}; set quant.method=gptq")

    def _check_format(self, part: Part | Literal["ends"]) -> None:
        from osp.quant.formats import FORMATS  # loads torch

        name, bits, group_size = (getattr(self, f"{part}_{key}", None) for key in ("format", "bits", "group_size"))
        if name not in FORMATS:
            raise UserError(f"quant.{part}_format={name!r}; choose from {', '.join(sorted(FORMATS))}")
        chosen = FORMATS[name]
        if part == "ends":
            if not self.embedding_and_head:
                raise UserError(f"quant.ends_format={name} does nothing without quant.embedding_and_head=true")
            bits = self.w_bits if len(chosen.widths) > 1 else 16
        if (bits or 16) < 16 and bits not in chosen.widths:
            widths = ", ".join(map(str, chosen.widths))
            raise UserError(f"quant.{'w' if part == 'ends' else part}_bits={bits}: the format {name} has {widths} bits")
        if chosen.block_size and group_size not in (None, chosen.block_size):
            raise UserError(
                f"quant.{part}_group_size={group_size}: the format {name} has groups of {chosen.block_size}; "
                f"set quant.{part}_group_size=null"
            )
        if part == "w" and self.method == "gptq" and not chosen.has_grid:
            raise UserError(f"quant.method=gptq: the format {name} has no grid that GPTQ can use; set quant.method=rtn")

    def _check_static(self) -> None:
        if self.a_group_size is not None:
            raise UserError(
                f"quant.a_group_size={self.a_group_size}: quant.static_activations=true has one scale per site; "
                "set quant.a_group_size=null"
            )
        if self.a_bits < 16 and not self.number_format("a").can_be_static:
            raise UserError(
                f"quant.static_activations=true: the format {self.a_format} takes its scales from the values; "
                "set quant.static_activations=false"
            )

    def number_format(self, part: Part) -> "NumberFormat":
        """Return the format of weights, activations or cache."""
        from osp.quant.formats import FORMATS

        name = getattr(self, f"{part}_format") or ("sym" if getattr(self, f"{part}_symmetric") else "asym")
        return FORMATS[name](getattr(self, f"{part}_bits"))

    def weight_format(self, site: str) -> "NumberFormat":
        """Return the format of the weights of `site`, a matrix of the blocks, the embedding or the head."""
        from osp.quant.formats import FORMATS

        if self.ends_format is None or site not in END_SITES["w"]:
            return self.number_format("w")
        chosen = FORMATS[self.ends_format]
        return chosen(chosen.widths[0] if len(chosen.widths) == 1 else self.w_bits)

    def activation_rounding(self, site: str, model: ModelConfig) -> "partial[Tensor]":
        """Return the function that rounds activations or cache at `site`, of a model of this shape."""
        part = "kv" if site in INNER_SITES["kv"] else "a"
        number_format, group_size = self.number_format(part), getattr(self, f"{part}_group_size")
        by_head = site == "o_proj_in" and self.o_proj_by_head and number_format.block_size is None
        return partial(number_format.round, group_size=model.head_size if by_head else group_size)

    def is_static(self, part: Part) -> bool:
        """Whether a scale of these activations is taken from calibration text."""
        if part == "w" or getattr(self, f"{part}_bits") == 16:
            return False
        return (part == "a" and self.static_activations) or self.number_format(part).tensor_scale

    @property
    def bits(self) -> str:
        """W-A-KV as the papers write it: "4-8-16"."""
        return f"{self.w_bits}-{self.a_bits}-{self.kv_bits}"

    @property
    def parts(self) -> tuple[Part, ...]:
        """What has fewer than 16 bits."""
        return tuple(part for part in PARTS if getattr(self, f"{part}_bits") < 16)

    @property
    def is_identity(self) -> bool:
        return not self.parts

    @property
    def needs_calibration(self) -> bool:
        """Whether the quantizer looks at calibration text."""
        return (self.method == "gptq" and self.w_bits < 16) or self.is_static("a") or self.is_static("kv")

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 of all fields; later fields at their defaults do not count."""
        values = {**dataclasses.asdict(self), "rotation_steps": 100, "rotation_lr": 1.5}  # removed keys
        values["a_static"] = values.pop("static_activations")  # its first name
        for key in ("w_format", "a_format", "kv_format", "ends_format", "a_static", "fold_gains"):
            if not values[key]:
                del values[key]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def at(self, bits: str) -> "QuantSpec":
        """Return this spec at other bits, "4-8-16" for W-A-KV."""
        parts = bits.split("-")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise UserError(f"bits {bits!r}: write weights-activations-cache such as 4-8-16")
        w, a, kv = map(int, parts)
        return build(QuantSpec, dataclasses.asdict(self) | {"w_bits": w, "a_bits": a, "kv_bits": kv}, path="quant")

    def __str__(self) -> str:
        """Return one line with every setting that has an effect."""
        if self.is_identity:
            return "16-16-16 (not quantized)"
        method = "rtn"
        if self.method == "gptq" and self.w_bits < 16:
            method = f"gptq{' act-order' if self.act_order else ''} damping {self.damping:g}"
        if self.rotation != "none":
            method += f" + {self.rotation}"
        if self.fold_gains and self.rotation == "none" and min(self.w_bits, self.a_bits) < 16:
            method += " + folded gains"
        if self.ffn_hadamard and min(self.w_bits, self.a_bits) < 16:
            method += " + ffn Hadamard"
        words = [f"{self.bits} {method}"]
        whole = {"w": "channel", "a": "token", "kv": "head"}
        for part in self.parts:
            number_format, size = self.number_format(part), getattr(self, f"{part}_group_size")
            by_head = self.o_proj_by_head and not self.static_activations and number_format.block_size is None
            notes = {
                "w": " clip" if self.w_clip and number_format.has_grid else "",
                "a": " (o_proj by head)" if by_head else "",
                "kv": " (K Hadamard)" if self.qk_hadamard else "",
            }
            groups = f"group {size}" if size else whole[part]
            if number_format.block_size:
                groups = f"block {number_format.block_size}"
            elif self.is_static(part):
                groups = "tensor static"
            words.append(f"{part.upper()} {number_format.name}/{groups}{notes[part]}")
        if self.embedding_and_head and min(self.w_bits, self.a_bits) < 16:
            words.append(f"embedding and head {self.ends_format or 'too'}")
        if self.needs_calibration:
            words.append(f"calibration {self.calibration} {self.calibration_tokens} tokens")
        if self.needs_calibration or self.rotation != "none":
            words.append(f"seed {self.seed}")
        return ", ".join(words)


def active_sites(spec: QuantSpec, model: ModelConfig) -> frozenset[str]:
    """Return the sites of a model of this shape that `spec` quantizes."""
    tables = (INNER_SITES, END_SITES) if spec.embedding_and_head else (INNER_SITES,)
    sites = frozenset(site for table in tables for part in spec.parts for site in table[part])
    return sites if model.attention.gate else sites - {"attention_gate"}


def check_spec(spec: QuantSpec, model: ModelConfig) -> None:
    """Raise `UserError` if `spec` does not fit a model of this shape: groups that do not divide, norms."""
    # the FFN can be padded with zero channels, so its last group need not be full
    widths = {"model.hidden_size": model.hidden_size}
    widths["model.num_attention_heads * head_dim"] = model.num_attention_heads * model.head_size
    for part in spec.parts:
        number_format, size = spec.number_format(part), getattr(spec, f"{part}_group_size")
        what = f"quant.{part}_group_size={size}" if size else f"the block of {number_format.name}"
        size = size or number_format.block_size
        for name, width in ({"the head size": model.head_size} if part == "kv" else widths).items():
            if size is not None and width % size:
                blocks = "" if "=" in what else f", {size} channels,"
                raise UserError(f"{what}{blocks} does not divide {name}={width}")
    if spec.rotation == "none" or spec.is_identity:
        return
    from osp.model.build_norms import final_norm_name  # a spec is checked without torch until here
    from osp.model.norms import NORMS

    refusal = f"quant.rotation={spec.rotation}: a rotation does not pass through the"
    for name in (model.norm.name, final_norm_name(model.norm)):
        if NORMS[name].not_rmsnorm is not None:
            rotatable = " and ".join(name for name, norm in NORMS.items() if norm.not_rmsnorm is None)
            raise UserError(f"{refusal} norm {name}, only through {rotatable}; set quant.rotation=none")
    if model.norm.placement == "peri" and not NORMS[model.norm.name].one_gain and model.norm.affine is not False:
        raise UserError(
            f"{refusal} gains of norms after a sublayer (norm.placement=peri), which no next matrix can take in; "
            "set quant.rotation=none"
        )
