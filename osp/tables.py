"""Rows of text as a table, in Markdown and for a terminal, and text from a template."""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

Rows = Sequence[Sequence[str]]


def escape_cell(text: str) -> str:
    """Return `text` for a cell of a Markdown table, where a `|` or a line end would end the cell."""
    return " ".join(text.splitlines()).replace("|", "\\|")


def escape_markdown(value: Any) -> Any:
    """Return text that makes no HTML element and no link in Markdown: a `<` before a name and `](` are escaped."""
    return re.sub("<(?=[a-zA-Z/!?])", "&lt;", value).replace("](", "]\\(") if isinstance(value, str) else value


def markdown_table(head: Sequence[str], rows: Rows) -> str:
    """Return a Markdown table. A `|` inside a cell is escaped."""
    lines = [[escape_cell(cell) for cell in cells] for cells in [head, *rows]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], ["---"] * len(head), *lines[1:]])


def text_table(rows: Rows, *, left: int | None = None) -> str:
    """Return a plain-text table with a line below the first row. left: columns not right-aligned, None: all."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def render_text(template: Path, **values: Any) -> str:
    """Return the text of a Jinja template with these values, Markdown or plain; a `.md` escapes them as Markdown.

    Filters: `cell` (`escape_cell`) and `number`, 4 digits or "not finite" for None. Function: `table`, in Markdown.
    """
    finalize = escape_markdown if template.suffix == ".md" else None
    return _environment(template.parent, finalize).get_template(template.name).render(**values)


@functools.cache  # it keeps the compiled templates
def _environment(folder: Path, finalize: Callable[[Any], Any] | None) -> jinja2.Environment:
    settings: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), finalize=finalize, **settings)
    environment.filters["cell"] = escape_cell
    environment.filters["number"] = lambda value: "not finite" if value is None else f"{value:.4g}"
    environment.globals["table"] = markdown_table
    return environment
