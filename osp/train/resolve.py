"""Turn a configuration and a machine into one `Resolved`, in which every choice is made."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from osp.config import Config, TokenizerConfig, check
from osp.device import native_bf16, prefers_cudnn
from osp.errors import UserError, as_user_error
from osp.optim.average import Samples, build_samples
from osp.optim.schedule import build_schedule, length_in_steps
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec, check_spec
from osp.run.checkpoint import Checkpoint, find


@dataclass(frozen=True)
class Resolved:
    """A configuration with every choice made for one machine. Only `resolve` builds it, and nothing changes it.

    `config` holds the decided value in place of every `auto`: it is what config.yaml and the checkpoints record.
    """

    config: Config
    device: torch.device
    world_size: int
    micro_batch_size: int  # sequences per rank and backward pass
    gradient_accumulation_steps: int  # backward passes per rank and optimizer step
    compute_dtype: torch.dtype  # of matmuls and activations; with fp8 of all but the matmuls in the blocks
    loss_chunk_tokens: int  # tokens whose logits are in memory at a time
    compiled: bool  # every block and the loss by torch.compile
    qat: tuple[int, QuantSpec] | None  # first step, from 0, with rounded blocks, and how; None: none

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.config.train.num_steps

    @property
    def last_step(self) -> int:
        """Step after which the run ends, of the whole run or of `train.stop_at`."""
        return min(self.total_steps, self.config.train.stop_at or self.total_steps)

    def build_schedule(self) -> Callable[[int], float]:
        """Return the learning rate over its peak as a function of the step. Raises `UserError` if phases overlap."""
        tokens = self.config.train.tokens_per_step
        return build_schedule(self.config.schedule, total_steps=self.total_steps, tokens_per_step=tokens)

    def build_samples(self) -> Samples:
        """Return when and how the average of the weights is updated. Raises `UserError` if its lengths do not fit."""
        tokens = self.config.train.tokens_per_step
        return build_samples(self.config.average, total_steps=self.total_steps, tokens_per_step=tokens)


def resolve(config: Config, *, device: torch.device, world_size: int, bf16: bool | None = None) -> Resolved:
    """Decide everything that `config` leaves open.

    Raises `UserError` if the batch does not divide among the ranks, or `checkpoint.init_from` or a number format does
    not fit. bf16: whether the device multiplies bf16 natively; None: ask the device of this process.
    """
    config = _with_initial_model(config)
    for key, names in (("eval.quant.formats", config.eval.quant.formats), ("monitor.quant", (config.monitor.quant,))):
        for name in filter(None, names):
            with as_user_error(f"{key}={name}: ", UserError):
                check_spec(DEPLOYED[name], config.model)
    train = config.train
    precision = train.precision
    if precision == "auto":
        native = native_bf16(device) if bf16 is None else bf16
        precision = "bf16" if native else "fp32"
    compiled = train.compile
    if compiled == "auto":
        compiled = device.type == "cuda" and config.engine.zero_stage < 3
    elif compiled and config.engine.zero_stage == 3:
        raise UserError("train.compile=true does not work with engine.zero_stage=3 (its hooks break every graph)")
    sequences = train.tokens_per_step // train.seq_len
    if sequences % world_size:
        nearest = max(1, round(sequences / world_size)) * world_size * train.seq_len
        raise UserError(
            f"train.tokens_per_step={train.tokens_per_step} is {sequences} sequences of train.seq_len={train.seq_len}, "
            f"which {world_size} ranks do not divide; the nearest that works is train.tokens_per_step={nearest}"
        )
    per_rank, size = sequences // world_size, train.micro_batch_size
    if size == "auto":
        limit = max(1, (16384 if device.type == "cuda" else 4096) // train.seq_len)
        size = max(b for b in range(1, min(per_rank, limit) + 1) if per_rank % b == 0)
    elif per_rank % size:
        raise UserError(
            f"train.micro_batch_size={size} does not divide the {per_rank} sequences that each of {world_size} "
            f"ranks takes per step (train.tokens_per_step / train.seq_len / ranks)"
        )
    dtype, chunk = torch.float32 if precision == "fp32" else torch.bfloat16, train.loss_chunk_tokens
    if chunk == "auto":
        fitting = 2**29 // (config.model.vocab_size * dtype.itemsize)
        chunk = 2 ** max(10, fitting.bit_length() - 1) if device.type == "cuda" else 8192
    decided = {"attention": _attention(config, device), "precision": precision, "compile": compiled}
    decided |= {"micro_batch_size": size, "loss_chunk_tokens": chunk}
    train = dataclasses.replace(train, **decided, steps=train.num_steps, tokens=None)
    return Resolved(
        config=dataclasses.replace(config, train=train),
        device=device,
        world_size=world_size,
        micro_batch_size=size,
        gradient_accumulation_steps=per_rank // size,
        compute_dtype=dtype,
        loss_chunk_tokens=chunk,
        compiled=compiled,
        qat=_qat(config),
    )


def _attention(config: Config, device: torch.device) -> str:
    """Return `train.attention`, decided. Raises `UserError` if device, document masks or heads exclude it."""
    train, small = config.train, config.model.head_size < 16
    choice, masked = train.attention, train.document_mask
    if device.type == "cpu":
        if choice not in ("auto", "sdpa"):
            raise UserError(f"train.attention={choice} trains on a GPU only; on a CPU set train.attention=auto")
        return "sdpa"
    if choice == "auto":
        if masked:
            return "flash" if small else "flex"
        return "cudnn" if prefers_cudnn(device) and not train.deterministic else "flash"
    if choice == "cudnn" and train.deterministic:
        raise UserError("train.attention=cudnn sums in any order, unlike train.deterministic=true; set flash")
    if choice == "flex" and small:  # a limit of its kernel
        raise UserError(f"train.attention=flex: heads of {config.model.head_size} channels; it needs 16. Set flash")
    if masked and choice not in ("flex", "flash"):  # with a mask cuDNN's gradients may be nan (torch #196678)
        raise UserError(f"train.attention={choice} takes no train.document_mask=true; set flex, or flash (slow)")
    return choice


def _qat(config: Config) -> tuple[int, QuantSpec] | None:
    """Return `Resolved.qat`. Raises `UserError` if it begins after the end or the scheme does not fit."""
    scheme, value, steps = config.qat.scheme, config.qat.start, config.train.num_steps
    if scheme is None:
        return None
    if config.train.precision == "fp8":
        raise UserError(f"qat.scheme={scheme}: fp8 would round once more, unlike evaluation; set train.precision=bf16")
    with as_user_error(f"qat.scheme={scheme}: ", UserError, after="; choose another scheme"):
        check_spec(spec := DEPLOYED[f"qat_{scheme}"], config.model)
    start = length_in_steps("qat.start", value, tokens_per_step=config.train.tokens_per_step, total_steps=steps)
    if start == steps and str(value).endswith("%") and value != "100%":
        start -= 1  # shares are rounded up
    if start >= steps:
        raise UserError(f"qat.start={value!r} is step {start}, and the run has {steps} steps; set an earlier start")
    return start, spec


def _with_initial_model(config: Config) -> Config:
    """Return `config` with the model and the tokenizer of `checkpoint.init_from`, or as it is without that key."""
    if (source := config.checkpoint.init_from) is None:
        return config
    if (folder := find(Path(source))) is None:
        raise UserError(
            f"checkpoint.init_from={source}: no model there; name a run, a checkpoint or what scripts/convert.py "
            "wrote; a Hugging Face folder is converted first"
        )
    initial = Checkpoint(folder).config
    if not (path := folder.resolve().parent.parent / "tokenizer.json").is_file():
        raise UserError(f"checkpoint.init_from={source}: {path} is missing, the model's tokenizer")
    tokenizer = TokenizerConfig(train=False, path=str(path), eos_token=initial.tokenizer.eos_token)
    config = dataclasses.replace(config, model=initial.model, tokenizer=tokenizer)
    check(config)
    return config
