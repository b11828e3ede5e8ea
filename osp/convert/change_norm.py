"""`scripts/convert.py`: the same function with another norm, in a folder that every other script reads.

    OUT/config.yaml       the configuration of the run with the new model
        tokenizer.json
        checkpoints/      one checkpoint with weights only: training starts from it with checkpoint.init_from=OUT
        certificate.json  see osp.convert.same_function

Conversions (arXiv 2305.14858). With d channels, mean mu of x and s = mean(x^2) - mu^2,

    LayerNorm    (x - mu) / sqrt(s + eps)
    RMSNorm      x / sqrt(s + mu^2 + eps)                                   the same if mu = 0
    CRMSNorm     x' / sqrt((sum(x'^2) + sum(x')^2) / d + eps)               x' = x without its last channel, mu = 0

so eps carries over unchanged: it is added to the same number each time. A LayerNorm ignores mu, hence the weights that
write into the residual stream may lose their mean over the channels, which makes mu = 0: W - mean_out(W). A reader of a
stream with mu = 0 needs d - 1 channels, since x_d = -sum(x'): W x = (W[:, :-1] - W[:, -1:]) x'.
"""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from osp.config import Config, DataConfig, RunConfig, TokenizerConfig, TrainConfig, to_dict
from osp.convert.same_function import FILE_NAME, Certificate, certify, read_certificate
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel, find_model, open_model
from osp.evaluation.texts import read_text
from osp.files import new_folder, write_text
from osp.model.build_norms import block_norm, final_norm, final_norm_name, inner_norm
from osp.model.fold import fold_into_weights, norm_gain, residual_norms
from osp.model.hf_llama import EMBEDDING, HEAD, TOKENIZER
from osp.model.norms import NORMS, CRMSNorm, Norm
from osp.model.sites import SUBLAYER_WRITERS
from osp.model.transformer import Transformer
from osp.model_config import ModelConfig, NormConfig
from osp.run.checkpoint import Checkpoint, Saver, whole_parameters

CONVERTIBLE = tuple(name for name, norm in NORMS.items() if norm.mean is not None)
ZERO_MEAN = 1e-6  # largest mean of a recentred matrix rounded to fp32, relative to its largest weight


def convert_folder(path: str | Path, out: str | Path, *, to: str, text: str = "held_out", **keys: Any) -> Certificate:
    """Write the model at `path` with the norm `to` to the new folder `out` and return the certificate.

    Raises `UserError` and leaves no folder if there is no such model or the conversion is not exact enough.
    path: a run, a checkpoint or a Hugging Face folder. text: name of the text that both models are compared on.
    keys: `device` and `weights` of `open_model`.
    """
    out = Path(out)
    with new_folder(out) as folder:
        subject = open_model(path, **keys)
        change_config(subject.model.config, to)  # refuses a model before a text is read
        read_certificate(subject)
        if subject.eos_id is None or subject.tokenizer.id_to_token(subject.eos_id) is None:
            raise UserError(f"{path}: config.json has no eos_token_id that the tokenizer knows; add it there")
        tokens = read_text(text, subject)
        exact, steps = change_norms(subject.model, to)
        steps = ["average of the weights read"] * (subject.weights == "averaged") + steps
        stored = copy.deepcopy(exact).float()
        stored.compute_dtype = torch.float32
        certificate = certify(subject, exact, stored, tokens, steps=steps, path=out)
        _write(folder, subject, stored, out, steps)
        write_text(folder / FILE_NAME, json.dumps(dataclasses.asdict(certificate), indent=1) + "\n")
    return certificate


def change_norms(model: Transformer, to: str) -> tuple[Transformer, list[str]]:
    """Return a fp64 model with the norms `to` (a name of `CONVERTIBLE`) that computes the same, and the steps taken.

    Projections, the scale of the embedding, the scales of `norm.lns` and the biases of norms move into the
    weights first, and so do gains unless both norms have one per channel. Raises `UserError` if there is no such model.
    """
    before, config = model.config, change_config(model.config, to)
    name, width_change = before.norm.name, config.hidden_size - before.hidden_size
    recentred = NORMS[name].mean != NORMS[to].mean and name != "crmsnorm"  # whose channels always have mean 0
    source = copy.deepcopy(model).double()
    fold_into_weights(source)
    norms = [norm for _, norm, _ in residual_norms(source)]
    steps = {
        "embedding projections absorbed": before.embed_proj,
        "scale of the embedding folded": before.norm.embed_scale,
        "LayerNorm scaling folded": before.norm.lns,
        "biases of norms folded": any(norm.bias is not None for norm in norms),
        "gains of norms folded": any(norm.weight is not None and not _keeps_gain(norm, to) for norm in norms),
        "residual stream recentred": recentred and name == "layernorm",
        "last channel appended": width_change > 0,
        "last channel dropped": width_change < 0,
        f"{name} -> {to}": True,
    }
    tensors = {name: tensor.detach() for name, tensor in source.named_parameters(remove_duplicate=False)}
    tensors[EMBEDDING] = tensors[EMBEDDING].T  # the residual stream is dimension 0 of all that write into it
    _fold_norms(tensors, source, to)
    if recentred:
        _recentre(tensors, name, to)
    if width_change:
        _change_width(tensors, source, width_change)
    tensors[EMBEDDING] = tensors[EMBEDDING].T
    if tied := before.tie_embeddings and torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        del tensors[HEAD]
    steps = {"head untied from the embedding": before.tie_embeddings and not tied} | steps
    config = dataclasses.replace(config, tie_embeddings=tied)
    return _build(config, tensors), [step for step, is_made in steps.items() if is_made]


def change_config(config: ModelConfig, to: str) -> ModelConfig:
    """Return the configuration of the model that `change_norms` returns; `UserError` if there is no such model."""
    if to not in CONVERTIBLE:
        raise UserError(f"to={to}: choose from {', '.join(CONVERTIBLE)}")
    block, final = block_norm(config), final_norm(config)
    name, final_name = config.norm.name, final_norm_name(config.norm)
    if block.mean is None:
        raise UserError(f"norm.name={name} cannot be converted: {block.not_rmsnorm}; train with another norm")
    if block.mean != final.mean:
        raise UserError(
            f"norm.name={name} with norm.final={final_name} cannot be converted: {name} {block.mean} and {final_name} "
            f"{final.mean or 'does not divide by a statistic'}"
        )
    if config.norm.placement == "peri":
        raise UserError(
            "norm.placement=peri cannot be converted: its norms after the sublayers write into the residual stream, "
            "where no matrix can take their gains or subtract their mean"
        )
    eps = {norm.eps for norm in (block, final) if isinstance(norm.eps, float)}
    if len(eps) > 1:
        raise UserError(f"the norms have several eps, {sorted(eps)}; name one, norm.eps, before training")
    bias = block.bias is not None
    if bias and config.attention.gate:
        raise UserError("norm.bias=true with attention.gate=true cannot be converted: the gate has no bias")
    hidden_size = config.hidden_size + (name == "crmsnorm") - (to == "crmsnorm")
    if not hidden_size:
        raise UserError("model.hidden_size=1: crmsnorm has one channel less, and none would be left")
    converted = dataclasses.replace(
        config,
        hidden_size=hidden_size,
        head_dim=None if config.num_attention_heads * config.head_size == hidden_size else config.head_size,
        attention_bias=config.attention_bias or bias,
        mlp_bias=config.mlp_bias or bias,
        head_bias=config.head_bias or final.bias is not None,
        embed_proj=False,
        norm=NormConfig(name=to, eps=eps.pop()),
    )
    inner, inner_after = (inner_norm(model, config.head_size) for model in (config, converted))
    if (config.qk_norm or config.ffn_norm) and inner.eps != inner_after.eps:
        key = "qk_norm" if config.qk_norm else "ffn_norm"
        raise UserError(
            f"{key}=true has eps={inner.eps} and the other norms eps={converted.norm.eps}, but rmsnorm "
            "has one for both; name norm.eps before training"
        )
    return converted


def _keeps_gain(norm: Norm, to: str) -> bool:
    """Return whether a norm of the kind `to` can hold the gain of `norm`; crmsnorm has one channel less."""
    if NORMS[to].one_gain:
        return norm.one_gain
    return to != "crmsnorm" and not isinstance(norm, CRMSNorm)


def _fold_norms(tensors: dict[str, Tensor], model: Transformer, to: str) -> None:
    """Move the biases of norms, and gains that the norm `to` cannot hold, into the matrices that read them."""
    for name, norm, readers in residual_norms(model):
        gain = norm_gain(norm, model.config.hidden_size).to(model.lm_head.weight.device)
        bias = tensors.pop(f"{name}.bias", None)
        tensors.pop(f"{name}.weight", None)
        for reader in readers:
            weight = tensors[f"{reader}.weight"]
            if bias is not None:
                tensors[f"{reader}.bias"] = tensors.get(f"{reader}.bias", 0) + weight @ (bias * norm.output_scale)
            if not _keeps_gain(norm, to):
                tensors[f"{reader}.weight"] = weight * gain
        if _keeps_gain(norm, to):
            tensors[f"{name}.weight"] = gain


def _stream_writers(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that write into the residual stream."""
    matrices = tuple(matrix for matrix, _ in SUBLAYER_WRITERS)
    return [EMBEDDING, *(name for name in tensors if name.rpartition(".")[0].endswith(matrices))]


def _recentre(tensors: dict[str, Tensor], name: str, to: str) -> None:
    """Subtract the mean over the channels. Only a LayerNorm ignores it: for another norm `name` it must be 0."""
    for writer in _stream_writers(tensors):
        weight = tensors[writer]
        tensors[writer] = weight - weight.mean(0)
        share = (weight.mean(0).abs().max() / weight.abs().max()).item()
        if name != "layernorm" and share > ZERO_MEAN:
            raise UserError(
                f"norm.name={name} to={to}: the residual stream has a mean ({writer}: {share:.1e} of its largest "
                f"weight), which {to} ignores; only models converted from layernorm have none"
            )


def _change_width(tensors: dict[str, Tensor], model: Transformer, change: int) -> None:
    """Drop the last channel of the zero-mean residual stream (change=-1), or append the one that is left out (1)."""
    for name in _stream_writers(tensors):
        weight = tensors[name]
        tensors[name] = weight[:-1] if change < 0 else torch.cat((weight, -weight.sum(0, keepdim=True)))
    for name in (f"{reader}.weight" for _, _, readers in residual_norms(model) for reader in readers):
        weight = tensors[name]
        tensors[name] = weight[:, :-1] - weight[:, -1:] if change < 0 else F.pad(weight, (0, 1))


@torch.no_grad()
def _build(config: ModelConfig, tensors: dict[str, Tensor]) -> Transformer:
    """Return the fp64 model of `config` with these tensors; gains that are missing are 1, biases 0."""
    with tensors[EMBEDDING].device:
        model = Transformer(config).double().eval()  # whose norms have gains of 1
    model.compute_dtype = torch.float64
    for name, parameter in model.named_parameters():
        assert name in tensors or name.endswith((".bias", "norm.weight")), name
        value = tensors.pop(name, torch.zeros_like(parameter) if name.endswith(".bias") else parameter)
        if value.numel() > parameter.numel():  # a gain per channel for a norm with a single one
            if (value != value[0]).any():
                raise UserError(f"{name}: its gains differ, and to={config.norm.name} has one for all channels")
            value = value[:1]
        parameter.copy_(value)
    assert not tensors, list(tensors)
    return model


def _write(folder: Path, subject: LanguageModel, model: Transformer, out: Path, steps: list[str]) -> None:
    """Write a run folder with the configuration of the trained model, or one without data for a Hugging Face model."""
    run, config = RunConfig(name=out.name, dir=str(out)), subject.config
    if config is None:
        eos_token = str(subject.tokenizer.id_to_token(subject.eos_id or 0))
        seq_len = min(2048, model.config.max_position_embeddings)
        config = Config(
            train=TrainConfig(steps=1, seq_len=seq_len, tokens_per_step=seq_len),
            data=DataConfig(source="none"),
            tokenizer=TokenizerConfig(train=False, path=str(out / TOKENIZER), eos_token=eos_token),
        )
    trained = Checkpoint(found) if (found := find_model(subject.folder)) else None
    values, step = to_dict(dataclasses.replace(config, run=run, model=model.config)), subject.step or 0
    write_text(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False))
    shutil.copyfile((subject.run or subject.folder) / TOKENIZER, folder / TOKENIZER)
    manifest: dict[str, Any] = {
        "step": step,
        "tokens": trained.tokens if trained else 0,
        "data": trained.manifest.get("data") if trained else None,  # where its text is
        "config": values,
        "shapes": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "conversion": {"steps": steps, "bos_id": subject.bos_id, "stop_ids": list(subject.stop_ids)},
    }
    saver = Saver(folder / "checkpoints", config.checkpoint, token="convert", rank=0, gather=lambda x: [x])
    saver.begin(whole_parameters(model), rng={}, buffers=dict(model.named_buffers()), manifest=manifest)
    if error := saver.finish().error:
        raise OSError(error)
