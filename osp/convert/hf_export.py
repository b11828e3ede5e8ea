"""A trained model as a stock Hugging Face Llama: `transformers`, vLLM and llama.cpp load it without code of ours.

The projections are absorbed (the head is untied from the embedding then), so are recentring and scales, an SSNorm
becomes an RMSNorm whose gains are all the same, and nothing else changes, as names and layout are Hugging Face's
already. What was written is read back and compared with the model that was trained before the folder gets its name.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from osp.config import ModelConfig
from osp.convert.change_norm import converted_config
from osp.convert.model_card import model_card
from osp.convert.same_function import Certificate, read_certificate
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.perplexity import Text, perplexity
from osp.evaluation.texts import read_text
from osp.files import new_folder, write_text
from osp.model.fold import fold_into_weights, norm_gain
from osp.model.hf_llama import BODY, CONFIG, HEAD, INDEX, TOKENIZER, WEIGHTS, load_hf
from osp.model.norms import NORMS, Norm, RMSNorm, SSNorm
from osp.model.transformer import Embedding, Linear, Transformer
from osp.quant.apply import quantized
from osp.quant.spec import QuantSpec

Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOGIT_TOLERANCE = 1e-5  # of the largest logit
# of the perplexity; of bf16 the weights' rounding, 2^-9 each, is all there is
PERPLEXITY_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
CHECKED_TOKENS = 16_384
FOUR_BITS = QuantSpec().at("4-4-4")  # OSP's round to nearest: what the model card says that 4 bits cost

WHY_NOT = {
    "bhyt": "it bounds activations with a tanh and shares a statistic between two norms",
    "bhyt_star": "it bounds activations with a tanh",
    "dyt": "it is a tanh without a statistic",
    "derf": "it is an error function without a statistic",
    "layernorm": "it subtracts the mean",
    "crmsnorm": "its statistic holds a channel that is not stored",
}


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares."""

    folder: Path
    logit_error: float  # largest difference over largest logit, fp32, before the weights are rounded to their dtype
    perplexity: float  # of the trained model
    exported_perplexity: float


def export(
    run: str | Path,
    out: str | Path,
    *,
    dtype: Dtype = "fp32",
    max_shard_size: str = "5GB",
    text: str = "held_out",
    device: torch.device | str = "cpu",
) -> Exported:
    """Write the model of a run or checkpoint to the folder `out`, which does not exist yet.

    text: the name of the text that both models are compared on. Raises `UserError` for a model that no stock Llama
    equals, and if what was written does not compute what was trained; then nothing is left behind.
    """
    out = Path(out)
    shard_bytes = size_in_bytes(max_shard_size)
    with new_folder(out) as folder:
        subject = open_model(run, device=device)
        if subject.run is None:
            raise UserError(f"{run}: is a Hugging Face folder already; name a run or a checkpoint")
        check_exportable(subject.model.config, path=run)
        eps = _shared_eps(subject.model)
        certificate = None if subject.conversion is None else read_certificate(subject)
        tokens = read_text(text, subject)
        exported = _write(
            subject, folder, tokens, dtype=dtype, shard_bytes=shard_bytes, eps=eps, certificate=certificate
        )
    return Exported(out, **exported)


def check_exportable(config: ModelConfig, *, path: str | Path) -> None:
    """Raise `UserError` with the reason, and a way out where there is one, if no stock Llama equals such a model.

    path: what the user named.
    """
    final = config.norm.final or NORMS[config.norm.name].final or config.norm.name
    for key, name in (("norm.name", config.norm.name), ("norm.final", final)):
        if name not in ("rmsnorm", "ssnorm"):
            raise UserError(f"{key}={name}: a stock Llama has no such norm, {WHY_NOT[name]}; {_way_out(config, path)}")
    for key, holds, what in (
        ("norm.placement=peri", config.norm.placement == "peri", "norm after a sublayer"),
        ("qk_norm=true", config.qk_norm, "norm of queries and keys"),
        ("ffn_norm=true", config.ffn_norm, "norm inside its MLP"),
        ("attention.gate=true", config.attention.gate, "gate after attention"),
        ("attention.off_by_one=true", config.attention.off_by_one, "1 in the denominator of its softmax"),
        (f"model.hidden_act={config.hidden_act}", config.hidden_act != "silu", "activation but silu in its MLP"),
        ("model.head_bias=true", config.head_bias, "bias of the head (here that of the last LayerNorm, folded)"),
    ):
        if holds:
            raise UserError(f"{key}: a stock Llama has no {what}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"model.hidden_size={config.hidden_size} is no multiple of model.num_attention_heads="
            f"{config.num_attention_heads}, which transformers demands of a Llama, whatever its head_dim"
        )


def hf_config(
    model: Transformer, *, dtype: Dtype, eps: float, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """`config.json` of a model whose projections are absorbed, in the layout that all versions read."""
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config),
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": False,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    """What `config.json` says of it; linear scaling knows its factor alone."""
    if config.rope_scaling is None:
        return None
    values = dataclasses.asdict(config.rope_scaling)
    return values if values["rope_type"] == "llama3" else {key: values[key] for key in ("rope_type", "factor")}


def size_in_bytes(size: str) -> int:
    """Bytes of a size such as `5GB` or `500MB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", size.strip().upper())
    if not match or float(match[1]) <= 0:
        raise UserError(f"max_shard_size={size!r}: write a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def _way_out(config: ModelConfig, path: str | Path) -> str:
    """What to do about a norm that a stock Llama does not have."""
    try:
        check_exportable(converted_config(config, "rmsnorm"), path=path)
    except UserError as error:
        reason = f" ({error})" if config.norm.name in ("layernorm", "crmsnorm") else ""
        return f"runs with norm=ssnorm and norm=rmsnorm export{reason}"
    return f"convert it first: python scripts/convert.py {path} to=rmsnorm out=DIR"


def _write(
    subject: LanguageModel,
    folder: Path,
    text: Text,
    *,
    dtype: Dtype,
    shard_bytes: int,
    eps: float,
    certificate: Certificate | None,
) -> dict[str, float]:
    """Fill `folder`, and compare it with the model; `subject`'s model is another one afterwards."""
    model, device = subject.model, subject.device
    trained_logits, trained = _logits(model), _perplexity(model, text)
    fold_into_weights(model)
    logit_error = _compare("folding projections and scales", trained_logits, _logits(model))
    write_llama(
        model, folder, dtype=dtype, shard_bytes=shard_bytes, eps=eps, bos_id=subject.bos_id, eos_id=subject.eos_id
    )
    _write_tokenizer(subject, folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).float()
    loaded = load_hf(folder).to(device)
    _compare("reading back what was written", _logits(model), _logits(loaded))
    exported = _perplexity(loaded, text)
    if not abs(exported - trained) <= PERPLEXITY_TOLERANCE[dtype] * trained:
        raise UserError(
            f"perplexity of {text.name} is {exported:.5f} as exported and {trained:.5f} as trained; not written"
        )
    with quantized(loaded, FOUR_BITS):
        four_bits = (str(FOUR_BITS), FOUR_BITS.hash, _perplexity(loaded, text))
    figures = {"logit_error": logit_error, "perplexity": trained, "exported_perplexity": exported}
    assert subject.run is not None
    card = model_card(
        subject,
        subject.run,
        text=text.name,
        dtype=dtype,
        four_bits=four_bits,
        certificate=certificate,
        **figures,
    )
    write_text(folder / "README.md", card)
    return figures


def write_llama(
    model: Transformer,
    folder: Path,
    *,
    dtype: Dtype,
    shard_bytes: int,
    eps: float,
    bos_id: int | None,
    eos_id: int | None,
) -> None:
    """`config.json` and weights of a model whose projections are absorbed.

    Safetensors of at most `shard_bytes` each (a tensor is never cut), and their index if there are several.
    """
    _write_json(folder / CONFIG, hf_config(model, dtype=dtype, eps=eps, bos_id=bos_id, eos_id=eos_id))
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in _hf_tensors(model):
        value = tensor.to(DTYPES[dtype]).cpu().contiguous()
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + value.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = value
    stem, suffix = WEIGHTS.split(".")
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}" for i in range(1, len(shards) + 1)]
    for name, shard in zip([WEIGHTS] if len(shards) == 1 else names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _hf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its Hugging Face name, norms as one gain per channel."""
    hidden_size = model.config.hidden_size
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            yield f"{BODY}{name}.weight", norm_gain(module, hidden_size)
        elif isinstance(module, Linear | Embedding):
            key = f"{name}.weight"
            yield key if key == HEAD else BODY + key, module.weight.detach()
            if isinstance(module, Linear) and module.bias is not None:
                yield f"{BODY}{name}.bias", module.bias.detach()


def _write_tokenizer(subject: LanguageModel, folder: Path) -> None:
    """The run's tokenizer.json, and what `transformers` has to know besides."""
    assert subject.run is not None
    shutil.copyfile(subject.run / TOKENIZER, folder / TOKENIZER)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _token(subject, subject.bos_id),
        "eos_token": _token(subject, subject.eos_id),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": subject.model.config.max_position_embeddings,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {"bos_token_id": subject.bos_id, "eos_token_id": subject.eos_id})


def _token(subject: LanguageModel, token_id: int | None) -> str | None:
    return None if token_id is None else subject.tokenizer.id_to_token(token_id)


def _shared_eps(model: Transformer) -> float:
    """The eps of all norms; `UserError` if they have several: a stock Llama has one."""
    found = {module.eps for module in model.modules() if isinstance(module, RMSNorm | SSNorm)}
    if len(found) > 1:
        raise UserError(f"the norms have several eps, {sorted(found)}; a stock Llama has one for all")
    return found.pop()


@torch.no_grad()
def _logits(model: Transformer) -> Tensor:
    """(2, T, V) fp32 of random tokens, the same in every call."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, min(64, config.max_position_embeddings)), generator=generator)
    return model(ids.to(model.embed_tokens.weight.device)).float()


def _perplexity(model: Transformer, text: Text) -> float:
    seq_len = min(2048, model.config.max_position_embeddings)
    return perplexity(model, text, seq_len=seq_len, max_tokens=CHECKED_TOKENS).perplexity


def _compare(what: str, expected: Tensor, found: Tensor) -> float:
    """The largest difference over the largest logit; `UserError` if that is too much."""
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= LOGIT_TOLERANCE:  # nan as well
        raise UserError(
            f"{what} changes the logits by {error:.1e} of the largest, above {LOGIT_TOLERANCE}; not written"
        )
    return error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
