"""The configuration of a run as dataclasses: every key, its default, its unit, and the checks that span keys.

Hydra composes YAML and command line into one plain dict; `from_dict` turns it into a `Config` or raises a `UserError`
that names the key, the value and the fix. Nothing else in the package knows Hydra, and defaults live only here or in
`configs/`. Lengths of a schedule are written `100` (steps), `5e9 tokens` or `20%`.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from osp.errors import UserError

ROLES = ("matrix", "embed_proj", "gain", "embedding", "head")
Role = Literal["matrix", "embed_proj", "gain", "embedding", "head"]
Rule = str  # a key of osp.optim.rules.RULES; checked when parameter groups are built


class Heads(NamedTuple):
    """How a matrix of attention consists of those of its heads, which stand side by side along dimension `dim`."""

    count: int
    dim: int  # 0: heads write, the matrix is (heads * head_dim, D); 1: they are read, it is (D, heads * head_dim)


# Where the monitor looks, and what it measures there: osp.monitor.probe and osp.monitor.statistics define them.
Site = Literal[
    "embed_out", "attn_in", "q", "k", "v", "o_proj_in", "mlp_in", "down_proj_in", "block_out", "final_norm_out"
]
AlertSite = Literal["all", Site]
Statistic = Literal[
    "kurtosis",
    "kurtosis_pooled",
    "kurtosis_channel",
    "max_abs",
    "max_over_median",
    "rms",
    "top_channel_share",
    "top_token_share",
    "massive_count",
    "few_channels",
    "few_tokens",
    "osp_script",
    "R_L",
    "attn_logit_max",
    "attn_sink",
    "gain_max",
    "weight_row_max",
    "var_error",
]

C = TypeVar("C")


class Bound(NamedTuple):
    """What the number or text of a key must be: said beside its field in `Annotated`, checked by `check`."""

    words: str
    holds: Callable[[Any], bool]  # False for nan


def at_most(limit: int) -> Bound:
    """What no machine could do fails here, not in an allocation or after an hour."""
    return Bound(f"at most {limit}", lambda x: x <= limit)


AT_LEAST_1 = Bound("at least 1", lambda x: x >= 1)
AT_LEAST_2 = Bound("at least 2", lambda x: x >= 2)
NOT_NEGATIVE = Bound("a finite number, 0 or more", lambda x: 0 <= x < math.inf)
POSITIVE = Bound("a finite number above 0", lambda x: 0 < x < math.inf)

NOT_EMPTY = Bound("text that is not empty", lambda text: text.strip() != "")
NAME = Bound(
    "a name of at most 200 characters without slashes",
    lambda text: text not in (".", "..") and len(text) <= 200 and not set(text) & set("/\\"),
)
PATH = Bound(
    "a path whose parts are at most 255 bytes long",
    lambda text: len(text) < 4096 and all(len(part.encode()) <= 255 for part in text.split("/")),
)

Count = Annotated[int, AT_LEAST_1, at_most(10**15)]
CountOrZero = Annotated[int, NOT_NEGATIVE, at_most(10**15)]
Finite = Annotated[float, Bound("a finite number", math.isfinite)]
NotNegative = Annotated[float, NOT_NEGATIVE]
Positive = Annotated[float, POSITIVE]
Decay = Annotated[float, Bound("in [0, 1)", lambda x: 0 <= x < 1)]  # of a running mean
Fraction = Annotated[float, Bound("in [0, 1]", lambda x: 0 <= x <= 1)]
PositiveFraction = Annotated[float, Bound("in (0, 1]", lambda x: 0 < x <= 1)]
Share = Annotated[float, Bound("in (0, 1)", lambda x: 0 < x < 1)]
Text = Annotated[str, NOT_EMPTY]
FilePath = Annotated[str, NOT_EMPTY, PATH]


EVALUATIONS = "evaluation"  # folder of a run with the records of its evaluations
COMPARISONS = "compare"  # and in it that with its rows of comparisons


@dataclass(frozen=True)
class RunConfig:
    name: Annotated[str, NOT_EMPTY, NAME] = "osp"
    dir: FilePath = "runs/osp"


@dataclass(frozen=True)
class TrainConfig:
    seed: Annotated[int, NOT_NEGATIVE, at_most(2**32 - 1)] = 0
    # Length of the run: the first of the three that is set.
    steps: Count | None = None  # optimizer steps
    tokens: Count | None = None  # training tokens, rounded up to whole steps
    minutes: Annotated[float, POSITIVE, at_most(10**7)] | None = (
        None  # as many steps as this machine takes in that time, measured before the first one
    )
    seq_len: Annotated[int, AT_LEAST_1, at_most(2**24)] = 2048  # tokens a row predicts
    tokens_per_step: Annotated[int, AT_LEAST_1, at_most(2**30)] = 524_288  # tokens of one optimizer step over all ranks
    micro_batch_size: Count | Literal["auto"] = "auto"  # rows per rank and backward pass; auto: see osp.train.resolve
    grad_clip: NotNegative = 1.0  # bound on the global norm of the raw gradient; 0 switches clipping off
    compile: bool | Literal["auto"] = "auto"  # torch.compile per block; auto: on for CUDA below ZeRO-3
    # Of matmuls and activations; auto: bf16 where it is native; fp8: bf16, blocks in 8 bits (osp.model.fp8)
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    activation_checkpointing: bool = False
    document_mask: bool = False  # a token attends only inside its own document
    loss_chunk_tokens: Count = 8192  # rows of the logits that exist at a time
    norm_refresh_every: Count | Literal["auto"] = "auto"  # steps between updates of a norm's statistics (BHyT)
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite: end the run, or go on
    max_skips: CountOrZero = 10  # updates of a run that may be left out for `on_nonfinite` and `spike` before it ends
    stop_at: Count | None = None  # end after this step with a checkpoint; the schedule stays that of the whole run

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps of the run: `steps`, or `tokens` in whole steps; None where `minutes` have to be measured."""
        if self.steps is None and self.tokens is not None:
            return math.ceil(self.tokens / self.tokens_per_step)
        return self.steps


@dataclass(frozen=True)
class EvalQuantConfig:
    """Perplexity of the model in training at 16-16-16 and fake-quantized at 4-4-4 (W-A-KV), round to nearest."""

    every: CountOrZero = 0  # steps, and at the end; 0: never
    tokens: Annotated[int, AT_LEAST_2, at_most(10**9)] = 16_384  # of the held-out split, always its first


@dataclass(frozen=True)
class EvalConfig:
    # Steps, and at the end; auto: as often as a fiftieth of the training time allows; 0: only at the end.
    every: CountOrZero | Literal["auto"] = "auto"
    tokens: Count = 1_000_000  # held-out tokens per validation, at most
    sample_tokens: Annotated[int, NOT_NEGATIVE, at_most(10**6)] = (
        64  # length of the text generated in the closing summary; 0: none
    )
    quant: EvalQuantConfig = field(default_factory=EvalQuantConfig)


@dataclass(frozen=True)
class SpikeConfig:
    """A loss or gradient norm far above those of the last steps; see osp.train.guards."""

    action: Literal["off", "warn", "skip"] = "warn"  # skip: leave the update out
    threshold: Positive = 8.0  # robust z-score
    window: Annotated[int, AT_LEAST_1, at_most(100_000)] = 128  # steps that the score is taken against


@dataclass(frozen=True)
class PenaltyConfig:
    """A price on large activations, added to the loss of training; see osp.model.penalty."""

    weight: NotNegative = 0.0  # 0: none
    site: Literal["block_out", "down_proj_in"] = "block_out"  # in every block; names of the monitor
    # Of x in (|x| / scale)^4; rms: that of the token itself.
    scale: Annotated[float, Bound("between 1e-6 and 1e6", lambda x: 1e-6 <= x <= 1e6)] | Literal["rms"] = 3.0


@dataclass(frozen=True)
class NormConfig:
    """Which normalizer a model uses. `None` leaves an option at the default of the class in `osp.model.norms`."""

    name: str = "ssnorm"  # a key of osp.model.norms.NORMS
    final: str | None = None  # normalizer before the head; None: the one that the source of `name` uses
    placement: Literal["pre", "peri"] = "pre"  # peri: a second norm after each sublayer, before the residual addition
    lns: bool = False  # scale the norms of layer l, counted from 1, by 1 / sqrt(l)
    embed_scale: bool = False  # a learnable scalar after the embedding, starting at sqrt(hidden_size) (DyT)
    eps: NotNegative | None = None
    init: Finite | None = None  # initial value of every gain
    affine: bool | None = None  # layernorm, rmsnorm, crmsnorm: one gain per channel
    bias: bool | None = None  # layernorm
    alpha: Finite | None = None  # dyt, derf: initial slope
    alpha_attention: Finite | None = None  # dyt, derf: that of the norms before attention; None: alpha
    lam: Finite | None = None  # bhyt: lambda, the bound of the tanh argument
    kappa: Finite | None = None  # bhyt: Chebyshev factor
    kappa_schedule: Literal["constant", "decay", "grow", "mild_grow"] | None = None  # bhyt: kappa by depth
    learnable_lambda: bool | None = None  # bhyt
    approximation: Literal["baseline", "beta", "eta", "residual_aware"] | None = None  # bhyt: of the variance
    gain_variance: bool | None = None  # bhyt: it takes the gain of the norm before attention into account
    exact_layers: tuple[Count, ...] | None = None  # bhyt: layers, from 1, that measure after attention too
    seq_len: Count | None = None  # bhyt: sequence length of the variance approximation; None: train.seq_len


@dataclass(frozen=True)
class AttentionConfig:
    gate: bool = False  # sigmoid gate, element by element, on what o_proj reads (arXiv 2505.06708)
    off_by_one: bool = False  # softmax with 1 + sum exp in its denominator: a head may attend to nothing


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotation for longer contexts, as Hugging Face's `rope_scaling` says it; see `rotary_table`.

    linear: every frequency by `factor`. llama3 (Llama 3.1): those that turn less than `low_freq_factor` times in
    `original_max_position_embeddings` tokens by `factor`, those that turn more than `high_freq_factor` times not at
    all, and what lies between by something between.
    """

    rope_type: Literal["linear", "llama3"]
    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Count = 8192


# Fields of `ModelConfig` that stand beside `model` in YAML and on the command line: `norm=bhyt qk_norm=true`.
AT_TOP = ("norm", "attention", "qk_norm", "ffn_norm", "recentre")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama. Names are Hugging Face's `LlamaConfig`; `embed_proj` and what follows are ours."""

    vocab_size: Annotated[int, AT_LEAST_1, at_most(2**24)] = 4096
    hidden_size: Annotated[int, AT_LEAST_1, at_most(2**20)] = 256
    intermediate_size: Annotated[int, AT_LEAST_1, at_most(2**24)] = 688
    num_hidden_layers: Annotated[int, AT_LEAST_1, at_most(1000)] = 6
    num_attention_heads: Count = 4
    num_key_value_heads: Count | None = None  # None: as many as num_attention_heads (MHA)
    head_dim: Count | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: Annotated[int, AT_LEAST_1, at_most(2**24)] = 2048
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # of q_proj, k_proj, v_proj and o_proj
    mlp_bias: bool = False  # of gate_proj, up_proj and down_proj
    hidden_act: Literal["silu", "gelu", "relu2", "sigmoid"] = "silu"  # of the gate: down(act(gate(x)) * up(x))
    initializer_range: Annotated[float, POSITIVE, at_most(100)] | None = None  # None: 1/sqrt(hidden_size)
    scale_residual_init: bool = False  # o_proj and down_proj start 1/sqrt(2 num_hidden_layers) smaller
    embed_proj: bool = False  # EmbProj after the embedding and before the head (papers: OSP section 3)
    head_bias: bool = False  # of lm_head; where a LayerNorm's bias ends when it is folded
    norm: NormConfig = field(default_factory=NormConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    qk_norm: bool = False  # queries and keys of every head are normalized before RoPE
    ffn_norm: bool = False  # what down_proj reads is normalized over its channels
    recentre: bool = False  # all that writes into the residual stream is made zero-mean in the forward pass

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


@dataclass(frozen=True)
class OptimizerConfig:
    lr: NotNegative = 5e-4  # of the rules muon and normalized
    adam_lr: NotNegative | None = None  # of the rule adamw; None: lr
    weight_decay: NotNegative = 0.01  # decoupled, of every role
    momentum: Decay = 0.95
    nesterov: bool = True
    ns_method: Literal["standard", "gram"] = "standard"
    ns_coefficients: str = "keller_jordan"  # a key of osp.optim.muon.COEFFICIENTS
    ns_steps: Annotated[int, AT_LEAST_1, at_most(100)] = 5
    ns_dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where it is native
    per_head: bool = False  # rule muon: matrices of attention are orthogonalized head by head
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)
    adam_eps: NotNegative = 1e-8
    rules: dict[Role, Rule] = field(
        default_factory=lambda: {
            "matrix": "muon",
            "embed_proj": "muon",
            "gain": "normalized",
            "embedding": "adamw",
            "head": "adamw",
        }
    )


@dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["trapezoid", "cosine", "constant"] = "trapezoid"
    warmup: str | int = "5%"
    decay: str | int = "20%"  # trapezoid: length of the linear decay at the end
    final_ratio: Fraction = 0.0  # last rate over peak rate


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents inside a mixture; the meaning of the fields is that of `DataConfig`."""

    source: str = "text"
    paths: tuple[FilePath, ...] = ()
    text_field: Text = "text"
    dataset: FilePath | None = None
    subset: Text | None = None
    split: Text = "train"
    weight: Positive = 1.0


@dataclass(frozen=True)
class DataConfig:
    source: str = "python_stdlib"  # a key of osp.data.sources.SOURCES, or none: a converted model has no text here
    paths: tuple[FilePath, ...] = ()  # text: files or folders of .txt .md .py .jsonl[.gz|.zst|.xz] .parquet
    text_field: Text = "text"  # text, hf: the field of a record that holds the document
    dataset: FilePath | None = None  # hf: name of the data set
    subset: Text | None = None  # hf: its configuration
    split: Text = "train"  # hf
    mixture: tuple[SourceConfig, ...] = ()  # mixture: sources and their shares of the tokens
    max_tokens: Count | None = None  # stop preparing after this many training tokens; None: all there are
    val_fraction: Share = 0.01  # share of documents held out, chosen by the hash of their text
    shard_tokens: Annotated[int, AT_LEAST_1, at_most(2**32)] = 32_000_000
    cache_dir: FilePath = "data/shards"
    num_workers: Annotated[int, NOT_NEGATIVE, at_most(1024)] = 0  # tokenizing processes; 0: one per core
    # Leave out the rows of these steps, both ends included: [[900, 920]].
    skip_steps: tuple[tuple[Count, Count], ...] = ()


@dataclass(frozen=True)
class TokenizerConfig:
    train: bool = True  # train a byte-level BPE on the data
    vocab_size: Annotated[int, AT_LEAST_1, at_most(2**24)] = 4096
    sample_bytes: Count = 32_000_000  # text the BPE is trained on
    path: FilePath | None = None  # an existing tokenizer.json, with train=false
    hub: Text | None = None  # or a tokenizer of the Hugging Face hub, with train=false
    eos_token: Text = "<|endoftext|>"


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: Literal[1, 2, 3] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, AT_LEAST_1, at_most(4096)] | None = (
        None  # CPU threads per rank; None: all cores shared among the ranks of a host
    )
    timeout: Positive = 1800.0  # seconds after which a rank gives up waiting for the others


@dataclass(frozen=True)
class CheckpointConfig:
    every: CountOrZero = 1000  # steps; 0: only at the end
    keep_last: CountOrZero = 2  # newest checkpoints to keep; 0: all
    keep_every: CountOrZero = 0  # steps whose multiples are kept for good; 0: none
    # Start at step 0 from the model and the tokenizer of a run, of a checkpoint, or of what scripts/convert.py wrote.
    init_from: FilePath | None = None


@dataclass(frozen=True)
class AlertConfig:
    """When a statistic of a site is worth a warning; null switches a rule off."""

    above: Positive | None = None  # larger than this
    growth: Positive | None = None  # larger than this many times its value at half of the steps ...
    floor: Positive = 1.0  # ... or than this many times the floor, where that value was below it


def _default_alerts() -> dict[Statistic, dict[AlertSite, AlertConfig]]:
    return {
        "kurtosis": {
            "all": AlertConfig(above=100.0, growth=4.0, floor=5.0),
            # a product of two activations: its tails are heavy, and grow heavier, in the first steps of every model
            "down_proj_in": AlertConfig(above=500.0),
        },
        "max_over_median": {
            "all": AlertConfig(above=1000.0, growth=4.0, floor=50.0),
            "down_proj_in": AlertConfig(above=5000.0),
        },
        "R_L": {"all": AlertConfig(above=1.0, growth=3.0, floor=0.1)},
        "attn_logit_max": {"all": AlertConfig(above=100.0, growth=3.0, floor=15.0)},
    }


@dataclass(frozen=True)
class MonitorConfig:
    """Which outlier statistics a run measures on held-out text, how often, and when it warns."""

    enabled: bool = True
    # Steps between probes; auto: at powers of two, and as often as max_cost allows; 0: at the start and the end only.
    every: CountOrZero | Literal["auto"] = "auto"
    max_cost: Share = 0.005  # of the training time that probes may take once a run is under way, with every=auto
    tokens: Annotated[int, AT_LEAST_2, at_most(2**24)] = 2048  # held-out tokens of a probe, over all ranks
    sites: tuple[Site, ...] | Literal["all"] = ("embed_out", "attn_in", "down_proj_in", "block_out", "final_norm_out")
    statistics: tuple[Statistic, ...] | Literal["all"] = (
        "kurtosis",
        "kurtosis_pooled",
        "max_abs",
        "max_over_median",
        "rms",
        "top_channel_share",
        "top_token_share",
        "osp_script",
        "R_L",
        "attn_logit_max",
        "gain_max",
        "var_error",
    )
    # Rules by statistic and site; a site's own rule takes the place of that of `all`.
    alerts: dict[Statistic, dict[AlertSite, AlertConfig]] = field(default_factory=_default_alerts)


@dataclass(frozen=True)
class LoggerConfig:
    every: Count = 1  # steps between training lines of metrics.jsonl and W&B
    wandb: Literal["online", "offline", "disabled"] = "offline"
    project: Text = "osp"
    entity: Text | None = None
    progress: bool = True
    peak_tflops: Positive | None = None  # MFU's denominator per rank; None: the table of known GPUs, no MFU elsewhere


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    resume: FilePath | bool = "auto"  # auto | a checkpoint or run folder | false
    debug: bool = False  # show tracebacks of user errors


# Keys that may differ between a run and its continuation: they change neither the model nor what it learns, or say
# what to do where it goes wrong.
FREE = (
    "run.",
    "resume",
    "debug",
    "logger.",
    "monitor.",
    "checkpoint.every",
    "checkpoint.keep_",
    "eval.",
    "engine.",
    "spike.",
    "data.cache_dir",
    "data.num_workers",
    "data.skip_steps",
    "train.micro_batch_size",
    "train.compile",
    "train.activation_checkpointing",
    "train.loss_chunk_tokens",
    "train.on_nonfinite",
    "train.max_skips",
    "train.stop_at",
)


def from_dict(values: dict[str, Any]) -> Config:
    """The checked `Config` that a composed, resolved YAML tree describes.

    Raises `UserError` with the path of the first unknown key, ill-typed value or pair of keys that contradict.
    """
    known = to_dict(Config())
    for key in values:
        if key not in known:
            raise UserError(_unknown("", str(key), list(known)))
    model = values.get("model", {})
    for key in AT_TOP:
        if isinstance(model, dict) and key in model:
            raise UserError(f"model.{key}: stands at the top level; write {key}=... or {key}.KEY=...")
    at_top = {key: values[key] for key in AT_TOP if key in values}
    config = build(Config, {key: value for key, value in values.items() if key not in at_top}, path="")
    of_model = {key: getattr(build(ModelConfig, {key: value}, path=""), key) for key, value in at_top.items()}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **of_model))
    check(config)
    norm = config.model.norm
    if norm.name == "bhyt" and norm.seq_len is None:  # the length the model is trained at belongs to the model
        norm = dataclasses.replace(norm, seq_len=config.train.seq_len)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, norm=norm))


def to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `from_dict`: plain containers, ready for YAML or JSON."""
    values = _plain(dataclasses.asdict(config))
    return values | {key: values["model"].pop(key) for key in AT_TOP}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every key that is not `FREE` and differs, in order of the keys.

    A key that is missing has its default: a run may be older than the key.
    """
    defaults = dict(leaves(to_dict(Config())))
    before, after = defaults | dict(leaves(old)), defaults | dict(leaves(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE)
    ]


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every value of a configuration."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}" if path else str(key))]
    return [(path, tree)]


def check(config: Config) -> None:
    """Raise `UserError` for values that are well-typed and out of bounds, or contradict each other."""
    check_bounds(config)
    check_length(config.train)
    check_model(config.model)
    check_rows(config.train, config.model, config.data)
    check_tokenizer(config.tokenizer, config.model)
    check_skip_steps(config.data)
    check_live_quantization(config)


def check_bounds(part: Any, path: str = "") -> None:
    """Raise `UserError` for the first value below the dataclass `part` that a `Bound` of its field excludes."""
    for name, hint in _hints(type(part), with_bounds=True).items():
        value = getattr(part, name)
        key = name if path == "model" and name in AT_TOP else _join(path, name)
        for inner, inner_key in _elements(value, key):
            if dataclasses.is_dataclass(inner):
                check_bounds(inner, inner_key)
            for bound in _bounds(hint, inner):
                if not bound.holds(inner):
                    raise UserError(f"{inner_key}={inner!r}: must be {bound.words}")


def check_length(train: TrainConfig) -> None:
    """Raise `UserError` for a run without an end, or of steps that are no whole rows."""
    if train.steps is None and train.tokens is None and train.minutes is None:
        raise UserError("the run has no length; set train.steps, train.tokens or train.minutes")
    if train.tokens_per_step % train.seq_len:
        raise UserError(
            f"train.tokens_per_step={train.tokens_per_step} is no multiple of train.seq_len={train.seq_len}; "
            f"the nearest is {max(1, round(train.tokens_per_step / train.seq_len)) * train.seq_len}"
        )


def check_skip_steps(data: DataConfig) -> None:
    """Raise `UserError` for ranges of steps that are none or overlap."""
    past = 0
    for first, last in sorted(data.skip_steps):
        if not past < first <= last:
            raise UserError(
                f"data.skip_steps={[list(pair) for pair in data.skip_steps]}: write [[first, last], ...] with steps "
                "from 1, first <= last, and no step twice"
            )
        past = last


def check_live_quantization(config: Config) -> None:
    """Raise `UserError` where the weights are in parts: fake quantization gives whole ones other values for a time."""
    if config.eval.quant.every and config.engine.zero_stage == 3:
        raise UserError(
            f"eval.quant.every={config.eval.quant.every} does not work with engine.zero_stage=3, which keeps "
            "weights in parts; set engine.zero_stage=2, or eval.quant.every=0 and evaluate checkpoints later"
        )
    if config.eval.quant.every and config.train.seq_len < 2:
        raise UserError("eval.quant.every needs train.seq_len=2 or more: a window of one token predicts nothing")


def check_model(model: ModelConfig) -> None:
    """Raise `UserError` for a shape no Llama can have, and for options of its blocks that exclude each other."""
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
    scaling = model.rope_scaling
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below "
            f"high_freq_factor={scaling.high_freq_factor}"
        )
    if model.norm.placement == "peri" and model.norm.name == "bhyt":
        raise UserError(
            "norm.placement=peri with norm=bhyt: the approximation holds for what attention adds to the residual "
            "stream, not for a norm of it; take norm.name=bhyt_star, which measures"
        )
    if beyond := [layer for layer in model.norm.exact_layers or () if layer > model.num_hidden_layers]:
        raise UserError(
            f"norm.exact_layers names layer {beyond[0]}, and model.num_hidden_layers={model.num_hidden_layers}; "
            "layers count from 1"
        )
    if model.recentre:
        _check_recentre(model)


def _check_recentre(model: ModelConfig) -> None:
    """Raise `UserError` where a zero-mean residual stream cannot be had, or would be subtracted twice."""
    names = {model.norm.name, model.norm.final or model.norm.name}
    if names != {"rmsnorm"}:
        raise UserError(
            f"recentre=true with norm={' and norm.final='.join(sorted(names))}: a zero mean makes an RMSNorm equal to "
            "LayerNorm and serves no other; take norm=rmsnorm or recentre=false"
        )
    if model.norm.placement == "peri":
        raise UserError("recentre=true with norm.placement=peri: a norm after a sublayer makes its mean other than 0")


def check_rows(train: TrainConfig, model: ModelConfig, data: DataConfig) -> None:
    """Raise `UserError` for rows that the model's positions do not reach, or that fit into no shard."""
    if train.seq_len > model.max_position_embeddings:
        raise UserError(
            f"train.seq_len={train.seq_len} is longer than model.max_position_embeddings="
            f"{model.max_position_embeddings}; raise the latter"
        )
    for key, value in (("data.shard_tokens", data.shard_tokens), ("data.max_tokens", data.max_tokens)):
        if value is not None and value <= train.seq_len:
            raise UserError(
                f"{key}={value} holds no row of train.seq_len={train.seq_len} plus 1 tokens; "
                f"set {key}={train.seq_len + 1} or more, or a smaller train.seq_len"
            )


def check_tokenizer(tokenizer: TokenizerConfig, model: ModelConfig) -> None:
    """Raise `UserError` unless there is exactly one tokenizer, and the model has room for it."""
    if tokenizer.train and tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={tokenizer.vocab_size} is larger than model.vocab_size={model.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    if not tokenizer.train and (tokenizer.path is None) == (tokenizer.hub is None):
        raise UserError("tokenizer.train=false needs exactly one of tokenizer.path=FILE and tokenizer.hub=NAME")
    if tokenizer.train and (tokenizer.path or tokenizer.hub):
        raise UserError("tokenizer.path or tokenizer.hub is set but tokenizer.train=true; set tokenizer.train=false")


def unknown_key(path: str, tree: Any = None) -> str:
    """The sentence that says which key of the dotted `path` is unknown and which ones there are.

    tree: all keys with their defaults; None: those of `Config`.
    """
    tree = tree or to_dict(Config())
    known: list[str] = []
    for key in path.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return _unknown(".".join(known), key, list(tree) if isinstance(tree, dict) else [])
        known.append(key)
        tree = tree[key]
    return f"{path} cannot be overridden like this"


def length_in_steps(key: str, value: str | int, *, tokens_per_step: int, total_steps: int) -> int:
    """Steps that a schedule length stands for: `100` steps, `5e9 tokens` or `20%` of the run, rounded up.

    key: the name of the configuration key, for the message of the `UserError` that a malformed length raises.
    """
    try:
        if isinstance(value, str) and value.endswith("%"):
            steps = math.ceil(float(value[:-1]) * total_steps / 100)  # multiply first: 0.07 * 100 > 7
        elif isinstance(value, str) and value.endswith("tokens"):
            steps = math.ceil(float(value.removesuffix("tokens")) / tokens_per_step)
        else:
            steps = int(str(value).removesuffix("steps"))
    except (ValueError, OverflowError):
        steps = -1
    if steps < 0:
        raise UserError(f"{key}={value!r} is no length; write 100 (steps), '5e9 tokens' or 20%")
    return steps


def build(cls: type[C], values: Any, *, path: str = "") -> C:
    """An instance of dataclass `cls` from a dict, every nested value checked against its annotation."""
    if not isinstance(values, dict):
        raise UserError(f"{path or 'config'}={values!r}: expected keys {sorted(f.name for f in _fields(cls))}")
    hints = _hints(cls)
    names = [f.name for f in _fields(cls)]
    for key in values:
        if key not in names:
            raise UserError(_unknown(path, str(key), names))
    for field_ in _fields(cls):
        needed = field_.default is dataclasses.MISSING and field_.default_factory is dataclasses.MISSING
        if needed and field_.name not in values:
            raise UserError(f"{_join(path, field_.name)} is missing")
    return cls(**{key: _value(hints[key], value, path=_join(path, key)) for key, value in values.items()})


def _value(hint: Any, value: Any, *, path: str) -> Any:
    """`value` as the type `hint` says, or a `UserError`: no silent conversion but int -> float and list -> tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for arm in args:
            try:
                return _value(arm, value, path=path)
            except UserError:
                continue
    elif origin is Literal:
        # type as well as value: True == 1 and 2.0 == 2 are other settings
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise UserError(f"{path}={value!r}; choose from {', '.join(map(str, args))}")
    elif dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path=path)
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_value(k, v, path=f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is list and isinstance(value, list):
        return [_value(args[0], inner, path=f"{path}[{i}]") for i, inner in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {_value(args[0], k, path=path): _value(args[1], v, path=_join(path, k)) for k, v in value.items()}
    elif hint is types.NoneType:
        if value is None:
            return None
    elif hint is str:
        if isinstance(value, str):
            if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
                raise UserError(f"{path}={value!r}: control characters and halves of characters cannot be part of it")
            return value
    elif hint is float:
        if isinstance(value, float):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:  # what a float holds
            return float(value)
    elif hint is int:
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:  # 5e9 reads as a float in YAML
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is Any or (origin is None and isinstance(value, hint)):
        return value
    fix = f"; write {path}=[{value}]" if origin is tuple and args[0] is str and isinstance(value, str) else ""
    raise UserError(f"{path}={value!r}: expected {_describe(hint)}{fix}")


@functools.cache
def _hints(cls: type, *, with_bounds: bool = False) -> dict[str, Any]:
    """Annotation of every field by name."""
    return typing.get_type_hints(cls, include_extras=with_bounds)


def _bounds(hint: Any, value: Any) -> list[Bound]:
    """The bounds that an annotation sets to a value of this type, wherever in it they stand."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return list(args[1:]) if isinstance(value, args[0]) else []
    return [bound for arg in args for bound in _bounds(arg, value)]


def _elements(value: Any, path: str) -> list[tuple[Any, str]]:
    """What a list or table holds, however deep, with its key; anything else holds itself."""
    if isinstance(value, dict):
        return [element for key, inner in value.items() for element in _elements(inner, f"{path}.{key}")]
    return _numbered(value, path) if isinstance(value, list | tuple) else [(value, path)]


def _numbered(values: Sequence[Any], path: str) -> list[tuple[Any, str]]:
    """Every element of a list with its key: `data.mixture[0]`."""
    return [(value, f"{path}[{i}]") for i, value in enumerate(values)]


def _unknown(path: str, key: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {_join(path, close[0])!r}?" if close else f"choose from {', '.join(sorted(names))}"
    return f"unknown key {_join(path, key)!r}; {hint}"


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(typing.cast(Any, cls))


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _describe(hint: Any) -> str:
    """`hint` as a user reads it: `int or null`, `one of on, off`, `list of str`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(arm) for arm in args)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (tuple, list):
        return f"a list of {_describe(args[0])}"
    return {types.NoneType: "null", dict: "a table"}.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _plain(value: Any) -> Any:
    """`value` with every tuple as a list."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
