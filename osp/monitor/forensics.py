"""The cause of an outlier: its place, its text, the growth of its channel, and the weights that write it.

A bundle is a JSON file and the same as Markdown. The weights of the model must be whole while a bundle is made
(`Engine.gathered_parameters`); everything else comes from a `Reading` and from the run's probes.jsonl.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from osp.config import Config
from osp.files import write_text
from osp.model.sites import SITES, SUBLAYER_WRITERS, split_site
from osp.model.transformer import Linear, Transformer
from osp.monitor.alerts import Alert, mechanism
from osp.monitor.probe import Reading
from osp.run.evaluations import replace_nonfinite
from osp.run.read import growth, since
from osp.tables import render_text

CONTEXT = 8  # tokens of text shown before the token of an outlier
SHOWN_WRITERS = 4  # weights shown of those that add to a channel of the residual stream


@dataclass(frozen=True)
class Forensics:
    """The explanation of readings by their model, its configuration and its tokenizer."""

    model: Transformer
    config: Config
    tokenizer: Tokenizer

    def site_records(self, reading: Reading) -> dict[str, dict[str, Any]]:
        """Return the entries of the sites in a line of probes.jsonl."""
        records = {}
        for name, site in reading.sites.items():
            text = reading.text.tokens[site.row, max(0, site.position - CONTEXT) : site.position + 1]
            records[name] = {
                "top_channel": site.top_channel,
                "top_channel_share": site.statistics["top_channel_share"],
                **{f"top_{key}": getattr(site, key) for key in ("value", "row", "position", "token")},
                "top_text": self.tokenizer.decode(text.tolist(), skip_special_tokens=False),
                "channels": site.channels,
            }
        return records

    def bundle(
        self, name: str, reading: Reading, history: Sequence[Mapping[str, Any]], alerts: Sequence[Alert] = ()
    ) -> dict[str, Any]:
        """Return everything known about the outlier of one site as values of JSON.

        history: lines of probes.jsonl, the last one about this reading. alerts: about this site.
        """
        site, now = reading.sites[name], history[-1]
        layer, kind = split_site(name)
        grown = growth(history, name, site.channel)
        contents = {
            "step": now["step"],
            "tokens": now.get("tokens", now["step"] * self.config.train.tokens_per_step),
            "model_weights": self.config.monitor.weights,
            "site": name,
            "layer": layer,
            **{key: getattr(site, key) for key in ("channel", "value", "row", "position", "token")},
            "token_text": self.tokenizer.decode([site.token], skip_special_tokens=False),
            "text": now["sites"][name]["top_text"],
            "mechanism": mechanism(name, site),
            "statistics": site.statistics,
            "channels": site.channels,
            "growth": grown,
            "since": since(grown),
            "weights": behind(kind, layer, site.channel, self.model),
            "alerts": [{"message": alert.message, **alert.details()} for alert in alerts],
        }
        return replace_nonfinite(contents)


def write_bundle(contents: Mapping[str, Any], folder: Path) -> Path:
    """Write `folder/step_00001234_layer_03_down_proj_in.json` and `.md`; return the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{contents['step']:08d}_{contents['site'].replace('/', '_')}.json"
    write_text(path, json.dumps(contents, indent=1) + "\n")
    markdown = render_text(Path(__file__).with_suffix(".md"), **contents)
    write_text(path.with_suffix(".md"), markdown)
    return path


def behind(kind: str, layer: int | None, channel: int, model: Transformer) -> list[dict[str, Any]]:
    """Return the rows, columns and gains that write `channel` of a site, each with its norm over the median norm.

    Every attention and MLP output adds to the residual stream: of these, the `SHOWN_WRITERS` largest are returned.
    """
    parameters = dict(model.named_parameters())
    block = "" if layer is None else f"layers.{layer}."
    direct = [
        (f"{block}{path}.weight", index)
        for path in SITES[kind].writers
        for index in _indices(kind, path, channel, model)
    ]
    stream = [(f"{path}.weight", channel) for path in _stream_writers(kind, layer, model)]
    # not every model has every norm, gain and gate
    own = [_measure_weight(name, parameters[name], index) for name, index in direct if name in parameters]
    added = [_measure_weight(name, parameters[name], index) for name, index in stream if name in parameters]
    return own + sorted(added, key=lambda weight: weight["ratio"], reverse=True)[:SHOWN_WRITERS]


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


@torch.no_grad()
def _measure_weight(name: str, weight: Tensor, index: int) -> dict[str, Any]:
    """Return the norm of a row, column or gain and the median one of its parameter."""
    axis = "gain" if weight.ndim == 1 else "column" if name == "embed_tokens.weight" else "row"
    norms = weight.float().abs()
    if axis != "gain":
        norms = torch.linalg.vector_norm(weight.float(), dim=0 if axis == "column" else 1)
    index = min(index, len(norms) - 1)  # SSNorm has one gain for all channels
    norm, median = float(norms[index]), float(norms.median())
    ratio = norm / max(median, 1e-30)  # JSON knows no infinity
    return {"parameter": name, "axis": axis, "index": index, "norm": norm, "median": median, "ratio": ratio}
