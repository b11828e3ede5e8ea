"""GGUF, the file format of llama.cpp: one file with the weights and the tokenizer, through the `gguf` library.

Tensors are as llama.cpp's converter writes them (`conversion/llama.py`): matrices in the type of the scheme, vectors in
F32, the rows of q_proj and k_proj reordered: its RoPE rotates the channels (2i, 2i + 1) of a head, not (i, i + K/2).

A file names its pre-tokenizer and cannot describe one. So a tokenizer is written only if its pre-tokenizer is one of
`PRE_TOKENIZERS` and llama.cpp has an equal of all its other parts.
"""

import contextlib
import errno
import importlib
import io
import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from osp.convert.file_format import Client, FileFormat, LlamaSource
from osp.convert.hf_export import InOsp
from osp.errors import UserError, as_user_error
from osp.model.attention import rotary_frequencies
from osp.model.hf_llama import BODY, EMBEDDING, HEAD
from osp.model.transformer import Transformer, meta_model
from osp.model_config import ModelConfig, NormConfig, RopeScaling
from osp.quant.apply import Quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec

Array = NDArray[Any]

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # GPT-2's pattern
BYTES = WORDS | {"use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


LLAMA3 = _split(rf"{CONTRACTIONS}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{REST}")
QWEN2 = _split(rf"{CONTRACTIONS}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{REST}")
# llama.cpp's name -> the same pre-tokenizer in tokenizer.json, and `ignore_merges` of the BPE (llama-vocab.cpp)
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([WORDS], False),
    "smollm": ([DIGITS, WORDS], False),
    "llama-bpe": ([LLAMA3, BYTES], True),
    "smaug-bpe": ([LLAMA3, BYTES], False),
    "qwen2": ([QWEN2, BYTES], False),
}

FILLER = "[PAD{}]"  # name of an embedding without a token in llama.cpp's converter
SIZES = {  # llama.cpp's keys -> fields and properties of `ModelConfig`
    "vocab_size": "vocab_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "kv_heads",
    "attention.key_length": "head_size",
    "attention.value_length": "head_size",
    "rope.dimension_count": "head_size",
}
ROPE_FACTORS = "rope_freqs.weight"  # divisors of the RoPE frequencies, (head_size / 2,)


class Gguf(FileFormat):
    """A file for llama.cpp and programs built on it."""

    name = "gguf"
    schemes = {name: DEPLOYED[name] for name in ("q4_0", "q8_0")} | {"bf16": QuantSpec(), "f32": QuantSpec()}
    suffix = ".gguf"
    # llama.cpp multiplies 8-bit activations with quantized weights, and bf16 activations with bf16 weights
    tolerance = 1e-3

    def ffn_multiple(self, scheme: str) -> int:
        return 32 if scheme in DEPLOYED else 256  # Q4_K, to which a bf16 file can be quantized, has blocks of 256

    def check(self, config: ModelConfig, tokenizer: Tokenizer, scheme: str) -> None:
        _library()
        pre_tokenizer_name(tokenizer)

    def dtype(self, scheme: str) -> torch.dtype:
        return torch.bfloat16 if scheme == "bf16" else torch.float32

    def write(self, source: LlamaSource, state: Quantized, scheme: str, path: Path) -> None:
        gguf = _library()
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if scheme == "f32" else f"MOSTLY_{scheme.upper()}"])
        _add_model(writer, source)
        _add_tokenizer(writer, source)
        for name, values, kind in _stored_tensors(source.model, scheme):
            stored_as = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, stored_as), raw_dtype=stored_as)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except OSError as error:  # numpy says how many bytes it wrote, and not why no more
            raise OSError(error.errno or errno.ENOSPC, error.strerror or f"no space left, {error}") from error
        finally:
            writer.close()

    def open(self, path: Path, device: torch.device) -> Client:
        return dequantized(path, device) if _llama_cpp() is None else LlamaCpp(path)

    def above_four_bits(self, path: Path) -> list[str]:
        sizes = _library().GGML_QUANT_SIZES  # type -> (weights, bytes) of a block, with its scales
        tensors = _library().GGUFReader(path).tensors
        bits = {tensor.name: 8 * np.divide(*sizes[tensor.tensor_type][::-1]) for tensor in tensors}
        return [name for name, bits_per_weight in bits.items() if bits_per_weight > 5]

    def hint(self, path: Path, scheme: str) -> str | None:
        """Return the command that makes a Q4_K_M of a file that is not quantized."""
        smaller = path.with_name(f"{path.stem}-Q4_K_M.gguf")
        return None if scheme in DEPLOYED else f"4 bits by llama.cpp: llama-quantize {path} {smaller} Q4_K_M"


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with keys and values in fp32."""

    def __init__(self, path: Path):
        self.name = f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}, cache in fp32"
        self._path, self._library = path, _llama_cpp()
        context = _library().GGUFReader(path).fields["llama.context_length"].contents()
        self._model = self._open(min(2048, int(context)))

    def logits(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > self._model.n_ctx():
            self._model = self._open(ids.shape[1])
        rows: list[Tensor] = []
        for sequence in ids.tolist():
            self._model.reset()
            self._model.eval(sequence)
            rows.append(torch.tensor(self._model.scores[: len(sequence)]))
        return torch.stack(rows)

    def encode(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), add_bos=False, special=False)

    def _open(self, length: int) -> Any:
        """Return the model with a cache for `length` tokens; it holds the logits of all of them."""
        threads, fp32 = torch.get_num_threads(), self._library.GGML_TYPE_F32
        settings = {"n_threads": threads, "n_threads_batch": threads, "type_k": fp32, "type_v": fp32}
        silent = contextlib.redirect_stderr(io.StringIO())  # it warns that it rounds the length up to a multiple of 256
        with silent, as_user_error(f"llama.cpp does not load {self._path.name}: ", ValueError, after="; not written"):
            return self._library.Llama(str(self._path), n_ctx=length, logits_all=True, verbose=False, **settings)


def dequantized(path: Path, device: torch.device) -> InOsp:
    """Return the file as the `gguf` library reads it: its weights, its tokens and its merges."""
    reader = _library().GGUFReader(path)
    name = f"gguf {version('gguf')} (its dequantization; llama-cpp-python is not installed)"
    return InOsp(read_model(reader).to(device), read_tokenizer(reader), name)


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name of the pre-tokenizer; raise `UserError` for a part that llama.cpp does not have."""
    spec = json.loads(tokenizer.to_str())
    model, parts, spaces = spec["model"], _parts(spec["pre_tokenizer"]), ("lstrip", "rstrip", "single_word")
    form = (parts, bool(model.get("ignore_merges")))
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == form), None)
    options = [key for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    added = [token["content"] for token in spec["added_tokens"] if not token["special"] and any(map(token.get, spaces))]
    types = " + ".join(part["type"] for part in parts) or "none"
    reasons = {
        f"its model is {model['type']}, not a byte-level BPE": model["type"] != "BPE",
        f"its BPE has {' and '.join(options)}": bool(options),
        "its BPE has no merges": not model.get("merges"),
        f"llama.cpp does not apply its normalizer {(spec['normalizer'] or {}).get('type')}": bool(spec["normalizer"]),
        "add_prefix_space=true in its pre-tokenizer": any(part.get("add_prefix_space") for part in parts),
        f"llama.cpp has no pre-tokenizer like {types} with ignore_merges={str(form[1]).lower()}": name is None,
        f"its token {added[:1]} takes the space beside it ({', '.join(spaces)})": bool(added),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if name is None or reason is not None:
        fix = "use format=hf or train with tokenizer=train"
        raise UserError(f"format=gguf cannot hold this tokenizer: {reason}; {fix}")
    return name


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the parts of a pre-tokenizer. `trim_offsets` of ByteLevel has no influence on tokens."""
    if component is None:
        return []
    parts = component["pretokenizers"] if component["type"] == "Sequence" else [component]
    return [part | {"trim_offsets": True} if part["type"] == "ByteLevel" else part for part in parts]


def _library() -> Any:
    with as_user_error("format=gguf needs the gguf library: pip install -e '.[deploy]' (", ImportError, after=")"):
        import gguf
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it would print the name of the temporary file
    return gguf


def _llama_cpp() -> Any:
    """Return llama-cpp-python, None if it is not installed or was built for another machine."""
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError):
        return None


def _add_model(writer: Any, source: LlamaSource) -> None:
    """Write what the file says about the model."""
    config = source.model.config
    writer.add_type("model")
    writer.add_name(source.subject.name)
    writer.add_quantization_version(_library().GGML_QUANT_VERSION)
    for key, field in SIZES.items():
        writer.add_uint32(f"llama.{key}", getattr(config, field))
    writer.add_layer_norm_rms_eps(source.model.norm.eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _add_tokenizer(writer: Any, source: LlamaSource) -> None:
    """Write tokens, merges and special tokens; an embedding without a token gets a filler."""
    kinds, subject = _library().TokenType, source.subject
    spec = json.loads(subject.tokenizer.to_str())
    added = {token["id"]: token["special"] for token in spec["added_tokens"]}
    by_id = {token_id: token for token, token_id in subject.tokenizer.get_vocab(with_added_tokens=True).items()}
    ids = range(source.model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(subject.tokenizer))
    writer.add_token_list([by_id.get(i, FILLER.format(i)) for i in ids])
    kind_of = {i: kinds.CONTROL if special else kinds.USER_DEFINED for i, special in added.items()}
    writer.add_token_types([kind_of.get(i, kinds.NORMAL if i in by_id else kinds.UNUSED) for i in ids])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_bos_token_id(subject.begin_id)  # without it llama.cpp takes token 11
    if subject.eos_id is not None:
        writer.add_eos_token_id(subject.eos_id)
    for stop in [i for i in subject.stop_ids if i != subject.eos_id][:1]:
        writer.add_eot_token_id(stop)
    writer.add_add_bos_token(subject.begins_with_bos)
    writer.add_add_eos_token(False)


def _parameters(config: ModelConfig) -> Iterator[tuple[str, str, int]]:
    """Yield name, llama.cpp's name and number of rotated heads of every parameter; 0: not rotated."""
    gguf = _library()
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.kv_heads}
    for name, _ in meta_model(config).named_parameters():
        name_there = table.get_name(name if name == HEAD else BODY + name, (".weight", ".bias"))
        yield name, name_there, heads.get(name.split(".")[-2], 0)


def _stored_tensors(model: Transformer, scheme: str) -> Iterator[tuple[str, Array, str]]:
    """Yield llama.cpp's name, the values and the type of every tensor."""
    config = model.config
    for name, name_there, heads in _parameters(config):
        values = model.get_parameter(name).detach().float().cpu()
        if heads:  # (head, half, pair, ...) -> (head, pair, half, ...)
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        is_end = scheme == "q4_0" and name in (HEAD, EMBEDDING)
        yield name_there, values.numpy(), "F32" if values.ndim == 1 else "Q8_0" if is_end else scheme.upper()
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        factors = rotary_frequencies(config.head_size, config.rope_theta) / rotary_frequencies(
            config.head_size, config.rope_theta, scaling=config.rope_scaling
        )
        yield ROPE_FACTORS, factors.numpy(), "F32"


def read_model(reader: Any) -> Transformer:
    """Return the model of a file, whatever its types: fp32, dequantized by the `gguf` library."""

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sizes = {field: value(key) for key, field in SIZES.items()}
    sizes |= {"num_key_value_heads": sizes.pop("kv_heads"), "head_dim": sizes.pop("head_size")}
    scaled = "llama.rope.scaling.factor" in reader.fields
    config = ModelConfig(
        **sizes,
        rope_theta=value("rope.freq_base"),
        rope_scaling=RopeScaling("linear", value("rope.scaling.factor")) if scaled else None,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        norm=NormConfig(name="rmsnorm", eps=value("attention.layer_norm_rms_epsilon")),
    )
    model = meta_model(config).to_empty(device="cpu").eval()
    for name, name_there, heads in _parameters(config):
        values = _dequantized(tensors[name_there])
        if heads:
            values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        model.get_parameter(name).data = values
    if ROPE_FACTORS in tensors:
        frequency = rotary_frequencies(config.head_size, config.rope_theta) / _dequantized(tensors[ROPE_FACTORS])
        angle = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), frequency)
        model._rotary = angle.cos(), angle.sin()  # whichever scaling the divisors come from
    return model


def _dequantized(tensor: Any) -> Tensor:
    return torch.tensor(_library().quants.dequantize(tensor.data, tensor.tensor_type))


def read_tokenizer(reader: Any) -> Tokenizer:
    """Return the tokenizer of a file, made from its tokens, merges and the name of its pre-tokenizer."""
    kinds = _library().TokenType
    tokens, types, merges, name = (
        reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges", "pre")
    )
    parts, ignore_merges = PRE_TOKENIZERS[name]
    added = [
        {"id": i, "content": tokens[i], "special": kind == kinds.CONTROL, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, kind in enumerate(types)
        if kind in (kinds.CONTROL, kinds.USER_DEFINED)
    ]
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != kinds.UNUSED}
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges},
    }
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    return tokenizer
