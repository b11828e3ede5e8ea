"""Plan the runs of an ablation: one checked configuration for each row, set of learning rates and seed."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp.ablation.config import AblationConfig, parse_rows, settings_of
from osp.config import REMOVED, Config, RunConfig, from_dict, leaves, to_dict
from osp.errors import UserError, as_user_error
from osp.run.read import FREE

Compose = Callable[[Sequence[str]], dict[str, Any]]  # returns the configuration of `scripts/train.py OVERRIDES`

# All rows must agree in these keys, or their numbers do not compare. A sweep may change its key.
SHARED = ("train.", "data.", "tokenizer.", "eval.", "monitor.", "schedule.", "model.vocab_size")
NOT_SHARED = ("train.seed", "train.micro_batch_size", "train.compile", "train.activation_checkpointing")
NOT_SHARED += ("schedule.final_ratio", "train.z_loss")  # part of a recipe
# Defaults of keys younger than 0.1.0: with these a training keeps the name of its folder.
LATER = {"model.init": "normal", "optimizer.gain_decay": None, "train.deterministic": False}
LATER |= {"data.document_characters": None, "norm.lam_post": None, "norm.lam_final": None, "norm.layer_final": None}
LATER |= {"eval.quant.formats": [], "monitor.quant": None, "data.bos": False, "data.repeat": None}
LATER |= {"model.tie_embeddings": False, "train.z_loss": 0.0, "qat.scheme": None, "qat.start": "80%"}
LATER |= {"average.kind": "none", "average.horizon": "10%", "average.decay": None, "average.every": 1}
LATER |= {"qk_clip.tau": None, "attention.logit_cap": None, "attention.v_scale": 1.0, "attention.value_gate": False}


@dataclass(frozen=True)
class Planned:
    """One training of the ablation. `rates` names its settings; a run of the sweep has a `value` instead."""

    row: str
    overrides: tuple[str, ...]  # of the row
    rates: str
    seed: int
    value: Any  # of the swept key; None: not of the sweep
    config: Config

    @property
    def label(self) -> str:
        return self.config.run.name

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


def plan(config: AblationConfig, compose: Compose) -> list[Planned]:
    """Return the runs of `config` in the order of training: seed by seed, the first row and the last row first.

    Raises `UserError` if a row cannot be composed, or rows differ in a shared key.
    """
    rows, runs, sweep = parse_rows(config), list[Planned](), config.sweep
    composed = functools.cache(lambda *overrides: compose(overrides))  # seeds share it, because it takes 0.3 s
    first, *others = rows
    ends_first = [first, *others[-1:], *others[:-1]]
    swept = [row for row in ends_first if row in (config.sweep.rows or rows)]
    trainings = [(row, rates, seed, None) for seed in config.seeds for rates in config.rates for row in ends_first]
    swept_values = sorted({1.0, *sweep.factors}) if sweep.factors else sweep.values
    trainings += [(row, "sweep", config.seeds[0], value) for value in swept_values for row in swept]
    for row, rates, seed, value in trainings:
        chosen = config.rates[0] if sweep.factors and rates == "sweep" else rates
        settings = settings_of(row, rows[row], config.settings.get(chosen, {}))
        if value is not None and sweep.factors:
            own = next(dict(leaves(to_dict(run.config))).get(sweep.key or "") for run in runs if run.row == row)
            if not isinstance(own, int | float):
                raise UserError(f"sweep.factors: row {row} has {sweep.key}={own}, no number; set sweep.values instead")
            value *= own
        overrides = [*config.common, *settings, *rows[row], *config.overrides]
        overrides += [] if value is None else [f"{sweep.key}={value}"]
        with as_user_error(f"row {row}: ", UserError):
            keys = composed(*overrides)
            trained = from_dict(keys | {"train": keys["train"] | {"seed": seed}})
        if "averaged" in config.weights and trained.average.kind == "none":
            raise UserError(f"weights={list(config.weights)}: row {row} keeps no average; add average=ema")
        # The folder's name has a hash of the training: one that appears twice, for instance in a sweep, runs once, and
        # a run with another configuration is never mistaken for it.
        values = {key: default for key, (default, *_) in REMOVED.items()} | dict(leaves(to_dict(trained)))
        values = {k: v for k, v in values.items() if not k.startswith(FREE) and LATER.get(k, ...) != v}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        label = f"{row}-seed{seed}-{digest}"
        trained = dataclasses.replace(trained, run=RunConfig(name=label, dir=str(Path(config.dir) / "runs" / label)))
        runs.append(Planned(row, rows[row], rates, seed, value, trained))
    _check_shared(runs, sweep.key)
    return runs


def _check_shared(runs: list[Planned], swept: str | None) -> None:
    """Raise `UserError` if a row changes a key that all rows must share."""
    first = dict(leaves(to_dict(runs[0].config)))
    for run in runs[1:]:
        for key, value in leaves(to_dict(run.config)):
            shared = key.startswith(SHARED) and not key.startswith(NOT_SHARED) and key != swept
            if shared and value != first.get(key):
                raise UserError(
                    f"rows {runs[0].row} and {run.row} do not compare: {key}={first.get(key)} and {value}; "
                    f"rows must agree in this key. Give {key}=VALUE for all rows, beside rows=[...]"
                )
