"""Tasks against a loop that asks `transformers` for one pair at a time, and the lines that no task can have."""

import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.distributed import batches_by_tokens
from osp.errors import UserError
from osp.evaluation.harness import PAPER_TEN, HarnessModel, as_harness, evaluate_harness
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.tasks import (
    Item,
    Likelihood,
    Pair,
    Row,
    delimiter,
    encode_pair,
    evaluate_task,
    is_right,
    likelihoods,
    load_task,
    score_rows,
    standard_error,
)
from tests.conftest import made_text
from tests.hf_models import DATA

WORDS = "".join(made_text(2)).split()
PAIRS = [Pair(" ".join(WORDS[: 3 * n]) + " ", " ".join(WORDS[20 : 21 + n % 4])) for n in range(12)]


def naive(model: Any, subject: LanguageModel, pair: Pair, *, bos: bool = False) -> tuple[float, bool]:
    """(log-likelihood, is greedy) of one pair, fp64, from the logits of a whole row."""
    spaces = len(pair.context) - len(pair.context.rstrip())
    context = pair.context[: len(pair.context) - spaces]
    head = subject.encode(context)
    tail = subject.encode(pair.context + pair.continuation)[len(head) :]
    head = ([0] if bos or not head else []) + head
    ids = (head + tail)[-65:]
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[-len(tail) :]
    nats = sum(log_p[i, token].item() for i, token in enumerate(tail))
    return nats, log_p.argmax(-1).tolist() == tail


@pytest.mark.parametrize("bos", [False, True])
def test_likelihoods_are_those_of_transformers(bos: bool, llama: LanguageModel, transformers_llama: Any) -> None:
    pairs = [*PAIRS, Pair("", "alone"), Pair(" ", "alone"), Pair("word " * 90, "and then")]
    found, truncated = likelihoods(llama, pairs, bos=bos, batch_tokens=100)
    assert truncated == sum(sum(map(len, encode_pair(llama, pair, bos=bos))) > 65 for pair in pairs) > 0
    for pair, answer in zip(pairs, found, strict=True):
        nats, greedy = naive(transformers_llama, llama, pair, bos=bos)
        assert answer.nats == pytest.approx(nats, rel=1e-5), pair
        assert answer.is_greedy == greedy


def test_greedy_continuation_is_seen(llama: LanguageModel, transformers_llama: Any) -> None:
    ids = llama.encode("some context of words")
    for _ in range(3):
        ids.append(int(transformers_llama(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-2], (ids[-2] + 1) % 300, ids[-1]]
    rows = [Row(ids, 3), Row(ids[:-1], 2), Row(other, 3)]
    found = score_rows(llama, rows, batch_tokens=100, what="rows", progress=False)
    assert [answer.is_greedy for answer in found] == [True, True, False]


def test_batches_change_nothing_but_rounding(llama: LanguageModel) -> None:
    alone, _ = likelihoods(llama, PAIRS, batch_tokens=1)
    for batch_tokens in (50, 200, 10**6):
        found, _ = likelihoods(llama, PAIRS, batch_tokens=batch_tokens)
        assert [a.nats for a in found] == pytest.approx([a.nats for a in alone], rel=1e-6)


def test_batches_hold_every_row_and_no_more_tokens_than_asked() -> None:
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
def test_scores_of_choices_are_those_of_a_plain_loop(
    num_fewshot: int, llama: LanguageModel, transformers_llama: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "quiz.jsonl", *(choices(n, gold=n % 3) for n in range(15)))
    task = load_task(path, num_fewshot=num_fewshot)
    found = evaluate_task(llama, task)
    acc, acc_norm = [], []
    for n, item in enumerate(task.items):
        record = choices(n, gold=n % 3)
        assert [pair.continuation for pair in item.pairs] == record["choices"]
        assert all(pair.context.endswith(record["query"] + "\nAnswer: ") for pair in item.pairs)
        assert item.pairs[0].context.count("\nAnswer: ") == num_fewshot + 1
        assert item.pairs[0].context.count(record["query"]) == 1, "an item is no example of itself"
        nats = [naive(transformers_llama, llama, pair)[0] for pair in item.pairs]
        per_byte = [x / len(choice.encode()) for x, choice in zip(nats, record["choices"], strict=True)]
        acc.append(float(max(nats) == nats[n % 3]))
        acc_norm.append(float(max(per_byte) == per_byte[n % 3]))
    assert found.scores == pytest.approx({"acc": sum(acc) / 15, "acc_norm": sum(acc_norm) / 15})
    assert 0 < found.scores["acc"] < 1
    p = found.scores["acc"]
    assert found.stderr["acc"] == pytest.approx(math.sqrt(p * (1 - p) / 14))
    assert (found.items, found.name) == (15, f"quiz[shots={num_fewshot}]")


def test_acc_norm_counts_bytes_not_characters(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-3 over 4 bytes beats -2.7 over 3; over 2 characters it would not."""
    record = {"query": "q", "choices": ["\xe9\xe9", "abc"], "gold": 0}
    answers = [Likelihood(-3.0, False), Likelihood(-2.7, False)]
    monkeypatch.setattr("osp.evaluation.tasks.likelihoods", lambda *_, **__: (answers, 0))
    found = evaluate_task(llama, load_task(write(tmp_path / "quiz.jsonl", record)))
    assert found.scores == {"acc": 0.0, "acc_norm": 1.0}


def test_other_forms_of_a_line(llama: LanguageModel, transformers_llama: Any, tmp_path: Path) -> None:
    record = {"context_options": ["He said", "They said that"], "continuation": "it rains.", "gold": 1}
    (item,) = load_task(write(tmp_path / "schema.jsonl", record)).items
    assert item.pairs == (Pair("He said ", "it rains."), Pair("They said that ", "it rains."))
    found = evaluate_task(llama, load_task(tmp_path / "schema.jsonl"))
    nats = [naive(transformers_llama, llama, pair)[0] for pair in item.pairs]
    assert found.scores["acc"] == float(nats[1] > nats[0])
    record = {"context": "He said", "continuation": "no"}
    found = evaluate_task(llama, load_task(write(tmp_path / "last.jsonl", record)))
    expected, greedy = naive(transformers_llama, llama, Pair("He said ", "no"))
    assert found.scores == pytest.approx({"acc": float(greedy), "log_likelihood": expected}, rel=1e-5)
    assert math.isnan(found.stderr["acc"])


def test_examples_are_the_same_in_every_call_and_differ_between_items(tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", *(choices(n, gold=0) for n in range(12)))
    first, second = load_task(path, num_fewshot=3), load_task(path, num_fewshot=3)
    assert first == second
    assert load_task(path, num_fewshot=3, seed=1) != first
    assert load_task(path, num_fewshot=3, limit=4).items == first.items[:4]
    prefixes = {item.pairs[0].context.split("Question")[1] for item in first.items}
    assert len(prefixes) > 3


def test_questions_are_answered_and_sentences_continued() -> None:
    assert delimiter("Question: why?") == "\nAnswer: "
    assert delimiter("Question: why?\nChoices:\nA. x\nAnswer:") == " "
    assert delimiter("The man turned on the faucet, therefore") == " "


def test_standard_error_of_a_mean() -> None:
    assert standard_error([1.0, 2.0, 4.0]) == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item() / math.sqrt(3))
    assert math.isnan(standard_error([1.0]))


GOOD = '{"query": "q", "choices": ["a", "b"], "gold": 0}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": ', r"line 2: malformed JSON"),
        ('["q"]', r"line 2: expected a JSON object, found list"),
        (
            '{"query": "q", "choices": ["a"], "gold": 0}',
            r"line 2: choices=\['a'\]: must be a list of two texts or more",
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
    ],
)
def test_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(GOOD.encode() + line.encode("latin-1") + b"\n" + GOOD.encode())
    with pytest.raises(UserError, match=message) as error:
        load_task(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_task_that_cannot_be(tmp_path: Path, llama: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"tasks: cannot read .*nowhere.jsonl: No such file"):
        load_task(tmp_path / "nowhere.jsonl")
    (tmp_path / "two.jsonl").write_text(GOOD * 2)
    with pytest.raises(UserError, match=r"two.jsonl has 2 items: too few for num_fewshot=2"):
        load_task(tmp_path / "two.jsonl", num_fewshot=2)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl has 0 items"):
        load_task(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"a continuation of \d+ tokens is longer than the model's 64"):
        likelihoods(llama, [Pair("a", "word " * 90)])


@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")
def test_shared_task_files_are_read() -> None:
    for path in sorted((DATA / "tasks").glob("*.jsonl")):
        task = load_task(path)
        assert len(task.items) >= 100
        generated = path.stem in ("gsm8k", "triviaqa_sm_sub")
        for item in task.items:
            assert bool(item.answers) == generated
            assert item.gold is None or len(item.pairs) > item.gold
            # what an example shows is a right answer
            assert not generated or is_right(item, item.pairs[0].continuation), item


def test_a_right_answer() -> None:
    said = Item((), None, answers=("The Beatles", "1,080", "Spider-Man", "\U0001f40e"))
    assert all(
        is_right(said, text)
        for text in (" beatles.", "the Beatles!\nQ", "$1080", '"1,080"', "spider man", "\U0001f40e")
    )
    assert not any(is_right(said, text) for text in ("", "the", "Beatles band", "\n\n10", "108", "-1080", "10.80"))
    reasoned = Item((), None, answers=("18",), reasons=True)
    assert is_right(reasoned, " 16 - 3 = 13\nThe answer is $18.")
    assert not any(is_right(reasoned, text) for text in ("18", "The answer is 17. The answer is 18", "The answer is"))


def test_answers_are_the_greedy_text_of_transformers(
    llama: LanguageModel, transformers_llama: Any, tmp_path: Path
) -> None:
    """Each question by itself, uncached; ours in batches with a cache. Half of the questions are given their answer."""

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
        {"context": question, "answer": found if n % 2 and found else "no", "aliases": []}
        for n, (question, found) in enumerate(zip(questions, given, strict=True))
    ]
    task = load_task(write(tmp_path / "quiz.jsonl", *records))
    expected = [float(record["answer"] != "no") for record in records]
    for batch_tokens in (1, 200, 10**6):
        found = evaluate_task(llama, task, batch_tokens=batch_tokens)
        assert found.scores == {"exact_match": sum(expected) / 4}
        assert found.stderr["exact_match"] == pytest.approx(standard_error(expected))
        assert found.truncated == 0
    (first, *_) = load_task(tmp_path / "quiz.jsonl", num_fewshot=2).items
    assert first.pairs[0].context.count("Question:") == 3
    assert evaluate_task(llama, load_task(tmp_path / "quiz.jsonl", num_fewshot=3)).truncated > 0


def test_examples_of_reasoning_end_with_the_answer(tmp_path: Path) -> None:
    record = {"context": "2 + 2?", "answer": "4", "chain_of_thought": "2 and 2 are 4."}
    other = {**record, "context": "1 + 1?"}
    (item, _) = load_task(write(tmp_path / "sums.jsonl", record, other), num_fewshot=1).items
    assert item.pairs[0].context == (
        "Question: 1 + 1?\nAnswer: 2 and 2 are 4.\nThe answer is 4\n\nQuestion: 2 + 2?\nAnswer: "
    )


def request(*args: Any) -> Any:
    return types.SimpleNamespace(args=args)


def test_harness_gets_the_likelihoods(llama: LanguageModel, transformers_llama: Any) -> None:
    found = HarnessModel(llama).loglikelihood([request(*pair) for pair in PAIRS])
    for pair, (nats, greedy) in zip(PAIRS, found, strict=True):
        expected = naive(transformers_llama, llama, pair)
        assert nats == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]


def test_harness_gets_the_likelihood_of_a_whole_text(llama: LanguageModel, transformers_llama: Any) -> None:
    """As in the harness's own example: all tokens once, the last window as full as the others."""
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
    found = HarnessModel(llama).loglikelihood_rolling([request("short"), request(text)])
    assert found[1] == pytest.approx(nats, rel=1e-6)


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
    found = HarnessModel(llama).generate_until([request(context, options) for context in contexts])
    assert found == expected
    assert len(set(found)) == 3
    stop = expected[0][3]
    (cut,) = HarnessModel(llama).generate_until([request(contexts[0], {"until": [stop], "max_gen_toks": 6})])
    assert cut == expected[0][: expected[0].index(stop)]
    with pytest.raises(UserError, match="only greedy text"):
        HarnessModel(llama).generate_until([request("a", {"do_sample": True})])


def test_papers_ten_are_eleven_tasks_of_the_harness() -> None:
    assert len(PAPER_TEN) == 11  # ARC is both its parts
    assert (PAPER_TEN["gsm8k"], PAPER_TEN["triviaqa"]) == (8, 5)


def test_harness_on_a_local_task(llama: LanguageModel, tmp_path: Path) -> None:
    """The real harness, offline, agrees with our own scores of the same items."""
    pytest.importorskip("lm_eval")
    data = write(tmp_path / "quiz.jsonl", *(choices(n, gold=n % 3) for n in range(15)))
    (tmp_path / "quiz.yaml").write_text(
        f"task: local_quiz\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{query}}\\nAnswer:"\n'
        "doc_to_target: gold\ndoc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    )
    assert as_harness(HarnessModel(llama)).world_size == 1
    (found,) = evaluate_harness(HarnessModel(llama), {"local_quiz": 0}, include_path=str(tmp_path))
    ours = evaluate_task(llama, load_task(data))
    assert found.scores["acc"] == pytest.approx(ours.scores["acc"])
    assert found.stderr["acc"] == pytest.approx(ours.stderr["acc"])
    assert found.items == 15
    with pytest.raises(UserError, match=r"no task 'nonsense_task'"):
        evaluate_harness(HarnessModel(llama), {"nonsense_task": 0})


def test_harness_that_is_not_installed_names_the_extra(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm_eval: .*; pip install 'osp\[lm-eval\]'"):
        as_harness(HarnessModel(llama))
