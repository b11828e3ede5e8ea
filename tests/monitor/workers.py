"""Models with a planted outlier, and their measurement on the ranks of a process group."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from osp.config import AlertConfig, Config, MonitorConfig, from_dict
from osp.model.transformer import Block, Transformer, build_model
from osp.model_config import ModelConfig, NormConfig
from osp.monitor.alerts import Alerts, mechanism
from osp.monitor.forensics import Forensics
from osp.monitor.probe import ProbeText, Reading, probe
from osp.train.setup import train

FULL = MonitorConfig(sites="all", statistics="all")
LAYER, MARKED = 1, 7  # the layer of the outlier, and the residual channel by which it knows its token
TOKEN, ROW, POSITION = 19, 2, 11  # the last of its sequence: no other token can attend to it
RULES: Any = {"max_over_median": {"all": AlertConfig(above=150.0)}}  # without the outlier all sites are below 40
SITES = {  # site: (its name, the channel of the outlier, the parameter that makes it)
    "embed_out": ("embed_out", 5, "embed_tokens.weight"),
    "attn_in": ("layer_01/attn_in", MARKED, "layers.1.input_layernorm.weight"),
    "q": ("layer_01/q", 3, "layers.1.self_attn.q_proj.weight"),  # a slow pair: RoPE hardly rotates it
    "k": ("layer_01/k", 3, "layers.1.self_attn.k_proj.weight"),
    "v": ("layer_01/v", 9, "layers.1.self_attn.v_proj.weight"),
    "o_proj_in": ("layer_01/o_proj_in", 17, "layers.1.self_attn.v_proj.weight"),
    "mlp_in": ("layer_01/mlp_in", MARKED, "layers.1.post_attention_layernorm.weight"),
    "down_proj_in": ("layer_01/down_proj_in", 21, "layers.1.mlp.gate_proj.weight"),
    "block_out": ("layer_01/block_out", 13, "layers.1.mlp.down_proj.weight"),
    "final_norm_out": ("final_norm_out", MARKED, "norm.weight"),
}


def small_model(norm: str = "rmsnorm", **options: Any) -> Transformer:
    """Return a model with 4 query heads of 8 channels on 2 value heads."""
    config = ModelConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        norm=NormConfig(name=norm, seq_len=12 if norm == "bhyt" else None),
        **options,
    )
    return build_model(config, seed=0)


def probe_text(count: int = 3) -> ProbeText:
    """Return sequences of 12 tokens; TOKEN occurs once."""
    tokens = torch.randint(0, TOKEN, (count, 12), generator=torch.Generator().manual_seed(1))
    tokens[ROW, POSITION] = TOKEN
    return ProbeText(tokens)


@torch.no_grad()
def planted(site: str | None) -> Transformer:
    """Return a model with one value of some hundreds at `site`; None: the same model without it.

    Channel MARKED of the residual stream is 4 for TOKEN, 0 for all others; only the weights of `site` read it.
    """
    model = small_model()
    layer = model.layers[LAYER]
    assert isinstance(layer, Block)
    attention, mlp = layer.self_attn, layer.mlp
    for block in model.layers:
        assert isinstance(block, Block)
        block.self_attn.o_proj.weight[MARKED] = 0
        block.mlp.down_proj.weight[MARKED] = 0
        for reader in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            reader.weight[:, MARKED] = 0
        for reader in (block.mlp.gate_proj, block.mlp.up_proj):
            reader.weight[:, MARKED] = 0
    model.embed_tokens.weight.mul_(4)
    model.embed_tokens.weight[:, MARKED] = 0
    if site is not None:
        model.embed_tokens.weight[TOKEN, MARKED] = 4
    match site:
        case "embed_out":
            model.embed_tokens.weight[TOKEN, 5] = -400
        case "attn_in":
            model.get_parameter("layers.1.input_layernorm.weight")[MARKED] = 400
        case "q":
            attention.q_proj.weight[3, MARKED] = 400
        case "k":
            attention.k_proj.weight[3, MARKED] = 400
        case "v":
            attention.v_proj.weight[9, MARKED] = 400
        case "o_proj_in":
            attention.v_proj.weight[9, MARKED] = 400
            # query heads 2 and 3 read value head 1; only in head 2 does the token attend only to itself
            attention.q_proj.weight[19, MARKED] = attention.k_proj.weight[11, MARKED] = 10
        case "mlp_in":
            model.get_parameter("layers.1.post_attention_layernorm.weight")[MARKED] = 400
        case "down_proj_in":
            mlp.gate_proj.weight[21, MARKED] = 200
            mlp.up_proj.weight[21, MARKED] = 20
            mlp.down_proj.weight[:, 21] = 0
        case "block_out":
            mlp.gate_proj.weight[21, MARKED] = mlp.up_proj.weight[21, MARKED] = 4
            mlp.down_proj.weight[:, 21] = 0
            mlp.down_proj.weight[13, 21] = 100
        case "final_norm_out":
            model.get_parameter("norm.weight")[MARKED] = 400
    return model


@torch.no_grad()
def constant_channel(norm: str = "rmsnorm") -> Transformer:
    """Return a model in which channel 7 of layer_01/attn_in is 0.98 constant, with 37% of the energy and a gain of 3.6.

    The stream is the embedding: 31 channels of signs, and 1.162 (1 +- 0.2) in channel 7 of even and odd tokens.
    """
    model = small_model(norm)
    for block in model.layers:
        assert isinstance(block, Block)
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    signs = torch.rand(40, 32, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    model.embed_tokens.weight.copy_(signs)
    model.embed_tokens.weight[0::2, MARKED] = 1.162 * 1.2
    model.embed_tokens.weight[1::2, MARKED] = 1.162 * 0.8
    gain = model.get_parameter("layers.1.input_layernorm.weight")
    gain[-1 if norm == "ssnorm" else MARKED] = 3.6
    return model


def constant_channel_words(norm: str = "rmsnorm") -> str:
    """Return the words for layer_01/attn_in of `constant_channel`: four sequences with as many even as odd tokens."""
    text = ProbeText(torch.arange(48).remainder(40).view(4, 12))
    return mechanism("layer_01/attn_in", probe(constant_channel(norm), text, FULL).sites["layer_01/attn_in"])


def run_config(model: Transformer) -> Config:
    """Return the configuration of a run with this model."""
    config = from_dict({"train": {"steps": 10, "seq_len": 12, "tokens_per_step": 12}, "optimizer": {"adam_lr": 1e-3}})
    return dataclasses.replace(config, model=model.config)


class Words:
    """A tokenizer that spells token 3 as ` t3`."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(f" t{token}" for token in ids)


def find_planted(site: str) -> dict[str, Any]:
    """Return reading, alerts and forensics of this rank for the model with an outlier at `site`."""
    model, text = planted(site), probe_text()
    reading = probe(model, text, FULL)
    name = SITES[site][0]
    words: Any = Words()
    forensics = Forensics(model, run_config(model), words)
    before = {"step": 0, "sites": {name: {"channels": [[0, 1.0]]}}}
    now = {"step": 1, "sites": forensics.site_records(reading)}
    return {
        "reading": reading,
        "alerts": Alerts(MonitorConfig(alerts=RULES)).update(1, reading.metrics),
        "bundle": forensics.bundle(name, reading, [before, now]),
    }


def everything(_: int) -> dict[str, Any]:
    """Return what one rank measures: each planted outlier, a model with heavy tails, and a probe without sites."""
    without_sites = probe(small_model(), probe_text(), MonitorConfig(sites=(), statistics=("R_L",)))
    planted_sites = {site: find_planted(site) for site in SITES}
    words = constant_channel_words()
    return {"planted": planted_sites, "reading": heavy_reading(), "without_sites": without_sites, "words": words}


def trained(values: dict[str, Any]) -> None:
    """Train a run on the ranks of the process group."""
    train(from_dict(values))


def heavy_reading() -> Reading:
    """Return the reading of five sequences, which 2 and 4 ranks share unevenly."""
    model = small_model("layernorm", embed_proj=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_heavier(parameter))
    ids = torch.arange(12).div(5, rounding_mode="floor").repeat(5, 1)
    return probe(model, ProbeText(probe_text(5).tokens, ids), FULL)


def _heavier(weight: Tensor) -> Tensor:
    return weight * (1 + 20 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) ** 8)
