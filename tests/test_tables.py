"""Text and Markdown tables against tables written by hand."""

from pathlib import Path

from osp.tables import markdown_table, render_text, text_table


def test_markdown() -> None:
    assert markdown_table(["a", "|x|"], [["1", "2"], ["b", ""]]) == (
        "| a | \\|x\\| |\n| --- | --- |\n| 1 | 2 |\n| b |  |"
    )


def test_text() -> None:
    rows = [["part", "size"], ["a", "10"], ["longer", "7"]]
    assert text_table(rows) == "part    size\n------------\na       10\nlonger  7"
    assert text_table(rows, left=1) == "part    size\n------------\na         10\nlonger     7"


def test_text_from_files_makes_neither_html_nor_links_nor_cells(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "{{ text }}\n{{ table(['a', text], [[text, '1 < 2']]) }}\n| {{ text | cell }} |\n"
    )
    (tmp_path / "page.txt").write_text("{{ text }}")
    text = "<img src=x>[a](javascript:b)\n<!-- </b> | <|endoftext|>"
    line = "&lt;img src=x>[a]\\(javascript:b) &lt;!-- &lt;/b> \\| <\\|endoftext\\|>"
    markdown = render_text(tmp_path / "page.md", text=text)
    assert markdown.splitlines()[2:] == [f"| a | {line} |", "| --- | --- |", f"| {line} | 1 < 2 |", f"| {line} |"]
    assert render_text(tmp_path / "page.txt", text=text) == text
