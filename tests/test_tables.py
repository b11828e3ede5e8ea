"""Text and Markdown tables against tables written by hand."""

from osp.tables import markdown_table, text_table


def test_markdown() -> None:
    assert markdown_table(["a", "|x|"], [["1", "2"], ["b", ""]]) == (
        "| a | \\|x\\| |\n| --- | --- |\n| 1 | 2 |\n| b |  |"
    )


def test_text() -> None:
    rows = [["part", "size"], ["a", "10"], ["longer", "7"]]
    assert text_table(rows) == "part    size\n------------\na       10\nlonger  7"
    assert text_table(rows, left=1) == "part    size\n------------\na         10\nlonger     7"
