"""Read Hugging Face Llama folders without `transformers`; `load_hf(folder)` is the inverse of export.

Names and layout are the same as ours. Models that `Transformer` cannot express (another architecture or kind of RoPE,
quantized weights) are refused with the reason. Only safetensors are read, because pickled weights can hold code.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from osp.config import ModelConfig
from osp.data.tokenizer import load_tokenizer, vocab_size
from osp.errors import UserError
from osp.model.transformer import Transformer, meta_model
from osp.schema import build

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BODY = "model."  # Hugging Face's prefix of all parameters but the head
HEAD = "lm_head.weight"
ROTARY_TABLE = "rotary_emb.inv_freq"  # a buffer that old versions stored
# Keys of config.json that are fields of `ModelConfig` and `RopeScaling`
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = ("num_key_value_heads", "max_position_embeddings", "head_dim", "attention_bias", "mlp_bias")
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load_hf(folder: str | Path) -> Transformer:
    """Return the Llama in a folder with `config.json` and safetensors: fp32, on the CPU, in eval mode.

    A tied head becomes a copy of the embedding. Raises `UserError` if the model cannot be expressed, or if weights are
    missing, damaged or unknown.
    """
    folder = Path(folder)
    values = _read_json(folder / CONFIG)
    model = meta_model(_model_config(folder / CONFIG, values)).to_empty(device="cpu")
    missing = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in _tensors(folder):
            ours = name if name == HEAD else name.removeprefix(BODY)
            if name.endswith(ROTARY_TABLE):
                continue
            if ours not in missing:
                raise UserError(f"{folder}: the weights hold {name}, which the model of {CONFIG} does not have")
            parameter = missing.pop(ours)
            if parameter.shape != tensor.shape:
                raise UserError(
                    f"{folder}: {name} has the shape {list(tensor.shape)} where {CONFIG} says {list(parameter.shape)}"
                )
            if not tensor.is_floating_point():
                raise UserError(f"{folder}: {name} is {tensor.dtype}; quantized weights cannot be read")
            parameter.copy_(tensor)
        if HEAD in missing and values.get("tie_word_embeddings") and "embed_tokens.weight" not in missing:
            missing.pop(HEAD)
            model.lm_head.weight.copy_(model.embed_tokens.weight)
    if missing:
        raise UserError(f"{folder}: the weights lack {next(iter(missing))} and {len(missing) - 1} more")
    return model.eval()


def load_hf_tokenizer(folder: str | Path) -> tuple[Tokenizer, int | None, int | None]:
    """Return the tokenizer of a folder and the ids of BOS and EOS or None. Raises `UserError` if it does not fit."""
    folder = Path(folder)
    config = _read_json(folder / CONFIG)
    if not (folder / TOKENIZER).is_file():
        raise UserError(f"{folder}: {TOKENIZER} is missing; save the tokenizer there in the fast format")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    check_vocabulary(folder / TOKENIZER, tokenizer, num_embeddings=_model_config(folder / CONFIG, config).vocab_size)
    return tokenizer, _token_id(config, "bos_token_id"), _token_id(config, "eos_token_id")


def check_vocabulary(path: Path, tokenizer: Tokenizer, *, num_embeddings: int) -> None:
    """Raise `UserError` if `tokenizer` has more tokens than the model has embeddings."""
    if vocab_size(tokenizer) > num_embeddings:
        raise UserError(
            f"{path}: the tokenizer of another vocabulary, its ids go up to {vocab_size(tokenizer) - 1} and the model "
            f"has {num_embeddings} embeddings"
        )


def _model_config(path: Path, values: dict[str, Any]) -> ModelConfig:
    """Return the configuration of the model in `config.json`; `UserError` with the reason if it cannot be expressed."""
    if values.get("model_type") != "llama":
        raise UserError(f"{path}: model_type={values.get('model_type')!r}; only models of type 'llama' can be read")
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act={values['hidden_act']!r}; only silu can be read")
    if values.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantized (quantization_config); take the unquantized model")
    eps = values.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, int | float) or not 0 < eps < float("inf"):
        raise UserError(f"{path}: rms_norm_eps={eps!r}: must be a number above 0")
    # transformers 5 keeps theta and scaling in rope_parameters, older versions in two keys
    rope = values.get("rope_parameters") or {}
    model = {key: values.get(key) for key in REQUIRED}
    model |= {key: values[key] for key in OPTIONAL if values.get(key) is not None}
    model["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    model["rope_scaling"] = _rope_scaling(path, values.get("rope_scaling") or rope)
    model["norm"] = {"name": "rmsnorm", "eps": eps}
    try:
        return build(ModelConfig, model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _rope_scaling(path: Path, values: Any) -> dict[str, Any] | None:
    if not isinstance(values, dict):
        raise UserError(f"{path}: rope_scaling={values!r}: expected a JSON object")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ("default", "linear", "llama3") or values.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: RoPE of the type {kind!r}; only plain, linear and llama3 RoPE can be read")
    if kind == "default":
        return None
    keys = ROPE_SCALING if kind == "llama3" else ROPE_SCALING[:1]
    return {"rope_type": kind, **{key: values.get(key) for key in keys}}


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every stored tensor, one in memory at a time."""
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()  # a list: safe_open is not a mapping
                yield from ((name, file.get_tensor(name)) for name in names)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: missing or no whole safetensors file: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the model: one, or the shards in the index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = _read_json(folder / INDEX).get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        if not names:
            raise UserError(f"{folder / INDEX}: weight_map names no files")
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{folder / INDEX}: names the file {outside[0]!r} outside of its folder")
        return [folder / name for name in names]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise UserError(f"{folder}: only pickled weights, which could hold code; convert them to safetensors")
    raise UserError(f"{folder}: no weights, neither {WEIGHTS} nor {INDEX}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path.parent}: no Hugging Face model, {path.name} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _token_id(config: dict[str, Any], key: str) -> int | None:
    """Return the id of a special token, the first of several."""
    value = config.get(key)
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else None
