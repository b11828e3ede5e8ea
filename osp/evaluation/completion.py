"""Prompts and what a model makes of them: what `scripts/generate.py` does."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from osp.config import GenerateConfig
from osp.device import choose_device, native_bf16, prepare_cpu
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel, open_model
from osp.model.generate import Sampling, TextStream, check_lengths, prepare, stream

DEFAULT_NEW_TOKENS = 256


@dataclass
class Speed:
    """What was read and written, in how many seconds."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    reading: float = 0.0  # until the first tokens are there
    writing: float = 0.0  # the others

    def __str__(self) -> str:
        rate = f": {self.new_tokens / self.writing:,.0f} tokens/s" if self.writing else ""
        return (
            f"{self.prompt_tokens:,} tokens read in {self.reading:.2f} s, "
            f"{self.new_tokens:,} written in {self.writing:.2f} s{rate}"
        )


def complete(path: str, prompts: Sequence[str], config: GenerateConfig, write: Callable[[str], None]) -> Speed:
    """Continue each of `prompts`, and those of `config.prompts`, with the model at `path`.

    write: takes the texts, prompts included, piece by piece: the first one as it is made, the others in their order,
    parted by an empty line. Raises `UserError` before the first piece.
    """
    prompts = [*prompts, *read_prompts(config.prompts)]
    device = choose_device(config.device)
    if device.type == "cpu":
        prepare_cpu(config.threads)
    subject = open_model(path, device=device)
    ids = [encode(subject, prompt, number, bos=config.bos) for number, prompt in enumerate(prompts, start=1)]
    room = subject.model.config.max_position_embeddings - max(map(len, ids))
    limit = config.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, room))
    check_lengths(subject.model, ids, limit)
    prepare(subject.model, choose_dtype(config.dtype, device))
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
    compile = device.type == "cuda" if config.compile == "auto" else config.compile

    texts = Texts(prompts, [TextStream(subject.tokenizer, row) for row in ids], subject.eos_id, write)
    speed = Speed(prompt_tokens=sum(map(len, ids)))
    began = time.perf_counter()
    for tokens in stream(subject.model, ids, limit, sampling=sampling, eos_id=subject.eos_id, compile=compile):
        if not speed.reading:
            speed.reading = time.perf_counter() - began
        else:
            speed.new_tokens += sum(token is not None for token in tokens)
            speed.writing = time.perf_counter() - began - speed.reading
        texts.push(tokens)
    texts.finish()
    return speed


def choose_dtype(dtype: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """The dtype to generate in. bf16's rounding differs between batches and with the cache, and so may the text."""
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" and native_bf16(device) else "fp32"
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def read_prompts(path: str | None) -> list[str]:
    """The lines of a file that are not blank."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path}: cannot read it: {error}") from error
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts={path} holds no prompt; write one in each line")
    return prompts


def encode(subject: LanguageModel, prompt: str, number: int, *, bos: bool) -> list[int]:
    """The tokens of a prompt, after the token that begins a text if `bos` and if the model has one."""
    if not prompt:
        raise UserError(f"prompt {number} is empty; give it some text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8 arrive as halves of characters
        raise UserError(f"prompt {number} is not UTF-8 text") from error
    ids = subject.encode(prompt)
    return [subject.bos_id, *ids] if bos and subject.bos_id is not None else ids


class Texts:
    """Several texts that grow at once, written one after the other."""

    def __init__(
        self, prompts: Sequence[str], streams: Sequence[TextStream], eos_id: int | None, write: Callable[[str], None]
    ):
        self.streams, self.eos_id, self.write = streams, eos_id, write
        self.waiting, self.ended = list(prompts), [False] * len(prompts)
        self.current = 0  # all before it have been written to their ends

    def push(self, tokens: Sequence[int | None]) -> None:
        """One token of each text; None, and the end of a text, where it has ended."""
        for row, token in enumerate(tokens):
            if token is None or token == self.eos_id:
                self._end(row)
            else:
                self.waiting[row] += self.streams[row].push(token)
        self._write()

    def finish(self) -> None:
        for row in range(len(self.streams)):
            self._end(row)
        self._write()

    def _end(self, row: int) -> None:
        if not self.ended[row]:
            self.ended[row] = True
            self.waiting[row] += self.streams[row].finish() + ("\n" if row == len(self.streams) - 1 else "\n\n")

    def _write(self) -> None:
        while self.current < len(self.streams):
            piece, self.waiting[self.current] = self.waiting[self.current], ""
            if piece:
                self.write(piece)
            if not self.ended[self.current]:
                break
            self.current += 1
