"""Export a trained model as a stock Hugging Face Llama: `transformers`, vLLM and llama.cpp load it without our code.

Projections (the head is untied from the embedding then), recentring and scales are folded into the weights, and an
SSNorm becomes an RMSNorm with equal gains. Nothing else changes, since names and layout are Hugging Face's already. The
folder gets its name after the files were read back and compared with the trained model.
"""

import dataclasses
import inspect
import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError

from osp.config import ModelConfig
from osp.convert.change_norm import change_config
from osp.convert.model_card import FOUR_BITS, Exported, model_card
from osp.convert.same_function import (
    check_same_function,
    check_same_perplexity,
    compared_perplexity,
    observe_function,
    read_certificate,
)
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.texts import read_text
from osp.files import new_folder, write_text
from osp.model.build_norms import block_norm, final_norm, final_norm_name
from osp.model.fold import fold_into_weights, norm_gain, residual_norms
from osp.model.hf_llama import BODY, CONFIG, GENERATION, HEAD, REQUIRED, TOKENIZER, load_hf
from osp.model.norms import NORMS
from osp.model.transformer import Transformer
from osp.quant.apply import quantized

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str = "fp32",
    max_shard_size: str = "5GB",
    text: str = "held_out",
    device: torch.device | str = "cpu",
) -> Exported:
    """Write the model of a run or checkpoint to the new folder `out`.

    Raises `UserError` and leaves no folder if no stock Llama computes the same, or if the files do not. dtype: of the
    stored weights, a key of `DTYPES`. text: name of the text that both models are compared on, as for `read_text`.
    """
    out, shard_bytes = Path(out), size_in_bytes(max_shard_size)
    with new_folder(out) as folder:
        subject = open_model(run, device=device)
        if subject.run is None:
            raise UserError(f"{run}: is a Hugging Face folder already; name a run or a checkpoint")
        model = subject.model
        check_exportable(model.config, path=run)
        certificate = read_certificate(subject)
        tokens = read_text(text, subject)
        trained, perplexity = observe_function(model), compared_perplexity(model, tokens)
        fold_into_weights(model)
        folding = check_same_function("folding projections and scales", trained, observe_function(model))
        bos_id, eos_id = subject.bos_id, subject.eos_id
        write_llama(model, folder, dtype=dtype, shard_bytes=shard_bytes, bos_id=bos_id, eos_id=eos_id)
        _write_tokenizer(subject, folder)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype]).float()
        loaded = load_hf(folder).to(device)
        check_same_function("reading back the files", observe_function(model), observe_function(loaded))
        perplexities = check_same_perplexity(tokens, perplexity, loaded, dtype=dtype)
        with quantized(loaded, FOUR_BITS):
            exported = Exported(out, dtype, folding, perplexities, compared_perplexity(loaded, tokens))
        write_text(folder / "README.md", model_card(subject, exported, certificate))
    return exported


def check_exportable(config: ModelConfig, *, path: str | Path) -> None:
    """Raise `UserError` with the reason and a fix if no stock Llama computes the same as the model at `path`."""
    for key, name in (("norm.name", config.norm.name), ("norm.final", final_norm_name(config.norm))):
        reason = NORMS[name].not_rmsnorm
        if reason is not None:
            fix = _suggest_conversion(config, path)
            raise UserError(f"{key}={name}: a stock Llama has no such norm, {reason}; {fix}")
    for key, holds, what in (
        ("norm.placement=peri", config.norm.placement == "peri", "norm after a sublayer"),
        ("qk_norm=true", config.qk_norm, "norm of queries and keys"),
        ("ffn_norm=true", config.ffn_norm, "norm inside its MLP"),
        ("attention.gate=true", config.attention.gate, "gate after attention"),
        ("attention.off_by_one=true", config.attention.off_by_one, "1 in the denominator of its softmax"),
        (f"model.hidden_act={config.hidden_act}", config.hidden_act != "silu", "other activation than silu in its MLP"),
        ("model.head_bias=true", config.head_bias, "bias of the head (here the folded bias of the last LayerNorm)"),
    ):
        if holds:
            raise UserError(f"{key}: a stock Llama has no {what}")
    eps = {norm.eps for norm in (block_norm(config), final_norm(config))}
    if len(eps) > 1:
        raise UserError(f"the norms have several eps, {sorted(map(str, eps))}; a stock Llama has one for all")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"model.hidden_size={config.hidden_size} is no multiple of model.num_attention_heads="
            f"{config.num_attention_heads}, which transformers requires of a Llama with any head_dim"
        )


def _suggest_conversion(config: ModelConfig, path: str | Path) -> str:
    """Return the fix for a norm that a stock Llama does not have."""
    try:
        check_exportable(change_config(config, "rmsnorm"), path=path)
    except UserError as error:
        reason = f" ({error})" if NORMS[config.norm.name].mean is not None else ""
        return f"runs with norm=ssnorm and norm=rmsnorm export{reason}"
    return f"convert it first: python scripts/convert.py {path} to=rmsnorm out=DIR"


def size_in_bytes(size: str) -> int:
    """Return the bytes of a size such as `5GB` or `500MB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", size.strip().upper())
    if not match or not 0 < float(match[1]) < 1e18:
        raise UserError(f"max_shard_size={size!r}: write a size such as 5GB or 500MB")
    return math.ceil(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def write_llama(
    model: Transformer, folder: Path, *, dtype: str, shard_bytes: int, bos_id: int | None, eos_id: int | None
) -> None:
    """Write the weights of a model without projections, and its `config.json` for all versions of transformers.

    The weights are safetensors of at most `shard_bytes` each (no tensor is cut), and an index if there are several.
    """
    config = model.config
    scaling = None if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling)
    if scaling and scaling["rope_type"] == "linear":
        scaling = {"rope_type": "linear", "factor": scaling["factor"]}
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, key) for key in (*REQUIRED, "max_position_embeddings", "rope_theta")},
        **{key: getattr(config, key) for key in ("hidden_act", "attention_bias", "mlp_bias")},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rope_scaling": scaling,
        "rms_norm_eps": model.norm.eps,
        "tie_word_embeddings": False,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    _write_json(folder / CONFIG, values)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {f"{name}.weight": norm_gain(norm, config.hidden_size) for name, norm, _ in residual_norms(model)}
    stored = {key if key == HEAD else BODY + key: tensor.to(DTYPES[dtype]).cpu() for key, tensor in tensors.items()}
    # it would print the name of the temporary folder; its logger has the name of its file
    logging.getLogger(inspect.getfile(save_torch_state_dict)).setLevel(logging.WARNING)
    try:
        save_torch_state_dict(stored, folder, max_shard_size=shard_bytes)
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from error
    for path in folder.glob("*.safetensors"):  # safetensors creates them 0600; make them as readable as the other files
        path.chmod((folder / CONFIG).stat().st_mode)


def _write_tokenizer(subject: LanguageModel, folder: Path) -> None:
    """Write the run's tokenizer.json and the settings of `transformers`."""
    assert subject.run is not None
    shutil.copyfile(subject.run / TOKENIZER, folder / TOKENIZER)
    ids = (subject.bos_id, subject.eos_id)
    bos, eos = (None if token_id is None else subject.tokenizer.id_to_token(token_id) for token_id in ids)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": subject.model.config.max_position_embeddings,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    stops = subject.eos_id if len(subject.stop_ids) < 2 else list(subject.stop_ids)
    _write_json(folder / GENERATION, {"bos_token_id": subject.bos_id, "eos_token_id": stops})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
