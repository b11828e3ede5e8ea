"""What the runs of an ablation have shown: their numbers, mean and spread over seeds, and where they are from."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from osp.ablation.runs import Planned
from osp.evaluation.compare import COLUMNS
from osp.report import Run, Series, read_run
from osp.run.evaluations import ComparisonRecord, Score, replace_nonfinite

HADAMARD = " +Had"
LAST = COLUMNS[-1]


@dataclass(frozen=True)
class Quantity:
    """A number of a run: how it is called, and how it is read from the folder."""

    title: str
    says: str
    read: Callable[[Run], float]


def last(key: str) -> Callable[[Run], float]:
    return lambda run: run.last(key)


def over_layers(stat: str, kind: str, reduce: Callable[[list[float]], float]) -> Callable[[Run], float]:
    """`reduce` of a statistic's last values at one kind of site."""

    def read(run: Run) -> float:
        values = [s.last for site, s in run.sites().items() if (site.stat, site.kind) == (stat, kind)]
        return reduce(values) if values else math.nan

    return read


QUANTITIES = {
    "kurtosis": Quantity(
        "kurtosis in context",
        "excess kurtosis of the residual stream after each block, per token over channels, mean over tokens and "
        "layers, on held-out text",
        over_layers("kurtosis", "block_out", statistics.fmean),
    ),
    "osp_script": Quantity(
        "kurtosis, paper's script",
        "the same as the paper's evaluate_kurtosis.py takes it, every token alone at position 0",
        last("monitor/kurtosis/osp_script"),
    ),
    "down_proj_max": Quantity(
        "max |x| at down_proj",
        "largest value that down_proj reads in any layer, on held-out text",
        over_layers("max_abs", "down_proj_in", max),
    ),
    "down_proj_kurtosis": Quantity(
        "kurtosis at down_proj",
        "excess kurtosis of what down_proj reads, the largest of all layers",
        over_layers("kurtosis", "down_proj_in", max),
    ),
    "R_L": Quantity("R_L", "relative error of the last hidden state under fake W4A4", last("monitor/R_L")),
    "loss": Quantity("validation loss", "nats per token on the held-out split", last("val/loss")),
}


@dataclass(frozen=True)
class Measured:
    """The numbers of one run: `QUANTITIES`, perplexity by bits and by method, and what 4-4-4 costs in nats."""

    planned: Planned
    numbers: dict[str, float]
    kurtosis: Series | None  # of the residual stream over tokens
    record: ComparisonRecord


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation over seeds; the deviation is nan for one seed."""

    mean: float
    deviation: float
    count: int


@dataclass(frozen=True)
class Line:
    """One row of the table at one set of rates."""

    row: str
    rates: str
    cells: dict[str, Cell]
    missing: tuple[str, ...]  # labels of runs that it lacks


@dataclass
class Results:
    """All of an ablation. `sweep`: of its runs alone, row -> (value of the key, numbers), ascending."""

    lines: list[Line]
    runs: list[Measured]
    sweep: dict[str, list[tuple[float | str, dict[str, float]]]]
    failures: dict[str, str]
    specs: dict[str, str] = field(default_factory=dict)  # hash -> the quantization in words
    columns: dict[str, str] = field(default_factory=dict)  # column or method -> hash of its quantization
    texts: dict[str, str] = field(default_factory=dict)  # name -> SHA-256
    commits: tuple[str, ...] = ()


def collect(runs: list[Planned], records: dict[str, ComparisonRecord], failures: dict[str, str]) -> Results:
    """Everything that the finished runs have shown. records: label -> record of scripts/compare.py."""
    measured = [read(run, records[run.label]) for run in runs if run.label in records]
    lines = []
    for row, rates in dict.fromkeys((run.row.name, run.rates) for run in _in_order(runs) if run.value is None):
        mine = [m for m in measured if (m.planned.row.name, m.planned.rates) == (row, rates)]
        planned = [run.label for run in runs if (run.row.name, run.rates) == (row, rates) and run.value is None]
        missing = tuple(label for label in planned if label not in [m.planned.label for m in mine])
        lines.append(Line(row, rates, summary([m.numbers for m in mine]), missing))
    results = Results(lines, measured, _sweep(measured), failures)
    for m in measured:
        (model,) = m.record.models
        results.specs |= model.specs
        results.texts |= model.texts
        results.columns |= model.hashes
    results.commits = tuple(dict.fromkeys(str(m.record.commit) for m in measured))
    return results


def read(run: Planned, record: ComparisonRecord) -> Measured:
    """The numbers of one finished run."""
    folder, (model,) = read_run(run.folder), record.models
    numbers = {name: quantity.read(folder) for name, quantity in QUANTITIES.items()}
    for row, cells in model.bits.items():
        numbers |= {bits + HADAMARD * bool(row): _perplexity(score) for bits, score in cells.items()}
    # a method that cannot be applied to a model has no score
    possible = {method: s for method, s in model.methods.items() if s.perplexity is not None}
    numbers |= {method: _perplexity(score) for method, score in possible.items()}
    return Measured(run, numbers | in_nats(numbers), residual_kurtosis(folder), record)


def in_nats(numbers: dict[str, float]) -> dict[str, float]:
    """Logarithms of the perplexities at 16-16-16 and 4-4-4, and their difference, the cost; nats per token."""
    first, last = (math.log(numbers[bits]) for bits in (COLUMNS[0], LAST))
    return {"nats_16": first, "nats_4": last, "cost": last - first}


def summary(numbers: list[dict[str, float]]) -> dict[str, Cell]:
    """Name -> mean and deviation over runs that differ in their seed."""
    names = dict.fromkeys(name for each in numbers for name in each)
    found = {}
    for name in names:
        values = [each[name] for each in numbers if name in each]
        deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
        found[name] = Cell(statistics.fmean(values), deviation, len(values))
    return found


def difference(a: Cell, b: Cell) -> tuple[float, float]:
    """a - b, and the deviation of seeds that it has to be held against: sqrt(s_a^2 + s_b^2)."""
    return a.mean - b.mean, math.hypot(a.deviation, b.deviation)


def residual_kurtosis(run: Run) -> Series | None:
    """Mean over layers of the residual stream's kurtosis at every probe; steps."""
    series = [s for site, s in run.sites().items() if (site.stat, site.kind) == ("kurtosis", "block_out")]
    if not series:
        return None
    return Series(series[0].steps, np.mean([s.values for s in series], axis=0))


def as_json(results: Results) -> dict[str, Any]:
    """Everything as JSON: every number with the hashes of its quantization and data, and its commit."""

    def cells(line: Line) -> dict[str, Any]:
        return {
            name: {**dataclasses.asdict(cell), "quant": results.columns.get(name)} for name, cell in line.cells.items()
        }

    values = {
        "data": results.texts,
        "commits": list(results.commits),
        "specs": results.specs,
        "rows": [
            {"row": line.row, "rates": line.rates, "cells": cells(line), "missing": list(line.missing)}
            for line in results.lines
        ],
        "runs": [
            {
                "label": m.planned.label,
                "row": m.planned.row.name,
                "overrides": list(m.planned.row.overrides),
                "rates": m.planned.rates,
                "seed": m.planned.seed,
                "value": m.planned.value,
                "model_sha256": m.record.models[0].sha256,
                "commit": m.record.commit,
                "numbers": m.numbers,
            }
            for m in results.runs
        ],
        "failures": results.failures,
    }
    return replace_nonfinite(values)


def _sweep(measured: list[Measured]) -> dict[str, list[tuple[float | str, dict[str, float]]]]:
    found: dict[str, list[tuple[float | str, dict[str, float]]]] = {}
    for m in measured:
        if m.planned.value is not None:
            found.setdefault(m.planned.row.name, []).append((m.planned.value, m.numbers))
    for points in found.values():
        points.sort(key=lambda point: (isinstance(point[0], str), point[0]))
    return found


def _in_order(runs: list[Planned]) -> list[Planned]:
    """As the user named the rows, at the first rates first."""
    return sorted(runs, key=lambda run: run.order)


def _perplexity(score: Score) -> float:
    return math.inf if score.perplexity is None else score.perplexity
