"""Plan the runs of an ablation: one checked configuration for each row, set of learning rates and seed."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp.ablation.config import AblationConfig, Row, parse_rows, settings_of
from osp.config import Config, RunConfig, from_dict, leaves, to_dict
from osp.errors import UserError
from osp.run.read import FREE

Compose = Callable[[Sequence[str]], dict[str, Any]]  # returns the configuration of `scripts/train.py OVERRIDES`

# All rows must agree in these keys, or their numbers do not compare. A sweep may change its key.
SHARED = ("train.", "data.", "tokenizer.", "eval.", "monitor.", "schedule.", "model.vocab_size")
NOT_SHARED = ("train.seed", "train.micro_batch_size", "train.compile", "train.activation_checkpointing")


@dataclass(frozen=True)
class Planned:
    """One training of the ablation. `rates` names its settings; a run of the sweep has a `value` instead."""

    row: Row
    rates: str
    seed: int
    value: Any  # of the swept key; None: not of the sweep
    config: Config

    @property
    def num_steps(self) -> int:
        steps = self.config.train.num_steps
        assert steps is not None, "plan() refuses train.minutes"
        return steps

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.config.train.tokens_per_step

    @property
    def label(self) -> str:
        return self.config.run.name

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


def plan(config: AblationConfig, compose: Compose) -> list[Planned]:
    """Return the runs of `config` in the order of training: seed by seed, the first row and the last row first.

    Raises:
        UserError: a row cannot be composed, or rows differ in a shared key.
    """
    rows, runs = parse_rows(config), []
    ends_first = rows[:1] + rows[1:][-1:] + rows[1:-1]
    swept = [row for row in ends_first if row.name in (config.sweep.rows or [row.name])]
    trainings = [(row, rates, seed, None) for seed in config.seeds for rates in config.rates for row in ends_first]
    trainings += [(row, "sweep", config.seeds[0], value) for value in config.sweep.values for row in swept]
    for row, rates, seed, value in trainings:
        settings = settings_of(row, config.settings.get(rates, {}))
        overrides = [*config.common, *settings, *row.overrides, *config.overrides]
        overrides += [] if value is None else [f"{config.sweep.key}={value}"]
        try:
            composed = from_dict(compose([*overrides, f"train.seed={seed}"]))
        except UserError as error:
            raise UserError(f"row {row.name}: {error}") from error
        runs.append(Planned(row, rates, seed, value, named(composed, row.name, folder=Path(config.dir) / "runs")))
    _check_shared(runs, config.sweep.key)
    return runs


def named(config: Config, row: str, *, folder: Path) -> Config:
    """Return `config` with a run folder below `folder` whose name has a hash of the training.

    A training that appears twice on the page, for instance in a sweep, runs once. A run with another configuration is
    never mistaken for it.
    """
    values = {key: value for key, value in leaves(to_dict(config)) if not key.startswith(FREE)}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    label = f"{row}-seed{config.train.seed}-{digest}"
    return dataclasses.replace(config, run=RunConfig(name=label, dir=str(folder / label)))


def _check_shared(runs: list[Planned], swept: str | None) -> None:
    """Raise `UserError` if a row changes a key that all rows must share."""
    first = dict(leaves(to_dict(runs[0].config)))
    if runs[0].config.train.minutes is not None and runs[0].config.train.steps is None:
        raise UserError("train.minutes gives every row another number of steps; set train.steps or train.tokens")
    for run in runs[1:]:
        for key, value in leaves(to_dict(run.config)):
            shared = key.startswith(SHARED) and not key.startswith(NOT_SHARED) and key != swept
            if shared and value != first.get(key):
                raise UserError(
                    f"rows {runs[0].row.name} and {run.row.name} do not compare: {key}={first.get(key)} and {value}; "
                    f"rows must agree in this key. Give {key}=VALUE for all rows, beside rows=[...]"
                )
