"""Read Hugging Face Llama folders without `transformers`; `load_hf(folder)` is the inverse of export.

Names and layout are the same as ours. Models that `Transformer` cannot express (another architecture or kind of RoPE,
quantized weights) are refused with the reason. Only safetensors are read, because pickled weights can hold code.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from osp.data.tokenizer import load_tokenizer, vocab_size
from osp.errors import UserError, as_user_error
from osp.files import not_a_file, read_json
from osp.model.transformer import Transformer, meta_model
from osp.model_config import ModelConfig
from osp.schema import build

log = logging.getLogger(__name__)

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BODY = "model."  # Hugging Face's prefix of all parameters but the head
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"  # our names
FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")  # dtypes that are read
ROTARY_TABLE = "rotary_emb.inv_freq"  # a buffer that old versions stored
# Keys of config.json that are fields of `ModelConfig` and `RopeScaling`
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = ("num_key_value_heads", "max_position_embeddings", "head_dim", "attention_bias", "mlp_bias")
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load_hf(folder: str | Path) -> Transformer:
    """Return the Llama in a folder with `config.json` and safetensors: fp32, on the CPU, in eval mode.

    Raises `UserError` for another model, and missing or damaged weights.
    """
    folder = Path(folder)
    values = _read_object(folder / CONFIG)
    config, stored = _model_config(folder / CONFIG, values), _stored_tensors(folder)
    tied = bool(values.get("tie_word_embeddings")) and _remove_copy_of_head(folder, stored)
    model = meta_model(dataclasses.replace(config, tie_embeddings=tied))
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for ours, (file, name) in stored.items():  # headers only: nothing is allocated for a model that cannot be read
        shape, dtype = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
        if ours not in shapes:
            raise UserError(f"{folder}: the weights hold {name}, which the model of {CONFIG} does not have")
        if shape != shapes[ours]:
            raise UserError(f"{folder}: {name} has the shape {shape} where {CONFIG} says {shapes[ours]}")
        if dtype not in FLOATS:
            raise UserError(f"{folder}: {name} is {dtype}; quantized weights cannot be read")
    if missing := [name for name in shapes if name not in stored]:
        raise UserError(f"{folder}: the weights lack {missing[0]} and {len(missing) - 1} more")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            file, name = stored[ours]
            parameter.copy_(file.get_tensor(name))
    return model.eval()


def load_hf_tokenizer(folder: str | Path) -> tuple[Tokenizer, int | None, int | None, tuple[int, ...]]:
    """Return the tokenizer of a folder, the ids of BOS and EOS or None, and the ids that end a generated text.

    As in transformers, generation_config.json has the last word on those. `UserError` if the tokenizer does not fit.
    """
    folder = Path(folder)
    config = _read_object(folder / CONFIG)
    if not (folder / TOKENIZER).is_file():
        raise UserError(f"{folder}: {TOKENIZER} is missing; save the tokenizer there in the fast format")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    num_embeddings = _model_config(folder / CONFIG, config).vocab_size
    check_vocabulary(folder / TOKENIZER, tokenizer, num_embeddings=num_embeddings)
    bos, eos = (_token_ids(folder / CONFIG, config, key, num_embeddings) for key in ("bos_token_id", "eos_token_id"))
    generation = _read_object(folder / GENERATION) if (folder / GENERATION).exists() else {}
    stops = _token_ids(folder / GENERATION, generation, "eos_token_id", num_embeddings) or eos
    return tokenizer, next(iter(bos), None), next(iter(eos), None), stops


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
    if type(eps) not in (int, float) or not 0 < eps < 1e30:
        raise UserError(f"{path}: rms_norm_eps={eps!r:.60}: must be a number above 0")
    # transformers 5 keeps theta and scaling in rope_parameters, older versions in two keys
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters={rope!r:.60}: expected a JSON object")
    model = {key: values.get(key) for key in REQUIRED}
    model |= {key: values[key] for key in OPTIONAL if values.get(key) is not None}
    model["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    model["rope_scaling"] = _rope_scaling(path, values.get("rope_scaling") or rope)
    model["norm"] = {"name": "rmsnorm", "eps": eps}
    with as_user_error(f"{path}: ", UserError):
        return build(ModelConfig, model)


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


def _stored_tensors(folder: Path) -> dict[str, tuple[Any, str]]:
    """Return our name of every stored tensor -> the open file, and the name there."""
    stored: dict[str, tuple[Any, str]] = {}
    for path in _weight_files(folder):
        with as_user_error(f"{path}: missing or no whole safetensors file: ", OSError, SafetensorError):
            if not_a_file(path):
                raise OSError("not a file")
            file: Any = safe_open(path, framework="pt").__enter__()
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            ours = name if name == HEAD else name.removeprefix(BODY)
            if ours in stored:
                raise UserError(f"{path}: holds {name}, which the weights hold twice; keep one of them")
            if not name.endswith(ROTARY_TABLE):
                stored[ours] = file, name
    return stored


def _remove_copy_of_head(folder: Path, stored: dict[str, tuple[Any, str]]) -> bool:
    """Leave one matrix of a tied model; return False if there are two that differ, as `transformers` reads them."""
    head = stored.pop(HEAD, None)
    if head is None:
        return True
    matrices = [file.get_tensor(name) for file, name in (stored.setdefault(EMBEDDING, head), head)]
    if torch.equal(*(matrix.float() for matrix in matrices)):
        return True
    log.warning("%s: tie_word_embeddings=true, but the weights hold two different matrices: not tied", folder)
    stored[HEAD] = head
    return False


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the model: one, or the shards in the index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = _read_object(folder / INDEX).get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        if not names:
            raise UserError(f"{folder / INDEX}: weight_map names no files")
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{folder / INDEX}: names the file {outside[0]!r} outside of its folder")
        return [folder / name for name in names]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise UserError(f"{folder}: only pickled weights, which could hold code; convert them to safetensors")
    raise UserError(f"{folder}: no weights, neither {WEIGHTS} nor {INDEX}")


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _token_ids(path: Path, values: dict[str, Any], key: str, num_embeddings: int) -> tuple[int, ...]:
    """Return the ids of special tokens under `key`: a number or a list. Others are left out with a warning."""
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    known = tuple(i for i in ids if type(i) is int and 0 <= i < num_embeddings)
    if len(known) < len(ids):
        log.warning("%s: %s=%.60r names a token that the model does not have; it is ignored", path, key, value)
    return known
