"""The configuration of `scripts/ablation.py`, and the rows it can train."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from osp.config import Weights
from osp.errors import UserError, as_user_error
from osp.evaluation.config import Column
from osp.schema import Count, FilePath, Positive, Seed

PAPER_ROWS = ("adam", "muon_all", "muon", "muon_ssnorm", "muon_embproj", "osp")  # of OSP's table 2, in its order
WORDS = yaml.safe_load(Path(__file__).with_name("table.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class SweepConfig:
    """Train each row at several values of one key, with the first seed."""

    key: str | None = None  # key of a training, for example optimizer.lr
    values: tuple[Any, ...] = ()  # values of the key
    factors: tuple[Positive, ...] = ()  # instead of values: factors of the row's value at the first of `rates`
    rows: tuple[str, ...] = ()  # names of rows; names without a row are ignored; empty: all rows


@dataclass(frozen=True)
class AblationConfig:
    """Which runs to train and what to measure. The presets are `configs/scale/`.

    A row is the name of an experiment, or `NAME: OVERRIDE OVERRIDE ...`, for example
    `gated: +experiment=osp attention.gate=true`.
    """

    dir: FilePath = "ablations/nano"  # folder of the runs and the tables
    rows: tuple[str, ...] = PAPER_ROWS  # what to train
    seeds: tuple[Seed, ...] = (0,)  # values of train.seed
    common: tuple[str, ...] = ()  # overrides of every training, from the preset
    overrides: tuple[str, ...] = ()  # overrides of every training, from the command line
    # Named sets of overrides by row, see `settings_of`.
    settings: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    rates: tuple[str, ...] = ("paper",)  # names in `settings` to train with; `paper`: the rates of the experiments
    sweep: SweepConfig = field(default_factory=SweepConfig)
    ranks: Count = 1  # processes of each training
    parallel: Count | None = None  # trainings at a time; None: as many as the machine allows
    texts: tuple[str, ...] = ()  # texts for perplexity; empty: the validation split
    max_tokens: Count | None = None  # tokens to read from the start of each text; None: all
    # To measure in each run; averaged: the running average of its weights, see the table `average` of a training
    weights: Annotated[tuple[Weights, ...], Field(min_length=1)] = ("trained",)
    columns: tuple[Column, ...] = ()  # of scripts/compare.py, as costs on every text; empty: its own, as perplexities
    # Quantities of osp/ablation/table.yaml to show.
    quantities: tuple[str, ...] = ("kurtosis", "osp_script", "down_proj_max", "down_proj_kurtosis", "R_L", "loss")
    interval: bool = False  # show the 95% interval over seeds (Student's t) instead of the standard deviation
    compared: tuple[tuple[str, str], ...] = ()  # pairs of rows to compare; empty: the first row and the last row
    guard: dict[str, Positive] = field(default_factory=dict)  # text -> loss at 16 bits above which a row is marked
    calibration_tokens: Count = 262_144  # calibration tokens of GPTQ
    methods: Literal["ends", "all", "none"] = "ends"  # rows to measure with GPTQ and QuaRot; ends: first and last
    progress: bool = True  # show a progress bar
    debug: bool = False  # show tracebacks of user errors


def parse_rows(config: AblationConfig) -> dict[str, tuple[str, ...]]:
    """Return the overrides of each row by its name; raise `UserError` for a malformed or repeated row."""
    rows: dict[str, tuple[str, ...]] = {}
    for text in config.rows:
        name, colon, rest = text.partition(":")
        name = name.strip()
        if not 0 < len(name) <= 200 or name in (".", "..") or set(name) & set(" ,=/\\"):
            raise UserError(f"rows: {text!r}; write the name of an experiment, or 'NAME: OVERRIDE OVERRIDE'")
        if name in rows:
            raise UserError(f"rows: {name!r} is repeated; give each row another name")
        with as_user_error(f"rows: {text!r}: ", ValueError):
            rows[name] = tuple(shlex.split(rest)) if colon else (f"+experiment={name}",)
    return rows


def settings_of(row: str, overrides: Sequence[str], settings: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the overrides that `settings` has for a row with these `overrides`, which win over them.

    The key is the name of the row or of its experiment, or the longest prefix of that name before an underscore (`osp`
    for `osp_gate`).
    """
    experiments = [text.partition("=")[2] for text in overrides if text.lstrip("+").startswith("experiment=")]
    for name in (row, *experiments):
        for key in sorted(settings, key=len, reverse=True):
            if name == key or name.startswith(f"{key}_"):
                return settings[key]
    return ()


def check_ablation(config: AblationConfig) -> None:
    """Raise `UserError` for well-typed values that are not a valid ablation."""
    rows, sweep = list(parse_rows(config)), config.sweep
    for key, values, example in (("rows", rows, PAPER_ROWS), ("seeds", config.seeds, (0, 1, 2))):
        if not values:
            raise UserError(f"{key}=[]: name at least one, for example {key}=[{','.join(map(str, example))}]")
    distinct = {key: getattr(config, key) for key in ("seeds", "rates", "weights")} | {"sweep.values": sweep.values}
    for key, values in distinct.items():
        if repeated := [value for value in values if values.count(value) > 1]:
            raise UserError(f"{key}={list(values)}: {repeated[0]} is repeated and would be the same run")
    for key, names in {"rates": ["paper", *config.settings], "quantities": list(WORDS["quantities"])}.items():
        if unknown := [name for name in getattr(config, key) if name not in names]:
            raise UserError(f"{key}={list(getattr(config, key))}: {unknown[0]!r}; choose from {names}")
    if (sweep.key is None) != (not (sweep.values or sweep.factors)):
        raise UserError("a sweep needs both sweep.key=KEY and sweep.values=[VALUE,...]")
    if sweep.factors and (sweep.values or not config.rates):
        raise UserError(f"sweep.factors={list(sweep.factors)}: needs sweep.values=[] and rates=[NAME], for the values")
    if sweep.rows and not set(sweep.rows) & set(rows):
        raise UserError(f"sweep.rows={list(sweep.rows)}: no such rows; choose from {rows}")
    if not config.rates and sweep.key is None:
        raise UserError("rates=[] and no sweep: nothing to train")
    if config.columns and (missing := {"16-16-16", "4-4-4"} - set(config.columns)):
        raise UserError(f"columns={list(config.columns)}: add {min(missing)}; the tables compare with it")
    for text in config.guard:
        if text not in config.texts or not config.columns:
            raise UserError(f"guard.{text}: add {text} to texts={list(config.texts)}, and name columns=[...]")
