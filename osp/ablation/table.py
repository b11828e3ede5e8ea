"""The tables of an ablation, as JSON and Markdown: numbers of its runs, spread over seeds, and where they are from."""

import dataclasses
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from osp.ablation.config import AblationConfig
from osp.ablation.runs import Planned
from osp.evaluation.compare import COLUMNS
from osp.run.evaluations import ComparisonRecord, replace_nonfinite
from osp.run.metrics import key_regex
from osp.run.read import Run, Series, read_run
from osp.tables import markdown_table

HADAMARD = " +Had"
FIRST, LAST = COLUMNS[0], COLUMNS[-1]
METHODS = ("RTN", "+ FFN Had", "+ GPTQ", "+ QuaRot")
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # heading, rows


# ---- numbers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """A number of a run: its title, its meaning, and its key in metrics.jsonl."""

    title: str
    says: str
    key: str  # with <layer>: over all layers, the mean or the largest
    largest: bool = False

    def read(self, run: Run) -> float:
        values = [series.last for key, series in run.series.items() if re.fullmatch(key_regex(self.key), key)]
        if not values:
            return math.nan
        return max(values) if self.largest else statistics.fmean(values)


_FILE = yaml.safe_load(Path(__file__).with_name("table.yaml").read_text(encoding="utf-8"))
QUANTITIES = {name: Quantity(**fields) for name, fields in _FILE["quantities"].items()}
PAPER: dict[str, dict[str, float]] = _FILE["paper"]["rows"]  # row -> quantity or column -> number
SCALE, TEXT = _FILE["paper"]["scale"], _FILE["paper"]["text"]
TITLES = {name: quantity.title for name, quantity in QUANTITIES.items()} | {"cost": f"{LAST} costs, nats"}


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
    results = Results(
        [], [summarize_run(run, records[run.label]) for run in runs if run.label in records], {}, failures
    )
    planned: dict[tuple[str, str], list[Planned]] = {}
    for run in sorted(runs, key=lambda run: run.order):
        if run.value is None:
            planned.setdefault((run.row.name, run.rates), []).append(run)
    for (row, rates), of_row in planned.items():
        numbers = [m.numbers for m in results.runs if m.planned in of_row]
        missing = tuple(run.label for run in of_row if run.label not in records)
        results.lines.append(Line(row, rates, summarize(numbers), missing))
    for m in results.runs:
        if m.planned.value is not None:
            results.sweep.setdefault(m.planned.row.name, []).append((m.planned.value, m.numbers))
        (model,) = m.record.models
        results.specs |= model.specs
        results.texts |= model.texts
        results.columns |= model.hashes
    for points in results.sweep.values():
        points.sort(key=lambda point: (isinstance(point[0], str), point[0]))
    results.commits = tuple(dict.fromkeys(str(m.record.commit) for m in results.runs))
    return results


def summarize_run(run: Planned, record: ComparisonRecord) -> Measured:
    """Return the numbers of one finished run."""
    folder, (model,) = read_run(run.folder), record.models
    numbers = {name: quantity.read(folder) for name, quantity in QUANTITIES.items()}
    for row, cells in model.bits.items():
        for bits, score in cells.items():
            numbers[bits + HADAMARD * bool(row)] = math.inf if score.perplexity is None else score.perplexity
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
    rows = [dataclasses.asdict(line) for line in results.lines]
    for row in rows:
        row["cells"] = {name: {**cell, "quant": results.columns.get(name)} for name, cell in row["cells"].items()}
    runs = [
        {
            "label": m.planned.label,
            "row": m.planned.row.name,
            "overrides": m.planned.row.overrides,
            "rates": m.planned.rates,
            "seed": m.planned.seed,
            "value": m.planned.value,
            "model_sha256": m.record.models[0].sha256,
            "commit": m.record.commit,
            "numbers": m.numbers,
        }
        for m in results.runs
    ]
    values = {"data": results.texts, "commits": results.commits, "specs": results.specs, "rows": rows}
    return replace_nonfinite({**values, "runs": runs, "failures": results.failures})


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A table with a title and a caption."""

    title: str
    says: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading, what the tables say in one sentence, and the tables."""

    id: str
    heading: str
    says: str
    cards: list[Card]


def sections(results: Results, config: AblationConfig) -> list[Section]:
    """Return the text of the page and of the Markdown: one section per set of learning rates, sweep, sources."""
    num_seeds = len(config.seeds)
    seeds = f"mean ± standard deviation over {num_seeds} seeds" if num_seeds > 1 else "one seed"
    meanings = "; ".join(f"{quantity.title}: {quantity.says}" for quantity in QUANTITIES.values())
    parts = []
    for rates in dict.fromkeys(line.rates for line in results.lines):
        lines = [line for line in results.lines if line.rates == rates]
        says = f"Ours: {seeds}. In brackets the paper's: {SCALE}. {meanings}."
        cards = [Card("Outliers and quality", says, *outlier_rows(lines))]
        if len(lines) > 1:
            says = (
                f"Nats per token, ± the spread over seeds. A row is better if it loses less at {LAST} and not more at "
                f"{FIRST}, each by more than twice that spread."
            )
            cards.append(Card(f"Against {lines[0].row}", says, *against_rows(lines)))
        says = (
            f"Ours: {', '.join(results.texts) or 'no text'}, {seeds}. In brackets the paper's, of {TEXT}: {SCALE}. "
            "+Had: with an online Hadamard transform before down_proj."
        )
        cards.append(Card("Perplexity by bits of weights, activations and KV cache", says, *bits_rows(lines)))
        if (methods := methods_rows(lines))[1]:
            says = "Each row adds to the rows above it."
            cards.append(Card(f"Perplexity at {LAST} by method", says, *methods))
        parts.append(Section(f"rates-{rates}", f"Learning rates: {rates}", verdict(lines), cards))
    if results.sweep:
        says = f"Every row at each value, all else equal, with seed {config.seeds[0]}."
        cards = [Card("Numbers", "", *sweep_rows(results, config))]
        parts.append(Section("sweep", f"Over {config.sweep.key}", says, cards))
    rows = [[column, key, results.specs.get(key, "")] for column, key in results.columns.items()]
    quantizations = Card("Quantizations", "", ["column", "quantization", "in words"], rows)
    return [*parts, Section("provenance", "Where the numbers are from", "", [quantizations])]


def as_markdown(results: Results, config: AblationConfig, about: Sequence[str]) -> str:
    """Return all tables. about: lines on the training, its data and the command."""
    parts: list[str] = ["# What outliers cost, by recipe", "\n".join(f"- {line}" for line in about)]
    if missing := missing_lines(results):
        parts += ["**Missing from this table:**", "\n".join(f"- {line}" for line in missing)]
    for section in sections(results, config):
        parts += [f"## {section.heading}", f"**{section.says}**" if section.says else ""]
        if section.id == "provenance":
            parts.append("\n".join(f"- {line}" for line in source_lines(results)))
        for card in section.cards:
            parts += [" ".join(filter(None, [f"{card.title}.", card.says])), markdown_table(card.head, card.rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def source_lines(results: Results) -> list[str]:
    """Return lines on the texts and the code."""
    texts = [f"text {name}: SHA-256 {digest}" for name, digest in results.texts.items()]
    return [*texts, f"commit {', '.join(results.commits) or 'unknown'}"]


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
        return f"{costs}."
    if math.isfinite(spread) and abs(by) <= 2 * spread:
        return f"{costs}: no difference beyond twice the spread over seeds ({spread:.4f})."
    known = f", {abs(by) / spread:.1f} times the spread over seeds" if math.isfinite(spread) and spread else ""
    one_seed = "" if math.isfinite(spread) else "; one seed, so the spread is unknown"
    return f"{costs}: {last.row} loses {abs(by):.4f} {'less' if by > 0 else 'more'}{known}{one_seed}."


def outlier_rows(lines: Sequence[Line]) -> Table:
    """Return kurtosis, largest values, R_L, loss, and the cost of 4-4-4."""
    return ["row", *TITLES.values()], [[line.row, *(with_paper(line, name) for name in TITLES)] for line in lines]


def against_rows(lines: Sequence[Line]) -> Table:
    """Return the loss of every row at 16 and at 4 bits minus the first row's loss, and whether the row is better."""
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
    rows = [
        [row, str(value), *(format_number(numbers.get(name, math.nan)) for name in names)]
        for row, points in results.sweep.items()
        for value, numbers in points
    ]
    return ["row", config.sweep.key or "", *(TITLES.get(name, name) for name in names)], rows


def with_paper(line: Line, name: str) -> str:
    """Return our number, and in brackets the paper's if there is one."""
    paper = PAPER.get(line.row, {}).get(name)
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
