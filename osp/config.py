"""The configuration of a run as dataclasses: every key, its default, its unit, and the checks that span keys.

Hydra composes YAML and command line into one plain dict; `from_dict` turns it into a `Config` or raises a `UserError`
that names the key, the value and the fix. Nothing else in the package knows Hydra, and defaults live only here or in
`configs/`. Lengths of a schedule are written `100` (steps), `5e9 tokens` or `20%`.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

ROLES = ("matrix", "embed_proj", "gain", "embedding", "head")
Role = Literal["matrix", "embed_proj", "gain", "embedding", "head"]
Rule = Literal["muon", "normalized", "adamw"]

C = TypeVar("C")


class UserError(ValueError):
    """A mistake the user can mend. Entry points print it as one line and exit with status 2."""


class RunError(RuntimeError):
    """Why a run cannot go on although its configuration is right. One line, exit status 1."""


@dataclass(frozen=True)
class RunConfig:
    name: str = "osp"
    dir: str = "runs/osp"


@dataclass(frozen=True)
class TrainConfig:
    seed: int = 0
    # Length of the run: the first of the three that is set.
    steps: int | None = None  # optimizer steps
    tokens: int | None = None  # training tokens, rounded up to whole steps
    minutes: float | None = None  # as many steps as this machine takes in that time, measured before the first one
    seq_len: int = 2048  # tokens a row predicts
    tokens_per_step: int = 524_288  # tokens of one optimizer step over all ranks
    micro_batch_size: int | Literal["auto"] = "auto"  # rows per rank and backward pass; auto: see osp.trainer.resolve
    grad_clip: float = 1.0  # bound on the global norm of the raw gradient; 0 switches clipping off
    compile: bool | Literal["auto"] = "auto"  # torch.compile per block; auto: on for CUDA below ZeRO-3
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matmuls and activations; auto: bf16 where it is native
    activation_checkpointing: bool = False
    document_mask: bool = False  # a token attends only inside its own document
    loss_chunk_tokens: int = 8192  # rows of the logits that exist at a time
    norm_refresh_every: int | Literal["auto"] = "auto"  # steps between updates of a norm's statistics (BHyT)


@dataclass(frozen=True)
class EvalConfig:
    every: int = 250  # steps; 0: only at the end
    tokens: int = 1_000_000  # held-out tokens per validation, at most
    sample_tokens: int = 64  # length of the text generated in the closing summary; 0: none


@dataclass(frozen=True)
class NormConfig:
    """Which normalizer a model uses. `None` leaves an option at the default of the class in `osp.norms`."""

    name: str = "ssnorm"  # a key of osp.norms.NORMS
    final: str | None = None  # normalizer before the head; None: the one that the source of `name` uses
    eps: float | None = None
    init: float | None = None  # initial value of every gain
    affine: bool | None = None  # layernorm, rmsnorm, crmsnorm: one gain per channel
    bias: bool | None = None  # layernorm
    alpha: float | None = None  # dyt: initial slope
    lam: float | None = None  # bhyt: lambda, the bound of the tanh argument
    kappa: float | None = None  # bhyt: Chebyshev factor
    learnable_lambda: bool | None = None  # bhyt
    seq_len: int | None = None  # bhyt: sequence length of the variance approximation; None: train.seq_len


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama. Names are Hugging Face's `LlamaConfig`; `embed_proj` and what follows are ours."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # None: as many as num_attention_heads (MHA)
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    initializer_range: float | None = None  # None: 1/sqrt(hidden_size)
    scale_residual_init: bool = False  # o_proj and down_proj start 1/sqrt(2 num_hidden_layers) smaller
    embed_proj: bool = False  # EmbProj after the embedding and before the head (papers: OSP section 3)
    norm: NormConfig = field(default_factory=NormConfig)  # the top-level group `norm` of the YAML

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 5e-4  # of the rules muon and normalized
    adam_lr: float | None = None  # of the rule adamw; None: lr
    weight_decay: float = 0.01  # decoupled, of every role
    momentum: float = 0.95
    nesterov: bool = True
    ns_method: Literal["standard", "gram"] = "standard"
    ns_coefficients: str = "keller_jordan"  # a key of osp.optim.COEFFICIENTS
    ns_steps: int = 5
    ns_dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where it is native
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
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
    final_ratio: float = 0.0  # last rate over peak rate


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents inside a mixture; the meaning of the fields is that of `DataConfig`."""

    source: Literal["python_stdlib", "text", "hf"] = "text"
    paths: tuple[str, ...] = ()
    text_field: str = "text"
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    source: Literal["python_stdlib", "text", "hf", "mixture"] = "python_stdlib"
    paths: tuple[str, ...] = ()  # text: files or folders of .txt .md .py .jsonl[.gz|.zst|.xz] .parquet
    text_field: str = "text"  # text, hf: the field of a record that holds the document
    dataset: str | None = None  # hf: name of the data set
    subset: str | None = None  # hf: its configuration
    split: str = "train"  # hf
    mixture: tuple[SourceConfig, ...] = ()  # mixture: sources and their shares of the tokens
    max_tokens: int | None = None  # stop preparing after this many training tokens; None: all there are
    val_fraction: float = 0.01  # share of documents held out, chosen by the hash of their text
    shard_tokens: int = 32_000_000
    cache_dir: str = "data/shards"
    num_workers: int = 0  # tokenizing processes; 0: one per core


@dataclass(frozen=True)
class TokenizerConfig:
    train: bool = True  # train a byte-level BPE on the data
    vocab_size: int = 4096
    sample_bytes: int = 32_000_000  # text the BPE is trained on
    path: str | None = None  # an existing tokenizer.json, with train=false
    hub: str | None = None  # or a tokenizer of the Hugging Face hub, with train=false
    eos_token: str = "<|endoftext|>"


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: Literal[1, 2, 3] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None  # CPU threads per rank; None: all cores shared among the ranks of a host


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps; 0: only at the end
    keep_last: int = 2


@dataclass(frozen=True)
class LoggerConfig:
    every: int = 1  # steps between training lines of metrics.jsonl and W&B
    wandb: Literal["online", "offline", "disabled"] = "offline"
    project: str = "osp"
    entity: str | None = None
    progress: bool = True
    peak_tflops: float | None = None  # MFU's denominator per rank; None: the table of known GPUs, no MFU elsewhere


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    resume: str | bool = "auto"  # auto | a checkpoint or run folder | false
    debug: bool = False  # show tracebacks of user errors


def from_dict(values: dict[str, Any]) -> Config:
    """The checked `Config` that a composed, resolved YAML tree describes.

    Raises `UserError` with the path of the first unknown key, ill-typed value or pair of keys that contradict.
    """
    known = to_dict(Config())
    for key in values:
        if key not in known:
            raise UserError(_unknown("", str(key), list(known)))
    values = dict(values)
    model = dict(values.get("model") or {})
    if "norm" in model:
        raise UserError("model.norm: the normalizer is the top-level group; write norm=... or norm.KEY=...")
    if "norm" in values:
        model["norm"] = values.pop("norm")
    config = _build(Config, {**values, "model": model}, path="")
    check(config)
    norm = config.model.norm
    if norm.name == "bhyt" and norm.seq_len is None:  # the length the model is trained at belongs to the model
        norm = dataclasses.replace(norm, seq_len=config.train.seq_len)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, norm=norm))


def to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `from_dict`: plain containers, ready for YAML or JSON."""
    values = _plain(dataclasses.asdict(config))
    values["norm"] = values["model"].pop("norm")
    return values


def check(config: Config) -> None:
    """Raise `UserError` for values that are well-typed alone and wrong together."""
    train, model, data, tokenizer = config.train, config.model, config.data, config.tokenizer
    if train.steps is None and train.tokens is None and train.minutes is None:
        raise UserError("the run has no length; set train.steps, train.tokens or train.minutes")
    if train.minutes is not None and not (train.minutes > 0 and math.isfinite(train.minutes)):
        raise UserError(f"train.minutes={train.minutes}: must be a finite number above 0")
    for key, value in (
        ("train.steps", train.steps if train.steps is not None else 1),
        ("train.tokens", train.tokens if train.tokens is not None else 1),
        ("train.seq_len", train.seq_len),
        ("train.tokens_per_step", train.tokens_per_step),
        ("train.micro_batch_size", 1 if train.micro_batch_size == "auto" else train.micro_batch_size),
        ("train.loss_chunk_tokens", train.loss_chunk_tokens),
        ("train.norm_refresh_every", 1 if train.norm_refresh_every == "auto" else train.norm_refresh_every),
        ("model.hidden_size", model.hidden_size),
        ("model.intermediate_size", model.intermediate_size),
        ("model.num_hidden_layers", model.num_hidden_layers),
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_key_value_heads", 1 if model.num_key_value_heads is None else model.num_key_value_heads),
        ("model.vocab_size", model.vocab_size),
        ("optimizer.ns_steps", config.optimizer.ns_steps),
        ("data.shard_tokens", data.shard_tokens),
        ("data.max_tokens", 1 if data.max_tokens is None else data.max_tokens),
        ("engine.threads", 1 if config.engine.threads is None else config.engine.threads),
        ("tokenizer.sample_bytes", tokenizer.sample_bytes),
        ("logger.every", config.logger.every),
        ("eval.tokens", config.eval.tokens),
    ):
        if value <= 0:
            raise UserError(f"{key}={value}: must be at least 1")
    for key, value in (
        ("train.grad_clip", train.grad_clip),
        ("eval.every", config.eval.every),
        ("eval.sample_tokens", config.eval.sample_tokens),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep_last", config.checkpoint.keep_last),
        ("optimizer.lr", config.optimizer.lr),
        ("optimizer.adam_lr", config.optimizer.adam_lr or 0.0),
        ("optimizer.weight_decay", config.optimizer.weight_decay),
        ("optimizer.adam_eps", config.optimizer.adam_eps),
        ("norm.eps", model.norm.eps or 0.0),
        ("data.num_workers", data.num_workers),
    ):
        if value < 0 or not math.isfinite(value):
            raise UserError(f"{key}={value}: must be a finite number, 0 or more")
    for key, value in (
        ("model.rope_theta", model.rope_theta),
        ("model.initializer_range", 1.0 if model.initializer_range is None else model.initializer_range),
        ("logger.peak_tflops", 1.0 if config.logger.peak_tflops is None else config.logger.peak_tflops),
        *((f"data.mixture[{i}].weight", source.weight) for i, source in enumerate(data.mixture)),
    ):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{key}={value}: must be a finite number above 0")
    if not all(0 <= beta < 1 for beta in config.optimizer.adam_betas):
        raise UserError(f"optimizer.adam_betas={list(config.optimizer.adam_betas)}: both must be in [0, 1)")
    if not 0 <= config.optimizer.momentum < 1:
        raise UserError(f"optimizer.momentum={config.optimizer.momentum}: must be in [0, 1)")
    if not 0 <= config.schedule.final_ratio <= 1:
        raise UserError(f"schedule.final_ratio={config.schedule.final_ratio}: must be in [0, 1]")
    if not 0 < data.val_fraction < 1:
        raise UserError(f"data.val_fraction={data.val_fraction}: must be in (0, 1)")
    if train.tokens_per_step % train.seq_len:
        raise UserError(
            f"train.tokens_per_step={train.tokens_per_step} is no multiple of train.seq_len={train.seq_len}; "
            f"the nearest is {max(1, round(train.tokens_per_step / train.seq_len)) * train.seq_len}"
        )
    check_model(model)
    if train.seq_len > model.max_position_embeddings:
        raise UserError(
            f"train.seq_len={train.seq_len} is longer than model.max_position_embeddings="
            f"{model.max_position_embeddings}; raise the latter"
        )
    if tokenizer.train and tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={tokenizer.vocab_size} is larger than model.vocab_size={model.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    if not tokenizer.train and (tokenizer.path is None) == (tokenizer.hub is None):
        raise UserError("tokenizer.train=false needs exactly one of tokenizer.path=FILE and tokenizer.hub=NAME")
    if tokenizer.train and (tokenizer.path or tokenizer.hub):
        raise UserError("tokenizer.path or tokenizer.hub is set but tokenizer.train=true; set tokenizer.train=false")
    for source, path in [(data, "data")] + [(s, f"data.mixture[{i}]") for i, s in enumerate(data.mixture)]:
        if source.source == "text" and not source.paths:
            raise UserError(f"{path}.paths is empty; name files or folders, for example {path}.paths=[corpus.jsonl]")
        if source.source == "hf" and not source.dataset:
            raise UserError(f"{path}.dataset is not set; name a Hugging Face data set, for example allenai/c4")
    if data.source == "mixture" and not data.mixture:
        raise UserError("data.source=mixture but data.mixture is empty; list at least one source")


def check_model(model: ModelConfig) -> None:
    """Raise `UserError` for a shape no Llama can have."""
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not divisible by "
            f"model.num_attention_heads={model.num_attention_heads}"
        )
    if model.head_dim % 2:
        raise UserError(f"head size {model.head_dim} (hidden_size / num_attention_heads) is odd; RoPE needs it even")
    if model.num_attention_heads % model.kv_heads:
        raise UserError(
            f"model.num_attention_heads={model.num_attention_heads} is not divisible by "
            f"model.num_key_value_heads={model.num_key_value_heads}"
        )


def unknown_key(path: str) -> str:
    """The sentence that says which key of the dotted `path` is unknown and which ones there are."""
    tree: Any = to_dict(Config())
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


def _build(cls: type[C], values: Any, *, path: str) -> C:
    """An instance of dataclass `cls` from a dict, every nested value checked against its annotation."""
    if not isinstance(values, dict):
        raise UserError(f"{path or 'config'}={values!r}: expected keys {sorted(f.name for f in _fields(cls))}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in _fields(cls)]
    for key in values:
        if key not in names:
            raise UserError(_unknown(path, str(key), names))
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
        return _build(typing.cast(type, hint), value, path=path)
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_value(k, v, path=f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {_value(args[0], k, path=path): _value(args[1], v, path=_join(path, k)) for k, v in value.items()}
    elif hint is types.NoneType:
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, float) and value.is_integer():  # 5e9 reads as a float in YAML
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif origin is None and isinstance(value, hint):
        return value
    raise UserError(f"{path}={value!r}: expected {_describe(hint)}")


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
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    return {types.NoneType: "null", dict: "a table"}.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _plain(value: Any) -> Any:
    """`value` with every tuple as a list."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
