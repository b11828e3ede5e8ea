"""The tables of an ablation, as JSON and Markdown: numbers of its runs, spread over seeds, and where they are from."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from osp.ablation.config import AblationConfig
from osp.ablation.paper import SCALE, TABLE_2, TEXT
from osp.ablation.runs import Planned
from osp.evaluation.compare import COLUMNS
from osp.report import Run, Series, read_run
from osp.run.evaluations import ComparisonRecord, Score, replace_nonfinite
from osp.tables import markdown_table

HADAMARD = " +Had"
FIRST, LAST = COLUMNS[0], COLUMNS[-1]
METHODS = ("RTN", "+ FFN Had", "+ GPTQ", "+ QuaRot")
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # heading, rows


# ---- numbers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """A number of a run: its title, its meaning, and how to read it from the folder."""

    title: str
    says: str
    read: Callable[[Run], float]


def _last(key: str) -> Callable[[Run], float]:
    return lambda run: run.last(key)


def _over_layers(stat: str, kind: str, reduce: Callable[[list[float]], float]) -> Callable[[Run], float]:
    """Return a function that reduces the last values of a statistic at one kind of site."""

    def read(run: Run) -> float:
        values = [s.last for site, s in run.sites().items() if (site.stat, site.kind) == (stat, kind)]
        return reduce(values) if values else math.nan

    return read


QUANTITIES = {
    "kurtosis": Quantity(
        "kurtosis in context",
        "excess kurtosis of the residual stream after each block, per token over channels, mean over tokens and "
        "layers, on the validation split",
        _over_layers("kurtosis", "block_out", statistics.fmean),
    ),
    "osp_script": Quantity(
        "kurtosis, paper's script",
        "the same by the paper's evaluate_kurtosis.py, every token alone at position 0",
        _last("monitor/kurtosis/osp_script"),
    ),
    "down_proj_max": Quantity(
        "max |x| at down_proj",
        "largest input of down_proj in any layer, on the validation split",
        _over_layers("max_abs", "down_proj_in", max),
    ),
    "down_proj_kurtosis": Quantity(
        "kurtosis at down_proj",
        "excess kurtosis of the input of down_proj, the largest of all layers",
        _over_layers("kurtosis", "down_proj_in", max),
    ),
    "R_L": Quantity("R_L", "relative error of the last hidden state under fake W4A4", _last("monitor/R_L")),
    "loss": Quantity("validation loss", "nats per token on the validation split", _last("val/loss")),
}
COST_TITLE = f"{LAST} costs, nats"


@dataclass(frozen=True)
class Measured:
    """The numbers of one run: `QUANTITIES`, perplexity by bits and by method, and the cost of 4-4-4 in nats."""

    planned: Planned
    numbers: dict[str, float]
    kurtosis: Series | None  # of the residual stream, by step
    record: ComparisonRecord


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation over seeds; the deviation is nan for one seed."""

    mean: float
    deviation: float
    count: int


@dataclass(frozen=True)
class Line:
    """One row of the table at one set of learning rates."""

    row: str
    rates: str
    cells: dict[str, Cell]
    missing: tuple[str, ...]  # labels of runs without numbers


@dataclass
class Results:
    """The numbers of an ablation. `sweep`: row -> (value of the swept key, numbers), ascending."""

    lines: list[Line]
    runs: list[Measured]
    sweep: dict[str, list[tuple[float | str, dict[str, float]]]]
    failures: dict[str, str]
    specs: dict[str, str] = field(default_factory=dict)  # hash -> the quantization in words
    columns: dict[str, str] = field(default_factory=dict)  # column or method -> hash of its quantization
    texts: dict[str, str] = field(default_factory=dict)  # name -> SHA-256
    commits: tuple[str, ...] = ()


def collect(runs: list[Planned], records: dict[str, ComparisonRecord], failures: dict[str, str]) -> Results:
    """Return the results of the finished runs. records: label -> record of scripts/compare.py."""
    measured = [measure(run, records[run.label]) for run in runs if run.label in records]
    planned: dict[tuple[str, str], list[str]] = {}
    for run in sorted(runs, key=lambda run: run.order):
        if run.value is None:
            planned.setdefault((run.row.name, run.rates), []).append(run.label)
    lines = []
    for (row, rates), run_labels in planned.items():
        numbers = {
            m.planned.label: m.numbers for m in measured if (m.planned.row.name, m.planned.rates) == (row, rates)
        }
        missing = tuple(label for label in run_labels if label not in numbers)
        lines.append(Line(row, rates, summarize(list(numbers.values())), missing))
    sweep: dict[str, list[tuple[float | str, dict[str, float]]]] = {}
    for m in measured:
        if m.planned.value is not None:
            sweep.setdefault(m.planned.row.name, []).append((m.planned.value, m.numbers))
    for points in sweep.values():
        points.sort(key=lambda point: (isinstance(point[0], str), point[0]))
    results = Results(lines, measured, sweep, failures)
    for m in measured:
        (model,) = m.record.models
        results.specs |= model.specs
        results.texts |= model.texts
        results.columns |= model.hashes
    results.commits = tuple(dict.fromkeys(str(m.record.commit) for m in measured))
    return results


def measure(run: Planned, record: ComparisonRecord) -> Measured:
    """Return the numbers of one finished run."""

    def perplexity(score: Score) -> float:
        return math.inf if score.perplexity is None else score.perplexity

    folder, (model,) = read_run(run.folder), record.models
    numbers = {name: quantity.read(folder) for name, quantity in QUANTITIES.items()}
    for row, cells in model.bits.items():
        numbers |= {bits + HADAMARD * bool(row): perplexity(score) for bits, score in cells.items()}
    # a method that cannot be applied to a model has no score
    numbers |= {method: s.perplexity for method, s in model.methods.items() if s.perplexity is not None}
    first, last = math.log(numbers[FIRST]), math.log(numbers[LAST])
    numbers |= {"nats_16": first, "nats_4": last, "cost": last - first}
    layers = [s for site, s in folder.sites().items() if (site.stat, site.kind) == ("kurtosis", "block_out")]
    kurtosis = Series(layers[0].steps, np.mean([s.values for s in layers], axis=0)) if layers else None
    return Measured(run, numbers, kurtosis, record)


def summarize(numbers: list[dict[str, float]]) -> dict[str, Cell]:
    """Return name -> mean and deviation over runs that differ in their seed."""
    cells = {}
    for name in dict.fromkeys(name for run in numbers for name in run):
        values = [run[name] for run in numbers if name in run]
        deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
        cells[name] = Cell(statistics.fmean(values), deviation, len(values))
    return cells


def difference(a: Cell, b: Cell) -> tuple[float, float]:
    """Return a - b and the deviation over seeds to compare it with, sqrt(s_a^2 + s_b^2)."""
    return a.mean - b.mean, math.hypot(a.deviation, b.deviation)


def as_json(results: Results) -> dict[str, Any]:
    """Return every number with the hashes of its quantization and data, and its commit."""
    rows = [
        {
            "row": line.row,
            "rates": line.rates,
            "cells": {k: {**dataclasses.asdict(c), "quant": results.columns.get(k)} for k, c in line.cells.items()},
            "missing": list(line.missing),
        }
        for line in results.lines
    ]
    runs = [
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
    ]
    values = {"data": results.texts, "commits": list(results.commits), "specs": results.specs, "rows": rows}
    return replace_nonfinite({**values, "runs": runs, "failures": results.failures})


# ---- tables ----------------------------------------------------------------------------------------------------------


def as_markdown(results: Results, config: AblationConfig, about: Sequence[str]) -> str:
    """Return all tables. about: lines on the training, its data and the command."""
    parts: list[str] = ["# What outliers cost, by recipe", "\n".join(f"- {line}" for line in about)]
    if missing := missing_lines(results):
        parts += ["**Missing from this table:**", "\n".join(f"- {line}" for line in missing)]
    for rates in dict.fromkeys(line.rates for line in results.lines):
        lines = [line for line in results.lines if line.rates == rates]
        parts += [
            f"## Learning rates: {rates}",
            verdict(lines),
            f"Ours: {seeds_words(config)}. In brackets the paper's: {SCALE}, perplexity of {TEXT}.",
            markdown_table(*outlier_rows(lines)),
        ]
        if len(lines) > 1:
            parts += [against_words(lines), markdown_table(*against_rows(lines))]
        parts += [
            f"Perplexity by bits of weights, activations and KV cache. Ours: {', '.join(results.texts) or 'no text'}; "
            f"in brackets the paper's, of {TEXT}.",
            markdown_table(*bits_rows(lines)),
        ]
        if (methods := methods_rows(lines))[1]:
            parts += [f"Perplexity at {LAST} by method; each row adds to the rows above it.", markdown_table(*methods)]
    if results.sweep:
        parts += [f"## Over {config.sweep.key}", f"With seed {config.seeds[0]}."]
        parts.append(markdown_table(*sweep_rows(results, config)))
    texts = [f"- text {name}: SHA-256 `{digest}`" for name, digest in results.texts.items()]
    commits = f"- commit {', '.join(f'`{commit}`' for commit in results.commits) or 'unknown'}"
    parts += ["## Where the numbers are from", "\n".join([*texts, commits])]
    parts.append(markdown_table(*provenance_rows(results)))
    return "\n\n".join(filter(None, parts)) + "\n"


def seeds_words(config: AblationConfig) -> str:
    """Return what a cell says about the seeds."""
    count = len(config.seeds)
    return f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed"


def missing_lines(results: Results) -> list[str]:
    """Return one line for each run without numbers, with the reason."""
    labels = [label for line in results.lines for label in line.missing]
    return [f"{label}: {results.failures.get(label, 'not trained yet')}" for label in labels]


def verdict(lines: Sequence[Line]) -> str:
    """Return one sentence: whether the last row loses less at 4-4-4 than the first, beyond the spread over seeds."""
    first, last = lines[0], lines[-1]
    if len(lines) < 2 or "cost" not in first.cells or "cost" not in last.cells:
        return ""
    a, b = first.cells["cost"], last.cells["cost"]
    by, spread = difference(a, b)
    costs = f"{LAST} costs {first.row} {cell_text(a)} and {last.row} {cell_text(b)} nats per token"
    if not math.isfinite(by):
        return f"**{costs}.**"
    if math.isfinite(spread) and abs(by) <= 2 * spread:
        return f"**{costs}: no difference beyond twice the spread over seeds ({spread:.4f}).**"
    known = f", {abs(by) / spread:.1f} times the spread over seeds" if math.isfinite(spread) and spread else ""
    one_seed = "" if math.isfinite(spread) else "; one seed, so the spread is unknown"
    return f"**{costs}: {last.row} loses {abs(by):.4f} {'less' if by > 0 else 'more'}{known}{one_seed}.**"


def outlier_rows(lines: Sequence[Line]) -> Table:
    """Return kurtosis, largest values, R_L, loss, and the cost of 4-4-4."""
    names = [*QUANTITIES, "cost"]
    titles = [*(quantity.title for quantity in QUANTITIES.values()), COST_TITLE]
    return ["row", *titles], [[line.row, *(with_paper(line, name) for name in names)] for line in lines]


def against_words(lines: Sequence[Line]) -> str:
    """Return the caption of `against_rows`."""
    return (
        f"Against {lines[0].row}, nats per token, ± the spread over seeds. A row is better if it loses less at {LAST} "
        f"and not more at {FIRST}, each by more than twice that spread."
    )


def against_rows(lines: Sequence[Line]) -> Table:
    """Return the loss of every row at 16 and at 4 bits minus that of the first row, and whether the row is better."""
    rows = []
    for line in lines[1:]:
        if not {"nats_16", "nats_4"} <= lines[0].cells.keys() & line.cells.keys():
            continue
        at_16, spread_16 = difference(line.cells["nats_16"], lines[0].cells["nats_16"])
        at_4, spread_4 = difference(line.cells["nats_4"], lines[0].cells["nats_4"])
        word = "yes" if at_4 < -2 * spread_4 and at_16 <= 2 * spread_16 else "no"
        if not (math.isfinite(spread_16) and math.isfinite(spread_4)):
            word = "one seed"
        rows.append([line.row, _signed(at_16, spread_16), _signed(at_4, spread_4), word])
    return ["row", f"at {FIRST}", f"at {LAST}", f"better than {lines[0].row}"], rows


def _signed(value: float, spread: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:+.4f}" + (f" ± {spread:.4f}" if math.isfinite(spread) else "")


def bits_rows(lines: Sequence[Line]) -> Table:
    """Return perplexity by bits, without and with the FFN's Hadamard transform."""
    rows = []
    for line in lines:
        rows.append([line.row, *(with_paper(line, bits) for bits in COLUMNS)])
        rows.append(["+Had", *(with_paper(line, bits + HADAMARD) for bits in COLUMNS)])
    return ["row", *COLUMNS], rows


def methods_rows(lines: Sequence[Line]) -> Table:
    """Return perplexity at 4-4-4 by method, for the rows and methods that were measured."""
    shown = [line for line in lines if any(method in line.cells for method in METHODS)]
    methods = [method for method in METHODS if any(method in line.cells for line in shown)]
    rows = [[method, *(cell_text(line.cells.get(method)) for line in shown)] for method in methods]
    return ["method", *(line.row for line in shown)], rows


def sweep_rows(results: Results, config: AblationConfig) -> Table:
    """Return loss, kurtosis and the cost of 4-4-4 for every row and value."""
    names = ["loss", "kurtosis", "osp_script", "down_proj_max", "R_L", FIRST, LAST, "cost"]
    titles = {name: quantity.title for name, quantity in QUANTITIES.items()} | {"cost": COST_TITLE}
    rows = [
        [row, str(value), *(format_number(numbers.get(name, math.nan)) for name in names)]
        for row, points in results.sweep.items()
        for value, numbers in points
    ]
    return ["row", config.sweep.key or "", *(titles.get(name, name) for name in names)], rows


def provenance_rows(results: Results) -> Table:
    """Return the quantization of each column and method, by hash and in words."""
    rows = [[column, key, results.specs.get(key, "")] for column, key in results.columns.items()]
    return ["column", "quantization", "in words"], rows


def with_paper(line: Line, name: str) -> str:
    """Return our number, and in brackets the paper's if there is one."""
    paper = TABLE_2.get(line.row, {}).get(name)
    return cell_text(line.cells.get(name)) + ("" if paper is None else f" ({format_number(paper)})")


def cell_text(cell: Cell | None) -> str:
    """Return `mean ± deviation`, the mean alone for one seed, `-` without a number."""
    if cell is None:
        return "-"
    spread = f" ± {format_number(cell.deviation)}" if math.isfinite(cell.deviation) else ""
    return format_number(cell.mean) + spread


def format_number(value: float) -> str:
    """Return three or four digits: 0.0123, 1.234, 24.15, 1819, 8e4; inf, and - for nan."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else f"{value:g}"
    size = abs(value)
    if size >= 1e4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if size >= 10 else f"{value:.3f}" if size >= 1 else f"{value:.4f}"
