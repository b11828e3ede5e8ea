"""Zero- and few-shot tasks from local files, scored by log-likelihood or by the answer that the model writes.

A task file is jsonl, each line one of

    {"query": str, "choices": [str, ...], "gold": int}                   which choice follows the query?
    {"context_options": [str, ...], "continuation": str, "gold": int}    after which context does it follow?
    {"context": str, "continuation": str}                                is it what the model would say?
    {"context": str, "answer": str}, perhaps with "aliases": [str, ...]  what does the model answer?
                                     and "chain_of_thought": str         ... after it has reasoned?

`acc` is the share of items whose gold pair has the highest log-likelihood, of the last form those whose continuation is
the greedy one; `acc_norm` divides by the bytes of the choice first. Tokens of context and continuation are told apart
as EleutherAI's lm-evaluation-harness does it: the pair is encoded whole, and white space before the continuation
belongs to it.

`exact_match` is the share of questions whose greedy answer is `answer` or one of `aliases`, both `normalized`: the
first line of the text, or what follows "The answer is" where examples show a chain of thought that ends so.
"""

import dataclasses
import hashlib
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from osp.distributed import add_up, batches_by_tokens, my_share
from osp.errors import UserError
from osp.evaluation.greedy import Wanted, greedy_texts
from osp.evaluation.language_model import LanguageModel

FEWSHOT_DELIMITER = "\n\n"
ANSWER_TOKENS, REASONING_TOKENS = 32, 256  # that an answer may have, without and with a chain of thought
ANSWER_IS = "The answer is"
ARTICLES = {"a", "an", "the"}
LOGIT_ROWS = 1024  # rows of logits that exist at a time


class Options(TypedDict):
    """How a model is asked."""

    bos: bool
    batch_tokens: int
    what: str
    progress: bool


class Pair(NamedTuple):
    """The log-likelihood of `continuation` after `context` is asked for."""

    context: str
    continuation: str


class Likelihood(NamedTuple):
    nats: float  # log-likelihood, 0 or less
    is_greedy: bool  # every token of the continuation is the most likely one


class Row(NamedTuple):
    """Tokens of which the last `count` are predicted."""

    tokens: list[int]
    count: int


@dataclass(frozen=True)
class Item:
    pairs: tuple[Pair, ...]
    gold: int | None  # the right pair; None: there is one pair, and it is right if it is greedy
    answers: tuple[str, ...] = ()  # of a question, right ones; its one pair is for examples, its answer is generated
    reasons: bool = False  # the answer comes after a chain of thought


@dataclass(frozen=True)
class Task:
    name: str
    items: tuple[Item, ...]
    num_fewshot: int
    sha256: str  # of the file


@dataclass(frozen=True)
class TaskResult:
    """Scores of a task by metric, and their standard errors."""

    task: str
    num_fewshot: int
    items: int
    truncated: int  # contexts too long for the model, which lost their beginnings
    scores: dict[str, float]
    stderr: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.task}[shots={self.num_fewshot}]"


def load_task(path: Path, *, num_fewshot: int = 0, limit: int | None = None, seed: int = 0) -> Task:
    """The task in a jsonl file, or its first `limit` items; `UserError` names the first bad line.

    The examples before an item are other items of the file, drawn by (seed, item).
    """
    try:
        raw = path.read_bytes()
        lines = raw.decode().split("\n")
    except OSError as error:
        raise UserError(f"tasks: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {error.object.count(10, 0, error.start) + 1}: not UTF-8") from error
    items = [_item(line, where=f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if num_fewshot < 0 or len(items) <= num_fewshot:
        raise UserError(f"{path} has {len(items)} items: too few for num_fewshot={num_fewshot}")
    chosen = [
        _with_examples(item, i, items, num_fewshot=num_fewshot, seed=seed) for i, item in enumerate(items[:limit])
    ]
    return Task(path.stem, tuple(chosen), num_fewshot, hashlib.sha256(raw).hexdigest())


def evaluate_task(
    subject: LanguageModel, task: Task, *, bos: bool = False, batch_tokens: int = 8192, progress: bool = False
) -> TaskResult:
    """The scores of `subject` on `task`; every rank calls it and gets the same."""
    options: Options = {"bos": bos, "batch_tokens": batch_tokens, "what": task.name, "progress": progress}
    told, asked = ([item for item in task.items if bool(item.answers) == generated] for generated in (False, True))
    found: list[Likelihood] = []
    texts: list[str] = []
    truncated = 0
    if told:
        found, truncated = likelihoods(subject, [pair for item in told for pair in item.pairs], **options)
    if asked:
        texts, truncated_too = greedy_texts(subject, [_wanted(item) for item in asked], **options)
        truncated += truncated_too
    hits: dict[str, list[float]] = {}
    start = 0
    for item in told:
        answers = found[start : start + len(item.pairs)]
        start += len(item.pairs)
        for metric, hit in _hits(item, answers).items():
            hits.setdefault(metric, []).append(hit)
    if asked:
        hits["exact_match"] = [float(is_right(item, text)) for item, text in zip(asked, texts, strict=True)]
    scores = {metric: sum(values) / len(values) for metric, values in hits.items()}
    return TaskResult(
        task.name,
        task.num_fewshot,
        items=len(task.items),
        truncated=truncated,
        scores=scores,
        stderr={metric: standard_error(values) for metric, values in hits.items()},
    )


def is_right(item: Item, text: str) -> bool:
    """Whether the generated `text` is one of the answers to the question `item`."""
    if item.reasons:
        _, found, text = text.partition(ANSWER_IS)
        if not found:
            return False
    return normalized(text.strip().split("\n")[0]) in map(normalized, item.answers)


def normalized(answer: str) -> str:
    """Its words in lower case without articles, numbers without commas; if no word is left, the answer as it is."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", answer.lower().replace("_", " "))
    words = re.findall(r"(?<!\w)-?\d+(?:\.\d+)?|\w+", text)
    return " ".join(word for word in words if word not in ARTICLES) or answer.strip()


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: sqrt(sum (x - mean)^2 / (n - 1) / n); nan for fewer than two."""
    n = len(values)
    if n < 2:
        return math.nan
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def likelihoods(
    subject: LanguageModel,
    pairs: Sequence[Pair],
    *,
    bos: bool = False,
    batch_tokens: int = 8192,
    what: str = "likelihoods",
    progress: bool = False,
) -> tuple[list[Likelihood], int]:
    """(log-likelihood of every pair in order, how many contexts were cut); the same on every rank.

    bos: put the BOS token before every context. batch_tokens: tokens, padding included, that the model reads at a time.
    """
    longest = subject.model.config.max_position_embeddings
    encoded = [encode_pair(subject, pair, bos=bos) for pair in pairs]
    for pair, (_, tail) in zip(pairs, encoded, strict=True):
        if len(tail) > longest:
            raise UserError(
                f"{what}: a continuation of {len(tail)} tokens is longer than the model's {longest}: "
                f"{pair.continuation!r:.60}"
            )
    # the last token is predicted and not read
    rows = [Row((head + tail)[-longest - 1 :], len(tail)) for head, tail in encoded]
    truncated = sum(len(head) + len(tail) > longest + 1 for head, tail in encoded)
    return score_rows(subject, rows, batch_tokens=batch_tokens, what=what, progress=progress), truncated


@torch.no_grad()
def score_rows(
    subject: LanguageModel, rows: Sequence[Row], *, batch_tokens: int, what: str, progress: bool
) -> list[Likelihood]:
    """The likelihood of every row, in order; the same on every rank."""
    results = torch.zeros(len(rows), 2, dtype=torch.float64, device=subject.device)
    batches = batches_by_tokens([len(row.tokens) for row in rows], batch_tokens)
    for _, batch in my_share(batches, what=what, progress=progress):
        results[batch] = _score([rows[i] for i in batch], subject)
    return [Likelihood(nats, greedy > 0) for nats, greedy in add_up(results).tolist()]


def encode_pair(subject: LanguageModel, pair: Pair, *, bos: bool) -> tuple[list[int], list[int]]:
    """Tokens of context and continuation; the context has one at least, to predict the first from."""
    stripped = pair.context.rstrip()
    continuation = pair.context[len(stripped) :] + pair.continuation
    head = subject.encode(stripped)
    # nothing is left of the pair where both melt into tokens of the context
    tail = subject.encode(stripped + continuation)[len(head) :] or subject.encode(continuation)
    if bos or not head:
        head = [subject.begin_id, *head]
    return head, tail


def _score(rows: Sequence[Row], subject: LanguageModel) -> Tensor:
    """(rows, 2) fp64: log-likelihood of the predicted tokens of every row, and 1 if all of them are greedy."""
    model, device = subject.model, subject.device
    width = max(len(row.tokens) for row in rows) - 1
    # padding stands behind the tokens, where causal attention does not look
    ids = torch.tensor([row.tokens[:-1] + [0] * (width - len(row.tokens) + 1) for row in rows], device=device)
    hidden = model.hidden_states(ids)
    targets = torch.tensor([token for row in rows for token in row.tokens[-row.count :]], device=device)
    places = [(r, len(row.tokens) - 1 - row.count + i) for r, row in enumerate(rows) for i in range(row.count)]
    which, where = torch.tensor(places, device=device).unbind(1)
    nats = torch.zeros(len(rows), dtype=torch.float64, device=device)
    misses = torch.zeros_like(nats)
    for part in torch.arange(len(places), device=device).split(LOGIT_ROWS):
        logits = model.lm_head(hidden[which[part], where[part]])
        log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, targets[part, None])[:, 0]
        nats.index_add_(0, which[part], log_p.double())
        misses.index_add_(0, which[part], (logits.argmax(-1) != targets[part]).double())
    return torch.stack((nats, (misses == 0).double()), dim=1)


def _wanted(item: Item) -> Wanted:
    """What is to be generated of a question. The space after "Answer:" belongs to the answer."""
    context = item.pairs[0].context.rstrip()
    if item.reasons:
        return Wanted(context, REASONING_TOKENS, (FEWSHOT_DELIMITER, "Question:"))
    return Wanted(context, ANSWER_TOKENS, ("\n",))


def _hits(item: Item, answers: list[Likelihood]) -> dict[str, float]:
    """Metric -> what this item contributes to its mean."""
    if item.gold is None:
        return {"acc": float(answers[0].is_greedy), "log_likelihood": answers[0].nats}
    plain = [answer.nats for answer in answers]
    per_byte = [answer.nats / len(pair.continuation.encode()) for answer, pair in zip(answers, item.pairs, strict=True)]
    return {
        "acc": float(plain.index(max(plain)) == item.gold),
        "acc_norm": float(per_byte.index(max(per_byte)) == item.gold),
    }


def _item(line: str, *, where: str) -> Item:
    """The item of one line, without examples."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if {"query", "choices", "gold"} <= record.keys():
        query, choices = _text(record, "query", where), _texts(record, "choices", where)
        context = query.strip() + delimiter(query)
        return Item(tuple(Pair(context, choice) for choice in choices), _gold(record, len(choices), where))
    if {"context_options", "continuation", "gold"} <= record.keys():
        contexts, continuation = _texts(record, "context_options", where), _text(record, "continuation", where)
        pairs = tuple(Pair(context.strip() + " ", continuation) for context in contexts)
        return Item(pairs, _gold(record, len(contexts), where))
    if {"context", "continuation"} <= record.keys():
        context, continuation = _text(record, "context", where), _text(record, "continuation", where)
        return Item((Pair(context.strip() + " ", continuation),), None)
    if {"context", "answer"} <= record.keys():
        return _question(record, where)
    raise UserError(
        f"{where}: fields {sorted(record)}; a line has query, choices, gold, or context, continuation, or "
        "context_options, continuation, gold, or context, answer"
    )


def _question(record: dict[str, Any], where: str) -> Item:
    context, answer = _text(record, "context", where).strip(), _text(record, "answer", where).strip()
    aliases = _texts(record, "aliases", where, at_least=0) if "aliases" in record else []
    reasons = "chain_of_thought" in record
    shown = f"{_text(record, 'chain_of_thought', where).strip()}\n{ANSWER_IS} {answer}" if reasons else answer
    context = context if "Question:" in context else f"Question: {context}"
    pair = Pair(context + delimiter(context), shown)
    return Item((pair,), None, answers=(answer, *aliases), reasons=reasons)


def delimiter(query: str) -> str:
    """What stands between a query and its choices: a question is answered, anything else is continued."""
    return "\nAnswer: " if "Question:" in query and not query.rstrip().endswith("Answer:") else " "


def _with_examples(item: Item, number: int, items: list[Item], *, num_fewshot: int, seed: int) -> Item:
    """`item` with the gold pairs of others before each context."""
    if not num_fewshot:
        return item
    draw = random.Random(f"{seed} {number}")
    others = draw.sample([other for i, other in enumerate(items) if i != number], num_fewshot)
    shots = [pair.context + pair.continuation for pair in (other.pairs[other.gold or 0] for other in others)]
    prefix = FEWSHOT_DELIMITER.join([*shots, ""])
    pairs = tuple(Pair(prefix + pair.context, pair.continuation) for pair in item.pairs)
    return dataclasses.replace(item, pairs=pairs)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key}={value!r:.60}: must be a text that is not empty")
    return value


def _texts(record: dict[str, Any], key: str, where: str, *, at_least: int = 2) -> list[str]:
    values = record[key]
    texts = isinstance(values, list) and all(isinstance(value, str) and value.strip() for value in values)
    if not texts or len(values) < at_least:
        many = "two texts or more" if at_least else "texts"
        raise UserError(f"{where}: {key}={values!r:.60}: must be a list of {many}, none of them empty")
    return values


def _gold(record: dict[str, Any], num_choices: int, where: str) -> int:
    gold = record["gold"]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < num_choices:
        raise UserError(f"{where}: gold={gold!r}: must be the number of a choice, 0 to {num_choices - 1}")
    return gold
