"""Measurements of a model in training on its validation split: loss, bits per byte, perplexity at 4 bits."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from osp.config import Config
from osp.data.loader import Batch, validation_batches
from osp.data.manifest import load_manifest
from osp.data.tokenizer import token_bytes
from osp.distributed import add_up
from osp.evaluation.evaluate import live_perplexity
from osp.evaluation.perplexity import CodeLength
from osp.evaluation.texts import held_out
from osp.files import read_lines
from osp.model.transformer import Output, Transformer
from osp.train.resolve import Resolved

MIN_VALIDATION_STEPS, VALIDATION_SHARE = 250, 0.02  # eval.every=auto: the shortest interval, the share of the work

Measurement = tuple[int, dict[str, float]]  # after which step, and the metrics


class Validator:
    """Measures `model` on the validation split below `shards`. All methods are collective."""

    def __init__(self, resolved: Resolved, model: Transformer, shards: Path, tokenizer: Tokenizer):
        self.resolved, self.model, self.shards = resolved, model, shards
        self.config, quant = resolved.config, resolved.config.eval.quant
        self.every = validation_every(self.config, load_manifest(shards).val.tokens)
        self._token_bytes = torch.from_numpy(token_bytes(tokenizer)).to(resolved.device)
        if quant.every:
            self._text = held_out("held_out", shards, tokenizer, max_tokens=quant.tokens)

    @torch.no_grad()
    def loss(
        self, forward: Callable[[Batch], Output], asked_to_stop: Callable[[], bool], *, rank: int
    ) -> dict[str, float] | None:
        """Return `val/loss` in nats per token, `val/bits_per_byte` and `val/seconds`; None when asked to stop.

        Args:
            forward: the output of the model for a batch, whose `loss` is set.
            asked_to_stop: whether any rank was asked to stop; called before every batch.
        """
        began, train = time.perf_counter(), self.config.train
        sums = torch.zeros(3, dtype=torch.float64, device=self.resolved.device)  # nats, tokens, bytes
        self.model.eval()
        try:
            for batch in validation_batches(
                self.shards,
                seq_len=train.seq_len,
                batch_size=self.resolved.micro_batch_size,
                rank=rank,
                world_size=self.resolved.world_size,
                max_tokens=self.config.eval.tokens,
                document_ids=train.document_mask,
            ):
                if asked_to_stop():
                    return None
                targets = batch.tokens[: batch.num_rows, 1:].to(self.resolved.device)
                loss = forward(batch).loss
                assert loss is not None
                nats = loss.double()
                sums += torch.stack((nats, nats.new_tensor(targets.numel()), self._token_bytes[targets].sum().double()))
        finally:
            self.model.train()
        nats, tokens, num_bytes = add_up(sums).tolist()
        measured = CodeLength(nats=nats, tokens=int(tokens), bytes=int(num_bytes))
        return {
            "val/loss": measured.loss,
            "val/bits_per_byte": measured.bits_per_byte,
            "val/seconds": time.perf_counter() - began,
        }

    def quantized_perplexity(self) -> dict[str, float]:
        """Return `quant/perplexity/BITS` of the model as it is and at 4 bits, and `quant/seconds`.

        Weights, buffers and random numbers are the same bits afterwards.
        """
        began, seq_len = time.perf_counter(), self.config.train.seq_len
        # the windows of a text have another shape than a batch, and compiled code ignores hooks
        with torch.compiler.set_stance("force_eager"):
            metrics = live_perplexity(
                self.model, self._text, seq_len=seq_len, batch_tokens=self.resolved.micro_batch_size * seq_len
            )
        return metrics | {"quant/seconds": time.perf_counter() - began}


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
    for event in read_lines(folder / "metrics.jsonl"):
        if name in event:
            last = event["step"], {key: value for key, value in event.items() if key.startswith(kind)}
    return last
