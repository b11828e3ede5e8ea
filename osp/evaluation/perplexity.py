"""Perplexity and bits per byte of a text that is cut into windows.

Window i reads L tokens from token i (L - overlap) on; its first `overlap` tokens were predicted by the window before
and are context only. With BOS that token stands in front of every window and counts as one of the L. A rest shorter
than a window is left out, as in the evaluation code of GPTQ, QuaRot and OSP; a text shorter than a window is one
window.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from osp.distributed import add_up, device_of, my_share
from osp.errors import UserError
from osp.model.loss import IGNORE
from osp.model.transformer import Transformer


@dataclass(frozen=True)
class Text:
    """A text as a model reads it."""

    name: str
    tokens: Tensor  # int64 (N,)
    token_bytes: Tensor  # int32 (N,): bytes of text that each token stands for
    sha256: str  # of the text


@dataclass(frozen=True, kw_only=True)
class CodeLength:
    """The code length of the predicted tokens of a text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that leaves the range of a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


@dataclass(frozen=True)
class Perplexity(CodeLength):
    """The code length of a text, and how it was predicted."""

    text: str
    seq_len: int
    overlap: int
    bos: bool
    first: int | None = None  # only the first so many tokens of the text were read

    @property
    def name(self) -> str:
        """All that the number depends on besides model and text: `wikitext2[len=2048,overlap=0,bos=no]`."""
        settings = [f"len={self.seq_len}", f"overlap={self.overlap}", f"bos={'yes' if self.bos else 'no'}"]
        settings += [] if self.first is None else [f"first={self.first}"]
        return f"{self.text}[{','.join(settings)}]"


@torch.no_grad()
def perplexity(
    model: Transformer,
    text: Text,
    *,
    seq_len: int,
    overlap: int = 0,
    bos_id: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of `text`; every rank calls it and gets the same number, whatever their count.

    bos_id: the token before every window; None: none. max_tokens: read the first so many tokens of the text.
    batch_tokens: tokens the model reads at a time.
    """
    tokens = text.tokens[:max_tokens]
    starts, length = window_starts(len(tokens), seq_len=seq_len, overlap=overlap, bos=bos_id is not None, model=model)
    device = device_of(model)
    batches = starts.split(max(1, batch_tokens // length))
    nats = torch.zeros(len(batches), dtype=torch.float64, device=device)
    counts = torch.zeros(2, dtype=torch.int64)  # tokens, bytes
    for number, batch in my_share(batches, what=text.name, progress=progress):
        places, counted = _counted_places(batch, length=length, overlap=overlap, bos=bos_id is not None)
        rows = tokens[places]
        targets = rows.where(counted, IGNORE)
        if bos_id is not None:
            rows = torch.cat((torch.full_like(rows[:, :1], bos_id), rows), dim=1)
            targets = torch.cat((torch.full_like(rows[:, :1], IGNORE), targets), dim=1)
        nats[number] = model(rows[:, :-1].to(device), targets[:, 1:].to(device)).double()
        counts += torch.stack((counted.sum(), text.token_bytes[places[counted]].sum()))
    num_tokens, num_bytes = add_up(counts.to(device)).tolist()
    return Perplexity(
        text.name,
        seq_len=length + (bos_id is not None),
        overlap=overlap,
        bos=bos_id is not None,
        nats=add_up(nats).sum().item(),
        tokens=num_tokens,
        bytes=num_bytes,
        first=len(tokens) if len(tokens) < len(text.tokens) else None,
    )


def window_starts(num_tokens: int, *, seq_len: int, overlap: int, bos: bool, model: Transformer) -> tuple[Tensor, int]:
    """(where each window begins (n,), tokens of the text in a window); `UserError` for windows that cannot be."""
    longest = model.config.max_position_embeddings
    if not 2 <= seq_len <= longest:
        raise UserError(f"seq_len={seq_len}: a window has 2 to {longest} tokens, the model's max_position_embeddings")
    length = min(seq_len - bos, num_tokens)
    if not 0 <= overlap < length:
        raise UserError(f"overlap={overlap}: must be 0 or more and below the {length} tokens of a window")
    if length + bos < 2:
        raise UserError(f"the text has {num_tokens} tokens; there is nothing to predict")
    return torch.arange(0, num_tokens - length + 1, length - overlap), length


def _counted_places(starts: Tensor, *, length: int, overlap: int, bos: bool) -> tuple[Tensor, Tensor]:
    """(places in the text, whether the token there is predicted and not counted before), each (windows, length)."""
    offsets = torch.arange(length)
    places = starts[:, None] + offsets
    counted = (offsets >= overlap) | (starts[:, None] == 0)
    return places, counted & (offsets >= (0 if bos else 1))
