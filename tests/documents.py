"""Read the Markdown of the documents."""

import re

from tests.conftest import ROOT


def read_page(path: str) -> str:
    """Return the text of a document of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """Return the text below a heading, up to the next heading of any level but the first."""
    (text,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^##|\Z)", page, flags=re.DOTALL | re.MULTILINE)
    return text


def tables(text: str, first_title: str) -> list[list[dict[str, str]]]:
    """Return the tables whose first column has this title, each row by the titles of the columns."""
    found = []
    for block in re.findall(rf"^\| {re.escape(first_title)} \|.*\n(?:\|.*\n?)+", text, flags=re.MULTILINE):
        head, _, *rows = [_cells(line) for line in block.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
