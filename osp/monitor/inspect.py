"""Inspect a trained model: where its outliers are and since when, without DeepSpeed."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from osp.config import Config, MonitorConfig, Weights
from osp.data.loader import Layout
from osp.data.tokenizer import eos_id, load_tokenizer
from osp.errors import UserError, as_user_error
from osp.files import read_utf8
from osp.model.sites import split_site
from osp.model.transformer import check_finite
from osp.monitor.alerts import mechanism
from osp.monitor.forensics import Forensics, write_bundle
from osp.monitor.monitor import FORENSICS, PROBES, held_out_text
from osp.monitor.probe import ProbeText, Reading, probe
from osp.run.checkpoint import Checkpoint, find, load_model
from osp.run.evaluations import label
from osp.run.folder import training_shards
from osp.run.read import growth, read_probes, since
from osp.run.verdict import judge, over_usual
from osp.tables import text_table

log = logging.getLogger(__name__)

SHOWN = 20  # sites of the table
TITLES = (
    "site", "kurtosis", "judgement", "pooled", "max|x|", "/median", "channel", "energy", "position", "since", "text",
)  # fmt: skip


def inspect(
    path: Path, text: Path | None = None, out: Path | None = None, weights: Weights = "trained"
) -> tuple[str, Path]:
    """Probe the model of a run folder or checkpoint; return a table of its sites, worst first, and a bundle's path.

    The worst site has the highest kurtosis for its kind: heavy tails are normal at the input of down_proj.

    Args:
        text: file to read instead of the run's validation split, up to `monitor.tokens`.
        out: folder of the bundle, which is about the worst site; None: `forensics` or `forensics_averaged` of the run.
    """
    folder = find(path)
    if folder is None:
        raise UserError(f"{path}: neither a run folder with a checkpoint nor a checkpoint")
    checkpoint = Checkpoint(folder)
    checkpoint.check_weights(weights)
    config, run = checkpoint.config, folder.parent.parent
    probed, tokenizer = _read_text(folder, config, text)
    model = load_model(folder, weights=weights)
    check_finite(model, folder)
    forensics = Forensics(model, config, tokenizer)
    reading = probe(forensics.model, probed, MonitorConfig(sites="all", statistics="all"))
    notes = list[str]()
    lines = read_probes(run / PROBES, notes) if config.monitor.weights == weights else []
    history: list[Any] = [line for line in lines if line["step"] < checkpoint.step]
    for note in notes:
        log.warning("%s", note)
    history.append({"step": checkpoint.step, "tokens": checkpoint.tokens, "sites": forensics.site_records(reading)})
    kurtoses = {name: site.statistics["kurtosis"] for name, site in reading.sites.items()}
    order = sorted(kurtoses, key=lambda name: -over_usual(name, kurtoses[name]))
    place = out or run / label(FORENSICS, weights, "_")
    with as_user_error(f"{place}: cannot write there: ", OSError, after="; set out to another folder"):
        bundle_path = write_bundle(forensics.bundle(order[0], reading, history) | {"model_weights": weights}, place)
    return "averaged weights, " * (weights == "averaged") + _table(order, reading, history), bundle_path


def _read_text(folder: Path, config: Config, text: Path | None) -> tuple[ProbeText, Tokenizer]:
    """Return the text to probe the checkpoint `folder` with, and its tokenizer."""
    run = folder.parent.parent
    if text is None:
        shards = training_shards(folder, instead="name a file of text: text=FILE")
        return held_out_text(shards, config), load_tokenizer(shards / "tokenizer.json")
    if not (run / "tokenizer.json").exists():
        raise UserError(f"{run / 'tokenizer.json'}: the tokenizer of the run is missing; name the run folder")
    tokenizer = load_tokenizer(run / "tokenizer.json")
    ids = tokenizer.encode(read_utf8(text, name=f"text={text}")).ids[: config.monitor.tokens]
    if len(ids) < 2:
        raise UserError(f"text={text}: has {len(ids)} tokens; moments over tokens need at least 2")
    length = min(config.train.seq_len, len(ids))
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if Layout.of(config).has_start:
        start = rows.new_full((len(rows), 1), eos_id(tokenizer, config.tokenizer.eos_token))
        rows = torch.cat((start, rows[:, :-1]), dim=1)
    return ProbeText(rows), tokenizer


def _table(order: Sequence[str], reading: Reading, history: Sequence[Any]) -> str:
    """Return a table with one line per site. history: lines of probes.jsonl; the last one is about this reading."""
    table: list[Sequence[str]] = [TITLES]
    for name in order[:SHOWN]:
        site, numbers = reading.sites[name], reading.sites[name].statistics
        began = since(growth(history, name, site.channel))
        table.append(
            [
                name,
                f"{numbers['kurtosis']:.4g}",
                judge(split_site(name)[1], numbers["kurtosis"]),
                *(f"{numbers[key]:.4g}" for key in ("kurtosis_pooled", "max_abs", "max_over_median")),
                str(site.channel),
                f"{numbers['top_channel_share']:.1%}",
                f"{site.row}:{site.position}",
                "?" if began is None or len(history) == 1 else f"step {began}",
                repr(history[-1]["sites"][name]["top_text"][-24:]),
            ]
        )
    shown = [line[0] for line in table[1:] if line[2] != "normal"] or order[:1]
    words = "\n".join(mechanism(name, reading.sites[name]) for name in shown)
    whole = {name: reading.metrics[f"monitor/{name}"] for name in ("kurtosis/osp_script", "R_L")}
    return (
        f"after step {history[-1]['step']}: {', '.join(f'{name} {value:.4g}' for name, value in whole.items())}\n\n"
        f"{text_table(table)}\n\n"
        f"{words}\n\n"
        f"the {len(table) - 1} of {len(order)} sites with the highest kurtosis for their kind; raised: higher than in "
        "models without outliers. channel, position (sequence:token): of the largest |x|; energy: share of the "
        "strongest channel; since: first of the latest probes in which this channel was at least half as large"
    )
