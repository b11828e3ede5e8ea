"""GGUF files hold the rounded weights bit for bit, in llama.cpp's order, and a tokenizer that gives the same tokens."""

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from osp.config import TokenizerConfig
from osp.convert.file_format import LlamaSource
from osp.convert.gguf_file import PRE_TOKENIZERS, Gguf, dequantized, pre_tokenizer_name
from osp.convert.hf_export import InOsp
from osp.data.tokenizer import train_tokenizer
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel
from osp.model.transformer import Transformer, build_model
from osp.model_config import ModelConfig, NormConfig, RopeScaling
from osp.quant.apply import quantized
from osp.quant.formats import Q4_0, Q8_0
from tests.conftest import made_text

FORMAT, CPU = Gguf(), torch.device("cpu")
CONTEXT, FILLERS = 48, 7  # embeddings without a token
IDS = torch.randint(0, 300, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_scaling": RopeScaling("linear", 2.0)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, original_max_position_embeddings=32), "rope_theta": 500.0},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 32},
    "tied": {"tie_embeddings": True},
}
ODD = (
    *(
        "",
        " ",
        "\n",
        " \n\n  x",
        "a  b",
        "\r\n\t",
        "it's I'LL we'Ve",
        "12345 ½ ² ٣ 一二",
        "ﬁ e\u0301 é ǅ ß İ",
        "नमस्ते ไทย",
    ),
    *(
        "\u200b\u200d\ufeff",
        "\u00a0\u3000x\u0085y\u2028z",
        "👩‍👩‍👧 🏳️‍🌈",
        "\x00 \x1f \x7f",
        "\U0010ffff\ue000",
        "<|endoftext|>",
        "<|end|> <tool>",
    ),
    *("=" * 70 + " " * 70, "日本語。中文、한국어", "don't—'s", "x\u0301\u0302\u0303", "[PAD303]", "ĀġĊ Ġ"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(made_text(20), TokenizerConfig(vocab_size=300))


def make_source(tokenizer: Tokenizer, **shape: Any) -> LlamaSource:
    """Return a random Llama with grouped queries, whose vocabulary is larger than that of `tokenizer`."""
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size() + FILLERS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        norm=NormConfig("rmsnorm", eps=1e-5),
    )
    model = build_model(dataclasses.replace(config, **shape), seed=0).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    end = tokenizer.token_to_id("<|endoftext|>") or 0
    subject = LanguageModel("tiny", Path("tiny"), model, tokenizer, end, end, stop_ids=(end, end + 1))
    return LlamaSource(model, subject, torch.float32)


def write(source: LlamaSource, scheme: str, path: Path) -> Path:
    FORMAT.check(source.model.config, source.subject.tokenizer, scheme)
    with quantized(source.model, FORMAT.schemes[scheme]) as state:
        FORMAT.write(source, state, scheme, path)
    return path


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def metadata_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@torch.no_grad()
def logits_of(model: Transformer) -> torch.Tensor:
    logits = model(IDS).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize(("scheme", "rounded"), [("q4_0", Q4_0(4)), ("q8_0", Q8_0(8))])
def test_stored_blocks_are_our_fake_quantization_and_those_of_the_gguf_library(
    scheme: str, rounded: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = make_source(tokenizer)
    before = copy.deepcopy(source.model)
    stored = tensors_of(write(source, scheme, tmp_path / "m.gguf"))
    kind = gguf.GGMLQuantizationType[scheme.upper()]
    for name, ours in (("blk.1.ffn_down", "layers.1.mlp.down_proj"), ("blk.0.attn_v", "layers.0.self_attn.v_proj")):
        weight, tensor = before.get_parameter(f"{ours}.weight").detach(), stored[f"{name}.weight"]
        assert tensor.tensor_type == kind
        assert np.array_equal(tensor.data, gguf.quants.quantize(weight.numpy(), kind))  # of the weights before rounding
        assert np.array_equal(gguf.quants.dequantize(tensor.data, kind), rounded.round(weight).numpy())
    for name, ours in (("token_embd", "embed_tokens"), ("output", "lm_head")):
        weight, tensor = before.get_parameter(f"{ours}.weight").detach(), stored[f"{name}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        assert np.array_equal(tensor.data, gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0))
    for name in ("blk.0.attn_norm", "blk.1.ffn_norm", "output_norm"):
        assert stored[f"{name}.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    above = FORMAT.above_four_bits(tmp_path / "m.gguf")
    assert set(above) == {name for name, tensor in stored.items() if tensor.tensor_type.name != "Q4_0"}
    assert len(above) == (7 if scheme == "q4_0" else len(stored))


def test_tied_model_has_no_output_matrix(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """llama.cpp multiplies with token_embd then, which has the type of the head."""
    source = make_source(tokenizer, tie_embeddings=True)
    weight = source.model.embed_tokens.weight.detach().clone()
    stored = tensors_of(write(source, "q4_0", tmp_path / "m.gguf"))
    assert "output.weight" not in stored
    assert np.array_equal(
        stored["token_embd.weight"].data, gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    )
    client = dequantized(tmp_path / "m.gguf", CPU)
    assert isinstance(client, InOsp)
    assert client.model.lm_head.weight is client.model.embed_tokens.weight


def test_rows_of_queries_and_keys_alternate_between_the_halves_of_a_head(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = make_source(tokenizer, attention_bias=True)
    stored = tensors_of(write(source, "f32", tmp_path / "m.gguf"))
    size = source.model.config.head_size
    for name, ours, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        for part in ("weight", "bias"):
            values = source.model.get_parameter(f"layers.1.self_attn.{ours}.{part}").detach().numpy()
            written = stored[f"blk.1.{name}.{part}"].data
            for head in range(heads):
                for pair in range(size // 2):  # RoPE rotates the rows 2 i and 2 i + 1 there, i and i + K/2 here
                    assert np.array_equal(written[head * size + 2 * pair], values[head * size + pair])
                    assert np.array_equal(written[head * size + 2 * pair + 1], values[head * size + pair + size // 2])
    v_proj = source.model.get_parameter("layers.1.self_attn.v_proj.weight").detach().numpy()
    assert np.array_equal(stored["blk.1.attn_v.weight"].data, v_proj)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", ["f32", "q4_0"])
def test_model_read_back_has_the_same_logits(shape: str, scheme: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = make_source(tokenizer, **SHAPES[shape])
    client = dequantized(write(source, scheme, tmp_path / "m.gguf"), CPU)
    with quantized(source.model, FORMAT.schemes[scheme]):
        expected = logits_of(source.model)
    assert (client.logits(IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bf16_file_holds_bf16_matrices_and_fp32_vectors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = make_source(tokenizer)
    assert FORMAT.dtype("bf16") == torch.bfloat16
    for parameter in source.model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    path = write(source, "bf16", tmp_path / "m.gguf")
    assert {tensor.tensor_type.name for tensor in tensors_of(path).values()} == {"BF16", "F32"}
    assert torch.equal(dequantized(path, CPU).logits(IDS), logits_of(source.model))


def test_divisors_of_llama3_frequencies_are_llama_cpps(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(make_source(tokenizer, **SHAPES["llama3"]), "f32", tmp_path / "m.gguf")
    expected = []
    for i in range(8):  # the loop of llama.cpp's converter, in fp64
        wavelength = 2 * math.pi * 500.0 ** (2 * i / 16)
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        scaled = 1 / ((1 - smooth) / 8.0 + smooth)
        expected.append(1.0 if wavelength < 32 / 4.0 else 8.0 if wavelength > 32 / 1.0 else scaled)
    assert 1.0 < expected[1] < 8.0
    np.testing.assert_allclose(tensors_of(path)["rope_freqs.weight"].data, expected, rtol=1e-6)
    assert "llama.rope.scaling.type" not in metadata_of(path)


def test_metadata_describes_the_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(make_source(tokenizer, **SHAPES["linear"]), "q4_0", tmp_path / "m.gguf")
    metadata, size = metadata_of(path), tokenizer.get_vocab_size()
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 2,  # mostly Q4_0
        "llama.context_length": CONTEXT,
        "llama.vocab_size": size + FILLERS,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 1,  # the second token that ends a text
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    kinds = gguf.TokenType
    assert metadata["tokenizer.ggml.token_type"] == [
        kinds.CONTROL,
        *[kinds.NORMAL] * (size - 1),
        *[kinds.UNUSED] * FILLERS,
    ]
    assert metadata["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, size + FILLERS)]


def variant(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    """Return a copy whose tokenizer.json went through `change`."""
    spec = json.loads(tokenizer.to_str())
    change(spec)
    changed = Tokenizer.from_str(json.dumps(spec))
    changed.encode_special_tokens = True
    return changed


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_tokenizer_read_back_gives_the_same_tokens(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts, ignore_merges = PRE_TOKENIZERS[name]

    def change(spec: dict[str, Any]) -> None:
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        spec["model"]["ignore_merges"] = ignore_merges
        spec["model"]["vocab"]["Ġ1x"] = 300  # no merge leads to it

    changed = variant(tokenizer, change)
    changed.add_tokens(["<tool>"])
    assert pre_tokenizer_name(changed) == name
    path = write(make_source(changed), "f32", tmp_path / "m.gguf")
    assert metadata_of(path)["tokenizer.ggml.token_type"][301] == gguf.TokenType.USER_DEFINED
    client = dequantized(path, CPU)
    for text in (*ODD, "a 1x <tool>", *made_text(2, seed=5)):
        assert client.encode(text) == changed.encode(text, add_special_tokens=False).ids, text
    assert 301 in client.encode("a <tool>")
    assert 0 not in client.encode("<|endoftext|>")


def test_published_forms_of_the_pre_tokenizers_are_recognized(tokenizer: Tokenizer) -> None:
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": llama3}, "behavior": "Isolated", "invert": False}
    qwen2 = split | {"pattern": {"Regex": llama3.replace("{1,3}", "")}}
    digits = {"type": "Digits", "individual_digits": True}
    bare = words | {"use_regex": False, "trim_offsets": False}
    for parts, ignore_merges, name in (
        ([words | {"trim_offsets": False}], False, "gpt-2"),
        ([digits, words], False, "smollm"),
        ([split, bare], True, "llama-bpe"),
        ([qwen2, bare], False, "qwen2"),
    ):
        spec = json.loads(tokenizer.to_str())
        spec["pre_tokenizer"] = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
        spec["model"]["ignore_merges"] = ignore_merges
        assert pre_tokenizer_name(Tokenizer.from_str(json.dumps(spec))) == name


def refused_tokenizers(tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    """Return tokenizers that llama.cpp cannot have, by the part that the message names."""
    normalized, prefixed, split, padded, unmerged = (copy.deepcopy(tokenizer) for _ in range(5))
    normalized.normalizer = normalizers.NFC()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    split.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    padded.add_tokens([AddedToken("<tool>", lstrip=True)])
    no_words = copy.deepcopy(tokenizer)
    no_words.pre_tokenizer = None  # type: ignore[assignment]
    return {
        "its model is Unigram,": Tokenizer(models.Unigram([("a", 0.0)], 0, False)),
        "its model is WordPiece,": Tokenizer(models.WordPiece({"a": 0}, unk_token="a")),
        "its BPE has byte_fallback": variant(tokenizer, lambda spec: spec["model"].update(byte_fallback=True)),
        "its normalizer NFC": normalized,
        "add_prefix_space=true": prefixed,
        "like Whitespace + ByteLevel with": split,
        "like none with": no_words,
        "like ByteLevel with ignore_merges=true": variant(
            tokenizer, lambda spec: spec["model"].update(ignore_merges=True)
        ),
        "its BPE has end_of_word_suffix": variant(
            tokenizer, lambda spec: spec["model"].update(end_of_word_suffix="</w>")
        ),
        "its BPE has no merges": variant(unmerged, lambda spec: spec["model"].update(merges=[])),
        "its token ['<tool>']": padded,
    }


def test_tokenizers_that_llama_cpp_cannot_have_are_refused(tokenizer: Tokenizer) -> None:
    config = make_source(tokenizer).model.config
    for part, refused in refused_tokenizers(tokenizer).items():
        with pytest.raises(UserError) as error:
            FORMAT.check(config, refused, "f32")
        message = str(error.value)
        assert part in message, message
        assert "\n" not in message
        assert "tokenizer=train" in message


def test_missing_library_is_named_with_its_command(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[deploy\]'"):
        FORMAT.check(make_source(tokenizer).model.config, tokenizer, "f32")


def test_file_is_read_by_the_library_where_llama_cpp_is_missing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(make_source(tokenizer), "q8_0", tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    client = FORMAT.open(path, CPU)
    assert isinstance(client, InOsp)
    assert client.name.startswith("gguf 0.")
    assert "llama-cpp-python is not installed" in client.name


def test_only_an_unquantized_file_has_a_command_for_q4_k_m() -> None:
    path = Path("out/m.gguf")
    for scheme in ("bf16", "f32"):
        assert FORMAT.hint(path, scheme) == "4 bits by llama.cpp: llama-quantize out/m.gguf out/m-Q4_K_M.gguf Q4_K_M"
        assert FORMAT.ffn_multiple(scheme) == 256
    assert FORMAT.hint(path, "q4_0") is None
    assert FORMAT.ffn_multiple("q4_0") == 32
