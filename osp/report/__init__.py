"""Looking at runs: a run folder as one self-contained HTML page, or live in a terminal."""

from osp.report.folder import Run, Series, read_run
from osp.report.page import write_report

__all__ = ["Run", "Series", "read_run", "write_report"]
