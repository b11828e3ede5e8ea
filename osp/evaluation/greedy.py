"""Greedy text after contexts, up to stop strings: what generated answers are read from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from osp.distributed import add_up, batches_by_tokens, my_share
from osp.evaluation.language_model import LanguageModel
from osp.model.generate import stream


class Wanted(NamedTuple):
    """Text that is asked for: what follows `context`, at most `limit` tokens, up to the first of `stops`."""

    context: str
    limit: int
    stops: tuple[str, ...] = ()


def greedy_texts(
    subject: LanguageModel,
    wanted: Sequence[Wanted],
    *,
    bos: bool = False,
    batch_tokens: int = 8192,
    what: str = "generation",
    progress: bool = False,
) -> tuple[list[str], int]:
    """(the text after every context, how many contexts lost their beginnings); the same on every rank.

    The context keeps half of the model's positions at least. batch_tokens: tokens of contexts and texts at a time.
    """
    longest = subject.model.config.max_position_embeddings
    limits = [min(each.limit, longest // 2) for each in wanted]
    prompts = [_prompt(subject, each.context, bos=bos) for each in wanted]
    room = [longest - limit for limit in limits]
    truncated = sum(len(prompt) > most for prompt, most in zip(prompts, room, strict=True))
    prompts = [prompt[-most:] for prompt, most in zip(prompts, room, strict=True)]
    batches = []
    for limit in sorted(set(limits)):  # rows of a batch have the same limit
        rows = [i for i in range(len(wanted)) if limits[i] == limit]
        found = batches_by_tokens([len(prompts[i]) + limit for i in rows], batch_tokens)
        batches += [[rows[i] for i in batch] for batch in found]
    # one more than the ids of what is generated, 0 behind the end
    results = torch.zeros(len(wanted), max(limits, default=0), dtype=torch.int64, device=subject.device)
    for _, batch in my_share(batches, what=what, progress=progress):
        stops = [wanted[i].stops for i in batch]
        texts = _continue(subject, [prompts[i] for i in batch], limits[batch[0]], stops)
        for i, tokens in zip(batch, texts, strict=True):
            results[i, : len(tokens)] = torch.tensor(tokens) + 1
    tokens_of = [[value - 1 for value in row if value] for row in add_up(results).tolist()]
    return [_cut(subject, tokens, each.stops) for tokens, each in zip(tokens_of, wanted, strict=True)], truncated


def _prompt(subject: LanguageModel, context: str, *, bos: bool) -> list[int]:
    ids = subject.encode(context)
    return ids if ids and not bos else [subject.begin_id, *ids]


def _continue(
    subject: LanguageModel, prompts: list[list[int]], limit: int, stops: Sequence[tuple[str, ...]]
) -> list[list[int]]:
    """The greedy tokens after each prompt, until a stop string, the end of the text or the limit."""
    rows: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for tokens in stream(subject.model, prompts, limit, eos_id=subject.eos_id):
        for i, token in enumerate(tokens):
            if token is None or token == subject.eos_id:
                done[i] = True
            elif not done[i]:
                rows[i].append(token)
                text = subject.tokenizer.decode(rows[i]) if stops[i] else ""
                done[i] = any(stop in text for stop in stops[i])
        if all(done):
            break
    return rows


def _cut(subject: LanguageModel, tokens: list[int], stops: Sequence[str]) -> str:
    text = subject.tokenizer.decode(tokens)
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
