"""EleutherAI's lm-evaluation-harness (extra `lm-eval`) on a model of ours, quantized or not.

The harness builds prompts and counts answers; likelihoods and greedy text come from here, batched by token count.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from osp.errors import UserError
from osp.evaluation.greedy import Wanted, greedy_texts
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.tasks import Pair, Row, TaskResult, likelihoods, score_rows

# The ten benchmarks of OSP (arXiv 2506.19697, tables 2, 3 and 5) by the harness's names, with their numbers of
# examples. ARC is both its parts; MMLU is in cloze form.
PAPER_TEN = {
    "arc_easy": 0,
    "arc_challenge": 0,
    "commonsense_qa": 0,
    "gsm8k": 8,
    "hellaswag": 0,
    "mmlu_continuation": 0,
    "openbookqa": 0,
    "piqa": 0,
    "social_iqa": 0,
    "triviaqa": 5,
    "winogrande": 0,
}
DEFAULT_NEW_TOKENS = 256


@dataclass
class HarnessModel:
    """What the harness asks of a model; `as_harness` makes it one of its own."""

    subject: LanguageModel
    bos: bool = False
    batch_tokens: int = 8192
    progress: bool = False

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of every request, whose `args` are (context, continuation)."""
        pairs = [Pair(*request.args) for request in requests]
        answers, _ = likelihoods(
            self.subject, pairs, bos=self.bos, batch_tokens=self.batch_tokens, progress=self.progress
        )
        return [(answer.nats, answer.is_greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of the whole text of every request, each token once, after BOS.

        Longer texts are read in windows of the model's length; the last one is as full as the others.
        """
        rows, owners = [], []
        for number, request in enumerate(requests):
            for row in self._windows(self.subject.encode(request.args[0])):
                rows.append(row)
                owners.append(number)
        sums = [0.0] * len(requests)
        answers = score_rows(
            self.subject, rows, batch_tokens=self.batch_tokens, what="likelihoods", progress=self.progress
        )
        for owner, answer in zip(owners, answers, strict=True):
            sums[owner] += answer.nats
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The greedy text after the context of every request, up to the first of its stop strings."""
        wanted = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample"):
                raise UserError("lm_eval: a task wants sampled text; only greedy text is generated here")
            stop = options.get("until") or []
            stops = (stop,) if isinstance(stop, str) else tuple(filter(None, stop))
            wanted.append(Wanted(context, int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS)), stops))
        texts, _ = greedy_texts(
            self.subject, wanted, bos=self.bos, batch_tokens=self.batch_tokens, progress=self.progress
        )
        return texts

    def _windows(self, tokens: list[int]) -> list[Row]:
        """Rows that predict every token once, with as much before it as the model can read."""
        longest = self.subject.model.config.max_position_embeddings
        tokens = [self.subject.begin_id, *tokens]
        rows, done = [], 1
        while done < len(tokens):
            stop = min(done + longest, len(tokens))
            rows.append(Row(tokens[max(0, stop - longest - 1) : stop], stop - done))
            done = stop
        return rows


def as_harness(model: HarnessModel) -> Any:
    """`model` as an `lm_eval.api.model.LM`. `UserError` names the extra where the harness is not installed."""
    base: Any = _lm_eval("lm_eval.api.model").LM

    class Adapter(HarnessModel, base):
        def __init__(self) -> None:
            base.__init__(self)
            HarnessModel.__init__(self, **vars(model))

    return Adapter()


def require_harness() -> None:
    """Raise `UserError` where the harness is not installed."""
    _lm_eval("lm_eval")


def evaluate_harness(
    model: HarnessModel, tasks: dict[str, int], *, limit: int | None = None, include_path: str | None = None
) -> list[TaskResult]:
    """Scores of the harness's tasks, each with its number of examples.

    include_path: folder of further task files. Raises `UserError` for an unknown task and where one cannot be loaded.
    """
    evaluator, manager = _lm_eval("lm_eval").simple_evaluate, _lm_eval("lm_eval.tasks").TaskManager
    known = manager(include_path=include_path)
    for name in tasks:
        if name not in known.all_tasks:
            raise UserError(f"lm_eval: no task {name!r}; `lm_eval ls tasks` lists them")
    results = []
    for name, num_fewshot in tasks.items():
        try:
            found = evaluator(
                as_harness(model),
                tasks=[name],
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=known,
                log_samples=False,
            )
        except (OSError, ConnectionError) as error:
            raise UserError(f"lm_eval: the data of {name} cannot be loaded: {' '.join(str(error).split())}") from error
        if found is not None:  # the harness reports on the first rank alone
            results.append(_result(name, num_fewshot, found))
    return results


def _result(name: str, num_fewshot: int, found: dict[str, Any]) -> TaskResult:
    """The harness's `{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}` of one task as ours."""
    values = {key.split(",")[0]: value for key, value in found["results"][name].items() if isinstance(value, float)}
    scores = {key: value for key, value in values.items() if not key.endswith("_stderr")}
    samples = found.get("n-samples", {})
    return TaskResult(
        name,
        num_fewshot,
        items=sum(counts["effective"] for counts in samples.values()),
        truncated=0,
        scores=scores,
        stderr={key: values[f"{key}_stderr"] for key in scores if f"{key}_stderr" in values},
    )


def _lm_eval(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"lm_eval: tasks of the harness need lm-eval; pip install 'osp[lm-eval]' ({error})") from error
