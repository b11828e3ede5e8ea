"""Looking at runs: a run folder as one self-contained HTML page, or live in a terminal."""

from osp.report.page import write_report
from osp.run.read import Run, Series, read_run

__all__ = ["Run", "Series", "read_run", "write_report"]
