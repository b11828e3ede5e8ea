"""EleutherAI's lm-evaluation-harness (extra `lm-eval`) for a `Transformer`, quantized or not.

The harness builds the requests and computes the metrics. `HarnessModel` answers the requests: batched by token count,
shared by all ranks. Every rank gives the harness all requests and gets all answers, so it sees a single process.
"""

import functools
import logging
import math
import random
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from osp.distributed import add_up, batches_by_tokens, gather_objects, is_main, my_share
from osp.errors import RunError, UserError
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.local_tasks import FORMS, LocalTask, as_harness_task
from osp.evaluation.paper_ten.prompts import shuffle_generator, shuffled
from osp.model.generate import stream
from osp.run.evaluations import Result

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256
LOGIT_ROWS = 1024  # logits (tokens) that exist at a time
SEED, FEWSHOT_SEED = 0, 1234  # the harness's own
PAPER_TASKS = Path(__file__).with_name("paper_ten")  # task files
Scored = tuple[list[int], int]  # the tokens of a sequence, of which this number at the end is predicted


@dataclass
class HarnessModel:
    """The part of `lm_eval.api.model.LM` that the harness calls. All methods are collective."""

    subject: LanguageModel
    bos: bool = False  # put the BOS token before every context
    batch_tokens: int = 8192  # tokens, padding included, that the model reads at a time
    progress: bool = False
    what: str = "requests"  # for the progress bar and for errors
    truncated: int = 0  # contexts so far that were too long and lost their beginnings
    nonfinite: int = 0  # answers so far that rest on logits that are not finite
    rank: ClassVar[int] = 0
    world_size: ClassVar[int] = 1

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of each request, whose `args` are (context, continuation)."""
        longest, encode = self.subject.model.config.max_position_embeddings, self.subject.encode
        sequences = []
        for context, continuation in [request.args for request in requests]:
            # split as the harness's own models do it: white space at the end of the context belongs to the continuation
            stripped = context.rstrip()
            head = encode(stripped)
            tail = encode(context + continuation)[len(head) :]
            if not tail:  # the continuation merges into the last tokens of the context
                tail = encode(context[len(stripped) :] + continuation)
            if self.bos or not head:
                head = [self.subject.begin_id, *head]
            if len(tail) > longest:
                raise UserError(
                    f"{self.what}: a continuation of {len(tail)} tokens is longer than the model's {longest}: "
                    f"{continuation!r:.60}"
                )
            self.truncated += len(head) + len(tail) > longest + 1  # the last token is predicted but not read
            sequences.append(((head + tail)[-longest - 1 :], len(tail)))
        return self.score(sequences)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each text after BOS, every token once. All windows of a long text are full."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        longest = self.subject.model.config.max_position_embeddings
        sequences, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.subject.encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.subject.begin_id, longest, context_len=1):
                head, tail = make_disjoint_window(window)
                sequences.append((head + tail, len(tail)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self.score(sequences), strict=True):
            sums[owner] += nats
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the greedy text after each context up to a stop string. A context keeps half of the positions."""
        longest = self.subject.model.config.max_position_embeddings
        prompts, limits, stops = [], [], []
        for context, options in [request.args for request in requests]:
            if options.get("do_sample"):
                raise UserError(f"{self.what}: the task asks for sampled text; only greedy text is generated here")
            ids = self.subject.encode(context)
            ids = ids if ids and not self.bos else [self.subject.begin_id, *ids]
            limit = min(int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS)), longest // 2)
            self.truncated += len(ids) > longest - limit
            prompts.append(ids[limit - longest :])
            limits.append(limit)
            until = options.get("until") or []
            stops.append([until] if isinstance(until, str) else [stop for stop in until if stop])
        batches = []
        for limit in sorted(set(limits)):
            alike = [i for i, other in enumerate(limits) if other == limit]
            split = batches_by_tokens([len(prompts[i]) + limit for i in alike], self.batch_tokens)
            batches += [[alike[i] for i in batch] for batch in split]
        texts: dict[int, str | None] = {}  # None: not finite
        for _, batch in my_share(batches, what=self.what, progress=self.progress):
            try:
                new = self._continue([prompts[i] for i in batch], limits[batch[0]], [stops[i] for i in batch])
            except RunError:
                new = [None] * len(batch)
            texts |= zip(batch, new, strict=True)
        answers = ChainMap(*gather_objects(texts))
        self.nonfinite += list(answers.values()).count(None)
        return [answers[i] or "" for i in range(len(requests))]

    @torch.no_grad()
    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of the predicted tokens of each sequence."""
        model, device = self.subject.model, self.subject.device
        results = torch.zeros(2, len(sequences), dtype=torch.float64, device=device)
        nats, misses = results
        batches = batches_by_tokens([len(tokens) for tokens, _ in sequences], self.batch_tokens)
        for _, numbers in my_share(batches, what=self.what, progress=self.progress):
            batch = [sequences[i] for i in numbers]
            # padding comes after the tokens, where causal attention does not look
            ids = pad_sequence([torch.tensor(tokens[:-1]) for tokens, _ in batch], batch_first=True)
            hidden, _ = model.hidden_states(ids.to(device))
            targets = torch.tensor([token for tokens, count in batch for token in tokens[-count:]], device=device)
            places = [(n, len(tokens) - 1 - count + i) for n, (tokens, count) in enumerate(batch) for i in range(count)]
            which, where = torch.tensor(places, device=device).unbind(1)
            owner = torch.tensor(numbers, device=device)[which]
            for part in torch.arange(len(places), device=device).split(LOGIT_ROWS):
                logits = model.lm_head(hidden[which[part], where[part]])
                log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, targets[part, None])[:, 0]
                nats.index_add_(0, owner[part], log_p.double())
                misses.index_add_(0, owner[part], (logits.argmax(-1) != targets[part]).double())
        nats, misses = add_up(results)
        self.nonfinite += int((~nats.isfinite()).sum())
        return [(total, missed == 0) for total, missed in zip(nats.tolist(), misses.tolist(), strict=True)]

    def _continue(self, prompts: list[list[int]], limit: int, stops: list[list[str]]) -> list[str]:
        """Return the greedy text after each prompt, up to a stop string, the end of the text or the limit."""
        ids: list[list[int]] = [[] for _ in prompts]
        texts, ended, stop_ids = [""] * len(prompts), [False] * len(prompts), self.subject.stop_ids
        for tokens in stream(self.subject.model, prompts, limit, eos_ids=stop_ids):
            for i, token in enumerate(tokens):
                # other ends than EOS may be words of the text
                if token is None or (token == self.subject.eos_id and token in stop_ids):
                    ended[i] = True
                elif not ended[i]:
                    ids[i].append(token)
                    texts[i] = self.subject.tokenizer.decode(ids[i])
                    ended[i] = any(stop in texts[i] for stop in stops[i])
            if all(ended):
                break
        for i, text in enumerate(texts):
            texts[i] = text[: min((text.find(stop) for stop in stops[i] if stop in text), default=None)]
        return texts


def evaluate_local_task(model: HarnessModel, task: LocalTask) -> list[Result]:
    """Return the scores of a task file and their standard errors."""
    metrics, truncated = _score(model, task.name, as_harness_task(task))
    results = _results(f"{task.name}[shots={task.num_fewshot}]", metrics, truncated)
    scores = {result.metric: result for result in results}
    return [replace(scores[name], metric=metric) for metric, name in FORMS[task.form]["metrics"].items()]


def load_named_tasks(tasks: dict[str, int], *, include_path: str | None = None) -> dict[str, Any]:
    """Return the tasks and groups that the harness loads for each name of a task, a tag or a group.

    Raises `UserError` for unknown names, tasks that cannot be loaded or that two names hold; the first item of each is
    put into words, so that most mistakes in task files appear before anything is scored. tasks: name -> number of
    examples before an item. include_path: folder of further task files, which can run code.
    """
    from lm_eval.tasks import TaskManager

    manager, loaded, holders = TaskManager(include_path=[PAPER_TASKS, *filter(None, [include_path])]), {}, {}
    for name in tasks:
        if name not in manager.all_tasks:
            where = f" or in a readable file of lm_eval_dir={include_path}" if include_path else ""
            raise UserError(f"lm_eval: no task {name!r} in the harness{where}; `lm_eval ls tasks` lists them")
    for name, num_fewshot in tasks.items():
        _seed()
        try:
            loaded[name] = manager.load([name])
            if not loaded[name]["tasks"]:
                raise ValueError("a group without tasks")
            for task in loaded[name]["tasks"].values():
                if task.get_config("num_fewshot") != 0:  # 0 in the file of a task is final
                    task.set_config("num_fewshot", num_fewshot)
                _seed_examples(task)
                with _bar(False):
                    task.build_all_requests(limit=1)
        except Exception as error:  # of any kind: readers of data, templates, the task's own code
            raise UserError(f"lm_eval={name}: cannot be loaded: {_one_line(error)}") from error
        for member in loaded[name]["tasks"]:
            if holders.setdefault(member, name) != name:
                raise UserError(f"lm_eval: {holders[member]} and {name} both hold the task {member}; name one of them")
    return loaded


def evaluate_named_tasks(model: HarnessModel, loaded: Any, *, limit: int | None = None) -> Iterator[list[Result]]:
    """Yield the results of each task loaded for one name, then of groups with own scores. limit: items of each task."""
    groups, scores, shots = loaded.get("groups") or {}, {}, set()
    for name, task in loaded["tasks"].items():
        _seed()
        scores[name], truncated = _score(model, name, task, limit=limit)
        shots.add(task.get_config("num_fewshot"))
        yield _results(f"{name}[shots={task.get_config('num_fewshot')}]", scores[name], truncated, groups)
    for name, group in groups.items():
        yield _results(f"{name}[shots={','.join(map(str, sorted(shots)))}]", group.aggregate(scores), 0, groups)


def _score(model: HarnessModel, name: str, task: Any, *, limit: int | None = None) -> tuple[dict[str, Any], int]:
    """Return the metrics of one task by the harness's keys, and how many contexts were cut."""
    from lm_eval.evaluator import evaluate

    model.what, truncated, model.nonfinite = name, model.truncated, 0
    lm: Any = model  # not a subclass, so that this module can be imported without the harness
    _seed_examples(task)
    try:
        with _bar(model.progress and is_main()):
            answer: Any = evaluate(lm=lm, task_dict={"tasks": {name: task}}, limit=limit, log_samples=False)
    except (UserError, RunError):
        raise
    except Exception as error:  # of any kind: templates, metrics and the task's own code
        raise RunError(f"{name}: cannot be scored: {_one_line(error)}") from error
    scores = {key: value for key, value in answer["results"][name].items() if "," in key and isinstance(value, Real)}
    if model.nonfinite:
        log.warning("%s: %d answers of the model are not finite, so its scores are nan", name, model.nonfinite)
        scores = dict.fromkeys(scores, math.nan)
    return scores | {"sample_len": answer["results"][name]["sample_len"]}, model.truncated - truncated


def _results(what: str, scores: dict[str, Any], truncated: int, groups: dict[str, Any] | None = None) -> list[Result]:
    """Return the scores {"acc,none": 0.5, "acc_stderr,none": 0.1, ...}; a filter other than `none` is in the name."""
    results = []
    for key, value in scores.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = scores.get(f"{metric}_stderr,{filter_name}")
            stderr = float(stderr) if isinstance(stderr, Real) else None
            part_of = [name for name, group in (groups or {}).items() if _counts(group, what.partition("[")[0], metric)]
            named = metric if filter_name == "none" else key
            results.append(Result(what, named, float(value), stderr, truncated, part_of[0] if part_of else None))
    return results


def _counts(group: Any, name: str, metric: str) -> bool:
    """Return whether the group has a score of this metric itself, and the task or group `name` is part of it."""
    members = [task.task_name for task in group.get_all_tasks()] + [inner.name for inner in group.get_all_groups()]
    return name in members and metric in [each.metric for each in group.aggregate_metric_list or ()]


def _bar(shown: bool) -> AbstractContextManager[Any]:
    """Return a context with or without the harness's bar over the items, for which it has no option."""
    return mock.patch("lm_eval.api.task.tqdm", functools.partial(tqdm, disable=not shown))


def _seed() -> None:
    """Seed the global generators as the harness's own command does: some tasks draw from them."""
    random.seed(SEED)
    np.random.seed(FEWSHOT_SEED)


def _seed_examples(task: Any) -> None:
    """Seed the generator that draws the examples before each item; the paper's tasks have lighteval's."""
    task.set_fewshot_seed(FEWSHOT_SEED)
    if task.get_config("process_docs") is shuffled:
        task.sampler.rnd, _ = shuffle_generator(len(task.eval_docs))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
