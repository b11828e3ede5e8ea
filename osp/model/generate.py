"""Generate text: a static cache, one token per forward pass, and sampling.

    for tokens in stream(model, [[1, 5, 7], [1, 9]], 100, sampling=Sampling(temperature=0.8)):
        ...  # the next token of each sequence, None once a sequence has ended

Call `prepare_for_generation` first on a model that is used for nothing else. A model in training generates without it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from osp.errors import RunError, UserError
from osp.model.attention import KVCache
from osp.model.fold import absorb_projections, fold_embedding_scale
from osp.model.transformer import Transformer

Prompts = Sequence[Sequence[int]]  # token ids


@dataclass(frozen=True)
class Sampling:
    """Draw a token from softmax(logits / temperature), restricted by `top_k` and `top_p`."""

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # keep the k most likely tokens
    top_p: float = 1.0  # then keep the fewest most likely tokens whose probabilities sum to this or more
    seed: int = 0


@torch.no_grad()
def prepare_for_generation(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Prepare a model in place for generation only, and return it. It cannot be trained afterwards.

    The scale of the embedding is folded, projections are absorbed (exact up to rounding), and
    weights, biases and gains are cast to `dtype`. Scalars of norms stay fp32, like their arithmetic.
    """
    model.eval()
    fold_embedding_scale(model)
    absorb_projections(model)
    for name, parameter in model.named_parameters():
        if name.endswith((".weight", ".bias")):
            parameter.data = parameter.to(dtype)
    model.compute_dtype = dtype
    return model


class Decoder:
    """A model with a cache for `batch_size` sequences of at most `max_length` tokens.

    compile: run passes of one token as one CUDA graph, on a CPU as compiled code. The first such pass compiles.
    """

    def __init__(self, model: Transformer, batch_size: int, max_length: int, *, compile: bool = False):
        config, device = model.config, model.embed_tokens.weight.device
        self.model, self.compiled = model, compile
        shape = (config.num_hidden_layers, batch_size, max_length, config.kv_heads, config.head_size)
        self.multiple = 64 if device.type == "cuda" else 1  # of eager widths: cuDNN plans attention for each of them
        self.cache = KVCache(shape, dtype=model.compute_dtype, device=device)
        self._pass = self._next
        if compile:
            for tensor in (self.cache.keys, self.cache.values):
                torch._dynamo.mark_static_address(tensor)  # a CUDA graph may write only to memory with a static address
            model.rotary(max_length, device)  # outside of the graph, because the table is cached
            self._pass = torch.compile(self._next, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @torch.no_grad()
    def read(self, prompts: Prompts) -> Tensor:
        """Read `prompts` from the beginning and return the logits (B, V) of the token after each."""
        device = self.cache.keys.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ids = pad_sequence([torch.tensor(prompt, device=device) for prompt in prompts], batch_first=True)
        self.positions, self.cache.positions = lengths[:, None], None
        self.longest = ids.shape[1]
        return self.model(ids, cache=self.cache, wanted=lengths - 1).logits[:, 0]

    @torch.no_grad()
    def read_next(self, tokens: Tensor) -> Tensor:
        """Read one more token (B,) per sequence; return the logits (B, V) of the next, valid until the next call."""
        self.longest += 1
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        else:
            self.cache.width = min(-(-self.longest // self.multiple) * self.multiple, self.cache.keys.shape[2])
        logits = self._pass(tokens[:, None], self.positions)
        self.positions = self.positions + 1
        return logits

    def _next(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.cache.positions = positions
        return self.model(tokens, cache=self.cache).logits[:, 0]


def stream(
    model: Transformer,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """Yield the next token of every sequence, one list per forward pass.

    All sequences draw with the same random numbers, made on the CPU. So a text depends on the seed and its prompt, not
    on its index, the device or, beyond rounding, other sequences, and all ranks of a sharded model choose the same.

    Raises `UserError` if prompts are empty or the model has too few positions, `RunError` if a logit is not finite.
    model: in eval mode. sampling: None for greedy decoding. eos_ids: each ends a sequence; it is yielded, and the
    sequence yields None afterwards. compile: see `Decoder`.
    """
    check_lengths(model, prompts, max_new_tokens)
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + max_new_tokens, compile=compile)
    ended, tokens = [False] * len(prompts), None
    for _ in range(max_new_tokens):
        logits = decoder.read(prompts) if tokens is None else decoder.read_next(tokens)
        if not logits.isfinite().all():
            raise RunError("the model's logits are not finite: an activation overflows, so there is no next token")
        uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
        tokens = choose(logits, sampling, uniform)
        yield [None if done else token for done, token in zip(ended, tokens.tolist(), strict=True)]
        ended = [done or token in eos_ids for done, token in zip(ended, tokens.tolist(), strict=True)]
        if all(ended):
            break


def generate(model: Transformer, prompts: Prompts, max_new_tokens: int, **options: Any) -> list[list[int]]:
    """Return the new tokens of each sequence, up to one of `eos_ids`, which is included. See `stream`."""
    sequences: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, max_new_tokens, **options):
        for sequence, token in zip(sequences, tokens, strict=True):
            if token is not None:
                sequence.append(token)
    return sequences


def check_lengths(model: Transformer, prompts: Prompts, max_new_tokens: int) -> None:
    """Raise `UserError` if a prompt is empty or prompt and new tokens need more positions than the model has."""
    positions = model.config.max_position_embeddings
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise UserError(f"prompt {number} is empty; give it some text")
        if len(prompt) >= positions:
            raise UserError(
                f"prompt {number} is {len(prompt)} tokens long and the model has {positions} positions, which leaves "
                "none for an answer; shorten it"
            )
        if len(prompt) + max_new_tokens > positions:
            raise UserError(
                f"max_new_tokens={max_new_tokens} after the {len(prompt)} tokens of prompt {number} is more than the "
                f"model's {positions} positions; set max_new_tokens={positions - len(prompt)} or less"
            )


def choose(logits: Tensor, sampling: Sampling, uniform: float) -> Tensor:
    """Return one token (B,) int64 for each sequence from its logits (B, V).

    It is the token at the quantile `uniform`, in [0, 1), of the distribution of `sampling`, whose tokens are sorted by
    falling probability with `top_k` or `top_p` and by id otherwise.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores, order = logits.double(), None
    if sampling.top_k is not None or sampling.top_p < 1:
        scores, order = scores.topk(min(sampling.top_k or scores.shape[-1], scores.shape[-1]))
    # subtract the maximum first: with a low temperature the quotients would overflow
    cumulative = ((scores - scores.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1).cumsum(-1)
    # the last token kept is where the sum of probabilities first reaches top_p
    last = (cumulative < sampling.top_p).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    index = (cumulative <= uniform * cumulative.gather(-1, last)).sum(-1, keepdim=True).minimum(last)
    return (index if order is None else order.gather(-1, index))[:, 0]
