"""Write run folders as one self-contained HTML page."""

from osp.report.page import write_report
from osp.run.read import Run, Series, read_run

__all__ = ["Run", "Series", "read_run", "write_report"]
