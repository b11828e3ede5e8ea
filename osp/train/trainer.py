"""The training loop: what happens in a step, between two steps, and when the run has to stop.

A *boundary* is the state between two optimizer steps: the only state that is saved and continued from. An interrupted
run ends on a boundary; a step in progress is discarded and taken again from its first sequence.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from osp.config import Weights, to_dict
from osp.data.loader import Batch, Loader, data_step
from osp.data.manifest import content
from osp.device import peak_tflops_of
from osp.distributed import Peers, add_up, gather_objects
from osp.errors import LostRankError, RunError, StoppedError
from osp.files import write_record
from osp.model.loss import IGNORE
from osp.model.transformer import Output, Transformer, flops_per_token, parameter_shapes
from osp.monitor.monitor import Monitor
from osp.quant.qat import Rounding
from osp.run.checkpoint import Checkpoint, Saved, Saver, load
from osp.run.folder import RunLock, end, environment
from osp.run.logger import Logger, wandb_run_id
from osp.train.engine import Engine
from osp.train.guards import StepGuard
from osp.train.qk_clip import QkClip
from osp.train.resolve import Resolved
from osp.train.stop import StopRequest, count_flags
from osp.train.validate import Validator, describe_start, describe_summary

SECONDS_BETWEEN_CHECKS = 5.0  # inside a step of many micro batches: how long a request to stop may go unnoticed
SECONDS_OF_WAITING = 0.5  # for data, before the ranks ask each other again whether to stop


@dataclass(eq=False)
class Trainer:
    """One run on one rank.

        trainer = Trainer(resolved, engine, loader, folder, logger, peers=peers, lock=lock)
        trainer.restore(checkpoint)
        trainer.fit()
        trainer.close()

    Only rank 0 has a `logger`. `peers` are watched already, and dismissed at the end of the run.
    """

    resolved: Resolved
    engine: Engine
    loader: Loader
    folder: Path
    logger: Logger | None
    peers: Peers
    lock: RunLock

    def __post_init__(self) -> None:
        engine, config = self.engine, self.resolved.config
        self.config = config
        assert isinstance(engine.module, Transformer)
        self.model: Transformer = engine.module
        self.total_steps = self.resolved.total_steps
        self.last_step = self.resolved.last_step
        self.schedule = self.resolved.build_schedule()
        self.sample = self.resolved.build_samples()
        self.samples = 0  # in the average of the weights
        self.shards = self.loader.rows.folder
        self.validator = Validator(self.resolved, self.model, self.shards, self.logger, tokens_after=self.tokens_after)
        tau = config.qk_clip.tau
        self.qk_clip = None if tau is None else QkClip(engine, tau)
        self.guard = StepGuard(config, self.loader, report=self.folder / "nonfinite.json" if self.logger else None)
        saves, token = self.folder / "checkpoints", self.lock.token
        self.saver = Saver(saves, config.checkpoint, token=token, rank=engine.rank, gather=gather_objects)
        self.step = 0  # optimizer steps taken
        self.restored = (0, 0)  # step and tokens of the checkpoint that this run continues
        self.saved: int | None = None  # step of the newest checkpoint that was begun
        self.rounding: Rounding | None = None  # from `qat.start` on
        self.stop = StopRequest()
        self.interrupted = False  # a rank was asked to stop, and all ranks know it
        self.failure = ""  # why the run cannot go on, known to all ranks
        self.lost = False  # the run folder is not ours any more
        self.train_seconds = 0.0
        self._step_seconds = 0.0  # of the last step, on this rank
        self._check_every = 1  # micro steps between looks at requests to stop
        # computed once: asking git and building a model take longer than the copy of a save
        self._environment = environment() if engine.rank == 0 else None
        self._shapes = parameter_shapes(config.model)
        self.flops_per_token = flops_per_token(config.model, config.train.seq_len)
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else ""
        self.peak_tflops = config.logger.peak_tflops or peak_tflops_of(name)

    @property
    def tokens(self) -> int:
        """Training tokens seen so far."""
        return self.tokens_after(self.step)

    def tokens_after(self, step: int) -> int:
        """Return the training tokens of the first `step` steps; the steps of another run may have had another size."""
        first, tokens = self.restored
        return tokens + (step - first) * self.config.train.tokens_per_step

    def fit(self) -> None:
        """Train to the end, and leave stopped.json, which says why the run ended. Raises `StoppedError` on a signal."""
        if self.logger:
            self.logger.say(describe_start(self.resolved, self.engine, self.shards, self.peak_tflops))
        first, reason = self.step, "complete" if self.last_step == self.total_steps else "train.stop_at"
        try:
            if not self.samples and self.config.average.kind != "none":
                self.engine.optimizer.sample_average(1.0)
            monitor = self.build_monitor()
            while self._at_boundary(monitor) and self.step < self.last_step:
                self.refresh_norms(self.step)
                self.refresh_rounding(self.step)
                record = self._due(self.config.logger.every, self.step + 1)
                if (metrics := self.train_step(self.step, record=record)) is None:
                    break
                self.step += 1
                if self.logger:
                    self.logger.advance(loss=metrics["train/loss"], tokens_per_second=self._speed(first))
                if record:
                    self._log(metrics)
            if not self.lost:
                self._save_the_rest()
            if self.failure:
                raise RunError(self.failure)
            if self.interrupted:
                stopped = self.stop.error(self.step, self.total_steps)
                self._event("stopped", str(stopped), self.step)
                raise stopped
            if self.step == self.total_steps:
                self._conclude(first)
            if self.engine.world_size > 1:
                dist.barrier()
        except Exception as error:
            reason = error.signal if isinstance(error, StoppedError) else str(error) or type(error).__name__
            if dead := self.peers.cause(error):
                reason = f"step {self.step + 1}: {dead}; the same command continues from the last checkpoint"
                raise LostRankError(reason) from error
            raise
        finally:
            self.peers.dismiss()
            if self.logger:
                end(self.folder, reason, step=self.step, tokens=self.tokens, total_steps=self.total_steps)
                self.logger.close(exit_code=0 if reason in ("complete", "train.stop_at") else 1)

    def close(self) -> None:
        """End the threads of this run and release its folder."""
        self.loader.close()
        self.saver.close()
        self.lock.release()

    def train_step(self, step: int, *, record: bool) -> dict[str, float] | None:
        """Take optimizer step `step`, counted from 0, and return its metrics. Collective: every rank calls it.

        Returns None, with every weight unchanged, when a rank was asked to stop, or the run ends with a `failure`.
        `record` adds the metrics that cost time to collect.
        """
        began = time.perf_counter()
        if (data_wait := self._wait_for_data(step)) is None:
            return None
        # 8 bytes a token, queued before the first kernel: from pinned memory no copy waits for the device
        batches = [batch.to(self.engine.device) for batch in self.loader.step(step)]
        if self.qk_clip:
            self.qk_clip.largest.fill_(-torch.inf)
        sums = []
        for micro_step, batch in enumerate(batches):
            if micro_step and micro_step % self._check_every == 0 and self._asked_to_stop():
                self.engine.discard_gradients()
                return None
            loss, _, penalty, z_loss = self._forward(batch)
            assert loss is not None
            penalty, z_loss = (torch.zeros_like(loss) if term is None else term for term in (penalty, z_loss))
            total = loss + self.config.penalty.weight * penalty + self.config.train.z_loss * z_loss
            self.engine.backward(total / self.config.train.tokens_per_step)
            sums.append(torch.stack((loss, penalty, z_loss)).detach())
        terms = torch.stack(sums, dim=1)  # (3, micro batches)
        metrics, norms = self._reduce(terms, batches)
        verdict = self.guard.examine(step, metrics, terms[0], norms)
        if verdict.message:
            self._event(verdict.kind, verdict.message, step + 1)
        if verdict.action != "apply":
            self.engine.discard_gradients()
        if verdict.action == "stop":
            self.failure = verdict.message
            return None
        if verdict.action == "apply":
            self.engine.step(step + 1, self.schedule(step), norm=metrics["train/grad_norm"], record=record)
            metrics |= self.qk_clip.apply() if self.qk_clip else {}
        if sample := self.sample(step + 1, self.samples):
            share, self.samples = sample
            self.engine.optimizer.sample_average(share)
        self._step_seconds = time.perf_counter() - began
        self.train_seconds += self._step_seconds
        if record:
            metrics |= self._costly_metrics(data_wait, updated=verdict.action == "apply")
        return metrics

    def save(self) -> None:
        """Begin a checkpoint of this boundary; training goes on while it is written."""
        if self.saver.busy:
            self._log_save(self.saver.finish())
        config = self.config
        manifest = {
            "step": self.step,
            "tokens": self.tokens,
            "schedule": {"total_steps": self.total_steps, "next_factor": self.schedule(self.step)},
            "data": {
                "next_step": data_step(self.step, config.data.skip_steps),
                "rows_per_step": self.loader.rows_per_step,
                "tokenizer_hash": self.loader.rows.manifest.tokenizer_hash,
                "seed": config.train.seed,
                "next_row": self.loader.first_row(self.step),
                "shards": str(self.shards.resolve()),
                "from_run": os.path.relpath(self.shards.resolve(), self.folder.resolve()),
                "content": content(self.loader.rows.manifest),
            },
            **self.guard.state_dict(),
            **({} if config.average.kind == "none" else {"average": {"updates": self.samples}}),
            "wandb_run_id": wandb_run_id(self.folder),
            "environment": self._environment,
            "world_size": self.engine.world_size,
            "zero_stage": config.engine.zero_stage,
            "config": to_dict(config),
            "shapes": self._shapes,
        }
        rng, buffers = self.engine.rng_state(), dict(self.model.named_buffers())
        self.saver.begin(self.engine.optimizer.local_state(), rng=rng, buffers=buffers, manifest=manifest)
        self.saved = self.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`: weights, optimizer state, norm statistics, position in the data and schedule."""
        config, before = self.config.average, checkpoint.config.average
        slices = self.engine.optimizer.local_state()
        if config.kind != "none" and config == before:
            self.samples = checkpoint.manifest["average"]["updates"]
        elif config.kind != "none":
            slices = ((n, i, j, {k: x for k, x in states.items() if k != "average"}) for n, i, j, states in slices)
            self._event("average", f"the average of the weights begins after step {checkpoint.step}", checkpoint.step)
        load(checkpoint, slices, self.model)
        self.engine.sync_weights_from_master()
        self.engine.set_rng_state(checkpoint.rng(self.engine.rank))
        if self.loader.first_row(checkpoint.step) or not checkpoint.step:  # else another text, with other losses
            self.guard.load_state_dict(checkpoint.manifest)
        self.step, self.restored = checkpoint.step, (checkpoint.step, checkpoint.tokens)
        if checkpoint.folder.resolve().parent == self.saver.folder.resolve():
            self.saved = self.step
            self.validator.restore(self.folder)
        self._event("resumed", f"continuing after step {self.step} from {checkpoint.folder}", self.step)

    def build_monitor(self) -> Monitor:
        """Return the monitor of this run, which probes it from the present step on. Collective."""
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
        """Recompute the norm statistics that depend on weights, about 50 times a run (BHyT's callback)."""
        if (every := self.config.train.norm_refresh_every) == "auto":
            every = min(max(self.total_steps // 50, 1), 1000)
        if self.model.has_norm_statistics and step % every == 0:
            with self.engine.gathered_parameters():
                self.model.refresh_norms()

    def refresh_rounding(self, step: int) -> None:
        """From `qat.start` on let the blocks round in training mode, with the tensor scales of the present weights."""
        if (qat := self.resolved.qat) and step >= qat[0]:
            self.rounding = self.rounding or Rounding(self.model, qat[1])
            self.rounding.refresh(self.engine.optimizer.local_state())

    @contextmanager
    def _weights(self, which: Weights) -> Iterator[None]:
        """Give the model the trained or the averaged weights inside the context. Collective."""
        if which == "trained":
            yield
            return
        statistics = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with self.engine.averaged_weights():
            if self.model.has_norm_statistics:
                with self.engine.gathered_parameters():
                    self.model.refresh_norms()
            yield
        for buffer, before in statistics:
            buffer.copy_(before)

    def _at_boundary(self, monitor: Monitor) -> bool:
        """Save, probe and validate what is due between two steps; return whether to go on."""
        step, every = self.step, self.config.eval.quant.every
        if self.saved != step and (self._due(self.config.checkpoint.every, step) or step == self.last_step):
            self.save()
        if monitor.due(step):
            with self._weights(self.config.monitor.weights):
                monitor.probe(step, tokens=self.tokens, train_seconds=self.train_seconds)
        validate = self.validator.validated[0] != step and self._due(self.validator.every, step)
        quantize = every > 0 and self.validator.quantized[0] != step and self._due(every, step)
        if validate or quantize:
            with self._weights(self.config.eval.weights):
                if validate:
                    self.validator.validate(step, self._forward, self._asked_to_stop)
                if quantize and not self._asked_to_stop():
                    self.validator.validate_quantized(step)
        return not self.interrupted

    def _wait_for_data(self, step: int) -> float | None:
        """Return the seconds until all ranks had the data of `step`, None if one has to stop or fails. Collective."""
        world_size, began = self.engine.world_size, time.perf_counter()
        while True:
            ready = self.loader.wait(step, seconds=SECONDS_OF_WAITING)
            seconds = time.perf_counter() - began  # without the exchange below, which waits for the slowest rank
            lost, problem = self.lock.lost(), self.loader.problem(step)
            flags = bool(self.stop), ready, self.saver.write_done, bool(lost), bool(problem)
            num_stopped, num_ready, num_written, num_lost, num_failed = count_flags(*flags)
            if num_lost or num_failed:
                self.failure = f"step {step + 1}: {next(filter(None, gather_objects(lost or problem)))}"
                self.lost = num_lost > 0
                return None
            if num_written == world_size and (saved := self.saver.advance()):
                self._log_save(saved)
            self.interrupted = num_stopped > 0
            if self.interrupted or num_ready == world_size:
                return None if self.interrupted else seconds

    def _asked_to_stop(self) -> bool:
        """Return whether any rank was asked to stop. Collective."""
        self.interrupted = count_flags(bool(self.stop))[0] > 0
        return self.interrupted

    def _reduce(self, terms: Tensor, batches: list[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """Return the metrics of the step over all ranks, and the norm of each parameter's raw gradient. Collective.

        The metrics are loss, penalty and z-loss per token, the gradient norm, and the checksum of the sequences. One
        reduction and one transfer carry everything, because the device waits for the verdict on it.
        """
        checksum = sum(batch.checksum for batch in batches)
        local = terms.new_tensor([checksum, self._step_seconds], dtype=torch.float64)
        sums = torch.cat((terms.sum(1).double(), local, self.engine.gradient_squares()))
        loss, penalty, z_loss, checksum, seconds, *squares = add_up(sums).tolist()
        micro_step_seconds = seconds / self.engine.world_size / len(batches)  # of the last step, equal on all ranks
        if micro_step_seconds:
            self._check_every = max(1, int(SECONDS_BETWEEN_CHECKS / micro_step_seconds))
        tokens = self.config.train.tokens_per_step
        metrics = {"train/loss": loss / tokens, "train/rows_checksum": checksum}
        metrics |= {"train/penalty": penalty / tokens} if self.config.penalty.weight else {}
        metrics |= {"train/z_loss": z_loss / tokens} if self.config.train.z_loss else {}
        metrics["train/grad_norm"] = math.sqrt(sum(squares))
        return metrics, dict(zip(self.engine.names, map(math.sqrt, squares), strict=True))

    def _forward(self, batch: Batch) -> Output:
        """Return the loss and penalty of a batch; sequences beyond `num_rows` are padding and count nothing."""
        tokens, ids, *_ = batch.to(self.engine.device)
        targets = tokens[:, 1:].clone() if batch.num_rows < len(tokens) else tokens[:, 1:]
        targets[batch.num_rows :] = IGNORE
        ids = None if ids is None else ids[:, :-1]
        return self.engine(tokens[:, :-1], targets, document_ids=ids)

    def _costly_metrics(self, data_wait: float, *, updated: bool) -> dict[str, float]:
        """Return the metrics of the last step that cost time to collect. Collective."""
        speed = self.config.train.tokens_per_step / self._step_seconds
        metrics = {
            "train/tokens_per_second": speed,
            "train/step_seconds": self._step_seconds,
            "train/data_wait_seconds": data_wait,
            "train/memory_gib": self.engine.memory() / 2**30,
        }
        if self.peak_tflops:
            metrics["train/mfu"] = speed * self.flops_per_token / (self.peak_tflops * 1e12 * self.engine.world_size)
        if updated:
            metrics |= {f"train/{key}": value for key, value in self.engine.optimizer_statistics().items()}
        return metrics

    def _log_save(self, saved: Saved) -> None:
        """Log the outcome of a save. One that failed does not end the run."""
        if saved.error:
            self.saved = None
            message = f"checkpoint of step {saved.step} not written: {saved.error}; training goes on, older ones stay"
            self._event("checkpoint_failed", message, self.step)
            return
        seconds = {"checkpoint/blocked_seconds": saved.blocked_seconds, "checkpoint/write_seconds": saved.write_seconds}
        self._log(seconds | {"checkpoint/bytes": float(saved.num_bytes)})

    def _save_the_rest(self) -> None:
        """Complete a checkpoint of this boundary. Raises `RunError` if it cannot be written."""
        if self.saved != self.step:
            self.save()
        if self.saver.busy:
            self._log_save(self.saver.finish())
        if self.saved != self.step:
            raise RunError(
                f"{self.failure}{'; ' * bool(self.failure)}step {self.step}: the last checkpoint could not be written "
                f"to {self.saver.folder}; make room there, the same command continues from the one before"
            )

    def _conclude(self, first: int) -> None:
        """Write and print the closing summary. Collective."""
        figures = {"tokens_per_second": self._speed(first), "train_seconds": self.train_seconds}
        summary = {"steps": self.step, "tokens": self.tokens, **self.validator.validated[1], **figures}
        with self._weights(self.config.eval.weights):
            summary |= self.validator.compare_and_sample()
        if self.logger:
            write_record(self.folder / "summary.json", summary)
            self.logger.end_progress()
            self.logger.say(describe_summary(summary, self.folder))

    def _due(self, every: int, step: int) -> bool:
        """Return whether an action with this period is due after `step`; after the last step it is."""
        return step > 0 and (step == self.total_steps or (every > 0 and step % every == 0))

    def _speed(self, first: int) -> float:
        """Return training tokens per second since step `first`, without validation and saving; 0 before a step."""
        tokens = (self.step - first) * self.config.train.tokens_per_step
        return tokens / self.train_seconds if self.train_seconds else 0.0

    def _log(self, metrics: dict[str, float]) -> None:
        if self.logger:
            self.logger.log(metrics, step=self.step, tokens=self.tokens)

    def _event(self, kind: str, message: str, step: int) -> None:
        if self.logger:
            self.logger.event(kind, message, step=step, tokens=self.tokens_after(step))
