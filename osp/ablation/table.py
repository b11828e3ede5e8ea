"""The numbers of an ablation with their spread over seeds, the tables of ablation.md, the charts of ablation.html."""

import dataclasses
import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from osp.ablation.config import AblationConfig, parse_rows
from osp.ablation.runs import Planned
from osp.evaluation.compare import COLUMNS, DEPLOYED_COLUMNS, METHODS
from osp.report.charts import line_words
from osp.report.downsample import grid, rounded
from osp.report.page import render
from osp.run.evaluations import ComparisonRecord, replace_nonfinite
from osp.run.metrics import key_regex
from osp.run.read import Series, read_run

WORDS = yaml.safe_load(Path(__file__).with_name("table.yaml").read_text(encoding="utf-8"))
PAPER: dict[str, dict[str, float]] = WORDS["paper"]["rows"]  # row -> quantity or column -> number
HADAMARD = " +Had"
FIRST, LAST = COLUMNS[0], COLUMNS[-1]
TITLES = {name: about["title"] for name, about in WORDS["quantities"].items()} | {"cost": f"{LAST} costs, nats"}
SWEPT = ("loss", "kurtosis", "osp_script", "down_proj_max", "R_L", FIRST, LAST, "cost")  # columns of a sweep's table
LARGE_KURTOSIS, SMALLEST_KURTOSIS = 20, 0.01  # an axis is logarithmic above the first, and begins at the second
Records = dict[str, ComparisonRecord]  # label of a run -> record of scripts/compare.py
Chart = dict[str, Any]  # of page.js and macros.html, see `_chart`


@dataclass(frozen=True)
class Measured:
    """One run and its numbers: the quantities of table.yaml, perplexity by bits and by method, the cost of 4-4-4."""

    label: str
    row: str
    overrides: tuple[str, ...]
    rates: str
    seed: int
    value: Any  # of the swept key; None: not of the sweep
    model_sha256: str
    commit: str | None
    numbers: dict[str, float]
    kurtosis: Series | None  # of the residual stream, by tokens


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation over seeds; the deviation is nan for one seed."""

    mean: float
    deviation: float
    count: int
    quant: str | None = None  # hash of the quantization

    def __sub__(self, other: "Cell") -> "Cell":
        """Return the difference and its deviation, sqrt(s_a^2 + s_b^2)."""
        return Cell(self.mean - other.mean, math.hypot(self.deviation, other.deviation), min(self.count, other.count))

    def __str__(self) -> str:
        """Return `mean ± deviation`, the mean alone for one seed."""
        spread = f" ± {format_number(self.deviation)}" if math.isfinite(self.deviation) else ""
        return format_number(self.mean) + spread


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
        swept: dict[str, list[Measured]] = {run.row: [] for run in self.runs if run.value is not None}
        for row, runs in swept.items():
            runs += (run for run in self.runs if run.row == row and run.value is not None)
            runs.sort(key=lambda run: (isinstance(run.value, str), run.value))
        return swept


def collect(
    config: AblationConfig, runs: list[Planned], records: Records, failures: dict[str, str], *, about: list[str]
) -> Results:
    """Return the results of the finished runs. failures: label -> reason. about: see `Results`."""
    models = [record.models[0] for record in records.values()]
    columns = {name: digest for model in models for name, digest in model.hashes.items()}
    measured = [measure(run, records[run.label]) for run in runs if run.label in records]
    numbers = {run.label: run.numbers for run in measured}
    lines = []
    for rates, row in itertools.product(config.rates, parse_rows(config)):
        labels = [run.label for run in runs if (run.rates, run.row, run.value) == (rates, row, None)]
        cells = summarize([numbers[label] for label in labels if label in numbers], columns)
        lines.append(Line(row, rates, cells, tuple(label for label in labels if label not in numbers)))
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


def measure(run: Planned, record: ComparisonRecord) -> Measured:
    """Return the numbers of one finished run."""
    folder, (model,), numbers = read_run(run.folder), record.models, {}
    for name, about in WORDS["quantities"].items():
        values = [series.last for key, series in folder.series.items() if re.fullmatch(key_regex(about["key"]), key)]
        over_layers = max if about.get("largest") else statistics.fmean
        numbers[name] = over_layers(values) if values else math.nan
    for row, cells in model.bits.items():
        for bits, score in cells.items():
            numbers[bits + HADAMARD * bool(row)] = math.inf if score.perplexity is None else score.perplexity
    # a method that cannot be applied to a model has no score
    numbers |= {method: s.perplexity for method, s in model.methods.items() if s.perplexity is not None}
    first, last = (math.log(numbers.get(column, math.nan)) for column in (FIRST, LAST))
    numbers |= {"nats_16": first, "nats_4": last, "cost": last - first}
    sites = {site: s for site, s in folder.sites().items() if (site.stat, site.kind) == ("kurtosis", "block_out")}
    kurtosis = None
    if sites:
        probes, _, values = grid(sites, run.num_steps + 1)  # a column for each probe
        tokens = np.array([last for _, last in probes]) * run.config.train.tokens_per_step
        kurtosis = Series(tokens, np.mean(values, axis=0))
    plan = (run.label, run.row, run.overrides, run.rates, run.seed, run.value)
    return Measured(*plan, model.sha256, record.commit, numbers, kurtosis)


def summarize(numbers: list[dict[str, float]], columns: Mapping[str, str]) -> dict[str, Cell]:
    """Return name -> mean and deviation over runs that differ in their seed. columns: see `Results`."""
    cells = {}
    for name in dict.fromkeys(itertools.chain(*numbers)):
        values = [run[name] for run in numbers if name in run]
        deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
        cells[name] = Cell(statistics.fmean(values), deviation, len(values), columns.get(name))
    return cells


def as_json(results: Results) -> dict[str, Any]:
    """Return every number with the hashes of its quantization and data, and its commit."""
    values = dataclasses.asdict(results)
    for run in values["runs"]:
        del run["kurtosis"]
    return replace_nonfinite(values)


# ---- tables ----------------------------------------------------------------------------------------------------------


def contents(results: Results, config: AblationConfig) -> dict[str, Any]:
    """Return the values of ablation.md and ablation.html. The first row of a table is its heading."""
    num_seeds, key, quantities = len(config.seeds), config.sweep.key or "", WORDS["quantities"].values()
    words = {
        "seeds": f"mean ± standard deviation over {num_seeds} seeds" if num_seeds > 1 else "one seed",
        "scale": WORDS["paper"]["scale"],
        "texts": ", ".join(results.data) or "no text",
        "meanings": "; ".join(f"{about['title']}: {about['says']}" for about in quantities),
    }
    sections = []
    for rates in dict.fromkeys(line.rates for line in results.rows):
        lines = [line for line in results.rows if line.rates == rates]
        cards = []
        for name, rows in tables(lines).items():
            title, says = (text.format(**words, first_row=lines[0].row) for text in WORDS["tables"][name])
            cards += [(title, says, rows)] if len(rows) > 1 else []
        sections.append((f"rates-{rates}", f"Learning rates: {rates}", verdict(lines), cards))
    if results.sweep:
        rows = [["row", key, *(TITLES.get(name, name) for name in SWEPT)]]
        for run in itertools.chain(*results.sweep.values()):
            rows.append([run.row, str(run.value), *(format_number(run.numbers.get(name, math.nan)) for name in SWEPT)])
        says = f"Every row at each value, all else equal, with seed {config.seeds[0]}."
        sections.append(("sweep", f"Over {key}", says, [("Numbers", "", rows)]))
    rows = [[column, digest, results.specs.get(digest, "")] for column, digest in results.columns.items()]
    cards = [("Quantizations", "", [["column", "quantization", "in words"], *rows])]
    sections.append(("provenance", "Where the numbers are from", "", cards))
    missing = [label for line in results.rows for label in line.missing]
    texts = [f"text {name}: SHA-256 {digest}" for name, digest in results.data.items()]
    return {
        "title": "What outliers cost, by recipe",
        "about": results.about,
        "missing": [f"{label}: {results.failures.get(label, 'not trained yet')}" for label in missing],
        "sections": sections,  # each: id, heading, a sentence, tables (title, caption, rows)
        "sources": [*texts, f"commit {', '.join(results.commits) or 'unknown'}"],
    }


def tables(lines: Sequence[Line]) -> dict[str, list[list[str]]]:
    """Return the tables of one set of learning rates by their names in table.yaml, the first row a heading."""
    deployed = [column for column in DEPLOYED_COLUMNS if any(column in line.cells for line in lines)]
    bits = [["row", *COLUMNS, *deployed]]
    for line in lines:
        bits.append([line.row, *map(line.text, (*COLUMNS, *deployed))])
        bits.append(["+Had", *(line.text(column + HADAMARD) for column in COLUMNS), *("" for _ in deployed)])
    measured = [line for line in lines if set(METHODS) & line.cells.keys()]
    methods = [method for method in METHODS if any(method in line.cells for line in measured)]
    return {
        "outliers": [["row", *TITLES.values()], *([line.row, *map(line.text, TITLES)] for line in lines)],
        "against": against_first(lines),
        "bits": bits,
        "methods": [
            ["method", *(line.row for line in measured)],
            *([method, *(str(line.cells.get(method, "-")) for line in measured)] for method in methods),
        ],
    }


def against_first(lines: Sequence[Line]) -> list[list[str]]:
    """Return the loss of every row at 16 and at 4 bits minus the first row's loss, and whether the row is better."""
    first = lines[0]
    rows = [["row", f"at {FIRST}", f"at {LAST}", f"better than {first.row}"]]
    for line in lines[1:]:
        if {"nats_16", "nats_4"} <= first.cells.keys() & line.cells.keys():
            at_16, at_4 = line.cells["nats_16"] - first.cells["nats_16"], line.cells["nats_4"] - first.cells["nats_4"]
            word = "one seed"
            if math.isfinite(at_16.deviation) and math.isfinite(at_4.deviation):
                word = "yes" if at_4.mean < -2 * at_4.deviation and at_16.mean <= 2 * at_16.deviation else "no"
            rows.append([line.row, _signed(at_16), _signed(at_4), word])
    return rows


def _signed(cell: Cell) -> str:
    if math.isnan(cell.mean):
        return "-"
    return f"{cell.mean:+.4f}" + (f" ± {cell.deviation:.4f}" if math.isfinite(cell.deviation) else "")


def verdict(lines: Sequence[Line]) -> str:
    """Return one sentence: whether the last row loses less at 4-4-4 than the first, beyond the spread over seeds."""
    first, last = lines[0], lines[-1]
    if len(lines) < 2 or "cost" not in first.cells or "cost" not in last.cells:
        return ""
    a, b = first.cells["cost"], last.cells["cost"]
    by, spread = (a - b).mean, (a - b).deviation
    text = f"{LAST} costs {first.row} {a} and {last.row} {b} nats per token"
    if abs(by) <= 2 * spread:  # not if one of them is nan
        text += f": no difference beyond twice the spread over seeds ({spread:.4f})"
    elif math.isfinite(by):
        text += f": {last.row} loses {abs(by):.4f} {'less' if by > 0 else 'more'}"
        if math.isnan(spread):
            text += "; one seed, so the spread is unknown"
        elif spread:
            text += f", {abs(by) / spread:.1f} times the spread over seeds"
    return f"{text}."


def format_number(value: float) -> str:
    """Return three or four digits: 0.0123, 1.234, 24.15, 1819, 8e4; inf, and - for nan."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else f"{value:g}"
    if (size := abs(value)) >= 1e4:
        return f"{value:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e+", "e")
    decimals = 0 if size >= 1000 else 2 if size >= 10 else 3 if size >= 1 else 4
    return f"{value:.{decimals}f}"


# ---- page ------------------------------------------------------------------------------------------------------------


def ablation_page(results: Results, config: AblationConfig) -> str:
    """Return all tables with charts, as HTML."""
    rows = list(dict.fromkeys(line.row for line in results.rows)) or list(results.sweep)
    charts = {"sweep": _sweep_charts(results, config.sweep.key or "", rows)}  # id of a section -> charts
    for rates in dict.fromkeys(line.rates for line in results.rows):
        charts[f"rates-{rates}"] = _rates_charts(results, rates, rows)
    lines = {chart["name"]: chart for drawn in charts.values() for chart in drawn}
    return render(
        Path(__file__).with_name("ablation.html"),
        kind="ablation",
        data={"runs": rows, "lines": lines, "sites": {}, "stats": {}, "words": {}, "histograms": {}},
        legend=[(row, "") for row in rows],
        figures={section: [chart for chart in drawn if chart["curves"]] for section, drawn in charts.items()},
        columns=results.columns,
        folder=config.dir,
        **contents(results, config),
    )


def _sweep_charts(results: Results, key: str, rows: list[str]) -> list[Chart]:
    values = [run.value for runs in results.sweep.values() for run in runs]
    numeric = all(isinstance(value, int | float) and value > 0 for value in values)
    names = list(dict.fromkeys(map(str, values)))
    axis = {"x": key} | ({"logx": True} if numeric else {"categories": names})
    charts = []
    for name, words in WORDS["charts"]["sweep"].items():
        curves = []
        for row, runs in results.sweep.items():
            x = [run.value if numeric else names.index(str(run.value)) for run in runs]
            curves.append(_curve(rows.index(row), x, [run.numbers.get(name) for run in runs], key=name))
        unit = ", ".join(filter(None, [words.get("unit"), f"over {key}"]))
        charts.append(_chart(f"sweep-{name}", curves, rows, **words | {"unit": unit} | axis))
    return charts


def _rates_charts(results: Results, rates: str, rows: list[str]) -> list[Chart]:
    """Return the kurtosis over tokens of the first seed of each row, and perplexity by bits and by deployed format."""
    words, kurtosis = WORDS["charts"], {}
    for run in results.runs:
        if (run.rates, run.value) == (rates, None) and run.kurtosis is not None and run.row not in kurtosis:
            x, y = run.kurtosis.steps.tolist(), rounded(run.kurtosis.values, 4)
            kurtosis[run.row] = _curve(rows.index(run.row), x, y)
    charts = [_chart(f"kurtosis-{rates}", list(kurtosis.values()), rows, **words["kurtosis"])]
    shown = {"bits": COLUMNS, "had": [bits + HADAMARD for bits in COLUMNS], "formats": (FIRST, *DEPLOYED_COLUMNS)}
    for name, columns in shown.items():
        curves = []
        for line in results.rows:
            cells = [line.cells.get(column) for column in columns]
            y = [cell.mean if cell else None for cell in cells]
            curve = _curve(rows.index(line.row), list(range(len(columns))), y)
            if line.rates == rates and any(curve["y"][1:]):
                curves.append(curve)
        charts.append(_chart(f"{name}-{rates}", curves, rows, categories=columns, **words[name]))
    return charts


def _curve(run: int, x: list[Any], y: Sequence[float | None], *, key: str = "") -> dict[str, Any]:
    values = [None if value is None or not math.isfinite(value) else value for value in y]
    return {"run": run, "key": key, "name": "", "faint": False, "x": x, "y": values}


def _chart(name: str, curves: list[dict[str, Any]], rows: list[str], **more: Any) -> Chart:
    """Return a chart over `x`, not a step. more: its words, "logx", or "categories" (names of x = 0, 1, ...)."""
    texts = {"name": name, "unit": "", "says": "", "wide": False}
    chart = {**texts, "log": False, "curves": curves, "levels": [], "events": [], **more}
    if chart["log"] == "auto":
        values = [y for curve in curves for y in curve["y"] if y is not None]
        chart["log"] = max(values, default=0) > LARGE_KURTOSIS
        for curve in curves if chart["log"] else []:  # a logarithmic axis cannot show values below 0
            curve["y"] = [None if y is None else max(y, SMALLEST_KURTOSIS) for y in curve["y"]]
    return chart | {"words": line_words(chart, rows)}
