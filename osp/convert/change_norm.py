"""Conversions that leave the function of a model as it is.

Those that work in place replace tensors and never write into one, so that who holds the old ones can put them back.
`convert` exchanges the norms (arXiv 2305.14858). With d channels, mean mu of x and s = mean(x^2) - mu^2,

    LayerNorm    (x - mu) / sqrt(s + eps)
    RMSNorm      x / sqrt(s + mu^2 + eps)                                   the same if mu = 0
    CRMSNorm     x' / sqrt((sum(x'^2) + sum(x')^2) / d + eps)               x' = x without its last channel, mu = 0

so eps carries over unchanged: under it stands the same number each time. A LayerNorm does not see mu, hence what
writes into the residual stream may lose its mean over the channels, which makes mu = 0: W - mean_out(W). A reader of a
stream with mu = 0 needs d - 1 channels, for x_d = -sum(x'): W x = (W[:, :-1] - W[:, -1:]) x'.
"""

import copy
import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from osp.config import ModelConfig, NormConfig
from osp.errors import UserError
from osp.model.fold import fold_into_weights, norm_gain, residual_norms
from osp.model.norms import CRMSNorm, LayerNorm, Norm, SSNorm, block_norm, final_norm, head_norm
from osp.model.transformer import Transformer

CONVERTIBLE = ("layernorm", "rmsnorm", "ssnorm", "crmsnorm")
# what they take for the mean of the residual stream: norms of one kind can be converted together
KINDS = {"layernorm": "subtracts the mean", "crmsnorm": "counts a channel that is not stored"}
# of the largest weight: the means of a matrix that was recentred and then rounded to fp32 are smaller
ZERO_MEAN = 1e-6


def convert(model: Transformer, to: str) -> Transformer:
    """A float64 model with the norms `to` (a name of `CONVERTIBLE`) that computes what `model` computes.

    Projections, the scale of the embedding, recentring, the scales of `norm.lns` and the biases of norms move into the
    weights first. Gains stay where both norms have one per channel, else they move too. crmsnorm has one channel less.
    Raises `UserError` with the reason where there is no such model.
    """
    config = converted_config(model.config, to)
    source = copy.deepcopy(model).double()
    fold_into_weights(source)
    source_name = source.config.norm.name
    tensors = {name: parameter.detach() for name, parameter in source.named_parameters()}
    _fold_norms(tensors, source, to)
    if source_name == "layernorm" and to != "layernorm":
        _recentre(tensors)
    elif source_name in ("rmsnorm", "ssnorm") and to in ("crmsnorm", "layernorm"):
        _check_zero_mean(tensors, source, to)
        _recentre(tensors)
    if source_name == "crmsnorm" and to != "crmsnorm":
        _append_channel(tensors, source)
    elif to == "crmsnorm" and source_name != "crmsnorm":
        _drop_channel(tensors, source)
    return _filled(config, tensors)


def converted_config(config: ModelConfig, to: str) -> ModelConfig:
    """The configuration of what `convert` makes of such a model; `UserError` where there is no such model."""
    if to not in CONVERTIBLE:
        raise UserError(f"to={to}: choose from {', '.join(CONVERTIBLE)}")
    block, final = block_norm(config), final_norm(config)
    name, final_name = config.norm.name, type(final).__name__.lower()
    if name not in CONVERTIBLE:
        raise UserError(f"norm.name={name} cannot be converted: it is a bounded function, no division by a statistic")
    if final_name not in CONVERTIBLE or KINDS.get(name) != KINDS.get(final_name):
        odd = final_name if final_name in KINDS or final_name not in CONVERTIBLE else name
        raise UserError(
            f"norm.name={name} with norm.final={final_name} cannot be converted: {odd} "
            f"{KINDS.get(odd, 'is a bounded function')} and the other does not"
        )
    if config.norm.placement == "peri":
        raise UserError(
            "norm.placement=peri cannot be converted: its norms after the sublayers write into the residual stream, "
            "where no matrix can take their gains or subtract their mean"
        )
    eps = {norm.eps for norm in (block, final) if isinstance(norm.eps, float)}
    if len(eps) > 1:
        raise UserError(f"the norms have several eps, {sorted(eps)}; name one, norm.eps, before training")
    bias = _has_bias(block)
    if bias and config.attention.gate:
        raise UserError("norm.bias=true with attention.gate=true cannot be converted: the gate has no bias to hold it")
    hidden_size = config.hidden_size + (name == "crmsnorm") - (to == "crmsnorm")
    if not hidden_size:
        raise UserError("model.hidden_size=1 has no channel to spare")
    heads_fill = config.num_attention_heads * config.head_size == hidden_size
    converted = dataclasses.replace(
        config,
        hidden_size=hidden_size,
        head_dim=None if heads_fill else config.head_size,
        attention_bias=config.attention_bias or bias,
        mlp_bias=config.mlp_bias or bias,
        head_bias=config.head_bias or _has_bias(final),
        embed_proj=False,
        recentre=False,
        norm=NormConfig(name=to, eps=eps.pop()),
    )
    if (config.qk_norm or config.ffn_norm) and head_norm(config).eps != head_norm(converted).eps:
        key = "qk_norm" if config.qk_norm else "ffn_norm"
        raise UserError(
            f"{key}=true has eps={head_norm(config).eps} and the other norms eps={converted.norm.eps}, but rmsnorm "
            "has one for both; name norm.eps before training"
        )
    return converted


def conversion_steps(config: ModelConfig, to: str) -> list[str]:
    """What `convert` does to a model of this configuration, in its order, in words."""
    after, norms = converted_config(config, to), (block_norm(config), final_norm(config))
    done = {
        "recentring made part of the weights": config.recentre,
        "embedding projections absorbed": config.embed_proj,
        "scale of the embedding folded": config.norm.embed_scale,
        "LayerNorm scaling folded": config.norm.lns,
        "biases of norms folded": any(map(_has_bias, norms)),
        "gains of norms folded": any(norm.weight is not None and not _keeps_gain(norm, to) for norm in norms),
        "residual stream recentred": config.norm.name == "layernorm" and to != "layernorm",
        "last channel appended": after.hidden_size > config.hidden_size,
        "last channel dropped": after.hidden_size < config.hidden_size,
        f"{config.norm.name} -> {to}": True,
    }
    return [step for step, applies in done.items() if applies]


# --- in place -----------------------------------------------------------------------------------------------------


# --- parts of the model -------------------------------------------------------------------------------------------


def _keeps_gain(norm: Norm, to: str) -> bool:
    """Whether a norm of the kind `to` can have the gain of this one."""
    if to == "ssnorm":
        return isinstance(norm, SSNorm)
    return to in ("rmsnorm", "layernorm") and not isinstance(norm, CRMSNorm)


def _has_bias(norm: Norm) -> bool:
    return isinstance(norm, LayerNorm) and norm.bias is not None


def _writers(tensors: Iterable[str]) -> dict[str, int]:
    """Names of the tensors that write into the residual stream, and their dimension of its channels."""
    outputs = {f"{module}.{kind}" for module in ("o_proj", "down_proj") for kind in ("weight", "bias")}
    writers = {name: 0 for name in tensors if ".".join(name.split(".")[-2:]) in outputs}
    return {"embed_tokens.weight": 1, **writers}


# --- steps of `convert`, on fp64 tensors by name ------------------------------------------------------------------


def _fold_norms(tensors: dict[str, Tensor], model: Transformer, to: str) -> None:
    """Move biases, and gains that the norm `to` cannot have, into the readers; a norm without a tensor has gain 1."""
    for name, norm, readers in residual_norms(model):
        gain = norm_gain(norm, model.config.hidden_size).to(model.lm_head.weight.device)
        bias = tensors.pop(f"{name}.bias", None)
        tensors.pop(f"{name}.weight", None)
        for reader in readers:
            weight = tensors[f"{reader}.weight"]
            if bias is not None:
                added = weight @ (bias * norm.output_scale)
                tensors[f"{reader}.bias"] = tensors.get(f"{reader}.bias", 0) + added
            if not _keeps_gain(norm, to):
                tensors[f"{reader}.weight"] = weight * gain
        if _keeps_gain(norm, to):
            tensors[f"{name}.weight"] = gain


def _recentre(tensors: dict[str, Tensor]) -> None:
    for name, channels in _writers(tensors).items():
        tensors[name] = tensors[name] - tensors[name].mean(channels, keepdim=True)


def _drop_channel(tensors: dict[str, Tensor], model: Transformer) -> None:
    for name, channels in _writers(tensors).items():
        tensors[name] = tensors[name].narrow(channels, 0, tensors[name].shape[channels] - 1)
    for _, _, readers in residual_norms(model):
        for name in (f"{reader}.weight" for reader in readers):
            tensors[name] = tensors[name][:, :-1] - tensors[name][:, -1:]


def _append_channel(tensors: dict[str, Tensor], model: Transformer) -> None:
    for name, channels in _writers(tensors).items():
        last = -tensors[name].sum(channels, keepdim=True)
        tensors[name] = torch.cat((tensors[name], last), channels)
    for _, _, readers in residual_norms(model):
        for name in (f"{reader}.weight" for reader in readers):
            tensors[name] = torch.cat((tensors[name], torch.zeros_like(tensors[name][:, :1])), 1)


def _check_zero_mean(tensors: dict[str, Tensor], model: Transformer, to: str) -> None:
    for name, channels in _writers(tensors).items():
        share = (tensors[name].mean(channels).abs().max() / tensors[name].abs().max()).item()
        if share > ZERO_MEAN:
            raise UserError(
                f"norm.name={model.config.norm.name} to={to}: the residual stream has a mean ({name}: {share:.1e} of "
                f"its largest weight), which {to} does not see; only a model that was a LayerNorm's or trained with "
                "recentre=true has none"
            )


@torch.no_grad()
def _filled(config: ModelConfig, tensors: dict[str, Tensor]) -> Transformer:
    """The fp64 model of `config` with these tensors; gains without one are 1, biases that came with others 0."""
    with torch.device("meta"):
        model = Transformer(config).double()
    model.to_empty(device=tensors["lm_head.weight"].device)
    model.compute_dtype = torch.float64
    for module in model.modules():
        if isinstance(module, Norm):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        value = tensors.pop(name, None)
        if value is None:
            assert name.endswith((".bias", "norm.weight")), name
            value = torch.zeros_like(parameter) if name.endswith(".bias") else parameter.detach()
        elif value.numel() > parameter.numel():  # a gain per channel where there is one for all
            if (value != value[0]).any():
                raise UserError(f"{name}: its gains differ, and to={config.norm.name} has one for all channels")
            value = value[:1]
        parameter.copy_(value)
    assert not tensors, list(tensors)
    return model.eval()
