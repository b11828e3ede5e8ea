"""Rows of text as a table, in Markdown and for a terminal, and text from a template."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

Rows = Sequence[Sequence[str]]


def escape_cell(text: str) -> str:
    """Return `text` for a cell of a Markdown table, where a `|` would end the cell."""
    return text.replace("|", "\\|")


def markdown_table(head: Sequence[str], rows: Rows) -> str:
    """Return a Markdown table. A `|` inside a cell is escaped."""
    lines = [[escape_cell(cell) for cell in cells] for cells in [head, *rows]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], ["---"] * len(head), *lines[1:]])


def text_table(rows: Rows, *, left: int | None = None) -> str:
    """Return a plain-text table with a line below the first row.

    left: number of left-aligned columns, the others are right-aligned; None: all.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def render_text(template: Path, **values: Any) -> str:
    """Return the text of a Jinja template with these values, Markdown or plain.

    Filters: `cell` is `escape_cell`; `number` gives 4 digits, and "not finite" for None. Function: `table`,
    which is `markdown_table`.
    """
    return _environment(template.parent).get_template(template.name).render(**values)


@functools.cache  # it keeps the compiled templates
def _environment(folder: Path) -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = escape_cell
    environment.filters["number"] = lambda value: "not finite" if value is None else f"{value:.4g}"
    environment.globals["table"] = markdown_table
    return environment
