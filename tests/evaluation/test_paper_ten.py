"""The tasks of `lm_eval=[paper_ten]`: requests, scores and examples on items as the hub has them, without a network.

The expected prompts, choices and rules are written here from lighteval 0.9.2 and the authors' task definitions.
"""

import functools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

from osp.evaluation.compare import score
from osp.evaluation.config import EvaluateConfig
from osp.evaluation.harness import PAPER_TASKS, HarnessModel, evaluate_named_tasks, load_named_tasks
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.local_tasks import PAPER_TEN
from osp.run.evaluations import Result
from tests.documents import read_page, section, tables

pytest.importorskip("lm_eval")

Item = dict[str, Any]
Expected = tuple[str, list[str], int]  # query, choices as they follow it, the right one

ARC: list[Item] = [
    {
        "question": "Which gas do plants take in?",
        "choices": {"text": ["oxygen", "carbon dioxide", "helium"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    {
        "question": "Where is it the coldest?",
        "choices": {
            "text": ["at the sea", "\xc9t\xe9 r\xe9el", "at the pole", "on top"],
            "label": ["1", "2", "3", "4"],
        },
        "answerKey": "4",
    },
]
PLANTS: Expected = ("Question: Which gas do plants take in?\nAnswer:", [" oxygen", " carbon dioxide", " helium"], 1)
COLD: Expected = (
    "Question: Where is it the coldest?\nAnswer:",
    [" at the sea", " \xc9t\xe9 r\xe9el", " at the pole", " on top"],
    3,
)
CHOICES: dict[str, tuple[list[Item], list[Expected]]] = {
    "paper_arc_easy": (ARC, [PLANTS, COLD]),
    "paper_arc_challenge": (ARC[::-1], [COLD, PLANTS]),
    "paper_commonsense_qa": (
        [
            {
                "question": "Where would you keep a boat?",
                "choices": {"text": ["harbor", "a desk", "oven", "tree", "sky"], "label": ["A", "B", "C", "D", "E"]},
                "answerKey": "A ",
            },
        ],
        [("Where would you keep a boat?", [" harbor", " a desk", " oven", " tree", " sky"], 0)],
    ),
    "paper_hellaswag": (
        [
            {
                "activity_label": "Cooking",
                "ctx_a": "A man [header] stirs the pot.",
                "ctx_b": "he",
                "endings": ["tastes the soup.", "flies away.", "sings to the pot.", "is a [x y] pot."],
                "label": "0",
            },
            {
                "activity_label": "Rowing",
                "ctx_a": "They row [title] A boat.",
                "ctx_b": "",
                "endings": ["Then \xe9\xe9 rests.", "Stop [title] right  [step] now.", "They sing loudly.", "Go on."],
                "label": "3",
            },
        ],
        [
            (
                "Cooking: A man stirs the pot. He ",
                [" tastes the soup.", " flies away.", " sings to the pot.", " is a pot."],
                0,
            ),
            (
                "Rowing: They row. A boat. ",
                [" Then \xe9\xe9 rests.", " Stop. right  now.", " They sing loudly.", " Go on."],
                3,
            ),
        ],
    ),
    "paper_mmlu": (
        [
            {
                "question": "What is 2 + 2?",
                "subject": "elementary_mathematics",
                "choices": ["3", "4", "22", "5"],
                "answer": 1,
            },
            {
                "question": "Who rules? ",
                "subject": "world_history",
                "choices": ["a", "the king", "no", "b"],
                "answer": 0,
            },
        ],
        [
            (
                "The following are questions about elementary mathematics.\nQuestion: What is 2 + 2?\nAnswer:",
                [" 3", " 4", " 22", " 5"],
                1,
            ),
            (
                "The following are questions about world history.\nQuestion: Who rules? \nAnswer:",
                [" a", " the king", " no", " b"],
                0,
            ),
        ],
    ),
    "paper_openbook_qa": (
        [
            {
                "question_stem": "The sun is the source of",
                "choices": {"text": ["puppies", "energy for plants", "rock", "it"], "label": ["A", "B", "C", "D"]},
                "answerKey": "B",
            }
        ],
        [("The sun is the source of", [" puppies", " energy for plants", " rock", " it"], 1)],
    ),
    "paper_piqa": (
        [{"goal": "To open a jar,", "sol1": "twist the lid.", "sol2": "shake it.", "label": 0}],
        [("Question: To open a jar,\nAnswer:", [" twist the lid.", " shake it."], 0)],
    ),
    "paper_siqa": (
        [
            {
                "context": "Kai gave Ana a book.",
                "question": "How would Ana feel?",
                "answerA": "as angry",
                "answerB": "grateful to Kai",
                "answerC": "tired",
                "label": "2",
            }
        ],
        [("Kai gave Ana a book. How would Ana feel?", [" as angry", " grateful to Kai", " tired"], 1)],
    ),
    "paper_winogrande": (
        [
            {
                "sentence": "The cup did not fit in the box because the _ was too small.",
                "option1": "cup",
                "option2": "box",
                "answer": "2",
            },
            {"sentence": "Ann thanked Bea, so _ smiled.", "option1": "Ann", "option2": "Beatrix", "answer": "1"},
        ],
        [
            (
                "The cup did not fit in the box because the ",
                ["cup was too small.", "box was too small."],
                1,
            ),
            ("Ann thanked Bea, so ", ["Ann smiled.", "Beatrix smiled."], 0),
        ],
    ),
}
HUB = {  # task -> path, subset, split, and whether the authors' revision can be read
    "paper_arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", True),
    "paper_arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", True),
    "paper_commonsense_qa": ("tau/commonsense_qa", None, "validation", True),
    "paper_gsm8k": ("openai/gsm8k", "main", "test", True),
    "paper_hellaswag": ("Rowan/hellaswag", None, "validation", False),
    "paper_mmlu": ("cais/mmlu", "all", "test", True),
    "paper_openbook_qa": ("allenai/openbookqa", "main", "validation", True),
    "paper_piqa": ("baber/piqa", None, "validation", False),
    "paper_siqa": ("lighteval/siqa", None, "validation", True),
    "paper_trivia_qa": ("mandarjoshi/trivia_qa", "rc.nocontext", "validation", False),
    "paper_winogrande": ("allenai/winogrande", "winogrande_xl", "validation", False),
}
GSM8K = [
    {
        "question": f"Ann has {n} bags of {n + 1} nuts. How many nuts?",
        "answer": f"{n} * {n + 1} nuts\n#### {n * (n + 1)}",
    }
    for n in range(30)
]
TRIVIA = [
    {
        "question": f"Who wrote book {n}?",
        "answer": {"value": f"Writer {n}", "aliases": [f"Writer {n}", f"An O'Writer {n}", f"Writer {n} (novelist)"]},
    }
    for n in range(30)
]
FEATURES = {
    "paper_mmlu": Features(
        question=Value("string"),
        subject=Value("string"),
        choices=Sequence(Value("string")),
        answer=ClassLabel(names=["A", "B", "C", "D"]),
    ),
    "paper_piqa": Features(
        goal=Value("string"), sol1=Value("string"), sol2=Value("string"), label=ClassLabel(names=["0", "1"])
    ),
}


def on_the_hub() -> dict[str, DatasetDict]:
    """Return task -> its dataset, in the splits that the hub has."""
    sets = {}
    for task, (_, _, split, _) in HUB.items():
        if task in CHOICES:
            sets[task] = DatasetDict({split: Dataset.from_list(CHOICES[task][0], features=FEATURES.get(task))})
        else:
            items = GSM8K if task == "paper_gsm8k" else TRIVIA
            sets[task] = DatasetDict({"train": Dataset.from_list(items[9:]), split: Dataset.from_list(items[:9])})
    return sets


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the datasets of this file in place of the hub's; the harness has no tasks of its own."""
    from lm_eval import tasks

    sets = {(path, name): (task, pinned) for task, (path, name, _, pinned) in HUB.items()}

    def load_dataset(path: str, name: str | None = None, revision: str | None = None) -> DatasetDict:
        task, pinned = sets[path, name]
        assert bool(re.fullmatch("[0-9a-f]{40}", revision or "")) == pinned
        return on_the_hub()[task]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


def load(*names: str, shots: int | None = None) -> dict[str, Any]:
    """Return name -> task, with the paper's number of examples or another."""
    wanted = {name: PAPER_TEN[name][0] if shots is None else shots for name in names}
    return {name: loaded["tasks"][name] for name, loaded in load_named_tasks(wanted).items()}


def requests(task: Any) -> list[list[tuple[Any, ...]]]:
    """Return the arguments of the requests of each item."""
    task.build_all_requests()
    found: dict[int, list[tuple[Any, ...]]] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance.args)
    return list(found.values())


def measure(llama: LanguageModel, name: str) -> list[Result]:
    loaded = load_named_tasks({name: PAPER_TEN[name][0]})[name]
    (results,) = evaluate_named_tasks(HarnessModel(llama), loaded)
    return results


def test_files_and_names_are_the_papers_benchmarks() -> None:
    """No name is one of the harness, so `lm_eval=[hellaswag]` means the harness's."""
    import lm_eval.tasks

    assert PAPER_TEN.keys() == HUB.keys()
    assert {path.stem for path in PAPER_TASKS.glob("*.yaml")} == {name.removeprefix("paper_") for name in HUB}
    assert {name: shots for name, (shots, _) in PAPER_TEN.items() if shots} == {"paper_gsm8k": 8, "paper_trivia_qa": 5}
    assert not list(Path(lm_eval.tasks.__path__[0]).glob("**/paper_*"))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", CHOICES)
def test_requests_of_choices_are_the_authors(name: str) -> None:
    items, expected = CHOICES[name]
    asked = requests(load(name)[name])
    assert len(asked) == len(items) == len(expected)
    for pairs, (query, choices, _) in zip(asked, expected, strict=True):
        assert ["".join(pair) for pair in pairs] == [query + choice for choice in choices]
        assert {context.rstrip() for context, _ in pairs} == {query.rstrip()}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", CHOICES)
def test_acc_norm_divides_by_characters_without_the_leading_space(
    name: str, llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text has a log-likelihood that follows from its letters, so every score has a closed form."""

    def nats(context: str, continuation: str) -> float:
        return -sum(1 + ord(letter) * 7919 % 101 for letter in (context + continuation).encode().decode("latin-1"))

    def answers(model: HarnessModel, asked: Any) -> list[tuple[float, bool]]:
        return [(nats(*request.args), False) for request in asked]

    monkeypatch.setattr(HarnessModel, "loglikelihood", answers)
    found = {result.metric: result.value for result in measure(llama, name)}
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for query, choices, gold in CHOICES[name][1]:
        plain = [nats(query, choice) for choice in choices]
        normed = [x / (len(c) - 1 if c[0] == " " else len(c)) for x, c in zip(plain, choices, strict=True)]
        right["acc"].append(plain.index(max(plain)) == gold)
        right["acc_norm"].append(normed.index(max(normed)) == gold)
    assert found == {metric: sum(values) / len(values) for metric, values in right.items()}


Prompt = tuple[str, dict[str, Any]]  # context, how to generate


def generated(
    llama: LanguageModel, name: str, text: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Result, list[Prompt]]:
    """Return the score of a model that answers item n of this file with text(n), and what it was asked."""
    asked: list[Prompt] = []

    def answers(_: HarnessModel, requests: Any) -> list[str]:
        asked.extend(request.args for request in requests)
        return [text(int(re.findall(r"(?:Ann has|wrote book) (\d+)", context)[-1])) for context, _ in asked]

    monkeypatch.setattr(HarnessModel, "generate_until", answers)
    (result,) = measure(llama, name)
    return result, asked


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("name", "shots", "limit"), [("paper_gsm8k", 8, 256), ("paper_trivia_qa", 5, 20)])
def test_generated_tasks_ask_with_lightevals_examples(
    name: str, shots: int, limit: int, llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lighteval shuffles the items with seed 42 and goes on with the same generator to draw the examples of each."""

    def example(item: Item) -> str:
        if name == "paper_gsm8k":
            return f"Question: {item['question']}\nAnswer: {item['answer']}\n\n"
        first = min(item["answer"]["aliases"]).lower().replace("'", "")
        return f"Question: {item['question']}\nAnswer:{first}\n\n"

    items = GSM8K if name == "paper_gsm8k" else TRIVIA
    scored, generator = items[:9], random.Random(42)
    generator.shuffle(scored)
    expected = [
        "".join(map(example, generator.sample(items[9:], shots))) + f"Question: {item['question']}\nAnswer:"
        for item in scored
    ]
    _, asked = generated(llama, name, str, monkeypatch)
    assert [context for context, _ in asked] == expected
    assert all(options["until"] == ["Question:", "Question"] for _, options in asked)
    assert all(options["max_gen_toks"] == limit and not options["do_sample"] for _, options in asked)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, 1.0) for text in (" #### {}", "so\n#### {} nuts", "#### {}\n#### 1", "#### no #### {}", "#### ,{}")),
        *(
            (text, 0.0)
            for text in ("{}", "####{}", "#### ${}", "#### {}.", "#### 1\n#### {}", "", "### {}", "#### {}0")
        ),
    ],
)
def test_gsm8k_takes_only_a_number_after_four_hashes(
    text: str, value: float, llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = generated(llama, "paper_gsm8k", lambda n: text.format(n * (n + 1)), monkeypatch)
    assert result.what == "paper_gsm8k[shots=8]"
    assert (result.metric, result.value) == ("exact_match,strict-match", value)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, 1.0) for text in (" Writer {}", "writer {}.", "\n'WRITER {}'\n", "An OWriter {}", "an o'writer {}!")),
        *((text, 0.0) for text in ("", "Writer", "the Writer {}", "Writer {}\nHe", "Writer {} .")),
        ("Writer {} (novelist)", 0.0),  # lighteval leaves out what begins with another alias
    ],
)
def test_trivia_qa_takes_a_whole_answer_but_for_case_and_punctuation(
    text: str, value: float, llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = generated(llama, "paper_trivia_qa", text.format, monkeypatch)
    assert result.what == "paper_trivia_qa[shots=5]"
    assert (result.metric, result.value) == ("exact_match", value)


def shown(task: Any) -> str:
    """Return the first item of a task as docs/quantization.md shows it."""
    pairs = requests(task)[0]
    quoted = functools.partial(json.dumps, ensure_ascii=False)
    lines = [task.task_name, *(f"  {quoted(line)}" for line in pairs[0][0].splitlines(keepends=True))]
    if task.OUTPUT_TYPE == "multiple_choice":
        lines += [f"    + {quoted(continuation)}" for _, continuation in pairs]
    else:
        options = pairs[0][1]
        lines += [f"    ... until {quoted(options['until'][-1])}, {options['max_gen_toks']} tokens at most"]
    return "\n".join(lines)


@pytest.mark.usefixtures("hub")
def test_docs_show_the_prompts() -> None:
    """The two tasks with examples are shown with one."""
    page = section(read_page("docs/quantization.md"), "The paper's ten benchmarks")
    expected = [shown(load(name, shots=min(1, PAPER_TEN[name][0]))[name]) for name in PAPER_TEN]
    assert not [block for block in expected if block not in page], "\n\n".join(expected)
    rows = {name: row for row in tables(page, "task")[0] for name in re.findall(r"`(\w+)`", row["task"])}
    assert rows.keys() == HUB.keys()
    for name, (path, _, split, _) in HUB.items():
        assert f"`{path}`" in rows[name]["dataset, split"]
        assert rows[name]["dataset, split"].endswith(split)
        assert ("`acc_norm`" in rows[name]["prompt and score"]) == (name in CHOICES)


def test_average_takes_acc_norm_and_counts_arc_once() -> None:
    values = {name: 0.1 + 0.05 * n for n, name in enumerate(PAPER_TEN)}
    results = []
    for name, value in values.items():
        if name in CHOICES:
            results += [Result(f"{name}[shots=0]", "acc", 0.99), Result(f"{name}[shots=0]", "acc_norm", value)]
        else:
            results.append(Result(f"{name}[shots=8]", "exact_match,strict-match", value))
            results.append(Result(f"{name}[shots=8]", "exact_match,flexible-extract", 0.99))
    arc = (values.pop("paper_arc_easy") + values.pop("paper_arc_challenge")) / 2
    assert score(results).accuracy == pytest.approx((arc + sum(values.values())) / 10)
    assert score([Result("boolq[shots=0]", "acc", 0.6), Result("x[shots=0]", "word_perplexity", 9.0)]).accuracy == 0.6


def test_paper_ten_is_named_with_the_papers_examples() -> None:
    from osp.evaluation.evaluate import _named_tasks

    tasks = _named_tasks(EvaluateConfig(lm_eval=("paper_ten", "hellaswag", "paper_gsm8k"), num_fewshot=3))
    assert tasks == {name: shots for name, (shots, _) in PAPER_TEN.items()} | {"hellaswag": 3}
