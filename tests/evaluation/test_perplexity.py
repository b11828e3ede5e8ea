"""Perplexity against `transformers` on windows that are cut naively, token by token."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models

from osp.data.tokenizer import load_tokenizer
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.perplexity import CodeLength, Text, perplexity
from osp.evaluation.texts import encode, read_text
from tests.conftest import made_text
from tests.distributed import run_distributed
from tests.hf_models import BOS, DATA, STORIES_TEXT


@pytest.fixture(scope="module")
def text(llama: LanguageModel) -> Text:
    return encode("made", ["".join(made_text(4))], llama)


def naive(model: Any, tokens: list[int], *, seq_len: int, overlap: int, bos_id: int | None) -> tuple[float, list[int]]:
    """Return (nats, places of the predicted tokens) from one window at a time, every token once, in fp64."""
    length = min(seq_len - (bos_id is not None), len(tokens))
    nats, predicted, start = 0.0, [], 0
    while start + length <= len(tokens):
        window = ([] if bos_id is None else [bos_id]) + tokens[start : start + length]
        with torch.no_grad():
            log_p = F.log_softmax(model(torch.tensor([window])).logits[0].double(), dim=-1)
        for i in range(1, len(window)):
            place = start + i - (bos_id is not None)
            if place not in predicted:
                nats -= log_p[i - 1, window[i]].item()
                predicted.append(place)
        start += length - overlap
    return nats, predicted


@pytest.mark.parametrize(
    ("seq_len", "overlap", "bos_id"),
    [(32, 0, None), (32, 0, 0), (32, 20, None), (32, 20, 0), (64, 1, None), (7, 5, 0), (2, 0, None), (2, 0, 0)],
)
def test_perplexity_matches_transformers(
    seq_len: int, overlap: int, bos_id: int | None, llama: LanguageModel, transformers_llama: Any, text: Text
) -> None:
    measured = perplexity(
        llama.model, text, seq_len=seq_len, overlap=overlap, bos_id=bos_id, max_tokens=200, batch_tokens=100
    )
    tokens = text.tokens[:200].tolist()
    nats, predicted = naive(transformers_llama, tokens, seq_len=seq_len, overlap=overlap, bos_id=bos_id)
    assert measured.tokens == len(predicted)
    assert measured.loss == pytest.approx(nats / len(predicted), rel=2e-6)
    assert measured.perplexity == pytest.approx(math.exp(nats / len(predicted)), rel=2e-5)
    num_bytes = sum(len(str(llama.tokenizer.id_to_token(tokens[place]))) for place in predicted)  # one sign per byte
    assert measured.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=2e-6)


def test_name_has_the_settings_of_the_measurement(llama: LanguageModel, text: Text) -> None:
    measured = perplexity(llama.model, text, seq_len=16, overlap=4, max_tokens=40)
    assert measured.name == "made[len=16,overlap=4,bos=no,first=40]"
    assert perplexity(llama.model, text, seq_len=16, bos_id=0).name == "made[len=16,overlap=0,bos=yes]"


def test_text_shorter_than_a_window_is_one_window(llama: LanguageModel, text: Text) -> None:
    measured = perplexity(llama.model, text, seq_len=32, max_tokens=10)
    assert (measured.name, measured.tokens) == ("made[len=10,overlap=0,bos=no,first=10]", 9)


def test_batch_size_changes_nothing_but_rounding(llama: LanguageModel, text: Text) -> None:
    nats = [perplexity(llama.model, text, seq_len=32, overlap=8, batch_tokens=n).nats for n in (1, 100, 1000, 10**6)]
    assert nats == pytest.approx([nats[0]] * 4, rel=1e-7)


def _measure_on_a_rank(folder: str) -> tuple[CodeLength, list[Any], list[str], list[Any]]:
    """Return perplexity, the likelihoods of some pairs, texts after some contexts, and the scores of a task file."""
    from osp.evaluation.harness import HarnessModel, evaluate_local_task
    from osp.evaluation.language_model import open_model
    from osp.evaluation.local_tasks import read_task

    subject = open_model(folder)
    text = encode("made", ["".join(made_text(4))], subject)
    pairs = [SimpleNamespace(args=("a b " * n, "c d" * (1 + n % 3))) for n in range(9)]
    contexts = [SimpleNamespace(args=(f"a{'b' * n}", {"max_gen_toks": 4 + n % 2})) for n in range(5)]
    return (
        perplexity(subject.model, text, seq_len=32, batch_tokens=96),
        HarnessModel(subject, batch_tokens=40).loglikelihood(pairs),
        HarnessModel(subject, batch_tokens=20).generate_until(contexts),
        evaluate_local_task(HarnessModel(subject, batch_tokens=100), read_task(Path(folder) / "quiz.jsonl")),
    )


def test_number_of_ranks_changes_nothing(llama_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    torch.set_num_threads(1)
    lines = [json.dumps({"query": "a" * n, "choices": ["b", "cd " * n], "gold": n % 2}) for n in range(1, 8)]
    (llama_folder / "quiz.jsonl").write_text("\n".join(lines))
    single = _measure_on_a_rank(str(llama_folder))
    assert run_distributed(_measure_on_a_rank, 2, str(llama_folder)) == [single, single]
    assert len(set(single[2])) > 2
    assert len({result.value for result in single[3]}) == 2


def test_infinite_loss_is_infinite_perplexity() -> None:
    measured = CodeLength(nats=1e6, tokens=10, bytes=0)
    assert measured.perplexity == math.inf
    assert math.isnan(measured.bits_per_byte)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 65}, r"seq_len=65: a window has 2 to 64 tokens"),
        ({"seq_len": 1}, r"seq_len=1"),
        ({"seq_len": 8, "overlap": 8}, r"overlap=8: must be 0 or more and below the 8 tokens"),
        ({"seq_len": 8, "overlap": -1}, r"overlap=-1"),
        ({"seq_len": 8, "max_tokens": 1}, r"1 tokens; there is nothing to predict"),
    ],
)
def test_impossible_windows_are_refused(
    options: dict[str, Any], message: str, llama: LanguageModel, text: Text
) -> None:
    with pytest.raises(UserError, match=message):
        perplexity(llama.model, text, **options)


def test_wikitext_lines_are_joined_as_in_published_perplexities(llama: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_bytes(b" \n = Title = \n \n Some text . \n")
    text = read_text(str(file), llama)
    expected = "\n\n".join(["", " = Title = \n", "", " Some text . \n"])
    assert text.name == "wikitext2"
    assert text.tokens.tolist() == llama.encode(expected)
    assert text.sha256 == hashlib.sha256(expected.encode()).hexdigest()


def test_text_that_the_tokenizer_loses_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    subject: Any = SimpleNamespace(tokenizer=tokenizer, eos_id=None, encode=lambda text: tokenizer.encode(text).ids)
    assert encode("known", ["abba"], subject).tokens.tolist() == [0, 1, 1, 0]
    assert not caplog.text
    assert encode("lost", ["abΩΩ"], subject).tokens.tolist() == [0, 1]
    assert "lost: the tokens stand for 2 of 6 bytes of the text" in caplog.text


def test_each_document_of_a_file_is_followed_by_eos(llama: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    file.write_text('{"text": "one thing"}\n{"text": ""}\n{"text": "another"}\n')
    text = read_text(str(file), llama)
    assert text.tokens.tolist() == [*llama.encode("one thing"), 0, *llama.encode("another"), 0]
    assert text.token_bytes.sum() == len(b"one thinganother")


def test_any_other_file_is_one_text(llama: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "essay").write_text("one thing\nand another\n")
    text = read_text(str(tmp_path / "essay"), llama)
    assert (text.name, text.tokens.tolist()) == ("essay", llama.encode("one thing\nand another\n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("picture.png", b"\x89PNG\r\n", r"cannot read \S*picture.png: 'utf-8' codec"),
        ("nowhere.raw", None, r"nowhere.raw does not exist"),
        ("nowhere.txt", None, r"^\S*nowhere.txt does not exist"),
        ("field.jsonl", b'{"body": "x"}', r"line 1: no field 'text'; set text_field to one of \['body'\]"),
        ("empty.txt", b"", r"empty.txt: the text has 0 tokens; there is nothing to predict"),
        ("latin.raw", b"caf\xe9", r"cannot read .*latin.raw"),
        ("held_out", None, r"held_out: .* is no run; name the run folder"),
    ],
)
def test_unreadable_texts_are_refused(
    name: str, content: bytes | None, message: str, llama: LanguageModel, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(name if name == "held_out" else str(tmp_path / name), llama)


@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")
def test_wikitext2_has_the_published_number_of_gpt2_tokens(llama: LanguageModel) -> None:
    subject = dataclasses.replace(llama, tokenizer=load_tokenizer(DATA / "tokenizers" / "gpt2.json"))
    assert len(read_text(str(DATA / "wikitext2" / "wiki.test.raw"), subject).tokens) == 287_644


def test_stories260k_tells_stories_better_than_wikipedia(stories: LanguageModel) -> None:
    """Bits per byte count the bytes of the text."""
    story = perplexity(stories.model, encode("story", [STORIES_TEXT], stories), seq_len=256, bos_id=BOS)
    wiki = read_text(str(DATA / "wikitext2" / "wiki.test.raw"), stories)
    other = perplexity(stories.model, wiki, seq_len=256, bos_id=BOS, max_tokens=2000)
    assert story.perplexity < 3
    assert other.perplexity > 30
    assert story.bytes == pytest.approx(len(STORIES_TEXT.encode()), abs=1)  # the space it puts in front
