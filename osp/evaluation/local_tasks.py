"""Tasks in local jsonl files, as tasks of the lm-evaluation-harness. No network is needed.

tasks.yaml has the forms of their lines; all lines of a file have the same form.

`acc` is the share of items whose gold choice has the highest log-likelihood, or whose continuation is greedy;
`acc_norm` divides log-likelihoods by the bytes of the choice first. `exact_match` is the share of questions whose
greedy answer is `answer` or one of `aliases`, both normalized by `normalize_answer`: the first line of the text. Where
the examples show a chain of thought, it is what follows "#### ", and a number must be written as in GSM8K.
"""

import hashlib
import json
import logging
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from osp.data.sources import decode_utf8
from osp.errors import UserError, as_user_error
from osp.files import not_a_file, parse_json

log = logging.getLogger(__name__)

_FILE = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8"))
PAPER_TEN: dict[str, tuple[int, str]] = {name: (row[0], row[1]) for name, row in _FILE["paper_ten"].items()}
FORMS: dict[str, dict[str, Any]] = _FILE["forms"]
FEWSHOT_DELIMITER = "\n\n"
ANSWER_IS = "#### "
NUMBER = "-?[0-9.,]+"
ARTICLES = {"a", "an", "the"}
LISTS = {"choices": 2, "context_options": 2, "aliases": 0}  # fields that hold a list -> the least number of texts

Doc = dict[str, Any]  # of the harness: the fields that tasks.yaml names, and `example`, what it shows as one


@dataclass(frozen=True)
class LocalTask:
    """The items of a file. `docs` are what the harness calls documents, examples included in their contexts."""

    name: str
    form: str  # key of FORMS
    docs: list[Doc] = field(repr=False)
    num_fewshot: int
    sha256: str  # of the file


def score_answer(doc: Doc, results: list[str]) -> dict[str, float]:
    """Return whether the generated text answers the question `doc`, as a metric of the harness."""
    (text,) = results
    if doc["reasons"]:
        is_number = re.fullmatch(NUMBER, doc["answers"][0])
        found = re.search(f"{ANSWER_IS}({NUMBER if is_number else '.+'})", text)
        text = found[1] if found else ""
        if is_number or not found:
            return {"exact_match": float(text.replace(",", "") in [a.replace(",", "") for a in doc["answers"]])}
    answer = normalize_answer(text.strip().split("\n")[0])
    return {"exact_match": float(answer in map(normalize_answer, doc["answers"]))}


def normalize_answer(answer: str) -> str:
    """Return its words in lower case without articles, numbers without commas; the answer itself if no word is left."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", answer.lower().replace("_", " "))
    words = re.findall(r"(?<!\w)-?\d+(?:\.\d+)?|\w+", text)
    return " ".join(word for word in words if word not in ARTICLES) or answer.strip()


def read_task(path: Path, *, num_fewshot: int = 0, limit: int | None = None, seed: int = 0) -> LocalTask:
    """Return the task in a jsonl file, or its first `limit` items; `UserError` names the first bad line.

    The examples before an item are other items of the file, drawn by (seed, number of the item).
    """
    if not_a_file(path):
        raise UserError(f"tasks: {path} is not a file")
    with as_user_error(f"tasks: cannot read {path}: ", OSError):
        raw = path.read_bytes()
    docs, chosen, form = [], [], ""
    for number, line in enumerate(decode_utf8(raw, path, line=1).split("\n"), start=1):
        if line.strip():
            name, doc = _parse_line(line, where=f"{path}, line {number}")
            form = form or name
            if name != form:
                raise UserError(
                    f"{path}, line {number}: a line of the form {name!r} after lines of the form {form!r}; "
                    "move it to another file"
                )
            docs.append(doc)
    if num_fewshot < 0 or len(docs) <= num_fewshot:
        raise UserError(f"{path} has {len(docs)} items: too few for num_fewshot={num_fewshot}")
    for number, doc in enumerate(docs[:limit]):
        draw = random.Random(f"{seed} {number}").sample(range(len(docs) - 1), num_fewshot)
        prefix = "".join(docs[i + (i >= number)]["example"] + FEWSHOT_DELIMITER for i in draw)  # not its own
        if "contexts" in doc:
            chosen.append(doc | {"contexts": [prefix + context for context in doc["contexts"]]})
        else:
            chosen.append(doc | {"context": prefix + doc["context"]})
    return LocalTask(path.stem, form, chosen, num_fewshot, hashlib.sha256(raw).hexdigest())


def paper_files(folder: Path) -> list[tuple[Path, int]]:
    """Return (file, number of examples) of OSP's ten in `folder`, but not of files with letters or too few choices."""
    files, left_out = [], []
    for shots, file, *choices in _FILE["paper_ten"].values():
        path = folder / file
        shown = read_task(path, limit=1).docs[0].get("choices", []) if choices and path.exists() else []
        letters = all(len(choice) == 1 for choice in shown)
        if path.exists() and choices and (letters or len(shown) < choices[0]):
            left_out.append(f"{file} ({len(shown)} of {choices[0]} choices{', as letters' * letters})")
        elif path.exists():
            files.append((path, shots))
    if left_out:
        log.warning("tasks=[paper] leaves out %s; name a file to measure it", " and ".join(left_out))
    if not files:
        names = ", ".join(file for _, file in PAPER_TEN.values())
        raise UserError(f"tasks=[paper]: tasks_dir={folder} holds none of {names}")
    return files


def as_harness_task(task: LocalTask) -> Any:
    """Return `task` as a task of the harness. Examples are part of the documents, so the harness adds none."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    class JsonlTask(ConfigurableTask):
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {"test": Dataset.from_list(task.docs)}

    names = dict.fromkeys(FORMS[task.form]["metrics"].values())
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
    config = {"task": task.name, "test_split": "test", "num_fewshot": 0, "target_delimiter": "", "metric_list": metrics}
    config |= FORMS[task.form]["task"]
    if config["output_type"] == "generate_until":
        config["process_results"] = score_answer
    return JsonlTask(config=config)


def delimiter(query: str) -> str:
    """Return the text between a query and its choices: a question is answered, anything else is continued."""
    return "\nAnswer: " if "Question:" in query and not query.rstrip().endswith("Answer:") else " "


def _parse_line(line: str, *, where: str) -> tuple[str, Doc]:
    """Return (key of `FORMS`, document) of one line, without examples."""
    with as_user_error(f"{where}: malformed JSON (", ValueError, RecursionError, after=")"):
        record = parse_json(line)
        json.dumps(record, ensure_ascii=False).encode()  # raises for halves of surrogate pairs
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    name = next((name for name, form in FORMS.items() if record.keys() >= set(form["fields"])), None)
    if name is None:
        forms = ", or ".join(", ".join(form["fields"]) for form in FORMS.values())
        raise UserError(f"{where}: fields {sorted(record)[:20]}; a line has {forms}")
    _check_values(record, FORMS[name]["fields"], where)
    if name == "choices":
        context = record["query"].strip() + delimiter(record["query"])
        doc = {"context": context, "choices": record["choices"], "gold": record["gold"]}
        return name, doc | {"example": context + record["choices"][record["gold"]]}
    if name == "context_options":
        contexts = [text.strip() + " " for text in record["context_options"]]
        doc = {"contexts": contexts, "continuation": record["continuation"], "gold": record["gold"]}
        return name, doc | {"example": contexts[record["gold"]] + record["continuation"]}
    context = record["context"].strip()
    if name == "continuation":
        example = f"{context} {record['continuation']}"
        return name, {"context": context + " ", "continuation": record["continuation"], "example": example}
    context = context if "Question:" in context else f"Question: {context}"
    context += delimiter(context)
    answer = shown = record["answer"].strip()
    if name == "reasoning":
        shown = f"{record['chain_of_thought'].strip()}\n{ANSWER_IS}{answer}"
    return name, {
        "context": context.rstrip(),  # the space after "Answer:" belongs to the answer
        "answers": [answer, *record.get("aliases", [])],
        "reasons": name == "reasoning",
        "shown": shown,
        "example": context + shown,
    }


def _check_values(record: dict[str, Any], fields: list[str], where: str) -> None:
    """Raise `UserError` for the first field with a wrong value."""
    for key in [key for key in record if key in (*fields, "aliases") and key != "gold"]:
        least = LISTS.get(key)
        texts = [record[key]] if least is None else record[key]
        are_texts = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
        if not are_texts or len(texts) < (least or 0):
            what = "text that is not empty" if least is None else f"list of texts, {least} or more, none of them empty"
            raise UserError(f"{where}: {key}={record[key]!r:.60}: must be a {what}")
    if "gold" in fields:
        gold, num_choices = record["gold"], len(next(record[key] for key in fields if key in LISTS))
        if type(gold) is not int or not 0 <= gold < num_choices:
            raise UserError(f"{where}: gold={gold!r}: must be the number of a choice, 0 to {num_choices - 1}")
