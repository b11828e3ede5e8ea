"""What the task files here cannot say in a template. Facts from lighteval 0.9.2, which the authors used."""

import random
import string
from typing import Any

SHUFFLE_SEED = 42


def shuffle_generator(num_items: int) -> tuple[random.Random, list[int]]:
    """Return the order of the items in lighteval, and its generator, which then draws the examples before each."""
    generator, order = random.Random(SHUFFLE_SEED), list(range(num_items))
    generator.shuffle(order)
    return generator, order


def shuffled(docs: Any) -> Any:
    """Return the `datasets.Dataset` in lighteval's order."""
    return docs.select(shuffle_generator(len(docs))[1])


def trivia_qa_answers(doc: dict[str, Any]) -> list[str]:
    """Return the accepted answers, sorted, without those that begin with the one before. An example shows the first."""
    kept: list[str] = []
    for alias in sorted(doc["answer"]["aliases"]):
        if not kept or not alias.startswith(kept[-1]):
            kept.append(alias)
    return [_plain(alias) for alias in kept]


def score_trivia_qa(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the whole generated text is an accepted answer, but for case and ASCII punctuation."""
    (text,) = results
    accepted = [answer.strip() for answer in trivia_qa_answers(doc)]
    return {"exact_match": float(bool(text) and _plain(text.strip()) in accepted)}


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))
