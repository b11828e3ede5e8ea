"""llama.cpp itself reads the files: same tokens, logits, perplexity and greedy text. Needs llama-cpp-python."""

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from osp.config import TokenizerConfig, from_dict
from osp.convert.export import export
from osp.convert.file_certificate import odd_texts
from osp.convert.gguf_file import PRE_TOKENIZERS, Gguf, LlamaCpp, dequantized
from osp.data.tokenizer import train_tokenizer
from osp.errors import UserError
from osp.evaluation.language_model import open_model
from osp.evaluation.texts import read_text
from tests.conftest import made_text
from tests.convert.test_gguf_file import IDS, ODD, SHAPES, logits_of, make_source, write

INSTALL = "needs llama.cpp: `pip install llama-cpp-python` builds it in about ten minutes"
llama_cpp: Any = pytest.importorskip("llama_cpp", reason=INSTALL)
pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose widths are multiples of 256, as K-quants need them."""
    from osp.train.setup import train

    folder = tmp_path_factory.mktemp("wide") / "run"
    model = tiny_values["model"] | {"hidden_size": 256, "intermediate_size": 208, "max_position_embeddings": 64}
    length = tiny_values["train"] | {"steps": 100}
    changed = {"model": model, "train": length, "run": {"name": "wide", "dir": str(folder)}}
    train(from_dict({**tiny_values, **changed}))
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_model(shape: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(made_text(20), TokenizerConfig(vocab_size=300))
    source = make_source(tokenizer, **SHAPES[shape])
    expected = logits_of(source.model)
    logits = LlamaCpp(write(source, "f32", tmp_path / "m.gguf")).logits(IDS)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_tokens_are_those_of_the_tokenizer(name: str, tmp_path: Path) -> None:
    spec = json.loads(train_tokenizer(made_text(200), TokenizerConfig(vocab_size=1000)).to_str())
    parts, spec["model"]["ignore_merges"] = PRE_TOKENIZERS[name]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.encode_special_tokens = True
    client = LlamaCpp(write(make_source(tokenizer), "f32", tmp_path / "m.gguf"))
    for text in (*ODD, *odd_texts(), "a <tool> b<tool>", *made_text(3, seed=9)):
        assert client.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("scheme", ["f32", "bf16", "q8_0", "q4_0"])
def test_export_is_certified_by_llama_cpp(scheme: str, run: Path, tmp_path: Path) -> None:
    certificate = export(run, tmp_path / "m.gguf", format="gguf", scheme=scheme)
    assert certificate.client.reader.startswith("llama.cpp of llama-cpp-python")
    assert certificate.same_tokens == 100
    assert certificate.relative <= (1e-6 if scheme == "f32" else 1e-3)
    assert certificate.client.continuation == certificate.fake.continuation
    assert certificate.client.perplexity < 200  # of 320 tokens: the model has learned
    assert certificate.context == 32
    written = LlamaCpp(tmp_path / "m.gguf")
    assert written.logits(torch.zeros(1, 32, dtype=torch.long)).shape == (1, 32, 320)


def test_q4_k_m_by_llama_cpp_has_no_fallback(run: Path, tmp_path: Path) -> None:
    certificate = export(run, tmp_path / "m.gguf", format="gguf", scheme="f32")
    settings, smaller = llama_cpp.llama_model_quantize_default_params(), tmp_path / "m-Q4_K_M.gguf"
    settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    paths = (str(path).encode() for path in (tmp_path / "m.gguf", smaller))
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(settings)) == 0
    gguf = pytest.importorskip("gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(smaller).tensors if len(t.shape) == 2}
    assert set(types.values()) == {"Q4_K", "Q6_K"}
    assert certificate.ffn_width == (208, 256)  # 208 is no multiple of the 256 channels of a block
    subject = open_model(run)
    ids = read_text("held_out", subject).tokens[:2048].view(-1, 32).long()
    by_llama_cpp, by_library = (
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()
        for logits in (LlamaCpp(smaller).logits(ids), dequantized(smaller, CPU).logits(ids))
    )
    assert by_llama_cpp == pytest.approx(by_library, rel=1e-3)
    assert by_llama_cpp == pytest.approx(certificate.trained.perplexity, rel=0.1)


def test_file_that_llama_cpp_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRE_TOKENIZERS, "of-another-planet", PRE_TOKENIZERS["gpt-2"])
    monkeypatch.delitem(PRE_TOKENIZERS, "gpt-2")
    tokenizer = train_tokenizer(made_text(20), TokenizerConfig(vocab_size=300))
    path = write(make_source(tokenizer), "f32", tmp_path / "m.gguf")
    with pytest.raises(UserError, match=r"llama\.cpp does not load m\.gguf: .*; not written"):
        Gguf().open(path, CPU)
