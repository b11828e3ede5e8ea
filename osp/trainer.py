"""Training: from a checked configuration to a run folder with a trained model.

`train` sets everything up, on any number of ranks; `Trainer.fit` is the loop. What can be wrong with a configuration,
its data or its folder is found in `train` before the first step.
"""

import dataclasses
import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from osp.checkpoint import Checkpoint, checkpoint_bytes, load, prune, save
from osp.config import Config, RunError, UserError, to_dict
from osp.cpu import prepare_cpu
from osp.data import (
    Batch,
    Loader,
    existing_tokenizer,
    load_manifest,
    load_tokenizer,
    start,
    token_bytes,
    validation_batches,
    vocab_size,
)
from osp.engine import Engine, gather_objects, init_distributed, local_ranks, on_main
from osp.generate import generate
from osp.logger import Logger, check_wandb
from osp.loss import IGNORE
from osp.model import Transformer, build_model, count_parameters, flops_per_token
from osp.norms import bound_warning
from osp.optim import build_groups, build_schedule, collect_roles, describe_groups
from osp.precision import native_bf16, peak_tflops
from osp.run import begin, check_disk, environment, open_run, with_length_of_run

log = logging.getLogger(__name__)

MEASURED_STEPS = 6  # how many steps `train.minutes` is turned into steps by


def train(config: Config) -> None:
    """Run the training that `config` describes, or continue it; every rank calls it.

    Raises `UserError` before the first step for whatever the user can mend, `RunError` if the numbers go wrong.
    """
    setup(config).fit()


def setup(config: Config) -> "Trainer":
    """The trainer of `config`, everything checked and its run folder begun or continued. Collective."""
    model = meta_model(config)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    build_groups(collect_roles(model.named_parameters(), model.parameter_roles()), config.optimizer)
    device = init_distributed(config.engine.device)
    if device.type == "cpu":
        prepare_cpu(config.engine.threads, local_ranks=local_ranks())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = resolve(config, device=device, world_size=world_size)
    _check_same_config(config)
    config = on_main(lambda: with_length_of_run(config))
    if config.train.steps is not None:
        build_schedule_of(config)  # raises if its phases do not fit
    logger_config = on_main(lambda: check_wandb(config.logger))
    folder, checkpoint_folder = on_main(lambda: open_run(config))
    on_main(lambda: check_disk(folder, checkpoint_bytes(shapes, 1.5), copies=max(2, config.checkpoint.keep_last)))
    checkpoint = Checkpoint(checkpoint_folder) if checkpoint_folder else None
    if checkpoint and checkpoint.shapes != shapes:
        raise UserError(f"{checkpoint.folder}: its model has other parameters than this configuration's")
    if rank == 0 and (warning := bound_warning(config.model)):
        log.warning(warning)
    if not config.tokenizer.train:  # known before any text is read
        on_main(lambda: _check_vocabulary(config, vocab_size(existing_tokenizer(config.tokenizer))))
    shards = on_main(lambda: start(config.data, config.tokenizer, progress=config.logger.progress))
    _check_vocabulary(config, load_manifest(shards).vocab_size)
    loader = build_loader(config, shards, rank=rank, world_size=world_size)
    engine = build_engine(config, device=device, world_size=world_size)
    if config.train.steps is None:
        config = with_measured_length(config, engine, loader)
    on_main(
        lambda: begin(folder, config, tokenizer=shards / "tokenizer.json", world_size=world_size, device=str(device))
    )
    logger = None
    if rank == 0:
        logger = Logger(
            folder,
            logger_config,
            run_name=config.run.name,
            run_config=to_dict(config),
            step=checkpoint.step if checkpoint else 0,
            total_steps=total_steps(config),
        )
    trainer = Trainer(config, engine, loader, folder, logger)
    if checkpoint:
        trainer.restore(checkpoint)
    return trainer


class Trainer:
    """One run on one rank; `logger` is None on all ranks but the first."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        loader: Loader,
        folder: Path,
        logger: Logger | None,
    ):
        self.config, self.engine, self.loader, self.folder, self.logger = config, engine, loader, folder, logger
        self.total_steps = total_steps(config)
        self.schedule = build_schedule_of(config)
        self.shards = loader.rows.shards.folder
        self.step = 0
        self.train_seconds = 0.0
        self.tokenizer: Tokenizer = load_tokenizer(self.shards / "tokenizer.json")
        self.token_bytes = torch.from_numpy(token_bytes(self.tokenizer)).to(engine.device)
        self.flops_per_token = flops_per_token(config.model, config.train.seq_len)
        self.peak_tflops = config.logger.peak_tflops or peak_tflops(engine.device)

    @property
    def model(self) -> Transformer:
        module = self.engine.module
        assert isinstance(module, Transformer)
        return module

    @property
    def tokens(self) -> int:
        """Training tokens seen so far."""
        return self.step * self.config.train.tokens_per_step

    def fit(self) -> None:
        """Train from `self.step` to the end; validate, checkpoint and log on the way; close with the summary."""
        self._announce()
        first, validation = self.step, {}
        saved = self.step
        try:
            for step in range(first, self.total_steps):
                self.refresh_norms(step)
                record = self._due(self.config.logger.every, step + 1)
                metrics = self.train_step(step, record=record)
                self.step = step + 1
                if self.logger:
                    self.logger.advance(loss=metrics["train/loss"], tokens_per_second=self._speed(first))
                    if record:
                        self.logger.log(metrics, step=self.step, tokens=self.tokens)
                if self._due(self.config.eval.every, self.step):
                    validation = self.validate()
                if self._due(self.config.checkpoint.every, self.step):
                    self.save()
                    saved = self.step
            stored = self.folder / "summary.json"
            if first == self.total_steps and stored.exists():  # the run was complete already
                summary = json.loads(stored.read_text(encoding="utf-8"))
            else:
                summary = self._summary(validation or self.validate(), tokens_per_second=self._speed(first))
            self._print_summary(summary)
        finally:
            self.loader.close()
            if self.logger:
                self.logger.close(exit_code=0 if saved == self.total_steps else 1)

    def train_step(self, step: int, *, record: bool) -> dict[str, float]:
        """One optimizer step, 0-based `step`; its metrics, all of them when `record`.

        Every row predicts seq_len tokens, so the global number of valid tokens is tokens_per_step. The loss is looked
        at before the optimizer changes anything.
        """
        began = time.perf_counter()
        batches = self.loader.step(step)
        data_wait = time.perf_counter() - began
        losses = []
        for batch in batches:
            loss = self._loss(batch)
            self.engine.backward(loss / self.config.train.tokens_per_step)
            losses.append(loss.detach())
        summed = self.engine.all_reduce_sum(torch.stack(losses).sum())
        mean = summed.item() / self.config.train.tokens_per_step
        if not math.isfinite(mean):
            self._stop_on_nonfinite(step, torch.stack(losses))
        self.engine.set_step(step + 1, self.schedule(step), record=record)
        if not self.engine.step():
            raise RunError(
                f"step {step + 1}: the gradient is not finite though the loss is {mean:.4f}; nothing changed"
            )
        grad_norm = float(self.engine.grad_norm())
        seconds = time.perf_counter() - began
        self.train_seconds += seconds
        metrics = {"train/loss": mean, "train/grad_norm": grad_norm}
        if record:
            metrics |= self._figures(seconds, data_wait)
        return metrics

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss in nats per token and bits per byte on the held-out rows; logged."""
        config, began = self.config, time.perf_counter()
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.engine.device)  # nats, tokens, bytes
        for batch in validation_batches(
            self.shards,
            seq_len=config.train.seq_len,
            batch_size=_micro_batch_size(config),
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            max_tokens=config.eval.tokens,
            document_ids=config.train.document_mask,
        ):
            targets = batch.tokens[:, 1:].to(self.engine.device)
            counted = targets[: batch.num_rows]
            nats = self._loss(batch).double()
            sums += torch.stack((nats, nats.new_tensor(counted.numel()), self.token_bytes[counted].sum().double()))
        self.model.train()
        nats, tokens, num_bytes = self.engine.all_reduce_sum(sums).tolist()
        metrics = {
            "val/loss": nats / tokens,
            "val/bits_per_byte": nats / math.log(2) / max(num_bytes, 1.0),
            "val/seconds": time.perf_counter() - began,
        }
        if self.logger:
            self.logger.log(metrics, step=self.step, tokens=self.tokens)
            self.logger.say(
                f"step {self.step}: validation loss {metrics['val/loss']:.4f}, "
                f"{metrics['val/bits_per_byte']:.4f} bits/byte"
            )
        return metrics

    def save(self) -> None:
        """Write a checkpoint of this step and drop old ones."""
        run_id = self.folder / "wandb_run_id"
        folder = self.folder / "checkpoints"
        save(
            folder,
            self.engine.local_state(),
            step=self.step,
            tokens=self.tokens,
            config=to_dict(self.config),
            extra={
                "environment": environment(),
                "world_size": self.engine.world_size,
                "wandb_run_id": run_id.read_text().strip() if run_id.exists() else None,
            },
            shapes={name: list(p.shape) for name, p in meta_model(self.config).named_parameters()},
            buffers=dict(self.model.named_buffers()),
            rank=self.engine.rank,
            barrier=self.engine.barrier,
            gather=gather_objects,
        )
        if self.engine.rank == 0:
            prune(folder, self.config.checkpoint.keep_last)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`: weights, optimizer state, norm statistics, position in the data and schedule."""
        load(checkpoint, self.engine.local_state(), self.model)
        self.engine.sync_weights_from_master()
        self.step = checkpoint.step

    def refresh_norms(self, step: int) -> None:
        """Let norms re-derive their statistics from the weights, about 50 times a run (BHyT's callback)."""
        every = self.config.train.norm_refresh_every
        if every == "auto":
            every = min(max(self.total_steps // 50, 1), 1000)
        if self.model.has_norm_statistics and step % every == 0:
            with self.engine.gathered_parameters():
                self.model.refresh_norms()

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Summed loss of the batch's rows on this rank; rows beyond `num_rows` are padding and count nothing."""
        tokens = batch.tokens.to(self.engine.device, non_blocking=True)
        targets = tokens[:, 1:].clone() if batch.num_rows < len(tokens) else tokens[:, 1:]
        targets[batch.num_rows :] = IGNORE
        ids = batch.document_ids
        return self.engine(
            tokens[:, :-1],
            targets,
            document_ids=None if ids is None else ids[:, :-1].to(self.engine.device, non_blocking=True),
            chunk_tokens=self.config.train.loss_chunk_tokens,
        )

    def _figures(self, seconds: float, data_wait: float) -> dict[str, float]:
        """The metrics that cost something to collect."""
        train = self.config.train
        speed = train.tokens_per_step / seconds
        figures = {
            "train/tokens_per_second": speed,
            "train/step_seconds": seconds,
            "train/data_wait_seconds": data_wait,
            "train/memory_gib": self.engine.memory() / 2**30,
        }
        if self.peak_tflops:
            figures["train/mfu"] = speed * self.flops_per_token / (self.peak_tflops * 1e12 * self.engine.world_size)
        return figures | {f"train/{key}": value for key, value in self.engine.optimizer_statistics().items()}

    def _stop_on_nonfinite(self, step: int, losses: torch.Tensor) -> None:
        """Write which rows gave a loss that is not finite, and stop; no weight has changed."""
        size, world_size = _micro_batch_size(self.config), self.engine.world_size
        bad = [i for i, finite in enumerate(torch.isfinite(losses).tolist()) if not finite]
        first_row = step * (self.config.train.tokens_per_step // self.config.train.seq_len)
        mine = [
            [
                first_row + (i * world_size + self.engine.rank) * size,
                first_row + (i * world_size + self.engine.rank + 1) * size,
            ]
            for i in bad
        ]
        rows = sorted(interval for intervals in gather_objects(mine) for interval in intervals)
        if self.engine.rank == 0:
            report = {"step": step + 1, "rows": rows}
            (self.folder / "nonfinite.json").write_text(json.dumps(report) + "\n")
        raise RunError(
            f"step {step + 1}: the loss is not finite; rows {', '.join(f'{a} to {b - 1}' for a, b in rows)} of the "
            f"training data gave it (nonfinite.json); no weight was changed"
        )

    def _due(self, every: int, step: int) -> bool:
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _speed(self, first: int) -> float:
        """Training tokens per second since step `first`, without validation and saving; 0 before the first step."""
        done = (self.step - first) * self.config.train.tokens_per_step
        return done / self.train_seconds if self.train_seconds else 0.0

    def _announce(self) -> None:
        """Say what is about to run: sizes, engine, and the table of the optimizer's groups."""
        if not self.logger:
            return
        config, engine, counts = self.config, self.engine, count_parameters(self.config.model)
        self.logger.say(
            f"{config.run.name}: {counts['total'] / 1e6:.1f} M parameters, norm {config.model.norm.name}, "
            f"{self.flops_per_token / 1e6:.0f} MFLOP per token; {engine.world_size} x {engine.device.type}, "
            f"{config.train.precision}, ZeRO-{config.engine.zero_stage}; {self.total_steps:,} steps of "
            f"{config.train.tokens_per_step:,} tokens from {self.shards}\n{describe_groups(engine.groups)}"
        )
        if self.peak_tflops:
            self.logger.say(f"MFU is measured against {self.peak_tflops:g} TFLOP/s per rank")
        if self.step:
            complete = self.step == self.total_steps
            self.logger.say("this run is complete" if complete else f"resuming after step {self.step}")

    def _summary(self, validation: dict[str, float], *, tokens_per_second: float) -> dict[str, Any]:
        """The closing figures, with a sample that continues a held-out text; written to summary.json. Collective."""
        manifest = load_manifest(self.shards)
        summary = {
            "steps": self.step,
            "tokens": self.tokens,
            **validation,
            "tokens_per_second": tokens_per_second,
            "train_seconds": self.train_seconds,
            "gzip_bits_per_byte": 8 * manifest.val_gzip_bytes / max(manifest.val.bytes, 1),
            "sample": self._sample(),
        }
        if self.logger:
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        return summary

    def _print_summary(self, summary: dict[str, Any]) -> None:
        if not self.logger:
            return
        lines = [
            "",
            f"trained             {summary['steps']:,} steps, {summary['tokens']:,} tokens",
            f"validation loss     {summary['val/loss']:.4f} nats per token",
            f"bits per byte       {summary['val/bits_per_byte']:.4f}   "
            f"(gzip -9, file by file: {summary['gzip_bits_per_byte']:.4f})",
            f"tokens per second   {summary['tokens_per_second']:,.0f}",
            f"run folder          {self.folder}",
        ]
        if summary["sample"]:
            lines += ["sample, continuing a held-out text:", *(f"    {line}" for line in summary["sample"].split("\n"))]
        self.logger.end_progress()
        self.logger.say("\n".join(lines))

    def _sample(self) -> str:
        """A prompt from the held-out text and what the model makes of it."""
        num_tokens, seq_len = self.config.eval.sample_tokens, self.config.train.seq_len
        if not num_tokens:
            return ""
        rows = validation_batches(
            self.shards, seq_len=seq_len, batch_size=1, rank=0, world_size=1, max_tokens=seq_len, document_ids=False
        )
        prompt = next(iter(rows)).tokens[0, :32].to(self.engine.device)
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            tokens = generate(
                self.model, prompt, num_tokens, context=seq_len, temperature=0.8, seed=self.config.train.seed
            )
        self.model.train()
        return self.tokenizer.decode(torch.cat((prompt, tokens)).tolist())


def meta_model(config: Config) -> Transformer:
    """The model of `config` without memory: its names and whole shapes, also where ranks hold parts."""
    with torch.device("meta"):
        return Transformer(config.model)


def total_steps(config: Config) -> int:
    """Optimizer steps of the run, once its length is decided."""
    assert config.train.steps is not None, "resolve() or with_measured_length() decides it"
    return config.train.steps


def build_schedule_of(config: Config) -> Callable[[int], float]:
    """Learning rate over peak rate as a function of the step of this run."""
    return build_schedule(
        config.schedule, total_steps=total_steps(config), tokens_per_step=config.train.tokens_per_step
    )


def with_steps(config: Config, steps: int) -> Config:
    """`config` with the length of the run decided."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, tokens=None, minutes=None))


def with_measured_length(config: Config, engine: Engine, loader: Loader) -> Config:
    """`config` with as many steps as fit into `train.minutes`. Takes a few steps, and takes them back. Collective."""
    assert config.train.minutes is not None
    state = [(tensor, tensor.clone()) for *_, states in engine.local_state() for tensor in states.values()]
    trial = Trainer(with_steps(config, MEASURED_STEPS), engine, loader, Path(), None)
    seconds = []
    for step in range(MEASURED_STEPS):
        began = time.perf_counter()
        trial.train_step(step, record=True)
        seconds.append(time.perf_counter() - began)
    for tensor, before in state:
        tensor.copy_(before)
    engine.sync_weights_from_master()
    # the first steps compile, allocate and read cold memory
    steps = max(1, int(60 * config.train.minutes / statistics.median(seconds[MEASURED_STEPS // 2 :])))
    return with_steps(config, on_main(lambda: steps))


def resolve(config: Config, *, device: torch.device, world_size: int) -> Config:
    """`config` with every `auto` decided for this machine; `UserError` if the batch cannot be cut for its ranks."""
    train = config.train
    bf16 = train.precision == "bf16" or (train.precision == "auto" and native_bf16(device))
    compiled = train.compile
    if compiled == "auto":
        compiled = device.type == "cuda" and config.engine.zero_stage < 3
    elif compiled and config.engine.zero_stage == 3:
        raise UserError("train.compile=true does not work with engine.zero_stage=3 (its hooks break every graph)")
    rows = train.tokens_per_step // train.seq_len
    if rows % world_size:
        nearest = max(1, round(rows / world_size)) * world_size * train.seq_len
        raise UserError(
            f"train.tokens_per_step={train.tokens_per_step} is {rows} rows of train.seq_len={train.seq_len}, which "
            f"{world_size} ranks do not divide; the nearest that works is train.tokens_per_step={nearest}"
        )
    per_rank = rows // world_size
    size = train.micro_batch_size
    if size == "auto":
        limit = max(1, (16384 if device.type == "cuda" else 4096) // train.seq_len)
        size = max(b for b in range(1, min(per_rank, limit) + 1) if per_rank % b == 0)
    elif per_rank % size:
        raise UserError(
            f"train.micro_batch_size={size} does not divide the {per_rank} rows that each of {world_size} ranks takes "
            f"per step (train.tokens_per_step / train.seq_len / ranks)"
        )
    if train.steps is None and train.tokens is not None:
        train = dataclasses.replace(train, steps=math.ceil(train.tokens / train.tokens_per_step))
    if train.steps is not None:
        train = dataclasses.replace(train, tokens=None, minutes=None)
    train = dataclasses.replace(train, precision="bf16" if bf16 else "fp32", compile=compiled, micro_batch_size=size)
    return dataclasses.replace(config, train=train)


def build_loader(config: Config, shards: Path, *, rank: int, world_size: int) -> Loader:
    """This rank's rows of every step."""
    train = config.train
    return Loader(
        shards,
        seq_len=train.seq_len,
        rows_per_step=train.tokens_per_step // train.seq_len,
        micro_batch_size=_micro_batch_size(config),
        rank=rank,
        world_size=world_size,
        seed=train.seed,
        document_ids=train.document_mask,
    )


def build_engine(config: Config, *, device: torch.device, world_size: int) -> Engine:
    """The initialised model of `config` inside its engine. Collective."""
    train = config.train
    model = build_model(config.model, seed=train.seed, device=device)
    model.compute_dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    model.activation_checkpointing = train.activation_checkpointing
    if train.compile:
        for layer in model.layers:
            layer.compile()
    size = _micro_batch_size(config)
    return Engine(
        model,
        config.optimizer,
        zero_stage=config.engine.zero_stage,
        micro_batch_size=size,
        gradient_accumulation_steps=train.tokens_per_step // train.seq_len // world_size // size,
        grad_clip=train.grad_clip,
        device=device,
    )


def _check_same_config(config: Config) -> None:
    """Raise `UserError` unless all ranks have composed the same configuration."""
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()
    if len(set(gather_objects(digest))) > 1:
        raise UserError("the ranks have different configurations; start all of them with the same command and files")


def _check_vocabulary(config: Config, num_tokens: int) -> None:
    """Raise `UserError` if the tokenizer has tokens that the model has no embedding for."""
    if num_tokens > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {num_tokens}; "
            f"set model.vocab_size={num_tokens} or more"
        )


def _micro_batch_size(config: Config) -> int:
    size = config.train.micro_batch_size
    assert isinstance(size, int), "resolve() decides it"
    return size
