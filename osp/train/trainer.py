"""The training loop: what happens at a step, between steps, and when the run has to stop.

A *boundary* is the state after `step` whole optimizer steps: the only thing that is saved and continued from. Whatever
interrupts a run, it ends on a boundary; a step that was under way is taken again from its first row.
"""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from osp.config import Config, PenaltyConfig, to_dict
from osp.data import Batch, Loader, data_step, load_manifest, load_tokenizer, token_bytes, validation_batches
from osp.device import peak_tflops
from osp.distributed import Peers, gather_objects, is_connection_error, on_main
from osp.errors import LostRankError, RunError, StoppedError
from osp.evaluation.evaluate import live_perplexity
from osp.evaluation.texts import held_out
from osp.files import read_lines
from osp.model.generate import Sampling, generate
from osp.model.loss import IGNORE
from osp.model.transformer import Transformer, count_parameters, flops_per_token, meta_model
from osp.monitor import Monitor
from osp.optim import describe_groups
from osp.report import write_report
from osp.run.checkpoint import Checkpoint, Saver, load
from osp.run.folder import RunLock, end, environment
from osp.run.logger import Logger
from osp.train.engine import Engine
from osp.train.guards import SpikeDetector
from osp.train.resolve import Resolved
from osp.train.stop import StopRequest

log = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKS = 5.0  # inside a step of many micro batches: how long a request to stop may go unheard
SECONDS_OF_WAITING = 0.5  # for data, before the ranks ask each other again whether to stop
MIN_VALIDATION_STEPS, VALIDATION_SHARE = 250, 0.02  # eval.every=auto: the shortest interval, the share of the work
NUM_LARGEST = 8  # gradients named when the numbers go wrong


class Trainer:
    """One run on one rank; `logger` and `lock` are None on all ranks but the first. token: see `Saver`.

    peers: being watched already; dismissed when the run has ended.
    """

    def __init__(
        self,
        resolved: Resolved,
        engine: Engine,
        loader: Loader,
        folder: Path,
        logger: Logger | None,
        *,
        peers: Peers,
        lock: RunLock | None = None,
        token: str = "",
    ):
        config = resolved.config
        self.config, self.engine, self.loader, self.folder, self.logger = config, engine, loader, folder, logger
        self.lock = lock
        self.total_steps = resolved.total_steps
        self.micro_batch_size = resolved.micro_batch_size
        self.last_step = min(self.total_steps, config.train.stop_at or self.total_steps)
        self.schedule = resolved.build_schedule()
        self.shards = loader.rows.shards.folder
        self.step = 0  # optimizer steps taken
        self.skipped = 0  # of them, those whose update was left out
        self.spikes = {key: SpikeDetector(config.spike.window) for key in ("loss", "grad_norm")}
        self.saved: int | None = None  # the step of the newest checkpoint that was begun
        self.validation: tuple[int, dict[str, float]] = (-1, {})  # the last one: after which step, and its metrics
        self.quantized: tuple[int, dict[str, float]] = (-1, {})  # the same of the last quantized perplexity
        self.stop = StopRequest()
        self.interrupted = False  # all ranks know that one of them was asked to stop
        self.failure = ""  # why the run cannot go on, known to all ranks
        self.peers = peers
        self.saver = Saver(
            folder / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            token=token,
            rank=engine.rank,
            gather=gather_objects,
        )
        # taken once: asking git and building a model take longer than all that a save copies
        self._environment = environment() if engine.rank == 0 else None
        self._shapes = {name: list(p.shape) for name, p in meta_model(config.model).named_parameters()}
        self.train_seconds = 0.0
        self._step_seconds = 0.0  # of the last step, on this rank
        self._check_every = 1  # micro steps between looks at requests to stop
        self.tokenizer: Tokenizer = load_tokenizer(self.shards / "tokenizer.json")
        self.token_bytes = torch.from_numpy(token_bytes(self.tokenizer)).to(engine.device)
        quant = config.eval.quant
        self.quantized_text = (
            held_out("held_out", self.shards, self.tokenizer, max_tokens=quant.tokens) if quant.every else None
        )
        self.validation_every = validation_every(config, load_manifest(self.shards).val.tokens)
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
        """Train from `self.step` to the end, or until `self.stop`, if it listens; validate, save and log on the way.

        Leaves `stopped.json`, which says why. Raises `StoppedError` when asked to stop.
        """
        self._announce()
        first, reason = self.step, "complete" if self.last_step == self.total_steps else "train.stop_at"
        try:
            monitor = self.build_monitor()
            while self._boundary(monitor) and self.step < self.last_step:
                self.refresh_norms(self.step)
                record = self._due(self.config.logger.every, self.step + 1)
                metrics = self.train_step(self.step, record=record)
                if metrics is None:
                    break
                self.step += 1
                if self.logger:
                    self.logger.advance(loss=metrics["train/loss"], tokens_per_second=self._speed(first))
                    if record:
                        self.logger.log(metrics, step=self.step, tokens=self.tokens)
            self._save_the_rest()
            if self.failure:
                raise RunError(self.failure)
            if self.interrupted:
                self._stop()
            if self.step == self.total_steps:
                self._conclude(first)
            self.engine.barrier()
        except Exception as error:
            reason = error.signal if isinstance(error, StoppedError) else str(error) or type(error).__name__
            if not isinstance(error, RunError) and is_connection_error(error):
                dead = self.peers.describe(self.peers.dead(seconds=3))
                reason = f"step {self.step + 1}: {dead}; the same command continues from the last checkpoint"
                raise LostRankError(reason) from error
            raise
        finally:
            self.peers.dismiss()
            if self.logger:
                end(self.folder, reason, step=self.step, tokens=self.tokens, total_steps=self.total_steps)
                self.logger.close(exit_code=0 if reason in ("complete", "train.stop_at") else 1)

    def close(self) -> None:
        """End the threads of this run and let another process train in its folder."""
        self.loader.close()
        self.saver.close()
        if self.lock:
            self.lock.release()

    def train_step(self, step: int, *, record: bool) -> dict[str, float] | None:
        """One optimizer step, 0-based `step`; its metrics, all of them when `record`.

        None, and the step is not taken, if a rank was asked to stop meanwhile or the numbers forbid to go on. Every row
        predicts seq_len tokens, so the global number of valid tokens is tokens_per_step. Loss and gradient are looked
        at before the optimizer changes anything.
        """
        began = time.perf_counter()
        if not self._wait_for_data(step):
            return None
        batches = self.loader.step(step)
        data_wait = time.perf_counter() - began
        losses, penalties = [], []
        for micro_step, batch in enumerate(batches):
            if micro_step and micro_step % self._check_every == 0 and self._asked_to_stop():
                self.engine.discard_gradients()
                return None
            loss, penalty = self._loss_and_penalty(batch)
            total = loss + self.config.penalty.weight * penalty
            self.engine.backward(total / self.config.train.tokens_per_step)
            losses.append(loss.detach())
            penalties.append(penalty.detach())
        mean, penalty, checksum = self._reduce(torch.stack(losses), torch.stack(penalties), batches)
        names, norms = self.engine.gradient_norms()
        grad_norm = torch.linalg.vector_norm(norms).item()
        metrics = {"train/loss": mean, "train/grad_norm": grad_norm, "train/rows_checksum": checksum}
        if self.config.penalty.weight:
            metrics["train/penalty"] = penalty
        skip = self._examine(step, mean, grad_norm, losses=losses, norms=dict(zip(names, norms.tolist(), strict=True)))
        if skip or self.failure:
            self.engine.discard_gradients()
        if self.failure:
            return None
        if not skip:
            self.engine.set_step(step + 1, self.schedule(step), record=record)
            applied = self.engine.step()
            assert applied, f"DeepSpeed refuses a gradient of norm {grad_norm}"
        self._step_seconds = time.perf_counter() - began
        self.train_seconds += self._step_seconds
        if record:
            metrics |= self._figures(self._step_seconds, data_wait)
            if not skip:
                metrics |= {f"train/{key}": value for key, value in self.engine.optimizer_statistics().items()}
        return metrics

    @torch.no_grad()
    def validate(self) -> None:
        """Loss in nats per token and bits per byte on the held-out rows; logged. Breaks off if asked to stop."""
        config, began = self.config, time.perf_counter()
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.engine.device)  # nats, tokens, bytes
        for batch in validation_batches(
            self.shards,
            seq_len=config.train.seq_len,
            batch_size=self.micro_batch_size,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            max_tokens=config.eval.tokens,
            document_ids=config.train.document_mask,
        ):
            if self._asked_to_stop():
                break
            targets = batch.tokens[:, 1:].to(self.engine.device)
            counted = targets[: batch.num_rows]
            nats = self._loss(batch).double()
            sums += torch.stack((nats, nats.new_tensor(counted.numel()), self.token_bytes[counted].sum().double()))
        self.model.train()
        if self.interrupted:
            return
        nats, tokens, num_bytes = self.engine.all_reduce_sum(sums).tolist()
        metrics = {
            "val/loss": nats / tokens,
            "val/bits_per_byte": nats / math.log(2) / max(num_bytes, 1.0),
            "val/seconds": time.perf_counter() - began,
        }
        self.validation = self.step, metrics
        if self.logger:
            self.logger.log(metrics, step=self.step, tokens=self.tokens)
            self.logger.say(
                f"step {self.step}: validation loss {metrics['val/loss']:.4f}, "
                f"{metrics['val/bits_per_byte']:.4f} bits/byte"
            )

    def validate_quantized(self) -> None:
        """Perplexity of the model as it is and at 4 bits, on a fixed slice of the held-out text; logged. Collective.

        Weights, buffers and random numbers are the same bits afterwards.
        """
        assert self.quantized_text is not None
        began, seq_len = time.perf_counter(), self.config.train.seq_len
        # windows have a shape of their own, and hooks do not go together with compiled code
        with torch.compiler.set_stance("force_eager"):
            metrics = live_perplexity(
                self.model, self.quantized_text, seq_len=seq_len, batch_tokens=self.micro_batch_size * seq_len
            )
        found = ", ".join(f"{value:.2f} at {key.rpartition('/')[2]}" for key, value in metrics.items())
        metrics["quant/seconds"] = time.perf_counter() - began
        self.quantized = self.step, metrics
        if self.logger:
            self.logger.log(metrics, step=self.step, tokens=self.tokens)
            self.logger.say(f"step {self.step}: perplexity {found}")

    def save(self) -> None:
        """Begin a checkpoint of this boundary; training goes on while it is written."""
        if self.saver.busy:
            self._finish_save()
        config = self.config
        position = data_step(self.step, config.data.skip_steps)
        run_id = self.folder / "wandb_run_id"
        manifest = {
            "step": self.step,
            "tokens": self.tokens,
            "schedule": {"total_steps": self.total_steps, "next_factor": self.schedule(self.step)},
            "data": {
                "next_step": position,  # rows [next_step * rows_per_step, ...) come next
                "rows_per_step": self.loader.rows_per_step,
                "tokenizer_hash": self.loader.rows.shards.tokenizer_hash,
                "seed": config.train.seed,
            },
            "skipped": self.skipped,
            "spikes": {key: list(detector.values) for key, detector in self.spikes.items()},
            "wandb_run_id": run_id.read_text().strip() if run_id.exists() else None,
            "environment": self._environment,
            "world_size": self.engine.world_size,
            "zero_stage": config.engine.zero_stage,
            "config": to_dict(config),
            "shapes": self._shapes,
        }
        rng, buffers = self.engine.rng_state(), dict(self.model.named_buffers())
        self.saver.begin(self.engine.local_state(), rng=rng, buffers=buffers, manifest=manifest)
        self.saved = self.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`: weights, optimizer state, norm statistics, position in the data and schedule."""
        load(checkpoint, self.engine.local_state(), self.model)
        self.engine.sync_weights_from_master()
        self.engine.set_rng_state(checkpoint.rng(self.engine.rank))
        self.step = checkpoint.step
        self.skipped = checkpoint.manifest.get("skipped", 0)
        for key, values in checkpoint.manifest.get("spikes", {}).items():
            self.spikes[key] = SpikeDetector(self.config.spike.window, values)
        if checkpoint.folder.resolve().parent == self.saver.folder.resolve():
            self.saved = self.step
            self.validation = on_main(lambda: self._last_logged("val/loss"))
            self.quantized = on_main(lambda: self._last_logged("quant/seconds"))
        if self.logger:
            message = f"continuing after step {self.step} from {checkpoint.folder}"
            self.logger.event("resumed", message, step=self.step, tokens=self.tokens)

    def build_monitor(self) -> Monitor:
        """What looks at the activations of this run, from the present step on. Collective."""
        return Monitor(
            self.config,
            self.model,
            total_steps=self.total_steps,
            shards=self.shards,
            folder=self.folder,
            logger=self.logger,
            step=self.step,
            gathered_parameters=self.engine.gathered_parameters,
        )

    def refresh_norms(self, step: int) -> None:
        """Let norms re-derive their statistics from the weights, about 50 times a run (BHyT's callback)."""
        every = self.config.train.norm_refresh_every
        if every == "auto":
            every = min(max(self.total_steps // 50, 1), 1000)
        if self.model.has_norm_statistics and step % every == 0:
            with self.engine.gathered_parameters():
                self.model.refresh_norms()

    def _boundary(self, monitor: Monitor) -> bool:
        """Do what is due between two steps; whether to go on."""
        if self.saved != self.step and (self._due(self.config.checkpoint.every) or self.step == self.last_step):
            self.save()
        if monitor.due(self.step):
            monitor.probe(self.step, tokens=self.tokens, train_seconds=self.train_seconds)
        if self.validation[0] != self.step and self._due(self.validation_every):
            self.validate()
        every = self.config.eval.quant.every
        if every and self.quantized[0] != self.step and self._due(every) and not self._asked_to_stop():
            self.validate_quantized()
        return not self.interrupted

    def _wait_for_data(self, step: int) -> bool:
        """Wait until all ranks have the rows of `step`; False if one was asked to stop. Collective, once a step.

        The same exchange tells that all ranks are through with what they do for a save in the background.
        """
        world_size = self.engine.world_size
        while True:
            ready = self.loader.wait(step, seconds=SECONDS_OF_WAITING)
            stop, has_data, through = self._count(bool(self.stop), ready, self.saver.through)
            if through == world_size and self.saver.published:
                self._finish_save()
            elif through == world_size:
                self.saver.publish()
            self.interrupted = stop > 0
            if self.interrupted or has_data == world_size:
                return not self.interrupted

    def _asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        self.interrupted = self._count(bool(self.stop))[0] > 0
        return self.interrupted

    def _count(self, *flags: bool) -> list[int]:
        """On how many ranks each flag is set. Collective."""
        counts = torch.tensor(flags, dtype=torch.float32, device=self.engine.device)
        return [int(count) for count in self.engine.all_reduce_sum(counts).tolist()]

    def _reduce(
        self, losses: torch.Tensor, penalties: torch.Tensor, batches: list[Batch]
    ) -> tuple[float, float, float]:
        """Mean loss and penalty per token and the checksum of the rows of a step over all ranks. Collective."""
        mine = losses.new_tensor([sum(batch.checksum for batch in batches), self._step_seconds], dtype=torch.float64)
        local = torch.cat((torch.stack((losses.sum(), penalties.sum())).double(), mine))
        loss, penalty, checksum, seconds = self.engine.all_reduce_sum(local).tolist()
        micro_step_seconds = seconds / self.engine.world_size / len(batches)  # of the step before, equal on all ranks
        if micro_step_seconds:
            self._check_every = max(1, int(SECONDS_BETWEEN_CHECKS / micro_step_seconds))
        tokens = self.config.train.tokens_per_step
        return loss / tokens, penalty / tokens, checksum

    def _loss_and_penalty(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss of a training batch and its summed penalty before the weight, 0 where there is none."""
        if self.config.penalty.weight:
            return self._loss(batch, penalty=self.config.penalty)
        loss = self._loss(batch)
        return loss, torch.zeros_like(loss)

    def _loss(self, batch: Batch, *, penalty: PenaltyConfig | None = None) -> Any:
        """Summed loss of the batch's rows on this rank; rows beyond `num_rows` are padding and count nothing.

        With `penalty` (loss, summed penalty): of training, whose batches have no padding.
        """
        tokens = batch.tokens.to(self.engine.device, non_blocking=True)
        targets = tokens[:, 1:].clone() if batch.num_rows < len(tokens) else tokens[:, 1:]
        targets[batch.num_rows :] = IGNORE
        ids = batch.document_ids
        return self.engine(
            tokens[:, :-1],
            targets,
            document_ids=None if ids is None else ids[:, :-1].to(self.engine.device, non_blocking=True),
            chunk_tokens=self.config.train.loss_chunk_tokens,
            penalty=penalty,
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
        return figures

    def _examine(
        self, step: int, loss: float, grad_norm: float, *, losses: list[torch.Tensor], norms: dict[str, float]
    ) -> bool:
        """Whether to leave out the update of `step`, because its numbers are not finite or far from the usual.

        losses: of this rank's micro batches. norms: of every parameter's gradient. Sets `failure` if the run must end.
        """
        action, kind, message = self.config.spike.action, "spike", ""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            action, kind = self.config.train.on_nonfinite, "nonfinite"
            message = self._describe_nonfinite(step, loss, losses, norms)
        elif action != "off":
            message = self._describe_spike(step, {"loss": loss, "grad_norm": grad_norm})
        if not message:
            return False
        limit, skip = self.config.train.max_skips, action == "skip"
        if action == "stop":
            self.failure = f"{message}; no weight was changed"
        elif skip and self.skipped == limit:
            self.failure = f"{message}; no weight was changed, and train.max_skips={limit} updates are left out already"
        elif skip:
            self.skipped += 1
            message += f"; this update is left out ({self.skipped} of at most {limit})"
        self._event(kind, message, step + 1)
        return skip

    def _describe_nonfinite(self, step: int, loss: float, losses: list[torch.Tensor], norms: dict[str, float]) -> str:
        """What is not finite, from which rows, and the largest gradients; also in nonfinite.json. Collective."""
        size, world_size, rank = self.micro_batch_size, self.engine.world_size, self.engine.rank
        first = data_step(step, self.config.data.skip_steps) * self.loader.rows_per_step
        starts = [first + (i * world_size + rank) * size for i in range(len(losses))]
        bad = [
            start for start, value in zip(starts, torch.stack(losses).tolist(), strict=True) if not math.isfinite(value)
        ]
        rows = sorted([start, start + size] for starts in gather_objects(bad) for start in starts)
        order = sorted(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else math.inf, reverse=True)
        largest = {name: norms[name] for name in order[:NUM_LARGEST]}
        if self.logger:
            report = {
                "step": step + 1,
                "loss": str(loss),
                "rows": rows,
                "gradients": {k: str(v) for k, v in largest.items()},
            }
            (self.folder / "nonfinite.json").write_text(json.dumps(report, indent=1) + "\n")
        what = "the loss is not finite" if rows else f"the gradient is not finite though the loss is {loss:.4f}"
        where = f"; rows {', '.join(f'{a} to {b - 1}' for a, b in rows)} of the training data gave it" if rows else ""
        gradients = ", ".join(f"{name} {norm:.3g}" for name, norm in list(largest.items())[:3])
        return f"step {step + 1}: {what}{where}; largest gradients: {gradients} (all in nonfinite.json)"

    def _describe_spike(self, step: int, values: dict[str, float]) -> str:
        """What is far above the last steps, and how to leave its rows out; empty if nothing is."""
        scores = {key: self.spikes[key].score(value) for key, value in values.items()}
        for key, value in values.items():
            self.spikes[key].add(value)
        found = [
            f"{key} {values[key]:.4g} is {score:.1f} deviations above its last {len(self.spikes[key].values) - 1} steps"
            for key, score in scores.items()
            if score > self.config.spike.threshold
        ]
        position = data_step(step, self.config.data.skip_steps) + 1
        rows = f"; its rows are left out by data.skip_steps=[[{position},{position}]] when resuming from before"
        return f"step {step + 1}: {', '.join(found)}{rows}" if found else ""

    def _event(self, kind: str, message: str, step: int) -> None:
        if self.logger:
            self.logger.event(kind, message, step=step, tokens=step * self.config.train.tokens_per_step)

    def _finish_save(self) -> None:
        """Wait until the checkpoint is known, and log what it took; a failure is only said."""
        saved = self.saver.finish()
        if saved.error:
            self.saved = None
            what = (
                f"checkpoint of step {saved.step} not written: {saved.error}; training goes on, older checkpoints stay"
            )
            self._event("checkpoint_failed", what, self.step)
        elif self.logger:
            figures = {
                "checkpoint/blocked_seconds": saved.blocked_seconds,
                "checkpoint/write_seconds": saved.write_seconds,
                "checkpoint/bytes": float(saved.num_bytes),
            }
            self.logger.log(figures, step=self.step, tokens=self.tokens)

    def _save_the_rest(self) -> None:
        """Have a complete checkpoint of this boundary. Raises `RunError` if it cannot be written."""
        if self.saved != self.step:
            self.save()
        if self.saver.busy:
            self._finish_save()
        if self.saved != self.step:
            raise RunError(
                f"step {self.step}: the last checkpoint could not be written to {self.saver.folder}; make room there, "
                "the same command continues from the one before"
            )

    def _stop(self) -> None:
        """Raise `StoppedError` that names who asked. Collective."""
        asked = [(signal, rank) for rank, signal in enumerate(gather_objects(self.stop.signal)) if signal]
        signal, rank = asked[0]
        message = (
            f"{signal} on rank {rank}: stopped after step {self.step} of {self.total_steps} with a checkpoint; "
            "the same command continues it"
        )
        self._event("stopped", message, self.step)
        raise StoppedError(message, signal=signal)

    def _conclude(self, first: int) -> None:
        """Write and print the closing figures; a run that was complete before prints what it wrote then."""
        stored = self.folder / "summary.json"
        if first == self.total_steps and stored.exists():
            summary = json.loads(stored.read_text(encoding="utf-8"))
        else:
            summary = self._summary(self.validation[1], tokens_per_second=self._speed(first))
        self._print_summary(summary)

    def _last_logged(self, name: str) -> tuple[int, dict[str, float]]:
        """After which step the metric `name` was logged last, and with what else of its kind; from the run's file."""
        found: tuple[int, dict[str, float]] = (-1, {})
        kind = name.partition("/")[0] + "/"
        for event in read_lines(self.folder / "metrics.jsonl"):
            if name in event:
                found = event["step"], {key: value for key, value in event.items() if key.startswith(kind)}
        return found

    def _due(self, every: int, step: int | None = None) -> bool:
        """Whether something of that period is due after `step` (now, if not given); all is after the last one."""
        step = self.step if step is None else step
        return step > 0 and (step == self.total_steps or (every > 0 and step % every == 0))

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
        if self.step == self.total_steps:
            self.logger.say("this run is complete")

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
            f"report              {self._report()}",
        ]
        if summary["sample"]:
            lines += ["sample, continuing a held-out text:", *(f"    {line}" for line in summary["sample"].split("\n"))]
        self.logger.end_progress()
        self.logger.say("\n".join(lines))

    def _report(self) -> str:
        """Write the page about this run; its path, or why there is none: a finished run must not fail here."""
        path = self.folder / "report.html"
        try:
            write_report([self.folder], path)
        except Exception as error:
            return f"not written, {type(error).__name__}: {error}"
        return str(path)

    def _sample(self) -> str:
        """A prompt from the held-out text and what the model makes of it."""
        num_tokens, seq_len = self.config.eval.sample_tokens, self.config.train.seq_len
        if not num_tokens:
            return ""
        rows = validation_batches(
            self.shards, seq_len=seq_len, batch_size=1, rank=0, world_size=1, max_tokens=seq_len, document_ids=False
        )
        prompt = next(iter(rows)).tokens[0, : min(32, (seq_len + 1) // 2)].tolist()
        sampling = Sampling(temperature=0.8, seed=self.config.train.seed)
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            (tokens,) = generate(self.model, [prompt], min(num_tokens, seq_len - len(prompt)), sampling=sampling)
        self.model.train()
        return self.tokenizer.decode([*prompt, *tokens])


def validation_every(config: Config, val_tokens: int) -> int:
    """Steps between validations on held-out text of `val_tokens`; `auto`: a forward pass is a third of the work."""
    if config.eval.every != "auto":
        return config.eval.every
    steps = min(config.eval.tokens, val_tokens) / (3 * config.train.tokens_per_step)
    return max(MIN_VALIDATION_STEPS, math.ceil(steps / VALIDATION_SHARE))
