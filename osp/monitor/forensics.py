"""What stands behind an outlier: where it is, its text, how its channel grew, and the weights that write it.

A bundle is one JSON file with a Markdown file for the reader beside it. The model's weights must be whole while a
bundle is made (`Engine.gathered_parameters`); everything else comes from a `Reading` and from the run's probes.jsonl.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from osp.config import Config
from osp.model.sites import SITES, SUBLAYER_WRITERS, split_site
from osp.model.transformer import Linear, Transformer
from osp.monitor.probe import Rows, SiteReading, row_norms
from osp.optim import build_schedule, groups_of
from osp.run.history import growth, since

CONTEXT = 8  # tokens of text shown before the one that an outlier sits on
SHOWN_WRITERS = 4  # of the matrices that write a channel of the residual stream


def site_record(site: SiteReading, rows: Rows, tokenizer: Tokenizer) -> dict[str, Any]:
    """A site's part of a line of probes.jsonl."""
    first, counts = site.octaves
    return {
        "top_channel": site.top_channel,
        "top_channel_share": site.statistics["top_channel_share"],
        "top_value": site.value,
        "top_row": site.row,
        "top_position": site.position,
        "top_token": site.token,
        "top_text": text_before(site, rows, tokenizer),
        "channels": [[channel, value] for channel, value in site.channels],
        "histogram": {"edges_log2": [first, first + len(counts)], "counts": counts},
    }


def text_before(site: SiteReading, rows: Rows, tokenizer: Tokenizer) -> str:
    """The text up to and including the token that the outlier sits on."""
    tokens = rows.tokens[site.row, max(0, site.position - CONTEXT) : site.position + 1]
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def bundle(
    name: str,
    site: SiteReading,
    *,
    step: int,
    rows: Rows,
    tokenizer: Tokenizer,
    history: Sequence[Mapping[str, Any]],
    model: Transformer,
    config: Config,
    alerts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """All there is to know about the outlier of one site, ready for JSON."""
    layer, kind = split_site(name)
    weights = behind(kind, layer, site.channel, model)
    grown = growth(history, name, site.channel)
    return {
        "step": step,
        "tokens": step * config.train.tokens_per_step,
        "site": name,
        "layer": layer,
        "channel": site.channel,
        "value": _finite(site.value),
        "row": site.row,
        "position": site.position,
        "token": site.token,
        "token_text": tokenizer.decode([site.token], skip_special_tokens=False),
        "text": text_before(site, rows, tokenizer),
        "statistics": {key: _finite(value) for key, value in site.statistics.items()},
        "channels": [[channel, _finite(value)] for channel, value in site.channels],
        "growth": grown,
        "since": since(grown),
        "weights": weights,
        "optimizer": _optimizer(sorted({weight["parameter"] for weight in weights}), model, config, step),
        "alerts": list(alerts),
    }


def write_bundle(contents: Mapping[str, Any], folder: Path) -> Path:
    """Write a bundle as `folder/step_00001234_layer_03_down_proj_in.json` and `.md`; the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{contents['step']:08d}_{contents['site'].replace('/', '_')}.json"
    path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(describe(contents), encoding="utf-8")
    return path


def describe(contents: Mapping[str, Any]) -> str:
    """A bundle as Markdown."""
    figures = contents["statistics"]
    lines = [
        f"# {contents['site']}, channel {contents['channel']}, after step {contents['step']}",
        "",
        *(f"* {alert['message']}" for alert in contents["alerts"]),
        f"* value {_number(contents['value'])}: {_number(figures['max_over_median'])} times the median; the site's "
        f"kurtosis is {_number(figures['kurtosis'])}",
        f"* token {contents['token']} {contents['token_text']!r} at position {contents['position']} of row "
        f"{contents['row']}, after {contents['text']!r}",
        f"* at least half as large since the probe after step {contents['since']}",
        "",
        "| step | max abs of the channel |",
        "|---|---|",
        *(f"| {step} | {'not among the largest' if v is None else _number(v)} |" for step, v in contents["growth"]),
        "",
        "| weights behind it | which | norm | over the median |",
        "|---|---|---|---|",
        *(
            f"| {w['parameter']} | {w['axis']} {w['index']} | {_number(w['norm'])} | {_number(w['ratio'])} |"
            for w in contents["weights"]
        ),
        "",
        "| parameter | role | rule | learning rate | weight decay |",
        "|---|---|---|---|---|",
        *(
            f"| {o['parameter']} | {o['role']} | {o['rule']} | {o['learning_rate']:g} | {o['weight_decay']:g} |"
            for o in contents["optimizer"]
        ),
    ]
    return "\n".join(lines) + "\n"


def behind(kind: str, layer: int | None, channel: int, model: Transformer) -> list[dict[str, Any]]:
    """The rows, columns and gains that write `channel` of a site: each with its norm and that over the median one.

    Every attention and MLP output adds to the residual stream; the rows and gains that stand out most are given.
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
    own = [_standing(model, *place) for place in direct if place[0] in parameters]
    added = [_standing(model, *place) for place in stream if place[0] in parameters]
    return own + sorted(added, key=lambda w: w["ratio"], reverse=True)[:SHOWN_WRITERS]


def _stream_writers(kind: str, layer: int | None, model: Transformer) -> list[str]:
    """Modules that add to the residual stream before a site, in order; none for a site inside a sublayer."""
    sublayers = SITES[kind].sublayers
    if sublayers is None:
        return []
    last = len(model.layers) if kind == "final_norm_out" else layer or 0
    modules = ["embed_proj" if isinstance(model.embed_proj, Linear) else "embed_tokens"]
    for i in range(2 * last + sublayers):
        modules += [f"layers.{i // 2}.{module}" for module in SUBLAYER_WRITERS[i % 2]]
    return modules


def _indices(kind: str, module: str, channel: int, model: Transformer) -> list[int]:
    """Rows or gains of the module `module` that write `channel` of a site."""
    size = model.config.head_size
    head, within = divmod(channel, size)
    if kind in ("q", "k"):  # RoPE rotates a channel with its partner half a head away
        partner = (within + size // 2) % size
        return [within, partner] if module.endswith("_norm") else [channel, head * size + partner]
    if kind == "o_proj_in" and module.endswith("v_proj"):  # several query heads may read one value head
        queries_per_value = model.config.num_attention_heads // model.config.kv_heads
        return [head // queries_per_value * size + within]
    return [channel]


def _standing(model: Transformer, parameter: str, index: int) -> dict[str, Any]:
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
    """Group, rule and learning rate of parameters in the step that led to `step`."""
    assert config.train.steps is not None, "the length of a run is known when it has a model"
    factor = build_schedule(
        config.schedule, total_steps=config.train.steps, tokens_per_step=config.train.tokens_per_step
    )(max(step - 1, 0))
    groups = groups_of(model, config.optimizer)
    return [
        {
            "parameter": name,
            "role": group["role"],
            "rule": group["rule"],
            "learning_rate": group["base_lr"] * factor,
            "weight_decay": group["weight_decay"],
        }
        for name in parameters
        for group in groups
        if name in group["names"]
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
