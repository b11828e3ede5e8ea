"""The certificate of a file: perplexity by the same definition, odd texts, what the table says."""

import dataclasses
import hashlib
import json
import math
import unicodedata
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from osp.convert.file_certificate import ClientModel, FileCertificate, TextReading, describe_files, observe, odd_texts
from osp.convert.same_function import Difference
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.perplexity import Text, perplexity
from osp.evaluation.texts import read_text
from osp.model.transformer import Transformer

Measured = tuple[LanguageModel, Text]


class InFloat64:
    """The logits of a model in fp64, as a client gives them."""

    name = "fp64"

    def __init__(self, subject: LanguageModel):
        self.model = subject.model.double()
        self.model.compute_dtype = torch.float64
        self.sizes: list[tuple[int, ...]] = []

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        self.sizes.append(tuple(ids.shape))
        logits = self.model(ids).logits
        assert logits is not None
        return logits.float()

    def encode(self, text: str) -> list[int] | None:
        return None


@pytest.fixture(scope="module")
def measured(plain_run: Path) -> tuple[LanguageModel, Text]:
    subject = open_model(plain_run)
    return subject, read_text("held_out", subject)


def test_perplexity_through_a_client_is_that_of_the_model(measured: Measured, plain_run: Path) -> None:
    """Windows, context and BOS are those of `perplexity`; the oracle is written out."""
    subject, text = measured
    client = InFloat64(open_model(plain_run))
    model = ClientModel(client, subject.model.config)
    options: dict[str, Any]
    for options in ({"seq_len": 32}, {"seq_len": 24, "overlap": 7, "bos_id": 0}, {"seq_len": 64}):
        expected = perplexity(subject.model, text, max_tokens=300, **options)
        found = perplexity(cast(Transformer, model), text, max_tokens=300, **options)
        assert (found.tokens, found.bytes, found.name) == (expected.tokens, expected.bytes, expected.name)
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    rows = text.tokens[:288].view(-1, 32)
    nats = sum(F.cross_entropy(client.logits(row[None])[0, :-1], row[1:], reduction="sum").item() for row in rows)
    found = perplexity(cast(Transformer, model), text, seq_len=32, max_tokens=300)
    assert found.perplexity == pytest.approx(math.exp(nats / (9 * 31)), rel=1e-6)
    assert {rows for rows, _ in client.sizes} == {1}  # a window at a time


def test_greedy_text_is_the_most_likely_continuation(measured: Measured) -> None:
    subject, text = measured
    ids = text.tokens[:16].tolist()
    with torch.no_grad():
        for _ in range(16):  # 32 tokens are the context of the model
            logits = subject.model(torch.tensor([ids])).logits
            assert logits is not None
            ids.append(int(logits[0, -1].argmax()))
    reading = observe("it", subject.model, text, subject)
    assert reading.continuation == subject.tokenizer.decode(ids[16:], skip_special_tokens=False)
    assert reading.perplexity == perplexity(subject.model, text, seq_len=32, max_tokens=16_384).perplexity


def test_there_are_100_odd_texts() -> None:
    texts = odd_texts()
    assert len(texts) == len(set(texts)) == 100
    assert texts == odd_texts()
    together = "".join(texts)
    together.encode()  # no halves of surrogate pairs
    categories = {unicodedata.category(character) for character in together}
    assert categories >= {"Mn", "Cf", "Cc", "Cn", "Co", "Lo", "So", "Sk", "Zs", "Zl", "Zp", "Nd", "No", "Nl"}
    assert {unicodedata.bidirectional(character) for character in together} >= {"R", "AL", "AN", "RLO"}
    for part in ("\x00", "\r\n", " " * 60, "\ud7ff\ue000", "\u200d", "<|endoftext|>", "\U0010ffff", "e\u0301"):
        assert part in together


def made_certificate(**changes: Any) -> FileCertificate:
    certificate = FileCertificate(
        file="m|.gguf",
        files={"m.gguf": {"bytes": 1_234_567, "sha256": "0"}},
        format="gguf",
        scheme="q4_0",
        quantization="4-16-16 [0123]",
        dtype="fp32",
        model={"name": "run", "path": "runs/run", "sha256": "1", "step": 3},
        context=256,
        ffn_width=(344, 352),
        folding=Difference(0.1, 1e-7, None),
        text={"name": "held_out", "sha256": "2", "tokens": 16_384},
        window=256,
        trained=TextReading("osp", 20.0, "a"),
        fake=TextReading("osp", 21.0, "b"),
        client=TextReading("llama.cpp 1", 21.001, "b"),
        tolerance=1e-3,
        same_tokens=100,
        above_four_bits=("blk.0.attn_norm.weight", "blk.1.attn_norm.weight", "token_embd.weight", "output.weight"),
        versions={"torch": "2"},
    )
    return dataclasses.replace(certificate, **changes)


def test_table_says_what_was_measured() -> None:
    table = made_certificate().markdown()
    for row in (
        r"| file | m\|.gguf: 1,234,567 bytes |",
        "| quantization | gguf q4_0: 4-16-16 [0123]; the rest in fp32 |",
        "| text | the first 16,384 tokens of held_out in windows of 256; SHA-256 2 |",
        "| perplexity as trained, 16 bits | 20.0000 |",
        "| perplexity of the file | 21.0010 by llama.cpp 1; relative difference 4.8e-05, at most 0.001 |",
        "| greedy text | equal from the file and by fake quantization |",
        "| tokens | equal on 100 of 100 texts with odd Unicode |",
        "| above 4 bits | 4 tensors: blk.*.attn_norm.weight (2), token_embd.weight, output.weight |",
        "| width of the FFN | 352 channels, the last 8 of them zeros, which leaves the function as it is |",
    ):
        assert f"\n{row}\n" in table
    other = made_certificate(
        same_tokens=None,
        client=TextReading("x", 21.0, "c"),
        ffn_width=(352, 352),
        above_four_bits=tuple(f"t{i}" for i in range(9)),
    ).markdown()
    assert "| tokens | not compared, the client has no tokenizer |" in other
    assert "| greedy text | not equal from the file" in other
    assert "| width of the FFN | 352 channels as trained |" in other
    assert "| above 4 bits | 9 tensors: t0, t1, t2, t3, t4, t5, and 3 more kinds |" in other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"client": TextReading("x", 21.022, "b")},
            r"is 21.00000 by fake quantization and 21.02200 by x, more",
        ),
        ({"client": TextReading("x", math.nan, "b")}, r"nan by x"),
        ({"client": TextReading("x", math.inf, "b")}, r"inf by x"),
        (
            {"above_four_bits": ("output.weight", "blk.0.ffn_down.weight")},
            r"ffn_down.weight has more than 4 bits",
        ),
        ({"above_four_bits": ("model.layers.0.mlp.down_proj.weight",)}, r"down_proj.weight has more than 4 bits"),
        ({"above_four_bits": ("blk.0.attn_output.weight",)}, r"attn_output.weight has more than 4 bits"),
    ],
)
def test_file_that_computes_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made_certificate(**changes).check(w_bits=4)


def test_what_may_differ_is_accepted() -> None:
    made_certificate(client=TextReading("x", 21.020, "other text")).check(w_bits=4)
    made_certificate(above_four_bits=("blk.0.ffn_down.weight",)).check(w_bits=8)
    names = (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "output_norm.weight",
        "token_embd.weight",
    )
    names += ("model.layers.0.mlp.down_proj.bias", "model.layers.3.input_layernorm.weight", "rope_freqs.weight")
    made_certificate(above_four_bits=names).check(w_bits=4)


def test_files_are_described_by_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"12")
    (tmp_path / "a").write_bytes(b"")
    expected = {"a": b"", "b": b"12"}
    assert describe_files(tmp_path) == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in expected.items()
    }
    assert list(describe_files(tmp_path / "b")) == ["b"]
    assert json.loads(json.dumps(dataclasses.asdict(made_certificate())))["tolerance"] == 1e-3
