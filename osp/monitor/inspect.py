"""Where are my outliers, and since when: one look at a trained model, without DeepSpeed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from osp.config import Config, MonitorConfig
from osp.data import load_tokenizer, shard_folder
from osp.errors import UserError
from osp.files import read_lines
from osp.monitor.forensics import bundle, site_record, write_bundle
from osp.monitor.monitor import FORENSICS, PROBES, held_out_rows
from osp.monitor.probe import Reading, Rows, probe
from osp.run.checkpoint import Checkpoint, find, load_model
from osp.run.history import growth, since

SHOWN = 20  # sites of the table


def inspect(path: Path, text: Path | None = None, out: Path | None = None) -> tuple[str, Path]:
    """(a table of the sites, the worst first; the bundle of the first one) of a run folder's or checkpoint's model.

    text: a file to read instead of the run's held-out split, `monitor.tokens` of it. out: folder of the bundle; None:
    `forensics` of the run. Raises `UserError` for what cannot be read.
    """
    folder = find(path)
    if folder is None:
        raise UserError(f"{path}: neither a run folder with a checkpoint nor a checkpoint")
    checkpoint = Checkpoint(folder)
    config, run = checkpoint.config, folder.parent.parent
    rows, tokenizer_file = _rows(config, run, text)
    tokenizer = load_tokenizer(tokenizer_file)
    model = load_model(folder)
    reading = probe(model, rows, MonitorConfig(sites="all", statistics="all"))
    history: list[Any] = [line for line in read_lines(run / PROBES) if line["step"] < checkpoint.step]
    now = {"step": checkpoint.step, "sites": {n: site_record(s, rows, tokenizer) for n, s in reading.sites.items()}}
    order = sorted(reading.sites, key=lambda name: -reading.sites[name].statistics["kurtosis_pooled"])
    contents = bundle(
        order[0],
        reading.sites[order[0]],
        step=checkpoint.step,
        rows=rows,
        tokenizer=tokenizer,
        history=[*history, now],
        model=model,
        config=config,
    )
    place = out or run / FORENSICS
    try:
        bundle_path = write_bundle(contents, place)
    except OSError as error:
        raise UserError(f"{place}: cannot write there: {error.strerror}; name another folder with --out") from error
    return _table(order, reading, history, now["sites"], checkpoint.step), bundle_path


def _rows(config: Config, run: Path, text: Path | None) -> tuple[Rows, Path]:
    """(the text to probe, the tokenizer it is in)."""
    shards = shard_folder(config.data, config.tokenizer) if text is None else None
    if shards is not None:
        if not (shards / "manifest.json").exists():
            raise UserError(f"{shards}: the run's held-out text is not there; name a text with --text FILE")
        return held_out_rows(shards, config), shards / "tokenizer.json"
    assert text is not None
    tokenizer_file = run / "tokenizer.json"
    if not tokenizer_file.exists():
        raise UserError(f"{tokenizer_file}: the tokenizer of the run is missing; name the run folder")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {text}: cannot be read: {error}") from error
    ids = load_tokenizer(tokenizer_file).encode(content).ids[: config.monitor.tokens]
    if len(ids) < 2:
        raise UserError(f"--text {text}: holds {len(ids)} tokens; moments over tokens need at least 2")
    length = min(config.train.seq_len, len(ids))
    return Rows(torch.tensor(ids[: len(ids) // length * length]).view(-1, length)), tokenizer_file


def _table(order: Sequence[str], reading: Reading, history: Sequence[Any], now: dict[str, Any], step: int) -> str:
    """One line per site."""
    titles = ("site", "kurtosis", "pooled", "max|x|", "/median", "channel", "energy", "position", "since", "text")
    rows: list[tuple[str, ...]] = [titles]
    for name in order[:SHOWN]:
        site = reading.sites[name]
        figures = site.statistics
        began = since(growth([*history, {"step": step, "sites": now}], name, site.channel))
        rows.append(
            (
                name,
                f"{figures['kurtosis']:.4g}",
                f"{figures['kurtosis_pooled']:.4g}",
                f"{figures['max_abs']:.4g}",
                f"{figures['max_over_median']:.4g}",
                str(site.channel),
                f"{figures['top_channel_share']:.1%}",
                f"{site.row}:{site.position}",
                "?" if began is None or not history else f"step {began}",
                repr(now[name]["top_text"][-24:]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    whole = {name: reading.metrics[f"monitor/{name}"] for name in ("kurtosis/osp_script", "R_L")}
    return "\n".join(
        [
            f"after step {step}: {', '.join(f'{name} {value:.4g}' for name, value in whole.items())}",
            "",
            *lines,
            "",
            f"the {len(rows) - 1} of {len(order)} sites with the largest pooled kurtosis. channel and position "
            "(row:token) are those of the largest |x|; energy: share of the strongest channel; since: the probe from "
            "which on this channel has been at least half as large",
        ]
    )
