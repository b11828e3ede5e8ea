"""What a run measures on its validation split, and the figures that it prints at its start and end."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jinja2 import UndefinedError
from torch import Tensor

from osp.config import Config
from osp.data.loader import Batch, Layout, validation_batches
from osp.data.manifest import load_manifest
from osp.data.tokenizer import load_tokenizer, token_bytes
from osp.distributed import add_up, on_main
from osp.errors import RunError
from osp.evaluation.evaluate import live_perplexity
from osp.evaluation.perplexity import CodeLength
from osp.evaluation.texts import first_shard, held_out
from osp.files import read_record
from osp.model.generate import Sampling, generate
from osp.model.transformer import Output, Transformer, count_parameters, flops_per_token
from osp.optim.groups import describe_groups
from osp.quant.apply import draw_calibration
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec
from osp.report.page import write_page
from osp.run.logger import Logger
from osp.run.read import read_metrics, read_run
from osp.run.verdict import judge_run
from osp.tables import render_text
from osp.train.engine import Engine
from osp.train.resolve import Resolved

PROMPT_TOKENS = 32
MIN_VALIDATION_STEPS, VALIDATION_SHARE = 250, 0.02  # eval.every=auto: the shortest interval, the share of the work

Measurement = tuple[int, dict[str, float]]  # after which step, and the metrics


class Validator:
    """Measures `model` on the validation split below `shards` and logs the result. All methods are collective."""

    def __init__(
        self,
        resolved: Resolved,
        model: Transformer,
        shards: Path,
        logger: Logger | None,
        *,
        tokens_after: Callable[[int], int],
    ):
        self.tokens_after = tokens_after
        self.resolved, self.model, self.shards, self.logger = resolved, model, shards, logger
        self.config, quant = resolved.config, resolved.config.eval.quant
        self.layout = Layout.of(self.config)
        self.every = validation_every(self.config, load_manifest(shards).val.tokens)
        self.validated: Measurement = (-1, {})  # the last one
        self.quantized: Measurement = (-1, {})
        self.tokenizer = load_tokenizer(shards / "tokenizer.json")
        self._token_bytes = torch.from_numpy(token_bytes(self.tokenizer)).to(resolved.device)
        if quant.every:
            self._text = held_out("held_out", shards, self.tokenizer, self.layout, max_tokens=quant.tokens)
            self._formats = {name: self._calibrated(DEPLOYED[name]) for name in quant.formats}

    def restore(self, folder: Path) -> None:
        """Read the last measurements of a run."""
        self.validated = on_main(lambda: last_measurement(folder, "val/loss"))
        self.quantized = on_main(lambda: last_measurement(folder, "quant/seconds"))

    @torch.no_grad()
    def validate(self, step: int, forward: Callable[[Batch], Output], asked_to_stop: Callable[[], bool]) -> None:
        """Measure the loss in nats per token and bits per byte. Stops early, without a result, when asked to stop."""
        began, train = time.perf_counter(), self.config.train
        sums = torch.zeros(3, dtype=torch.float64, device=self.resolved.device)  # nats, tokens, bytes
        self.model.eval()
        try:
            for batch in validation_batches(
                self.shards,
                self.layout,
                batch_size=self.resolved.micro_batch_size,
                rank=dist.get_rank(),
                world_size=self.resolved.world_size,
                max_tokens=self.config.eval.tokens,
                document_ids=train.document_mask,
            ):
                if asked_to_stop():
                    return
                targets = batch.tokens[: batch.num_rows, 1:].to(self.resolved.device)
                loss = forward(batch).loss
                assert loss is not None
                nats = loss.double()
                sums += torch.stack((nats, nats.new_tensor(targets.numel()), self._token_bytes[targets].sum().double()))
        finally:
            self.model.train()
        nats, tokens, num_bytes = add_up(sums).tolist()
        measured = CodeLength(nats=nats, tokens=int(tokens), bytes=int(num_bytes))
        seconds = time.perf_counter() - began
        metrics = {"val/loss": measured.loss, "val/bits_per_byte": measured.bits_per_byte, "val/seconds": seconds}
        message = f"validation loss {measured.loss:.4f}, {measured.bits_per_byte:.4f} bits/byte"
        self.validated = self._record(step, metrics, message)

    def validate_quantized(self, step: int) -> None:
        """Measure the perplexity of the model as it is, at 4-4-4, and in the chosen formats.

        Weights, buffers and random numbers are the same bits afterwards.
        """
        began, seq_len = time.perf_counter(), self.config.train.seq_len
        batch_tokens = self.resolved.micro_batch_size * seq_len
        # the windows of a text have another shape than a batch, and compiled code ignores hooks
        with torch.compiler.set_stance("force_eager"):
            metrics = live_perplexity(
                self.model, self._text, seq_len=seq_len, formats=self._formats, batch_tokens=batch_tokens
            )
        values = [f"{value:.2f} at {key.rpartition('/')[2]}" for key, value in metrics.items()]
        metrics["quant/seconds"] = time.perf_counter() - began
        self.quantized = self._record(step, metrics, f"perplexity {', '.join(values)}")

    def compare_and_sample(self) -> dict[str, Any]:
        """Return `gzip_bits_per_byte` of the validation split, and `sample`: its first tokens, continued by the model.

        With `data.repeat` there is no figure of gzip, which does not read each span twice.
        The sample is empty with eval.sample_tokens=0.
        """
        manifest = load_manifest(self.shards)
        gzip = None if self.layout.repeat else 8 * manifest.val_gzip_bytes / max(manifest.val.bytes, 1)
        figures = {"gzip_bits_per_byte": gzip, "sample": ""}
        num_tokens, seq_len = self.config.eval.sample_tokens, self.config.train.seq_len
        if not num_tokens:
            return figures
        text = held_out("held_out", self.shards, self.tokenizer, self.layout, max_tokens=PROMPT_TOKENS)
        prompt = text.tokens[: (seq_len + 1) // 2].tolist()
        sampling = Sampling(temperature=0.8, seed=self.config.train.seed)
        self.model.eval()
        if self.config.train.deterministic:  # CUDA has no deterministic cumulative sum, and training is over
            torch.use_deterministic_algorithms(False)
        with torch.compiler.set_stance("force_eager"):  # torch.compile would compile every length
            try:
                (tokens,) = generate(self.model, [prompt], min(num_tokens, seq_len - len(prompt)), sampling=sampling)
            except RunError:  # without finite logits; the run has ended and must not fail
                tokens = []
        self.model.train()
        return figures | {"sample": self.tokenizer.decode([*prompt, *tokens])}

    def _calibrated(self, spec: QuantSpec) -> tuple[QuantSpec, Tensor | None]:
        """Return a format to measure, and the training sequences that its static ranges are from."""
        calibration = None
        if spec.needs_calibration:
            tokens = first_shard(self.shards, self.layout)
            spec = replace(spec, calibration_tokens=min(self.config.eval.quant.tokens, tokens.numel()))
            calibration = draw_calibration(tokens, spec, seq_len=self.config.train.seq_len).to(self.resolved.device)
        if self.logger:
            self.logger.say(f"eval.quant.formats: {spec} [{spec.hash}]")
        return spec, calibration

    def _record(self, step: int, metrics: dict[str, float], message: str) -> Measurement:
        if self.logger:
            self.logger.log(metrics, step=step, tokens=self.tokens_after(step))
            self.logger.say(f"step {step}: {message}")
        return step, metrics


def validation_every(config: Config, val_tokens: int) -> int:
    """Return the steps between validations on a split of `val_tokens` tokens.

    With eval.every=auto validation takes VALIDATION_SHARE of the work; a forward pass is a third of a step's.
    """
    if config.eval.every != "auto":
        return config.eval.every
    steps = min(config.eval.tokens, val_tokens) / (3 * config.train.tokens_per_step)
    return max(MIN_VALIDATION_STEPS, math.ceil(steps / VALIDATION_SHARE))


def last_measurement(folder: Path, name: str) -> Measurement:
    """Return the last line of metrics.jsonl with the metric `name`: its step, and its metrics of the same kind."""
    last: Measurement = (-1, {})
    kind = name.partition("/")[0] + "/"
    for event in read_metrics(folder / "metrics.jsonl", []):
        if name in event:
            last = event["step"], {key: value for key, value in event.items() if key.startswith(kind)}
    return last


def describe_start(resolved: Resolved, engine: Engine, shards: Path, tflops: float | None) -> str:
    """Return the sizes of the run, its engine, and the table of the optimizer's groups."""
    config = resolved.config
    parameters, flops = count_parameters(config.model)["total"], flops_per_token(config.model, config.train.seq_len)
    text = (
        f"{config.run.name}: {parameters / 1e6:.1f} M parameters, norm {config.model.norm.name}, "
        f"{flops / 1e6:.0f} MFLOP per token; {resolved.world_size} x {resolved.device.type}, "
        f"{config.train.precision}, ZeRO-{config.engine.zero_stage}; {resolved.total_steps:,} steps of "
        f"{config.train.tokens_per_step:,} tokens from {shards}\n{describe_groups(engine.groups)}"
    )
    return f"{text}\nMFU is measured against {tflops:g} TFLOP/s per rank" if tflops else text


def stored_summary(folder: Path) -> str | None:
    """Return the text of a complete run's summary.json; None if it is missing or damaged."""
    try:
        return describe_summary(read_record(folder / "summary.json") or {}, folder)
    except (TypeError, ValueError, AttributeError, UndefinedError):
        return None


def describe_summary(summary: dict[str, Any], folder: Path) -> str:
    """Return summary.json as text, after writing the report page of the run, where a finished run must not fail."""
    report, verdict = folder / "report.html", None
    try:
        run = read_run(folder)
        write_page([run], report)
        verdict = judge_run(run)
    except Exception as error:
        report = f"not written, {type(error).__name__}: {error}"
    values = {"summary": summary, "verdict": verdict, "folder": folder, "report": report}
    return render_text(Path(__file__).with_name("summary.txt"), **values)
