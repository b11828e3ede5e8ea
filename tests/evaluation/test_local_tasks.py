"""Scores of the harness against a loop over pairs with `transformers`, and lines that are refused."""

import dataclasses
import functools
import json
import math
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.distributed import batches_by_tokens
from osp.errors import RunError, UserError
from osp.evaluation.compare import score
from osp.evaluation.harness import HarnessModel, evaluate_local_task, evaluate_named_tasks, load_named_tasks
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.local_tasks import FORMS, LocalTask, delimiter, paper_files, read_task, score_answer
from osp.model.generate import generate
from osp.run.evaluations import Evaluation, Result, Score, read_evaluation, write_evaluation
from tests.conftest import made_text
from tests.hf_models import DATA

pytest.importorskip("lm_eval")

Pair = tuple[str, str]  # context, continuation

WORDS = "".join(made_text(2)).split()
PAIRS = [(" ".join(WORDS[: 3 * n]) + " ", " ".join(WORDS[20 : 21 + n % 4])) for n in range(12)]


def request(*args: Any) -> Any:
    return types.SimpleNamespace(args=args)


def likelihoods(subject: LanguageModel, pairs: list[Pair], **options: Any) -> list[tuple[float, bool]]:
    return HarnessModel(subject, **options).loglikelihood([request(*pair) for pair in pairs])


def scores(results: list[Result]) -> dict[str, float]:
    return {result.metric: result.value for result in results}


def evaluate(subject: LanguageModel, task: LocalTask, **options: Any) -> dict[str, Result]:
    """Return metric -> result."""
    return {result.metric: result for result in evaluate_local_task(HarnessModel(subject, **options), task)}


def pairs_of(doc: dict[str, Any]) -> list[Pair]:
    """Return the (context, continuation) of every choice of a document."""
    contexts = doc.get("contexts") or [doc["context"]] * len(doc.get("choices", [0]))
    continuations = doc.get("choices") or [doc["continuation"]] * len(contexts)
    return list(zip(contexts, continuations, strict=True))


def naive(model: Any, subject: LanguageModel, pair: Pair, *, bos: bool = False) -> tuple[float, bool]:
    """Return (log-likelihood, whether greedy) of one pair, in fp64, from the logits of a whole sequence."""
    context, continuation = pair
    head = subject.encode(context.rstrip())
    tail = subject.encode(context + continuation)[len(head) :]
    head = ([0] if bos or not head else []) + head
    ids = (head + tail)[-65:]
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[-len(tail) :]
    nats = sum(log_p[i, token].item() for i, token in enumerate(tail))
    return nats, log_p.argmax(-1).tolist() == tail


@pytest.mark.parametrize("bos", [False, True])
def test_likelihoods_match_transformers(bos: bool, llama: LanguageModel, transformers_llama: Any) -> None:
    pairs = [*PAIRS, ("", "word"), (" ", "word"), ("word " * 90, "and then")]
    model = HarnessModel(llama, bos=bos, batch_tokens=100)
    answers = model.loglikelihood([request(*pair) for pair in pairs])
    lengths = [len(llama.encode("".join(pair))) + (bos or not pair[0].strip()) for pair in pairs]
    assert model.truncated == sum(length > 65 for length in lengths) > 0
    for pair, (nats, is_greedy) in zip(pairs, answers, strict=True):
        expected, greedy = naive(transformers_llama, llama, pair, bos=bos)
        assert nats == pytest.approx(expected, rel=1e-5), pair
        assert is_greedy == greedy


def test_greedy_continuations_are_recognized(llama: LanguageModel, transformers_llama: Any) -> None:
    ids = llama.encode("some context of words")
    for _ in range(3):
        ids.append(int(transformers_llama(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-2], (ids[-2] + 1) % 300, ids[-1]]
    answers = HarnessModel(llama, batch_tokens=100).score([(ids, 3), (ids[:-1], 2), (other, 3)])
    assert [is_greedy for _, is_greedy in answers] == [True, True, False]


def test_batches_change_nothing_but_rounding(llama: LanguageModel) -> None:
    one_by_one = [nats for nats, _ in likelihoods(llama, PAIRS, batch_tokens=1)]
    for batch_tokens in (50, 200, 10**6):
        batched = [nats for nats, _ in likelihoods(llama, PAIRS, batch_tokens=batch_tokens)]
        assert batched == pytest.approx(one_by_one, rel=1e-6)


def test_batches_hold_every_sequence_and_at_most_the_asked_tokens() -> None:
    lengths = [5, 1, 9, 3, 3, 7, 2, 30]
    batches = batches_by_tokens(lengths, 18)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    assert [sorted((lengths[i] for i in batch), reverse=True) for batch in batches] == [[30], [9, 7], [5, 3, 3], [2, 1]]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def choices(n: int, *, gold: int) -> dict[str, Any]:
    return {
        "query": f"Question: {' '.join(WORDS[n : n + 6])}?",
        "choices": [WORDS[n + 10], " ".join(WORDS[n + 11 : n + 16]), WORDS[n + 12]],
        "gold": gold,
    }


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_scores_of_choices_match_a_plain_loop(
    num_fewshot: int, llama: LanguageModel, transformers_llama: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "quiz.jsonl", *(choices(n, gold=n % 3) for n in range(15)))
    task = read_task(path, num_fewshot=num_fewshot)
    results = evaluate(llama, task)
    acc, acc_norm = [], []
    for n, doc in enumerate(task.docs):
        record = choices(n, gold=n % 3)
        assert doc["choices"] == record["choices"]
        assert doc["context"].endswith(record["query"] + "\nAnswer: ")
        assert doc["context"].count("\nAnswer: ") == num_fewshot + 1
        assert doc["context"].count(record["query"]) == 1, "an item is not an example of itself"
        nats = [naive(transformers_llama, llama, pair)[0] for pair in pairs_of(doc)]
        per_byte = [x / len(choice.encode()) for x, choice in zip(nats, record["choices"], strict=True)]
        acc.append(float(max(nats) == nats[n % 3]))
        acc_norm.append(float(max(per_byte) == per_byte[n % 3]))
    assert list(results) == ["acc", "acc_norm"]
    assert results["acc"].value == pytest.approx(sum(acc) / 15)
    assert results["acc_norm"].value == pytest.approx(sum(acc_norm) / 15)
    p = results["acc"].value
    assert 0 < p < 1
    assert results["acc"].stderr == pytest.approx(math.sqrt(p * (1 - p) / 14))
    assert results["acc"].what == f"quiz[shots={num_fewshot}]"


def test_acc_norm_counts_bytes_not_characters(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-3 over 4 bytes beats -2.7 over 3; over 2 characters it would not."""
    record = {"query": "q", "choices": ["\xe9\xe9", "abc"], "gold": 0}
    monkeypatch.setattr(HarnessModel, "loglikelihood", lambda *_: [(-3.0, False), (-2.7, False)])
    task = read_task(write(tmp_path / "quiz.jsonl", record))
    assert scores(evaluate_local_task(HarnessModel(llama), task)) == {"acc": 0.0, "acc_norm": 1.0}


def test_context_options_and_continuations_are_scored(
    llama: LanguageModel, transformers_llama: Any, tmp_path: Path
) -> None:
    record = {"context_options": ["He said", "They said that"], "continuation": "it rains.", "gold": 1}
    task = read_task(write(tmp_path / "schema.jsonl", record))
    (doc,) = task.docs
    assert pairs_of(doc) == [("He said ", "it rains."), ("They said that ", "it rains.")]
    nats = [naive(transformers_llama, llama, pair)[0] for pair in pairs_of(doc)]
    expected = float(nats[1] > nats[0])
    assert scores(evaluate_local_task(HarnessModel(llama), task)) == {"acc": expected, "acc_norm": expected}
    record = {"context": "He said", "continuation": "no"}
    results = evaluate(llama, read_task(write(tmp_path / "last.jsonl", record)))
    nats, greedy = naive(transformers_llama, llama, ("He said ", "no"))
    assert list(results) == ["acc", "log_likelihood"]
    assert results["acc"].value == float(greedy)
    assert results["log_likelihood"].value == pytest.approx(nats, rel=1e-5)
    assert results["acc"].stderr is None


def test_examples_of_context_options_and_continuations_hold_the_right_text(tmp_path: Path) -> None:
    """Two items of each form with one example: the other item, its gold context and its continuation."""
    first = {"context_options": ["He said", "They said that"], "continuation": "it rains.", "gold": 1}
    second = {"context_options": ["We", "You"], "continuation": "go.", "gold": 0}
    task = read_task(write(tmp_path / "schema.jsonl", first, second), num_fewshot=1)
    assert pairs_of(task.docs[0]) == [("We go.\n\nHe said ", "it rains."), ("We go.\n\nThey said that ", "it rains.")]
    first, second = {"context": "He said", "continuation": "no"}, {"context": "We", "continuation": "go."}
    task = read_task(write(tmp_path / "last.jsonl", first, second), num_fewshot=1)
    assert pairs_of(task.docs[1]) == [("He said no\n\nWe ", "go.")]


def test_examples_are_the_same_in_every_call_and_differ_between_items(tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", *(choices(n, gold=0) for n in range(12)))
    first, second = read_task(path, num_fewshot=3), read_task(path, num_fewshot=3)
    assert first == second
    assert read_task(path, num_fewshot=3, seed=1) != first
    assert read_task(path, num_fewshot=3, limit=4).docs == first.docs[:4]
    prefixes = {doc["context"].split("Question")[1] for doc in first.docs}
    assert len(prefixes) > 3


def test_questions_are_answered_and_sentences_continued() -> None:
    assert delimiter("Question: why?") == "\nAnswer: "
    assert delimiter("Question: why?\nChoices:\nA. x\nAnswer:") == " "
    assert delimiter("The man turned on the faucet, therefore") == " "


GOOD = '{"query": "q", "choices": ["a", "b"], "gold": 0}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": ', r"line 2: malformed JSON"),
        ("[" * 100_000, r"line 2: malformed JSON \(nested too deeply\)"),
        ('{"context": "c", "answer": "\\ud83d"}', r"line 2: malformed JSON \(.*surrogates not allowed\)"),
        ('{"query": "q", "choices": ["a", "b"], "gold": ' + "7" * 5000 + "}", r"line 2: gold=inf: must be the number"),
        ('["q"]', r"line 2: expected a JSON object, found list"),
        (
            '{"query": "q", "choices": ["a"], "gold": 0}',
            r"line 2: choices=\['a'\]: must be a list of texts, 2 or more",
        ),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', r"line 2: choices=.*none of them empty"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', r"line 2: gold=2: must be the number of a choice, 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": "0"}', r"line 2: gold='0'"),
        ('{"query": 3, "choices": ["a", "b"], "gold": 0}', r"line 2: query=3: must be a text"),
        ('{"context": "c", "continuation": ""}', r"line 2: continuation='': must be a text that is not empty"),
        ('{"context": "c", "anser": "a"}', r"line 2: fields \['anser', 'context'\]; a line has query, choices, gold"),
        ('{"context": "c", "answer": 18}', r"line 2: answer=18: must be a text"),
        ('{"context": "c", "answer": "a", "aliases": "b"}', r"line 2: aliases='b': must be a list of texts"),
        ("caf\xe9", r"line 2: not UTF-8"),
        ('{"context": "c", "continuation": "a"}', r"line 2: a line of the form 'continuation' after lines of the form"),
    ],
)
def test_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(GOOD.encode() + line.encode("latin-1") + b"\n" + GOOD.encode())
    with pytest.raises(UserError, match=message) as error:
        read_task(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_impossible_tasks_are_refused(tmp_path: Path, llama: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"tasks: cannot read .*nowhere.jsonl: No such file"):
        read_task(tmp_path / "nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"tasks: .*pipe.jsonl is not a file"):
        read_task(tmp_path / "pipe.jsonl")
    (tmp_path / "two.jsonl").write_text("\ufeff" + GOOD * 2, encoding="utf-8")
    with pytest.raises(UserError, match=r"two.jsonl has 2 items: too few for num_fewshot=2"):
        read_task(tmp_path / "two.jsonl", num_fewshot=2)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl has 0 items"):
        read_task(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"a continuation of \d+ tokens is longer than the model's 64"):
        likelihoods(llama, [("a", "word " * 90)])


@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")
def test_shared_task_files_have_right_examples() -> None:
    for path in sorted((DATA / "tasks").glob("*.jsonl")):
        task = read_task(path)
        assert len(task.docs) >= 100
        assert ("exact_match" in FORMS[task.form]["metrics"]) == (path.stem in ("gsm8k", "triviaqa_sm_sub"))
        for doc in task.docs:
            assert "gold" not in doc or len(pairs_of(doc)) > doc["gold"]
            # an example shows a right answer
            assert "answers" not in doc or score_answer(doc, [doc["shown"]]) == {"exact_match": 1.0}, doc


def test_only_right_answers_match() -> None:
    answers = ["The Beatles", "1,080", "Spider-Man", "\U0001f40e"]

    def is_right(text: str, **doc: Any) -> bool:
        return score_answer({"answers": answers, "reasons": False, **doc}, [text]) == {"exact_match": 1.0}

    right = (" beatles.", "the Beatles!\nQ", "$1080", '"1,080"', "spider man", "\U0001f40e")
    assert all(is_right(text) for text in right)
    assert not any(is_right(text) for text in ("", "the", "Beatles band", "\n\n10", "108", "-1080", "10.80"))


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("18", ("16 + 2 = 18\n#### 18 eggs", "#### no #### 18", "#### 1,8"), ("18", "####18", "#### $18", "#### 18.")),
        ("1,200", ("#### 1200", "#### 1,200\n\n"), ("#### 12", "#### 1 200", "The answer is 1200", "####", "")),
        ("a duck", ("It quacks.\n#### Duck.", "#### the duck\n#### a cow"), ("a duck", "#### a cow\n#### a duck")),
    ],
)
def test_reasoned_answer_follows_four_hashes(answer: str, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    """A number is read as strictly as the paper reads that of GSM8K."""
    doc = {"answers": [answer], "reasons": True}
    assert [text for text in right if score_answer(doc, [text]) != {"exact_match": 1.0}] == []
    assert [text for text in wrong if score_answer(doc, [text]) != {"exact_match": 0.0}] == []


def test_answers_match_the_greedy_text_of_transformers(
    llama: LanguageModel, transformers_llama: Any, tmp_path: Path
) -> None:
    """The expected text is generated without cache or batches. Half of the questions have it as their answer."""

    def answer(context: str) -> str:
        ids, start = llama.encode(context), len(llama.encode(context))
        while len(ids) - start < 32 and "\n" not in llama.tokenizer.decode(ids[start:]):
            ids.append(int(transformers_llama(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 0:
                ids.pop()
                break
        return llama.tokenizer.decode(ids[start:]).strip().split("\n")[0]

    questions = [WORDS[n][: 1 + 2 * n] for n in range(4)]
    given = [answer(f"Question: {question}\nAnswer:") for question in questions]
    assert all(given[1::2])
    records = [
        {"context": question, "answer": truth if n % 2 and truth else "no", "aliases": []}
        for n, (question, truth) in enumerate(zip(questions, given, strict=True))
    ]
    task = read_task(write(tmp_path / "quiz.jsonl", *records))
    expected = torch.tensor([float(record["answer"] != "no") for record in records])
    for batch_tokens in (1, 200, 10**6):
        (result,) = evaluate_local_task(HarnessModel(llama, batch_tokens=batch_tokens), task)
        assert (result.metric, result.value, result.truncated) == ("exact_match", expected.mean(), 0)
        assert result.stderr == pytest.approx(expected.std().item() / 2)
    (first, *_) = read_task(tmp_path / "quiz.jsonl", num_fewshot=2).docs
    assert first["context"].count("Question:") == 3
    (result,) = evaluate_local_task(HarnessModel(llama), read_task(tmp_path / "quiz.jsonl", num_fewshot=3))
    assert result.truncated > 0


def test_examples_of_reasoning_end_with_the_answer(tmp_path: Path) -> None:
    record = {"context": "2 + 2?", "answer": "4", "chain_of_thought": "2 and 2 are 4."}
    other = {**record, "context": "1 + 1?"}
    (item, _) = read_task(write(tmp_path / "sums.jsonl", record, other), num_fewshot=1).docs
    assert item["context"] == ("Question: 1 + 1?\nAnswer: 2 and 2 are 4.\n#### 4\n\nQuestion: 2 + 2?\nAnswer:")


def test_harness_gets_the_likelihood_of_a_whole_text(llama: LanguageModel, transformers_llama: Any) -> None:
    """Every token counts once, and the last window is full, as in the example of the harness."""
    text = " ".join(WORDS[:80])
    tokens = [0, *llama.encode(text)]
    assert len(tokens) > 2 * 64
    nats, done = 0.0, 1
    while done < len(tokens):
        stop = min(done + 64, len(tokens))
        with torch.no_grad():
            window = torch.tensor([tokens[stop - 65 : stop - 1] if stop > 64 else tokens[: stop - 1]])
            log_p = transformers_llama(window).logits[0].double().log_softmax(-1)
        nats += sum(log_p[i - stop, tokens[i]].item() for i in range(done, stop))
        done = stop
    answers = HarnessModel(llama).loglikelihood_rolling([request("short"), request(text)])
    assert answers[1] == pytest.approx(nats, rel=1e-6)


def test_harness_gets_greedy_text(llama: LanguageModel, transformers_llama: Any) -> None:
    contexts = ["one two", "a much longer context than the other", WORDS[5]]
    options = {"until": [], "max_gen_toks": 6}
    expected = []
    for context in contexts:
        ids = llama.encode(context)
        for _ in range(6):
            ids.append(int(transformers_llama(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 0:
                ids.pop()
                break
        expected.append(llama.tokenizer.decode(ids[len(llama.encode(context)) :]))
    answers = HarnessModel(llama).generate_until([request(context, options) for context in contexts])
    assert answers == expected
    assert len(set(answers)) == 3
    (new,) = generate(llama.model, [llama.encode(contexts[0])], 6)
    several = dataclasses.replace(llama, stop_ids=(0, new[2]))
    (ended,) = HarnessModel(several).generate_until([request(contexts[0], options)])
    first = new.index(new[2]) + 1
    assert ended == llama.tokenizer.decode(new[:first]), "as transformers decodes it, with the token that ends it"
    stop = expected[0][3]
    (cut,) = HarnessModel(llama).generate_until([request(contexts[0], {"until": [stop], "max_gen_toks": 6})])
    assert cut == expected[0][: expected[0].index(stop)]
    with pytest.raises(UserError, match="only greedy text"):
        HarnessModel(llama).generate_until([request("a", {"do_sample": True})])


def test_paper_leaves_out_files_that_show_letters_or_too_few_choices(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["bank", "new york", "a mall", "home", "sea"]
    piqa = write(tmp_path / "piqa.jsonl", {"query": "q", "choices": ["a", "b"], "gold": 0})
    siqa = write(tmp_path / "siqa.jsonl", {"query": "q", "choices": texts[:3], "gold": 2})
    quiz = write(tmp_path / "commonsense_qa.jsonl", {"query": "q", "choices": list("ABCD"), "gold": 0})
    assert paper_files(tmp_path) == [(piqa, 0), (siqa, 0)]
    (record,) = caplog.records
    assert record.message == (
        "tasks=[paper] leaves out commonsense_qa.jsonl (4 of 5 choices, as letters); name a file to measure it"
    )
    write(quiz, {"query": "q", "choices": texts, "gold": 0})
    assert paper_files(tmp_path) == [(quiz, 0), (piqa, 0), (siqa, 0)]
    write(quiz, {"query": "q", "choices": list("ABCDE"), "gold": 0})
    write(siqa, {"query": "q", "choices": texts[:2], "gold": 0})
    caplog.clear()
    assert paper_files(tmp_path) == [(piqa, 0)]
    assert "commonsense_qa.jsonl (5 of 5 choices, as letters) and siqa.jsonl (2 of 3 choices);" in caplog.text
    piqa.unlink()
    with pytest.raises(UserError, match=r"tasks=\[paper\]: tasks_dir=.* holds none of arc_easy.jsonl, "):
        paper_files(tmp_path)


def test_named_task_of_the_harness_agrees_with_the_file(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task file of the harness on the same items, offline."""
    from lm_eval import tasks

    # reading the files of all tasks takes seconds
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    data = write(tmp_path / "quiz.jsonl", *(choices(n, gold=n % 3) for n in range(15)))
    (tmp_path / "quiz.yaml").write_text(
        f"task: local_quiz\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{query}}\\nAnswer:"\n'
        "doc_to_target: gold\ndoc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    )
    subject, folder = HarnessModel(llama), str(tmp_path)
    (results,) = evaluate_named_tasks(subject, load_named_tasks({"local_quiz": 0}, include_path=folder)["local_quiz"])
    expected = evaluate(llama, read_task(data))["acc"]
    (result,) = results
    assert (result.what, result.metric) == ("local_quiz[shots=0]", "acc")
    assert result.value == pytest.approx(expected.value)
    assert result.stderr == pytest.approx(expected.stderr)
    with pytest.raises(UserError, match=r"no task 'nonsense_task'"):
        load_named_tasks({"nonsense_task": 0}, include_path=folder)


QUIZ = """task: {name}
tag: both
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
num_fewshot: {shots}
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
FILTERED = """task: filtered
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "7"
generation_kwargs: {{until: ["Question:"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
filter_list:
  - {{name: strict-match, filter: [{{function: regex, regex_pattern: "#### ([0-9]+)"}}, {{function: take_first}}]}}
  - {{name: lenient, filter: [{{function: regex, regex_pattern: zzzz, fallback: "7"}}, {{function: take_first}}]}}
"""


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with two tasks of one tag, one with two filters, and nested groups; the harness has no others."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    for name, count, shots in (("first", 4, 1), ("second", 8, 0)):
        data = write(tmp_path / f"{name}.jsonl", *(choices(n, gold=n % 3) for n in range(count)))
        (tmp_path / f"{name}.yaml").write_text(QUIZ.format(name=name, data=data, shots=shots))
    (tmp_path / "filtered.yaml").write_text(FILTERED.format(data=tmp_path / "first.jsonl"))
    scored = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (tmp_path / "outer.yaml").write_text(f"group: outer\ntask: [inner, second]\n{scored}\n")
    (tmp_path / "inner.yaml").write_text(f"group: inner\ntask: [first]\n{scored}\n")
    return tmp_path


def named(subject: LanguageModel, folder: Path, *names: str, num_fewshot: int = 1) -> list[Result]:
    loaded = load_named_tasks(dict.fromkeys(names, num_fewshot), include_path=str(folder))
    model = HarnessModel(subject)
    return [result for name in names for part in evaluate_named_tasks(model, loaded[name]) for result in part]


def test_every_filter_of_a_task_has_its_score(llama: LanguageModel, task_folder: Path) -> None:
    strict, lenient = named(llama, task_folder, "filtered")
    assert (strict.what, strict.metric, strict.value) == ("filtered[shots=1]", "exact_match,strict-match", 0.0)
    assert (lenient.what, lenient.metric, lenient.value) == ("filtered[shots=1]", "exact_match,lenient", 1.0)
    assert score([strict, lenient]) == Score(None, 0.0), "the first filter of the file counts, as for gsm8k"


def test_tags_and_groups_are_their_tasks_with_the_scores_of_the_harness(
    llama: LanguageModel, task_folder: Path
) -> None:
    """The scores equal the harness's own evaluation of the whole group."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded: Any = TaskManager(include_path=str(task_folder)).load(["outer"])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)
    lm: Any = HarnessModel(llama)
    expected: Any = evaluate(lm=lm, task_dict=loaded, log_samples=False)
    results = named(llama, task_folder, "outer")
    whats = {
        "first": "first[shots=1]",
        "second": "second[shots=0]",
        "outer": "outer[shots=0,1]",
        "inner": "inner[shots=0,1]",
    }
    assert list(dict.fromkeys(result.what for result in results)) == list(whats.values())
    for result in results:
        (name,) = [name for name, what in whats.items() if what == result.what]
        assert result.value == pytest.approx(expected["results"][name][f"{result.metric},none"])
        assert result.stderr == pytest.approx(expected["results"][name][f"{result.metric}_stderr,none"])
        assert result.part_of == (None if name == "outer" or result.metric == "acc_norm" else "outer")
    (outer,) = [result for result in results if result.what == whats["outer"]]
    assert score(results).accuracy == outer.value, "a group that has a score counts once"
    tagged = named(llama, task_folder, "both")
    assert [(r.what, r.metric, r.value, r.part_of) for r in tagged] == [
        (r.what, r.metric, r.value, None) for r in results if r.what in (whats["first"], whats["second"])
    ]
    assert [result.metric for result in tagged] == ["acc", "acc_norm"] * 2
    assert score(tagged).accuracy == pytest.approx((tagged[1].value + tagged[3].value) / 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("outer", "second"), r"lm_eval: outer and second both hold the task second; name one of them"),
        (("both", "inner"), r"lm_eval: both and inner both hold the task first; name one of them"),
        (("first", "absent"), r"no task 'absent' in the harness or in a readable file of lm_eval_dir="),
        (("no_data",), r"lm_eval=no_data: cannot be loaded: .*nowhere.jsonl"),
        (("no_field",), r"lm_eval=no_field: cannot be loaded: UndefinedError: 'qestion' is undefined"),
        (("circle",), r"lm_eval=circle: cannot be loaded: RecursionError"),
        (("empty",), r"lm_eval=empty: cannot be loaded: ValueError: a group without tasks"),
    ],
)
def test_names_that_cannot_be_scored_are_refused_before(
    names: tuple[str, ...], message: str, task_folder: Path
) -> None:
    text = (task_folder / "second.yaml").read_text().replace("tag: both", "")
    (task_folder / "no_data.yaml").write_text(
        text.replace("second", "no_data", 1).replace("second.jsonl", "nowhere.jsonl")
    )
    (task_folder / "no_field.yaml").write_text(text.replace("second", "no_field", 1).replace("{query}", "{qestion}"))
    (task_folder / "circle.yaml").write_text("group: circle\ntask: [circle]\n")
    (task_folder / "empty.yaml").write_text("group: empty\ntask: 5\n")
    (task_folder / "broken.yaml").write_text("task: [")
    with pytest.raises(UserError, match=message) as error:
        load_named_tasks(dict.fromkeys(names, 0), include_path=str(task_folder))
    assert "\n" not in str(error.value)


def test_task_that_fails_at_a_later_item_is_one_line(llama: LanguageModel, task_folder: Path) -> None:
    text = (task_folder / "second.yaml").read_text().replace("tag: both", "").replace("task: second", "task: late")
    (task_folder / "late.yaml").write_text(text.replace("{{query}}", "{{ 1 // (gold - 2) ~ query }}"))
    with pytest.raises(RunError, match=r"late: cannot be scored: ZeroDivisionError") as error:
        named(llama, task_folder, "late")
    assert "\n" not in str(error.value)


def test_scores_of_a_model_without_finite_logits_are_not_numbers(
    overflowing: LanguageModel, task_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = named(overflowing, task_folder, "filtered", "both")
    assert len(results) == 6
    assert all(math.isnan(result.value) for result in results)
    assert "filtered: 4 answers of the model are not finite, so its scores are nan" in caplog.text
    record = Evaluation(model={"step": 1}, quant={"text": "", "hash": ""}, results=tuple(results))
    write_evaluation(tmp_path / "record.json", record)
    assert math.isnan(read_evaluation(tmp_path / "record.json").results[0].value)


@pytest.mark.parametrize("progress", [False, True])
def test_bars_are_shown_only_with_progress(
    progress: bool, llama: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = read_task(write(tmp_path / "quiz.jsonl", *(choices(n, gold=0) for n in range(3))))
    evaluate(llama, task, progress=progress)
    assert ("3/3" in capsys.readouterr().err) == progress
