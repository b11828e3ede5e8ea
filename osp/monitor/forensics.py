"""The cause of an outlier: its place, its text, the growth of its channel, and the weights that write it.

A bundle is a JSON file and the same as Markdown. The weights of the model must be whole while a bundle is made
(`Engine.gathered_parameters`); everything else comes from a `Reading` and from the run's probes.jsonl.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from osp.config import Config
from osp.model.sites import SITES, SUBLAYER_WRITERS, split_site
from osp.model.transformer import Linear, Transformer
from osp.monitor.probe import ProbeText, SiteReading, row_norms
from osp.optim.groups import groups_of
from osp.optim.schedule import build_schedule
from osp.run.evaluations import replace_nonfinite
from osp.run.history import growth, since
from osp.tables import render_markdown

CONTEXT = 8  # tokens of text shown before the token of an outlier
SHOWN_WRITERS = 4  # weights shown of those that add to a channel of the residual stream


def site_record(site: SiteReading, rows: ProbeText, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the entry of a site in a line of probes.jsonl."""
    first, counts = site.octaves
    until = rows.tokens[site.row, max(0, site.position - CONTEXT) : site.position + 1]
    return {
        "top_channel": site.top_channel,
        "top_channel_share": site.statistics["top_channel_share"],
        "top_value": site.value,
        "top_row": site.row,
        "top_position": site.position,
        "top_token": site.token,
        "top_text": tokenizer.decode(until.tolist(), skip_special_tokens=False),
        "channels": [[channel, value] for channel, value in site.channels],
        "histogram": {"edges_log2": [first, first + len(counts)], "counts": counts},
    }


def bundle(
    name: str,
    site: SiteReading,
    *,
    step: int,
    rows: ProbeText,
    tokenizer: Tokenizer,
    history: Sequence[Mapping[str, Any]],
    model: Transformer,
    config: Config,
    alerts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return everything known about the outlier of one site as values of JSON.

    Args:
        history: lines of probes.jsonl, the present one included.
        alerts: the alerts about this site.
    """
    layer, kind = split_site(name)
    weights = behind(kind, layer, site.channel, model)
    grown = growth(history, name, site.channel)
    record = site_record(site, rows, tokenizer)
    contents = {
        "step": step,
        "tokens": step * config.train.tokens_per_step,
        "site": name,
        "layer": layer,
        "channel": site.channel,
        "value": site.value,
        "row": site.row,
        "position": site.position,
        "token": site.token,
        "token_text": tokenizer.decode([site.token], skip_special_tokens=False),
        "text": record["top_text"],
        "statistics": site.statistics,
        "channels": record["channels"],
        "growth": grown,
        "since": since(grown),
        "weights": weights,
        "optimizer": _optimizer(sorted({weight["parameter"] for weight in weights}), model, config, step),
        "alerts": list(alerts),
    }
    return replace_nonfinite(contents)


def write_bundle(contents: Mapping[str, Any], folder: Path) -> Path:
    """Write `folder/step_00001234_layer_03_down_proj_in.json` and `.md`; return the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{contents['step']:08d}_{contents['site'].replace('/', '_')}.json"
    path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    markdown = render_markdown(Path(__file__).with_suffix(".md"), **contents)
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    return path


def behind(kind: str, layer: int | None, channel: int, model: Transformer) -> list[dict[str, Any]]:
    """Return the rows, columns and gains that write `channel` of a site, each with its norm over the median norm.

    Every attention and MLP output adds to the residual stream: of these, the `SHOWN_WRITERS` largest are returned.
    """
    site, parameters = SITES[kind], {name for name, _ in model.named_parameters()}
    block = "" if layer is None else f"layers.{layer}."
    direct = [
        (f"{block}{module}.weight", index)
        for module in site.writers
        for index in _indices(kind, module, channel, model)
    ]
    stream = [(f"{module}.weight", channel) for module in _stream_writers(kind, layer, model)]
    # not every model has every norm, gain and gate
    own = [_measure_weight(model, *place) for place in direct if place[0] in parameters]
    added = [_measure_weight(model, *place) for place in stream if place[0] in parameters]
    return own + sorted(added, key=lambda w: w["ratio"], reverse=True)[:SHOWN_WRITERS]


def _stream_writers(kind: str, layer: int | None, model: Transformer) -> list[str]:
    """Return the modules that add to the residual stream before a site, in order; none for a site in a sublayer."""
    sublayers = SITES[kind].sublayers
    if sublayers is None:
        return []
    last = len(model.layers) if kind == "final_norm_out" else layer or 0
    modules = ["embed_proj" if isinstance(model.embed_proj, Linear) else "embed_tokens"]
    for i in range(2 * last + sublayers):
        modules += [f"layers.{i // 2}.{module}" for module in SUBLAYER_WRITERS[i % 2]]
    return modules


def _indices(kind: str, module: str, channel: int, model: Transformer) -> list[int]:
    """Return the rows or gains of `module` that write `channel` of a site."""
    size = model.config.head_size
    head, within = divmod(channel, size)
    if kind in ("q", "k"):  # RoPE rotates a channel with its partner half a head away
        partner = (within + size // 2) % size
        return [within, partner] if module.endswith("_norm") else [channel, head * size + partner]
    if kind == "o_proj_in" and module.endswith("v_proj"):  # several query heads may read one value head
        queries_per_value = model.config.num_attention_heads // model.config.kv_heads
        return [head // queries_per_value * size + within]
    return [channel]


def _measure_weight(model: Transformer, parameter: str, index: int) -> dict[str, Any]:
    """Return the norm of a row, column or gain and the median one of its parameter."""
    weight = model.get_parameter(parameter).detach()
    axis = "gain" if weight.ndim == 1 else "column" if parameter == "embed_tokens.weight" else "row"
    if axis == "gain":
        norms = weight.float().abs()
        index = index if norms.numel() > 1 else 0  # SSNorm has one for all channels
    else:
        norms = row_norms(weight if axis == "row" else weight.T)
    norm, median = float(norms[index]), float(norms.median())
    ratio = norm / max(median, 1e-30)  # JSON knows no infinity
    return {"parameter": parameter, "axis": axis, "index": index, "norm": norm, "median": median, "ratio": ratio}


def _optimizer(parameters: Sequence[str], model: Transformer, config: Config, step: int) -> list[dict[str, Any]]:
    """Return role, rule and learning rate of parameters in the update before `step`."""
    assert config.train.steps is not None, "a run with a model has a length"
    tokens_per_step = config.train.tokens_per_step
    schedule = build_schedule(config.schedule, total_steps=config.train.steps, tokens_per_step=tokens_per_step)
    return [
        {
            "parameter": name,
            "role": group["role"],
            "rule": group["rule"],
            "learning_rate": group["base_lr"] * schedule(max(step - 1, 0)),
            "weight_decay": group["weight_decay"],
        }
        for name in parameters
        for group in groups_of(model, config.optimizer)
        if name in group["names"]
    ]
