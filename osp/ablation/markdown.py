"""The table of an ablation as Markdown."""

import math
from collections.abc import Sequence

from osp.ablation.config import AblationConfig
from osp.ablation.paper import SCALE, TABLE_2, TEXT
from osp.ablation.results import HADAMARD, LAST, QUANTITIES, Cell, Line, Results, difference
from osp.evaluation.compare import COLUMNS
from osp.tables import markdown_table

FIRST = COLUMNS[0]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # heading, rows
METHODS = ("RTN", "+ FFN Had", "+ GPTQ", "+ QuaRot")


def markdown(results: Results, config: AblationConfig, about: Sequence[str]) -> str:
    """All tables. about: lines on what was trained where, and by which command."""
    parts: list[str] = ["# What outliers cost, by recipe", "\n".join(f"- {line}" for line in about)]
    if missing := missing_lines(results):
        parts += ["**Missing from this table:**", "\n".join(f"- {line}" for line in missing)]
    for rates in dict.fromkeys(line.rates for line in results.lines):
        lines = [line for line in results.lines if line.rates == rates]
        parts += [
            f"## Rates: {rates}",
            verdict(lines),
            f"Ours: {seeds_words(config)}. In brackets the paper's: {SCALE}, perplexity of {TEXT}.",
            markdown_table(*outlier_rows(lines)),
            *([against_words(lines), markdown_table(*against_rows(lines))] if len(lines) > 1 else []),
            f"Perplexity by bits of weights, activations and KV cache. Ours: {', '.join(results.texts) or 'no text'}; "
            f"in brackets the paper's, of {TEXT}.",
            markdown_table(*bits_rows(lines)),
        ]
        if any(method in line.cells for line in lines for method in METHODS):
            parts += [
                f"Perplexity at {LAST} by method, each with what stands above it.",
                markdown_table(*methods_rows(lines)),
            ]
    if results.sweep:
        parts += [
            f"## Over {config.sweep.key}",
            f"With seed {config.seeds[0]}.",
            markdown_table(*sweep_rows(results, config)),
        ]
    parts += ["## Where the numbers are from", provenance(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def seeds_words(config: AblationConfig) -> str:
    """What a cell holds of the seeds."""
    number = len(config.seeds)
    return f"mean ± standard deviation over {number} seeds" if number > 1 else "one seed"


def missing_lines(results: Results) -> list[str]:
    """What the page lacks, and why."""
    return [
        f"{label}: {results.failures.get(label, 'not trained yet')}" for line in results.lines for label in line.missing
    ]


def verdict(lines: Sequence[Line]) -> str:
    """One sentence: whether the last row loses less at 4-4-4 than the first, beyond the spread over seeds."""
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
    word = "less" if by > 0 else "more"
    return f"**{costs}: {last.row} loses {abs(by):.4f} {word}{known}{one_seed}.**"


def outlier_rows(lines: Sequence[Line]) -> Table:
    """Kurtosis, largest values, R_L, loss, and what 4-4-4 costs."""
    names = [*QUANTITIES, "cost"]
    titles = [*(quantity.title for quantity in QUANTITIES.values()), f"{LAST} costs, nats"]
    rows = [[line.row, *(with_paper(line, name) for name in names)] for line in lines]
    return ["row", *titles], rows


def against_words(lines: Sequence[Line]) -> str:
    """What `against_rows` shows."""
    return (
        f"Against {lines[0].row}, nats per token, ± the spread of seeds that a difference has to be held against. A "
        f"row is better if it loses less at {LAST} and not more at {FIRST}, each by more than twice that spread."
    )


def against_rows(lines: Sequence[Line]) -> Table:
    """Every row's loss at 16 and at 4 bits less that of the first row, and whether the row is better."""
    rows = []
    for line in lines[1:]:
        if not {"nats_16", "nats_4"} <= lines[0].cells.keys() & line.cells.keys():
            continue
        (at_16, spread_16), (at_4, spread_4) = (
            difference(line.cells[name], lines[0].cells[name]) for name in ("nats_16", "nats_4")
        )
        word = "yes" if at_4 < -2 * spread_4 and at_16 <= 2 * spread_16 else "no"
        if not all(map(math.isfinite, (spread_16, spread_4))):
            word = "one seed"
        rows.append([line.row, signed(at_16, spread_16), signed(at_4, spread_4), word])
    return ["row", f"at {FIRST}", f"at {LAST}", f"better than {lines[0].row}"], rows


def signed(value: float, spread: float) -> str:
    """A difference and its spread, nats."""
    if math.isnan(value):
        return "-"
    return f"{value:+.4f}" + (f" ± {spread:.4f}" if math.isfinite(spread) else "")


def bits_rows(lines: Sequence[Line]) -> Table:
    """Perplexity by bits, without and with the FFN's Hadamard transform."""
    rows = []
    for line in lines:
        rows.append([line.row, *(with_paper(line, bits) for bits in COLUMNS)])
        rows.append(["+Had", *(with_paper(line, bits + HADAMARD) for bits in COLUMNS)])
    return ["row", *COLUMNS], rows


def methods_rows(lines: Sequence[Line]) -> Table:
    """Perplexity at 4-4-4 by method, of the rows that were measured so."""
    shown = [line for line in lines if any(method in line.cells for method in METHODS)]
    methods = [method for method in METHODS if any(method in line.cells for line in shown)]
    rows = [[method, *(cell_text(line.cells.get(method)) for line in shown)] for method in methods]
    return ["method", *(line.row for line in shown)], rows


def sweep_rows(results: Results, config: AblationConfig) -> Table:
    """Row by row and value by value: loss, kurtosis and the cost of 4-4-4."""
    names = ["loss", "kurtosis", "osp_script", "down_proj_max", "R_L", FIRST, LAST, "cost"]
    titles = {name: quantity.title for name, quantity in QUANTITIES.items()} | {"cost": f"{LAST} costs, nats"}
    rows = [
        [row, str(value), *(number(numbers.get(name, math.nan)) for name in names)]
        for row, points in results.sweep.items()
        for value, numbers in points
    ]
    return ["row", config.sweep.key or "", *(titles.get(name, name) for name in names)], rows


def provenance(results: Results) -> str:
    """Hashes of quantizations, data and code."""
    texts = [f"- text {name}: SHA-256 `{digest}`" for name, digest in results.texts.items()]
    commits = [f"- commit {', '.join(f'`{commit}`' for commit in results.commits) or 'unknown'}"]
    return "\n".join([*texts, *commits]) + "\n\n" + markdown_table(*provenance_rows(results))


def provenance_rows(results: Results) -> Table:
    """Which quantization, by hash and in words, stands behind a column or a method."""
    rows = [[column, key, results.specs.get(key, "")] for column, key in results.columns.items()]
    return ["column", "quantization", "in words"], rows


def with_paper(line: Line, name: str) -> str:
    """Ours, and in brackets the paper's number where there is one."""
    paper = TABLE_2.get(line.row, {}).get(name)
    return cell_text(line.cells.get(name)) + ("" if paper is None else f" ({number(paper)})")


def cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    spread = f" ± {number(cell.deviation)}" if math.isfinite(cell.deviation) else ""
    return number(cell.mean) + spread


def number(value: float) -> str:
    """Three or four digits: 0.0123, 1.234, 24.15, 1819, 8e4; not finite: inf or -."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf"
    size = abs(value)
    if size >= 1e4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if size >= 10 else f"{value:.3f}" if size >= 1 else f"{value:.4f}"
