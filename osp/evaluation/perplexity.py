"""Perplexity and bits per byte of a text that is cut into windows.

Window i reads L tokens from token i (L - overlap) on. Its first `overlap` tokens are context only: the window before
predicts them. BOS, if asked for, comes before every window and counts as one of the L tokens. A remainder shorter than
a window is left out, as in the evaluation code of GPTQ, QuaRot and OSP. A text shorter than a window is one window.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from osp.distributed import add_up, my_share
from osp.errors import UserError
from osp.model.loss import IGNORE
from osp.model.transformer import Transformer


@dataclass(frozen=True)
class Text:
    """A text as a model reads it."""

    name: str
    tokens: Tensor  # int64 (N,)
    token_bytes: Tensor  # int32 (N,): bytes of text of each token
    sha256: str  # of the text
    row: int | None = None  # tokens of its sequences, which are the windows and begin with their own BOS
    counted: Tensor | None = None  # bool (N,): which tokens to predict; None: all


@dataclass(frozen=True, kw_only=True)
class CodeLength:
    """The code length of the predicted tokens of a text."""

    nats: float
    tokens: int
    bytes: int
    name: str = ""  # the text and how it was read: `wikitext2[len=2048,overlap=0,bos=no]`

    @property
    def loss(self) -> float:
        """Cross-entropy in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where a float overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


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
) -> CodeLength:
    """Return the code length of `text`. Collective: every rank gets the same number, whatever the number of ranks.

    Raises `UserError` if the windows do not fit the model or the text.

    Args:
        seq_len: Tokens of a window.
        overlap: Tokens at the start of a window that are context only.
        bos_id: Token before every window; None: no token.
        max_tokens: Tokens to read from the start of the text; None: all.
        batch_tokens: Tokens that the model reads at a time.
    """
    tokens, device, bos = text.tokens[:max_tokens], next(model.parameters()).device, bos_id is not None
    longest = model.config.max_position_embeddings
    if text.row is not None:  # the last token of a sequence is only predicted
        seq_len, overlap, bos, bos_id, longest = text.row, 0, False, None, longest + 1
    if not 2 <= seq_len <= longest:
        raise UserError(f"seq_len={seq_len}: a window has 2 to {longest} tokens, the model's max_position_embeddings")
    length = min(seq_len - bos, len(tokens))  # tokens of the text in a window
    if not 0 <= overlap < length:
        raise UserError(f"overlap={overlap}: must be 0 or more and below the {length} tokens of a window")
    if length + bos < 2:
        raise UserError(f"the text has {len(tokens)} tokens; there is nothing to predict")
    starts = torch.arange(0, len(tokens) - length + 1, length - overlap)
    batches, offsets = starts.split(max(1, batch_tokens // length)), torch.arange(length)
    nats = torch.zeros(len(batches), dtype=torch.float64, device=device)
    counts = torch.zeros(2, dtype=torch.int64)  # tokens, bytes
    for number, batch in my_share(batches, what=text.name, progress=progress):
        places = batch[:, None] + offsets  # in the text, (windows, length)
        counted = ((offsets >= overlap) | (batch[:, None] == 0)) & (offsets >= 1 - bos)
        if text.counted is not None:
            counted &= text.counted[places]
        ids, targets = tokens[places], tokens[places].where(counted, IGNORE)
        if bos_id is not None:
            ids, targets = F.pad(ids, (1, 0), value=bos_id), F.pad(targets, (1, 0), value=IGNORE)
        nats[number] = model(ids[:, :-1].to(device), targets[:, 1:].to(device)).loss.double()
        counts += torch.stack((counted.sum(), text.token_bytes[places[counted]].sum()))
    num_tokens, num_bytes = add_up(counts.to(device)).tolist()
    name = f"{text.name}[len={length + bos},overlap={overlap},bos={'yes' if bos or text.row else 'no'}"
    name += f",first={len(tokens)}]" if len(tokens) < len(text.tokens) else "]"
    return CodeLength(nats=add_up(nats).sum().item(), tokens=num_tokens, bytes=num_bytes, name=name)
