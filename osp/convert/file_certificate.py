"""What was measured on an exported file: a JSON file for programs, a Markdown table for people.

Three readers of one text are compared: the trained model, that model under fake quantization, and the client, a program
that has read the file. It is written only if the last two agree on the perplexity, the outer two on odd texts' tokens.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp.convert.file_format import Client
from osp.convert.same_function import Difference, compared_perplexity
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.perplexity import Text
from osp.files import read_json, sha256_of
from osp.model.loss import IGNORE
from osp.model.transformer import Output, Transformer
from osp.model_config import ModelConfig
from osp.tables import render_text

PROMPT_TOKENS, GREEDY_TOKENS = 16, 32
ODD_TEXTS = 100
SHOWN_TENSORS = 6  # kinds of tensors in the table
MAY_BE_WIDE = re.compile(r"norm|embed|embd|head|^output\.|bias|rope_freqs")  # outside of the matrices of blocks


@dataclass(frozen=True)
class TextReading:
    """What one reader of the model makes of the text."""

    reader: str
    perplexity: float  # of the first `tokens` tokens
    continuation: str  # the most likely tokens after the first of the text


@dataclass(frozen=True)
class FileCertificate:
    """The measurements of an export; the keys of the JSON file."""

    file: str
    files: dict[str, dict[str, Any]]  # name -> bytes and sha256 of what the client read
    format: str
    scheme: str | None
    quantization: str  # the QuantSpec in words, and its hash
    dtype: str  # of tensors that are not quantized
    model: dict[str, Any]  # name, path, sha256 of the trained weights, step
    context: int  # tokens of a training sequence, which the file states
    ffn_width: tuple[int, int]  # channels as trained and as written; the rest are zeros
    folding: Difference  # of the folded and padded model to the trained one, before anything is rounded
    text: dict[str, Any]  # name, sha256, and the number of tokens from its start that were read
    window: int  # tokens of a window
    trained: TextReading  # at 16 bits: not quantized
    fake: TextReading  # under fake quantization
    client: TextReading  # of the file
    tolerance: float  # of the client's perplexity, relative to fake quantization
    same_tokens: int | None  # texts that the client and the trained model split into the same tokens; None: not asked
    above_four_bits: tuple[str, ...]  # tensors with more than 4 bits per weight
    versions: dict[str, Any]

    @property
    def relative(self) -> float:
        """Distance of the client's perplexity from fake quantization, relative to the latter."""
        return abs(self.client.perplexity - self.fake.perplexity) / self.fake.perplexity

    def check(self, *, w_bits: int) -> None:
        """Raise `UserError` if the file does not compute what fake quantization does, or a matrix has more bits."""
        if not self.relative <= self.tolerance:  # true for nan as well
            raise UserError(
                f"perplexity of {self.text['name']} is {self.fake.perplexity:.5f} by fake quantization and "
                f"{self.client.perplexity:.5f} by {self.client.reader}, more than {self.tolerance:g} apart; not written"
            )
        if w_bits <= 4 and (wide := [name for name in self.above_four_bits if not MAY_BE_WIDE.search(name)]):
            raise UserError(f"{wide[0]} has more than 4 bits; not written")

    def markdown(self) -> str:
        """Return the table for people, laid out by file_certificate.md."""
        kinds = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in self.above_four_bits)
        above = [f"{name} ({n})" if n > 1 else name for name, n in kinds.items()]
        return render_text(Path(__file__).with_suffix(".md"), it=self, above=above, shown=SHOWN_TENSORS)


class ClientModel(nn.Module):
    """A client as `perplexity` reads a model: ids and targets (B, T) in, the summed loss out."""

    def __init__(self, client: Client, config: ModelConfig):
        super().__init__()
        self.client, self.config = client, config
        self.register_parameter("place", nn.Parameter(torch.empty(0)))  # its device is where ids go

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Output:
        if targets is None:
            return Output(None, self.client.logits(input_ids), None)
        losses = [  # a window at a time, whose logits may be a gigabyte
            F.cross_entropy(self.client.logits(ids[None])[0], wanted, ignore_index=IGNORE, reduction="sum")
            for ids, wanted in zip(input_ids, targets, strict=True)
        ]
        return Output(torch.stack(losses).sum(), None, None)


@torch.no_grad()
def observe(reader: str, model: nn.Module, text: Text, subject: LanguageModel) -> TextReading:
    """Return what `model` makes of `text`; subject: whose tokens they are."""
    llama, device = cast(Transformer, model), next(model.parameters()).device
    length = min(PROMPT_TOKENS + GREEDY_TOKENS, subject.context)
    prompt = text.tokens[: min(PROMPT_TOKENS, length - 1)].tolist()
    ids = [*prompt]
    while len(ids) < length:
        ids.append(int(llama(torch.tensor([ids], device=device)).logits[0, -1].argmax()))
    continuation = subject.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=False)
    return TextReading(reader, compared_perplexity(llama, text, subject.window), continuation)


def compare_tokens(client: Client, subject: LanguageModel) -> int | None:
    """Return the number of texts compared, None if the client has no tokenizer; raise `UserError` at a difference."""
    for text in odd_texts():
        theirs, ours = client.encode(text), subject.encode(text)
        if theirs is None:
            return None
        if theirs != ours:
            raise UserError(f"{client.name} splits {text!r:.60} into {theirs!s:.60}, not {ours!s:.60}; not written")
    return ODD_TEXTS


def odd_texts() -> list[str]:
    """Return 100 texts that tokenizers disagree on: the parts in odd_texts.json, then pairs of them."""
    parts = read_json(Path(__file__).with_name("odd_texts.json"))
    pairs = (parts[i + 1] + parts[(7 * i + 3) % len(parts)] for i in range(ODD_TEXTS - len(parts)))
    return [*parts, *pairs]


def describe_files(path: Path) -> dict[str, dict[str, Any]]:
    """Return bytes and SHA-256 of a file, or of the files in a folder, by name."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
