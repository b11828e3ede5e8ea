"""The configuration of a run as dataclasses: every key, its default, its unit, and the checks that span keys.

Hydra composes YAML files and the command line into one plain dict. `from_dict` turns it into a `Config`, or raises a
`UserError` with the key, the value and the fix. Defaults are defined only here and in `configs/`.
Lengths of a schedule are written `100` (steps), `5e9 tokens` or `20%` (of the run).
"""

import copy
import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from osp.errors import UserError
from osp.model_config import ModelConfig, Role, check_model
from osp.schema import (
    Count,
    CountOrZero,
    Decay,
    Device,
    FilePath,
    Finite,
    Int,
    Name,
    NotNegative,
    Positive,
    Seed,
    Share,
    Text,
    Threads,
    ZeroStage,
    build,
    join,
    unknown,
)

Weights = Literal["trained", "averaged"]  # the weights after the last step, or their running average
WandbMode = Literal["online", "offline", "disabled"]


# Names of the monitor; osp.monitor.probe and osp.monitor.statistics define them.
Site = Literal[
    "embed_out", "attn_in", "q", "k", "v", "o_proj_in", "mlp_in", "down_proj_in", "block_out", "final_norm_out"
]
AlertSite = Literal["all", Site]
Statistic = Literal[
    "kurtosis", "kurtosis_pooled", "kurtosis_channel", "max_abs", "max_over_median", "rms",
    "top_channel_share", "top_token_share", "massive_count", "few_channels", "few_tokens", "mean_energy",
    "top_channel_constancy", "top_channel_share_before_gain", "top_channel_gain", "gain_share",
    "osp_script", "R_L", "attn_logit_max", "attn_sink", "gain_max", "weight_row_max", "var_error",
]  # fmt: skip

# Formats that engines run, and of qat.scheme; osp.quant.deployed defines them.
Deployed = Literal[
    "w4a16_g128", "w4a16_g32", "w8a8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "q4_0", "q8_0",
    "qat_w4a16", "qat_w4a8", "qat_w4a4", "qat_nvfp4", "qat_mxfp4",
]  # fmt: skip

EVALUATIONS = "evaluation"  # folder inside a run: records of evaluations
COMPARISONS = "compare"  # folder inside EVALUATIONS: records of comparisons


@dataclass(frozen=True)
class RunConfig:
    name: Name = "osp"  # shown in the progress bar, W&B and the report
    dir: FilePath = "runs/osp"  # run folder; see docs/training.md


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `steps`, or `tokens` without it, gives the length of the run."""

    seed: Seed = 0  # of the initial weights, the order of the sequences, and the sample text
    steps: Count | None = None  # length of the run in optimizer steps
    tokens: Count | None = None  # or in training tokens, rounded up to whole steps
    seq_len: Annotated[Int, Field(ge=1, le=2**24)] = 2048  # tokens predicted per sequence
    tokens_per_step: Annotated[Int, Field(ge=1, le=2**30)] = 524_288  # global batch in tokens, over all ranks
    micro_batch_size: Count | Literal["auto"] = "auto"  # sequences per rank and backward pass
    grad_clip: NotNegative = 1.0  # upper bound of the global gradient norm; 0 disables clipping
    compile: bool | Literal["auto"] = "auto"  # torch.compile of each block and the loss; auto: on for CUDA below ZeRO-3
    # Dtype of matmuls and activations. auto: bf16 if the hardware has it, else fp32; fp8: bf16, and 8-bit floats in the
    # matmuls of the blocks (needs torchao).
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    # Kernel of attention in training. auto: sdpa on a CPU; on a GPU flex with document masks, cudnn where it is faster,
    # else flash. sdpa: the choice of torch; fa3 needs flash_attn_interface.
    attention: Literal["auto", "sdpa", "flash", "cudnn", "flex", "fa3"] = "auto"
    activation_checkpointing: bool = False  # recompute the activations of each block in the backward pass
    deterministic: bool = False  # compute the same bits in every run; a CPU does anyway, a GPU is slower
    document_mask: bool = False  # tokens attend only to their own document
    # Tokens whose logits are in memory at once. auto: 8192; on CUDA the largest power of 2, from 1024, within 512 MiB.
    loss_chunk_tokens: Count | Literal["auto"] = "auto"
    # Factor of log(Z)^2 in the loss, Z the sum of exp(logit) of a token (arXiv 2204.02311); 0: off, PaLM: 1e-4.
    z_loss: NotNegative = 0.0
    norm_refresh_every: Count | Literal["auto"] = "auto"  # steps between updates of a norm's statistics (BHyT)
    on_nonfinite: Literal["stop", "skip"] = "stop"  # after a loss or gradient that is not finite; skip: drop the update
    max_skips: CountOrZero = 10  # updates that `on_nonfinite` and `spike` may drop before the run ends
    stop_at: Count | None = None  # save and end after this step; the schedule still spans the whole run

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run. `check` raises for a configuration without them."""
        return self.steps or math.ceil((self.tokens or 0) / self.tokens_per_step)


@dataclass(frozen=True)
class EvalQuantConfig:
    """Perplexity during training at 16-16-16 and at fake-quantized 4-4-4 (weights-activations-KV), round to nearest."""

    every: CountOrZero = 0  # steps between measurements, with one at the end; 0: never
    tokens: Annotated[Int, Field(ge=2, le=10**9)] = 16_384  # tokens, always the first of the validation split
    formats: tuple[Deployed, ...] = ()  # formats that engines run, and qat_SCHEME of qat.scheme, measured too


@dataclass(frozen=True)
class EvalConfig:
    # Steps between validations. auto: as often as takes at most 1/50 of the training time; 0: only at the end.
    every: CountOrZero | Literal["auto"] = "auto"
    tokens: Count = 1_000_000  # upper bound of tokens per validation
    weights: Weights = "trained"  # to validate, quantize and sample; averaged: see the table `average`
    sample_tokens: Annotated[Int, Field(ge=0, le=10**6)] = 64  # length of the sample in the closing summary; 0: none
    quant: EvalQuantConfig = field(default_factory=EvalQuantConfig)


@dataclass(frozen=True)
class SpikeConfig:
    """What to do about a loss or gradient norm far above its values in the last steps; see osp.train.guards."""

    action: Literal["off", "warn", "skip"] = "warn"  # warn: log an event; skip: also drop the update
    threshold: Positive = 8.0  # robust z-score from which a step is a spike
    window: Annotated[Int, Field(ge=1, le=100_000)] = 128  # last steps that the score compares with


@dataclass(frozen=True)
class PenaltyConfig:
    """A penalty on large activations, added to the training loss; see osp.model.penalty."""

    weight: NotNegative = 0.0  # factor of the penalty in the loss; 0: no penalty
    site: Literal["block_out", "down_proj_in"] = "block_out"  # penalized activations, in every block
    # The penalty is the mean of (|x| / scale)^4. rms: the RMS of each token, which makes it a kurtosis.
    scale: Annotated[float, Field(ge=1e-6)] | Literal["rms"] = 3.0


@dataclass(frozen=True)
class QatConfig:
    """Quantization-aware training: from a step on the blocks compute with rounded values; see osp.quant.qat."""

    # Number formats, as in the preset qat_SCHEME of evaluate.py; None: no rounding.
    scheme: Literal["w4a16", "w4a8", "w4a4", "nvfp4", "mxfp4"] | None = None
    start: str | Int = "80%"  # steps, tokens or share of the run before the rounding begins


@dataclass(frozen=True)
class QkClipConfig:
    """Bound attention logits by scaling the weights of queries and keys after an update; see osp.train.qk_clip."""

    tau: Positive | None = None  # largest logit of a head, before `attention.logit_cap`; null: no bound


# Keys that configurations of version 0.1.0 have, with the default and other values without effect. None: not set.
REMOVED: dict[str, tuple[Any, ...]] = {
    "norm.kappa_schedule": (None, "constant"),
    "norm.learnable_lambda": (None, True),
    "norm.approximation": (None, "baseline"),
    "norm.gain_variance": (None, False),
    "norm.exact_layers": (None, []),
    "norm.lam_final": (None,),
    "norm.layer_final": (None,),
    "recentre": (False,),
    "train.minutes": (None,),
}

# Fields of `ModelConfig` that are top-level keys in YAML and on the command line: `norm=bhyt qk_norm=true`.
AT_TOP = ("norm", "attention", "qk_norm", "ffn_norm")


@dataclass(frozen=True)
class OptimizerConfig:
    lr: NotNegative = 5e-4  # peak learning rate of the rules `muon` and `normalized`
    adam_lr: NotNegative | None = None  # peak learning rate of the rule `adamw`; None: lr
    weight_decay: NotNegative = 0.01  # decoupled weight decay
    gain_decay: NotNegative | None = None  # weight decay of the role `gain`: gains, biases, lambda; None: weight_decay
    momentum: Decay = 0.95  # of `muon` and `normalized`
    nesterov: bool = True  # Nesterov momentum
    # Newton-Schulz iteration of muon. gram: on the Gram matrix, fewer operations for long matrices.
    ns_method: Literal["standard", "gram"] = "standard"
    ns_coefficients: str = "keller_jordan"  # polynomials of the iteration, a key of osp.optim.muon.COEFFICIENTS
    ns_steps: Annotated[Int, Field(ge=1, le=100)] = 5  # steps of the iteration
    ns_dtype: Literal["auto", "bf16", "fp32"] = "auto"  # dtype of the iteration; auto: bf16 if the hardware has it
    per_head: bool = False  # let muon orthogonalize attention matrices head by head
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)  # of the rule `adamw`
    adam_eps: NotNegative = 1e-8  # of the rule `adamw`
    rules: dict[Role, str] = field(default_factory=lambda: {  # update rule of a role: a key of osp.optim.rules.RULES
        "matrix": "muon", "embed_proj": "muon", "gain": "normalized", "embedding": "adamw", "head": "adamw",
    })  # fmt: skip


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a share of its peak."""

    name: Literal["trapezoid", "cosine", "constant"] = "trapezoid"  # shape after the warm-up
    warmup: str | Int = "5%"  # length of the linear warm-up: steps, tokens or a share of the run
    decay: str | Int = "20%"  # trapezoid: length of the linear decay at the end: steps, tokens or a share of the run
    final_ratio: Annotated[Finite, Field(ge=0, le=1)] = 0.0  # last learning rate / peak learning rate


@dataclass(frozen=True)
class AverageConfig:
    """A running average of the weights, beside the trained ones; see osp.optim.average."""

    kind: Literal["none", "ema", "window"] = "none"  # ema: exponential; window: the mean of the last `horizon`
    # ema: steps after which a sample counts 1/e; window: its length. Steps, tokens or a share of the run.
    horizon: str | Int = "10%"
    decay: Decay | None = None  # ema: factor of the older samples at each new one; None: exp(-every / horizon)
    every: Count = 1  # steps between samples


@dataclass(frozen=True)
class TextConfig:
    source: str = "text"  # where text comes from: a key of osp.data.sources.SOURCES
    # text: files, or folders of .txt .md .py .jsonl .ndjson .json[.gz|.xz|.zst] .parquet.
    paths: tuple[FilePath, ...] = ()
    text_field: Text = "text"  # text, hf: the field of a record that holds the document
    dataset: FilePath | None = None  # hf: name of the data set
    subset: Text | None = None  # hf: its configuration
    split: Text = "train"  # hf: its split


@dataclass(frozen=True)
class SourceConfig(TextConfig):
    weight: Positive = 1.0  # the share of the tokens is weight / sum of weights


@dataclass(frozen=True)
class DataConfig(TextConfig):
    """Training text, and how it is tokenized into shards."""

    source: str = "python_stdlib"
    mixture: tuple[SourceConfig, ...] = ()  # mixture: list of sources with their weights
    document_characters: Count | None = None  # cut longer documents into parts, after paragraphs or lines; None: do not
    max_tokens: Count | None = None  # training tokens to stop preparing after; None: use the whole source
    val_fraction: Share = 0.01  # share of documents in the validation split, chosen by a hash of their text
    shard_tokens: Annotated[Int, Field(ge=1, le=2**32)] = 32_000_000  # tokens per shard file
    cache_dir: FilePath = "data/shards"  # folder of the shards, shared by all runs
    num_workers: Annotated[Int, Field(ge=0, le=1024)] = 0  # tokenizing threads; 0: one per core, at most 32
    skip_steps: tuple[tuple[Count, Count], ...] = ()  # leave out the data of these steps: [[first, last], ...]
    bos: bool = False  # begin every sequence with a start token, the end-of-text token
    # Tokens of a span: every sequence is the start token and a span, twice. Needs train.seq_len = 2 * repeat.
    repeat: Count | None = None


@dataclass(frozen=True)
class TokenizerConfig:
    train: bool = True  # train a byte-level BPE on the data
    vocab_size: Annotated[Int, Field(ge=1, le=2**24)] = 4096  # tokens of the BPE to train; at most model.vocab_size
    sample_bytes: Count = 32_000_000  # bytes of text to train the BPE on
    path: FilePath | None = None  # an existing tokenizer.json, with train=false
    hub: Text | None = None  # or the name of a tokenizer on the Hugging Face hub, with train=false
    eos_token: Text = "<|endoftext|>"  # the token that ends every document


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: ZeroStage = 1  # partition optimizer state (1), gradients too (2), weights too (3)
    device: Device = "auto"  # auto: CUDA if there is a GPU
    threads: Threads | None = None  # CPU threads per rank; None: share all cores among the ranks of a host
    timeout: Positive = 1800.0  # seconds until a rank in a step stops waiting for the others


@dataclass(frozen=True)
class CheckpointConfig:
    every: CountOrZero = 1000  # steps between checkpoints; 0: only at the end
    keep_last: CountOrZero = 2  # number of newest checkpoints to keep; 0: all
    keep_every: CountOrZero = 0  # keep every checkpoint whose step is a multiple of this; 0: none
    # Start at step 0 with the model and tokenizer of a run, a checkpoint, or an output of scripts/convert.py.
    init_from: FilePath | None = None


@dataclass(frozen=True)
class AlertConfig:
    """When to warn about a statistic at a site; null disables a rule."""

    above: Positive | None = None  # warn if the statistic is larger than this
    growth: Positive | None = None  # warn if it is larger than growth * max(floor, its value at half of the steps)
    floor: Positive = 1.0  # least value that growth is measured from


def _default_alerts() -> dict[Statistic, dict[AlertSite, AlertConfig]]:
    # down_proj reads a product of two activations: its tails are heavy in every model and grow in the first steps;
    # osp/run/verdict.yaml has the kurtosis of models without outliers, and calls what is above these limits an outlier
    return {
        "kurtosis": {"all": AlertConfig(above=20.0, growth=4.0, floor=5.0), "down_proj_in": AlertConfig(above=500.0)},
        "max_over_median": {
            "all": AlertConfig(above=1000.0, growth=4.0, floor=50.0),
            "down_proj_in": AlertConfig(above=5000.0),
        },
        # in models with 128 channels: with outliers 20% to 74%, outlier-safe ones less than 7% at all steps
        "top_channel_share": {site: AlertConfig(above=0.2) for site in ("attn_in", "mlp_in", "final_norm_out")},
        "R_L": {"all": AlertConfig(above=1.0, growth=3.0, floor=0.1)},
        "attn_logit_max": {"all": AlertConfig(above=100.0, growth=3.0, floor=15.0)},
    }


@dataclass(frozen=True)
class MonitorConfig:
    """Which outlier statistics to measure on validation text, how often, and when to warn."""

    enabled: bool = True  # false: no probes and no alerts
    # Steps between probes. auto: at powers of two, and as often as max_cost allows. 0: only at the start and the end.
    every: CountOrZero | Literal["auto"] = "auto"
    max_cost: Share = 0.005  # share of the training time for probes, with every=auto
    tokens: Annotated[Int, Field(ge=2, le=2**24)] = 2048  # validation tokens per probe, over all ranks
    weights: Weights = "trained"  # to probe; averaged: see the table `average`
    # Activations to measure; docs/monitoring.md describes them.
    sites: tuple[Site, ...] | Literal["all"] = ("embed_out", "attn_in", "down_proj_in", "block_out", "final_norm_out")
    # What to compute from them; docs/metrics.md defines each.
    statistics: tuple[Statistic, ...] | Literal["all"] = (
        "kurtosis", "kurtosis_pooled", "max_abs", "max_over_median", "rms", "top_channel_share", "top_token_share",
        "osp_script", "R_L", "attn_logit_max", "gain_max", "var_error",
    )  # fmt: skip
    quant: Deployed | None = None  # format of R_L; None: 4-bit integers, weights by output channel and inputs by token
    # Rules by statistic and site; the rule of a site replaces the rule of `all`.
    alerts: dict[Statistic, dict[AlertSite, AlertConfig]] = field(default_factory=_default_alerts)


@dataclass(frozen=True)
class LoggerConfig:
    every: Count = 1  # steps between training lines of metrics.jsonl and W&B
    wandb: WandbMode = "offline"  # mode of W&B; offline: files in the run folder
    project: Text = "osp"  # project in W&B
    entity: Text | None = None  # user or team in W&B; None: your default
    progress: bool = True  # show a progress bar
    peak_tflops: Positive | None = None  # TFLOP/s of a rank, for MFU; None: a table of known GPUs


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    qk_clip: QkClipConfig = field(default_factory=QkClipConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    # Checkpoint to start from. auto: the newest of this run; a path: of that run, or that checkpoint; false: none.
    resume: FilePath | bool = "auto"
    debug: bool = False  # show tracebacks of user errors


def from_dict(values: dict[str, Any]) -> Config:
    """Return the checked `Config` of a composed, resolved YAML tree.

    Raises:
        UserError: one line for the first unknown key, wrong type, value out of range, or contradiction.
    """
    values, known = upgrade(values), to_dict(Config())
    for key in values:
        if key not in known:
            raise UserError(unknown("", str(key), known))
    model = values.get("model", {})
    for key in AT_TOP:
        if isinstance(model, dict) and key in model:
            raise UserError(f"model.{key} is a top-level key; write {key}=... or {key}.KEY=...")
    at_top = build(ModelConfig, {key: values[key] for key in AT_TOP if key in values})
    config = build(Config, {key: value for key, value in values.items() if key not in AT_TOP})
    model = dataclasses.replace(config.model, **{key: getattr(at_top, key) for key in AT_TOP})
    if model.norm.name == "bhyt" and model.norm.seq_len is None:  # the length of training is a property of the model
        model = dataclasses.replace(model, norm=dataclasses.replace(model.norm, seq_len=config.train.seq_len))
    if model.norm.name == "derf" and model.norm.alpha is None and config.optimizer.rules.get("matrix") == "muon":
        model = dataclasses.replace(model, norm=dataclasses.replace(model.norm, alpha=0.3))
    config = dataclasses.replace(config, model=model)
    check(config)
    return config


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration without `REMOVED` keys; raise `UserError` if one has an effect."""
    values = copy.deepcopy(values)
    for key, ineffective in REMOVED.items():
        table, _, name = key.rpartition(".")
        inner = values.get(table) if table else values
        if isinstance(inner, dict) and (value := inner.pop(name, ineffective[0])) not in ineffective:
            raise UserError(f"{key}={value} was removed after version 0.1.0; use that version for this configuration")
    return values


def to_dict(config: Config) -> dict[str, Any]:
    """Return plain containers, ready for YAML or JSON: the inverse of `from_dict`."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # lists instead of tuples
    return values | {key: values["model"].pop(key) for key in AT_TOP}


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) for every value of a configuration that is not a table."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, join(path, key))]
    return [(path, tree)]


def unknown_key(path: str, tree: Any = None) -> str:
    """Return the sentence for the unknown key of a dotted `path`, with the keys that exist there.

    tree: all keys with their defaults; None: the keys of `Config`.
    """
    tree = tree or to_dict(Config())
    known = ""
    for key in path.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return unknown(known, key, tree if isinstance(tree, dict) else [])
        known, tree = join(known, key), tree[key]
    return f"{path} cannot be overridden like this"


def check(config: Config) -> None:
    """Raise `UserError` if keys contradict each other."""
    train, model, data, tokenizer = config.train, config.model, config.data, config.tokenizer
    if train.steps is None and train.tokens is None:
        raise UserError("the run has no length; set train.steps or train.tokens")
    if train.tokens_per_step % train.seq_len:
        raise UserError(
            f"train.tokens_per_step={train.tokens_per_step} is not a multiple of train.seq_len={train.seq_len}; "
            f"the nearest is {max(1, round(train.tokens_per_step / train.seq_len)) * train.seq_len}"
        )
    if train.seq_len > model.max_position_embeddings:
        raise UserError(
            f"train.seq_len={train.seq_len} is longer than model.max_position_embeddings="
            f"{model.max_position_embeddings}; raise the latter"
        )
    for key, value in (("data.shard_tokens", data.shard_tokens), ("data.max_tokens", data.max_tokens)):
        if value is not None and value <= train.seq_len:
            raise UserError(
                f"{key}={value} is too small for one sequence of train.seq_len={train.seq_len} plus 1 tokens; "
                f"set {key}={train.seq_len + 1} or more, or a smaller train.seq_len"
            )
    if data.repeat is not None and train.seq_len != 2 * data.repeat:
        raise UserError(
            f"data.repeat={data.repeat}: a sequence is two spans of {data.repeat} tokens; set "
            f"train.seq_len={2 * data.repeat}"
        )
    if data.repeat is not None and train.document_mask:
        raise UserError(
            "data.repeat with train.document_mask=true: no token may attend to the first span across an end of text; "
            "set train.document_mask=false"
        )
    check_model(model)
    if config.qk_clip.tau is not None and model.qk_norm:
        raise UserError(
            f"qk_clip.tau={config.qk_clip.tau} with qk_norm=true, which bounds the logits and cancels the scale of the "
            "weights; set qk_clip.tau=null or qk_norm=false"
        )
    of_text = data.source != "backcopy"  # whose tokenizer has 257 tokens
    if tokenizer.train and of_text and tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={tokenizer.vocab_size} is larger than model.vocab_size={model.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    if not tokenizer.train and (tokenizer.path is None) == (tokenizer.hub is None):
        raise UserError("tokenizer.train=false needs exactly one of tokenizer.path=FILE and tokenizer.hub=NAME")
    if tokenizer.train and (tokenizer.path or tokenizer.hub):
        raise UserError("tokenizer.path or tokenizer.hub is set but tokenizer.train=true; set tokenizer.train=false")
    past = 0
    for first, last in sorted(data.skip_steps):
        if not past < first <= last:
            raise UserError(
                f"data.skip_steps={[list(pair) for pair in data.skip_steps]}: write [[first, last], ...] with steps "
                "from 1, first <= last, and no step twice"
            )
        past = last
    check_measurements(config)


def check_measurements(config: Config) -> None:
    """Raise `UserError` for what validation and probes cannot measure."""
    quant = config.eval.quant
    if quant.every and config.engine.zero_stage == 3:
        raise UserError(
            f"eval.quant.every={quant.every} does not work with engine.zero_stage=3, which partitions "
            "the weights; set engine.zero_stage=2, or eval.quant.every=0 and evaluate checkpoints later"
        )
    for table, weights in (("eval", config.eval.weights), ("monitor", config.monitor.weights)):
        if weights == "averaged" and config.average.kind == "none":
            raise UserError(f"{table}.weights=averaged: there is no average of the weights; set average=ema or window")
    if quant.formats and not quant.every:
        raise UserError("eval.quant.formats does nothing with eval.quant.every=0; set the steps between measurements")
    if quant.every and config.train.seq_len < 2:
        raise UserError("eval.quant.every needs train.seq_len=2 or more: a window of one token predicts nothing")
