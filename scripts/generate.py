"""Continue texts: `python scripts/generate.py MODEL "Once upon a time" temperature=0.7 top_p=0.9`."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from entry import launch
from pydantic import Field
from tokenizers import Tokenizer

from osp.config import Weights
from osp.device import choose_device, native_bf16, prepare_cpu
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel, open_model
from osp.files import read_utf8
from osp.model.generate import Sampling, check_lengths, prepare_for_generation, stream
from osp.schema import Count, Device, FilePath, Int, NotNegative, PositiveFraction, Seed, Threads, build

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class GenerateConfig:
    """Keys besides the model and the prompts, which come first."""

    weights: Weights = "trained"  # of a run; averaged: their running average, see the table `average` of a training
    prompts: FilePath | None = None  # a text file with one prompt per line
    # Tokens to write. None: 256, or as many as the context has left.
    max_new_tokens: Annotated[Int, Field(ge=1, le=2**24)] | None = None
    temperature: NotNegative = 0.8  # of sampling; 0: always the most likely token
    top_k: Count | None = None  # sample from the k most likely tokens only
    top_p: PositiveFraction = 1.0  # sample from the smallest set of tokens with this probability
    seed: Seed = 0  # of sampling
    bos: bool = True  # put the model's BOS token before every prompt
    device: Device = "auto"  # auto: CUDA if there is a GPU
    dtype: Literal["auto", "fp32", "bf16"] = (
        "auto"  # of weights, activations and cache; auto: bf16 on a GPU that has it
    )
    compile: bool | Literal["auto"] = "auto"  # run one token as one CUDA graph; auto: on a GPU
    threads: Threads | None = None  # CPU threads; None: all cores
    debug: bool = False  # show tracebacks of user errors


def main(values: dict[str, Any]) -> None:
    path, *prompts = values.pop("arguments") or ("",)
    config = build(GenerateConfig, values)
    if not path or not (prompts or config.prompts):
        raise UserError('name the model and a prompt: python scripts/generate.py MODEL "Once upon a time"')
    speed = complete(path, prompts, config, lambda piece: print(piece, end="", flush=True))
    print(speed, file=sys.stderr)


@dataclass
class Speed:
    """Counts and seconds of reading the prompts and writing new tokens."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    reading: float = 0.0  # seconds until the first new tokens
    writing: float = 0.0  # seconds of the other new tokens

    def __str__(self) -> str:
        rate = f": {self.new_tokens / self.writing:,.0f} tokens/s" if self.writing else ""
        return (
            f"{self.prompt_tokens:,} tokens read in {self.reading:.2f} s, "
            f"{self.new_tokens:,} written in {self.writing:.2f} s{rate}"
        )


def complete(path: str, prompts: Sequence[str], config: GenerateConfig, write: Callable[[str], None]) -> Speed:
    """Continue `prompts` and the lines of `config.prompts` with the model at `path`.

    write: Called with pieces of the texts, prompts included, in their order and separated by an empty line. The first
        text is written while it is generated. A `UserError` is raised before the first call.
    """
    prompts = [*prompts, *read_prompts(config.prompts)]
    device = choose_device(config.device)
    if device.type == "cpu":
        prepare_cpu(config.threads)
    subject = open_model(path, device=device, weights=config.weights)
    ids = [encode(subject, prompt, number, bos=config.bos) for number, prompt in enumerate(prompts, start=1)]
    positions_left = subject.model.config.max_position_embeddings - max(map(len, ids))
    limit = config.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, positions_left))
    check_lengths(subject.model, ids, limit)
    prepare_for_generation(subject.model, choose_dtype(config.dtype, device))
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
    compile = device.type == "cuda" if config.compile == "auto" else config.compile

    eos_id = subject.eos_id if subject.eos_id in subject.stop_ids else None  # other ends may be words of the text
    texts = Texts(prompts, [TextStream(subject.tokenizer, prompt_ids) for prompt_ids in ids], eos_id, write)
    speed = Speed(prompt_tokens=sum(map(len, ids)))
    began = time.perf_counter()
    for tokens in stream(subject.model, ids, limit, sampling=sampling, eos_ids=subject.stop_ids, compile=compile):
        if not speed.reading:
            speed.reading = time.perf_counter() - began
        else:
            speed.new_tokens += sum(token is not None for token in tokens)
            speed.writing = time.perf_counter() - began - speed.reading
        texts.push(tokens)
    texts.finish()
    return speed


def choose_dtype(dtype: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """Return the dtype to generate in. bf16 rounds differently by batch size, so the text may depend on it."""
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" and native_bf16(device) else "fp32"
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def read_prompts(path: str | None) -> list[str]:
    """Return the lines of a file that are not blank."""
    if path is None:
        return []
    lines = read_utf8(Path(path), name=f"prompts={path}").split("\n")
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts={path} holds no prompt; write one per line")
    return prompts


def encode(subject: LanguageModel, prompt: str, number: int, *, bos: bool) -> list[int]:
    """Return the tokens of a prompt, after the BOS token if `bos` is set and the model has one."""
    if not prompt:
        raise UserError(f"prompt {number} is empty; give it some text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python decodes bytes that are not UTF-8 as surrogates
        raise UserError(f"prompt {number} is not UTF-8 text") from error
    ids = subject.encode(prompt)
    return [subject.bos_id, *ids] if bos and subject.bos_id is not None else ids


class TextStream:
    """Decode the tokens after `prompt`, which decides about spaces, one by one into pieces of whole characters."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.begin, self.end = 0, len(self.ids)  # the tokens of the last piece: context of the next one

    def push(self, token: int) -> str:
        """Return the text completed by `token`, empty if it ends inside a character."""
        self.ids.append(token)
        text = self.finish()
        if not text or text.endswith("\ufffd"):
            return ""
        self.begin, self.end = self.end, len(self.ids)
        return text

    def finish(self) -> str:
        """Return the rest of the text: an incomplete character as replacement characters."""
        known = self.tokenizer.decode(self.ids[self.begin : self.end])
        return self.tokenizer.decode(self.ids[self.begin :])[len(known) :]


class Texts:
    """Texts that are generated in parallel and written one after the other."""

    def __init__(
        self, prompts: Sequence[str], streams: Sequence[TextStream], eos_id: int | None, write: Callable[[str], None]
    ):
        self.streams, self.eos_id, self.write = streams, eos_id, write
        self.waiting, self.ended = list(prompts), [False] * len(prompts)
        self.current = 0  # all texts before this one are written

    def push(self, tokens: Sequence[int | None]) -> None:
        """Add one token to each text; None or EOS ends it."""
        for number, token in enumerate(tokens):
            if token is None or token == self.eos_id:
                self._end(number)
            else:
                self.waiting[number] += self.streams[number].push(token)
        self._write()

    def finish(self) -> None:
        """End all texts."""
        for number in range(len(self.streams)):
            self._end(number)
        self._write()

    def _end(self, number: int) -> None:
        if not self.ended[number]:
            self.ended[number] = True
            separator = "\n" if number == len(self.streams) - 1 else "\n\n"
            self.waiting[number] += self.streams[number].finish() + separator

    def _write(self) -> None:
        while self.current < len(self.streams):
            piece, self.waiting[self.current] = self.waiting[self.current], ""
            if piece:
                self.write(piece)
            if not self.ended[self.current]:
                break
            self.current += 1


if __name__ == "__main__":
    defaults = {**dataclasses.asdict(GenerateConfig()), "arguments": []}
    launch(main, "generate", defaults=defaults, positional="arguments")
