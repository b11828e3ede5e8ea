"""The numbers of an ablation with their spread over seeds, and the tables of ablation.md."""

import dataclasses
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from osp.ablation.config import WORDS, AblationConfig, parse_rows
from osp.ablation.runs import Planned
from osp.config import Weights
from osp.evaluation.compare import METHODS
from osp.evaluation.config import COLUMNS, DEPLOYED_COLUMNS
from osp.run.evaluations import ComparisonRecord, replace_nonfinite
from osp.run.evaluations import label as named
from osp.run.metrics import key_regex
from osp.run.read import read_run

PAPER: dict[str, dict[str, float]] = WORDS["paper"]["rows"]  # row -> quantity or column -> number
HADAMARD = " +Had"
FIRST, LAST = COLUMNS[0], COLUMNS[-1]
TITLES = {name: about["title"] for name, about in WORDS["quantities"].items()} | {"cost": f"{LAST} costs, nats"}
SWEPT = ("loss", "kurtosis", "osp_script", "down_proj_max", "R_L", FIRST, LAST, "cost")  # columns of a sweep's table
Records = dict[tuple[str, Weights], ComparisonRecord]  # label of a run, its weights -> record of scripts/compare.py
Table = tuple[str, dict[str, str], list[list[str]]]  # name in table.yaml, words for it, rows after a heading


@dataclass(frozen=True)
class Measured:
    """One run and its numbers; with columns also `TEXT loss` at 16 bits and `TEXT cost COLUMN`, in nats per token."""

    label: str
    row: str  # `ROW, averaged` with the averaged weights
    overrides: tuple[str, ...]
    rates: str
    seed: int
    value: Any  # of the swept key; None: not of the sweep
    model_sha256: str
    commit: str | None
    numbers: dict[str, float]


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation over seeds; the deviation is nan for one seed."""

    mean: float
    deviation: float
    count: int
    quant: str | None = None  # hash of the quantization
    interval: float | None = None  # half of the 95% interval of the mean; None: not asked for

    @property
    def spread(self) -> float:
        return self.deviation if self.interval is None else self.interval

    @property
    def margin(self) -> float:
        return 2 * self.deviation if self.interval is None else self.interval  # what a difference must exceed

    def __sub__(self, other: "Cell") -> "Cell":
        """Return the difference with its deviation, sqrt(s_a^2 + s_b^2), or its interval."""
        interval = None if self.interval is None else half_interval(self, other)
        deviation, count = math.hypot(self.deviation, other.deviation), min(self.count, other.count)
        return Cell(self.mean - other.mean, deviation, count, interval=interval)

    def __str__(self) -> str:
        """Return `mean ± deviation` or `mean ± interval`, the mean alone for one seed."""
        return format_number(self.mean) + (f" ± {format_number(self.spread)}" if math.isfinite(self.spread) else "")


def half_interval(*cells: Cell) -> float:
    """Return half of the 95% interval of a mean over seeds, or of the difference of two (Welch 1947)."""
    variances = [(cell.deviation**2 / cell.count, cell.count - 1) for cell in cells]
    if not (total := sum(variance for variance, _ in variances)) > 0:  # nan for one seed
        return total
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances)
    return WORDS["student"][min(int(freedom + 1e-6), len(WORDS["student"])) - 1] * math.sqrt(total)


@dataclass(frozen=True)
class Line:
    """One row of the table at one set of learning rates."""

    row: str
    rates: str
    cells: dict[str, Cell]
    missing: tuple[str, ...]  # labels of runs without numbers

    def text(self, name: str) -> str:
        """Return our number, `-` without one, and in brackets the paper's if there is one."""
        paper = PAPER.get(self.row, {}).get(name)
        return str(self.cells.get(name, "-")) + ("" if paper is None else f" ({format_number(paper)})")


@dataclass(frozen=True)
class Results:
    """The numbers of an ablation: the keys of ablation.json."""

    about: list[str]  # lines on the training, its data and the command
    data: dict[str, str]  # text -> SHA-256
    commits: tuple[str, ...]
    specs: dict[str, str]  # hash -> the quantization in words
    columns: dict[str, str]  # column or method -> hash of its quantization
    rows: list[Line]
    runs: list[Measured]
    failures: dict[str, str]  # label -> reason

    @property
    def sweep(self) -> dict[str, list[Measured]]:
        """Row -> its runs of the sweep, by ascending value."""
        swept = [run for run in self.runs if run.value is not None]
        by_value = sorted(swept, key=lambda run: (isinstance(run.value, str), run.value))
        return {row: [run for run in by_value if run.row == row] for row in dict.fromkeys(run.row for run in swept)}


def collect(
    config: AblationConfig, runs: list[Planned], records: Records, failures: dict[str, str], *, about: list[str]
) -> Results:
    """Return the results of the finished runs. failures: label -> reason. about: see `Results`."""
    models = [record.models[0] for record in records.values()]
    columns = {name: digest for model in models for name, digest in model.hashes.items()}
    pairs = [(run, records.get((run.label, weights))) for run, weights in itertools.product(runs, config.weights)]
    measured = [measure(run, record, config) for run, record in pairs if record]
    numbers = {(run.label, run.row): run.numbers for run in measured}
    lines = []
    for rates, row, weights in itertools.product(config.rates, parse_rows(config), config.weights):
        name = named(row, weights)
        labels = [run.label for run in runs if (run.rates, run.row, run.value) == (rates, row, None)]
        done = [numbers[label, name] for label in labels if (label, name) in numbers]
        missing = tuple(label for label in labels if (label, name) not in numbers)
        lines.append(Line(name, rates, summarize(done, columns, config.interval), missing))
    return Results(
        about=about,
        data={name: digest for model in models for name, digest in model.texts.items()},
        commits=tuple(dict.fromkeys(str(record.commit) for record in records.values())),
        specs={digest: words for model in models for digest, words in model.specs.items()},
        columns=columns,
        rows=lines,
        runs=measured,
        failures=failures,
    )


def measure(run: Planned, record: ComparisonRecord, config: AblationConfig) -> Measured:
    """Return the numbers of one finished run, the ones of its training only if they are of the same weights."""
    folder, (model,), numbers = read_run(run.folder), record.models, {}
    in_training = {"val": run.config.eval.weights, "monitor": run.config.monitor.weights}
    for name, about in {name: WORDS["quantities"][name] for name in config.quantities}.items():
        values = [series.last for key, series in folder.series.items() if re.fullmatch(key_regex(about["key"]), key)]
        values = values if in_training[about["key"].partition("/")[0]] == model.weights else []
        over_layers = max if about.get("largest") else statistics.fmean
        numbers[name] = over_layers(values) if values else math.nan
    for row, cells in model.bits.items():
        for bits, score in cells.items():
            numbers[bits + HADAMARD * bool(row)] = math.inf if score.perplexity is None else score.perplexity
    for text in model.texts if config.columns else ():
        nats = {c: math.log(cell.perplexities.get(text, math.nan)) for c, cell in model.bits[""].items()}
        numbers[f"{text} loss"] = nats[FIRST]
        numbers |= {f"{text} cost {column}": nats.get(column, math.nan) - nats[FIRST] for column in config.columns}
    # a method that cannot be applied to a model has no score
    numbers |= {method: s.perplexity for method, s in model.methods.items() if s.perplexity is not None}
    first, last = (math.log(numbers.get(column, math.nan)) for column in (FIRST, LAST))
    numbers |= {"nats_16": first, "nats_4": last, "cost": last - first}
    plan = (run.label, named(run.row, model.weights), run.overrides, run.rates, run.seed, run.value)
    return Measured(*plan, model.sha256, record.commit, numbers)


def summarize(numbers: list[dict[str, float]], columns: Mapping[str, str], interval: bool = False) -> dict[str, Cell]:
    """Return name -> mean and deviation over runs that differ in their seed. columns: see `Results`."""
    cells = {}
    for name in dict.fromkeys(itertools.chain(*numbers)):
        values = [run[name] for run in numbers if name in run]
        deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
        cell = Cell(statistics.fmean(values), deviation, len(values), columns.get(name.rpartition(" cost ")[2]))
        cells[name] = replace(cell, interval=half_interval(cell)) if interval else cell
    return cells


def as_json(results: Results) -> dict[str, Any]:
    """Return every number with the hashes of its quantization and data, and its commit."""
    values = dataclasses.asdict(results, dict_factory=lambda x: {k: v for k, v in x if (k, v) != ("interval", None)})
    return replace_nonfinite(values)


def contents(results: Results, config: AblationConfig) -> dict[str, Any]:
    """Return the values of ablation.md. The first row of a table is its heading."""
    num_seeds, key, quantities = len(config.seeds), config.sweep.key or "", WORDS["quantities"]
    spread = "95% interval (Student's t)" if config.interval else "standard deviation"
    guard = " or ".join(f"{limit:g} nats on {text}" for text, limit in config.guard.items())
    words = {
        "seeds": f"mean ± {spread} over {num_seeds} seeds" if num_seeds > 1 else "one seed",
        "scale": WORDS["paper"]["scale"],
        "texts": ", ".join(results.data) or "no text",
        "guard": WORDS["unsolved"].format(guard=guard) if guard else "",
        "meanings": "; ".join(f"{TITLES[name]}: {quantities[name]['says']}" for name in config.quantities),
    }
    sections, limits = [], [(f"{text} loss", limit) for text, limit in config.guard.items()]
    unsolved = {(x.rates, x.row) for x in results.runs for name, most in limits if not x.numbers[name] <= most}
    marked = [replace(x, row=x.row + " (unsolved)" * ((x.rates, x.row) in unsolved)) for x in results.rows]
    for rates in dict.fromkeys(line.rates for line in marked):
        lines = [line for line in marked if line.rates == rates]
        by_name, ends = {line.row: line for line in lines}, ((lines[0].row, lines[-1].row),)[: len(lines) - 1]
        compared = [(by_name[a], by_name[b]) for a, b in config.compared or ends if {a, b} <= by_name.keys()]
        cards, references = [], {first.row: first for first, _ in compared if first.cells}
        for name, more, rows in tables(lines, config, list(results.data), references.values()):
            title, says = (text.format(**words, **more, first_row=lines[0].row) for text in WORDS["tables"][name])
            cards += [(title, says, rows)] if len(rows) > 1 else []
        says = " ".join(filter(None, (verdict(*pair, on=next(iter(config.guard), None)) for pair in compared)))
        sections.append((f"Learning rates: {rates}", says, cards))
    if results.sweep:
        rows = [["row", key, *(TITLES.get(name, name) for name in SWEPT)]]
        for run in itertools.chain(*results.sweep.values()):
            rows.append([run.row, str(run.value), *(format_number(run.numbers.get(name, math.nan)) for name in SWEPT)])
        rows = bracket_table(results, config) if config.sweep.factors else rows
        says = f"Every row at each value, all else equal, with seed {config.seeds[0]}."
        sections.append((f"Over {key}", says, [("Numbers", "", rows)]))
    rows = [[column, digest, results.specs.get(digest, "")] for column, digest in results.columns.items()]
    missing = dict.fromkeys(label for line in results.rows for label in line.missing)
    texts = [f"text {name}: SHA-256 {digest}" for name, digest in results.data.items()]
    return {
        "title": "What outliers cost, by recipe",
        "about": results.about,
        "missing": [f"{label}: {results.failures.get(label, 'not trained yet')}" for label in missing],
        "sections": sections,  # each: heading, a sentence, tables (title, caption, rows)
        "quantizations": [["column", "quantization", "in words"], *rows],
        "sources": [*texts, f"commit {', '.join(results.commits) or 'unknown'}"],
    }


def tables(lines: list[Line], config: AblationConfig, texts: Iterable[str], minus: Iterable[Line]) -> Iterator[Table]:
    """Yield the tables of one set of learning rates. minus: rows from which the others' differences are shown"""
    name, shown = ("quantities", config.quantities) if config.columns else ("outliers", (*config.quantities, "cost"))
    yield name, {}, [["row", *map(TITLES.__getitem__, shown)], *([line.row, *map(line.text, shown)] for line in lines)]
    if config.columns:
        for text, reference in itertools.product(texts, [None, *minus]):
            name, more = ("differences", {"reference": reference.row}) if reference else ("costs", {})
            yield name, more | {"text": text}, costs(lines, text, config.columns, reference)
        return
    yield "against", {}, against_first(lines)
    deployed = [column for column in DEPLOYED_COLUMNS if any(column in line.cells for line in lines)]
    bits = [["row", *COLUMNS, *deployed]]
    for line in lines:
        bits.append([line.row, *map(line.text, (*COLUMNS, *deployed))])
        bits.append(["+Had", *(line.text(column + HADAMARD) for column in COLUMNS), *("" for _ in deployed)])
    yield "bits", {}, bits
    measured = [line for line in lines if set(METHODS) & line.cells.keys()]
    methods = [method for method in METHODS if any(method in line.cells for line in measured)]
    cells = [[method, *(str(line.cells.get(method, "-")) for line in measured)] for method in methods]
    yield "methods", {}, [["method", *(line.row for line in measured)], *cells]


def costs(lines: Sequence[Line], text: str, columns: Sequence[str], minus: Line | None) -> list[list[str]]:
    """Return the loss of each row on `text` at 16 bits and the cost of each column, or the differences from a row."""
    columns = [column for column in columns if column != FIRST]
    names, rows = [f"{text} loss", *(f"{text} cost {column}" for column in columns)], [["row", FIRST, *columns]]
    for line in lines:
        gaps = [line.cells[name] - minus.cells[name] for name in names] if minus and line.cells else []
        cells = [_signed(gap) + " *" * (abs(gap.mean) > gap.margin) for gap in gaps] or list(map(line.text, names))
        rows += [] if line is minus else [[line.row, *cells]]
    return rows


def bracket_table(results: Results, config: AblationConfig) -> list[list[str]]:
    """Return the loss of every row at each factor of its value, and on which texts factor 1 is the best."""
    factors, own = sorted({1.0, *config.sweep.factors}), {run.label for run in results.runs if run.value is None}
    texts = {text: f"{text} loss" for text in results.data} if config.columns else {"validation split": "loss"}
    heading = [f"{text}, {factor:g} x" for text in texts for factor in factors]
    rows, middle = [["row", str(config.sweep.key), *heading, "bracketed on"]], factors.index(1.0)
    for row, runs in sorted(results.sweep.items(), key=lambda swept: [x.row for x in results.rows].index(swept[0])):
        value = next((run.value for run in runs if run.label in own), math.nan)
        cells, bracketed = [row, format_number(value)], list[str]()
        for text, name in texts.items():
            losses = {run.value: run.numbers.get(name, math.nan) for run in runs}
            best, *others = [losses.get(value * factor, math.nan) for factor in (1.0, *factors)]
            below, above = others[:middle], others[middle + 1 :]
            bracketed += [text] if below and above and all(best < loss for loss in below + above) else []
            cells += map(format_number, others)
        rows.append([*cells, ", ".join(bracketed) or "no text"])
    return rows


def against_first(lines: Sequence[Line]) -> list[list[str]]:
    """Return the loss of every row at 16 and at 4 bits minus the first row's loss, and whether the row is better."""
    first = lines[0]
    rows = [["row", f"at {FIRST}", f"at {LAST}", f"better than {first.row}"]]
    for line in lines[1:]:
        if {"nats_16", "nats_4"} <= first.cells.keys() & line.cells.keys():
            at_16, at_4 = line.cells["nats_16"] - first.cells["nats_16"], line.cells["nats_4"] - first.cells["nats_4"]
            word = "one seed"
            if math.isfinite(at_16.spread) and math.isfinite(at_4.spread):
                word = "yes" if at_4.mean < -at_4.margin and at_16.mean <= at_16.margin else "no"
            rows.append([line.row, _signed(at_16), _signed(at_4), word])
    return rows


def _signed(cell: Cell) -> str:
    spread = f" ± {cell.spread:.4f}" if math.isfinite(cell.spread) else ""
    return "-" if math.isnan(cell.mean) else f"{cell.mean:+.4f}{spread}"


def verdict(first: Line, last: Line, on: str | None = None) -> str:
    """Return one sentence: whether `last` loses less at 4-4-4 than `first`, beyond the spread over seeds. on: a text"""
    key, where = (f"{on} cost {LAST}", f" on {on}") if on else ("cost", "")
    if key not in first.cells or key not in last.cells:
        return ""
    a, b = first.cells[key], last.cells[key]
    by, gap = a - b, abs((a - b).mean)
    spread, twice = ("spread over seeds", "twice ") if by.interval is None else ("95% interval", "")
    text = f"{LAST} costs {first.row} {a} and {last.row} {b} nats per token{where}"
    if gap <= by.margin:  # not if one of them is nan
        text += f": no difference beyond {twice}the {spread} ({by.spread:.4f})"
    elif math.isfinite(gap):
        text += f": {last.row} loses {gap:.4f} {'less' if by.mean > 0 else 'more'}"
        if math.isnan(by.spread):
            text += "; one seed, so the spread is unknown"
        elif by.spread:
            text += f", {gap / by.spread:.1f} times the {spread}"
    return f"{text}."


def format_number(value: float) -> str:
    """Return three or four digits: 0.0123, 1.234, 24.15, 1819, 8e4; inf, and - for nan."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else f"{value:g}"
    if (size := abs(value)) >= 1e4:
        return f"{value:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e+", "e")
    decimals = 0 if size >= 1000 else 2 if size >= 10 else 3 if size >= 1 else 4
    return f"{value:.{decimals}f}"
