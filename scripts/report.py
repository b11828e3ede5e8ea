"""Write runs as one HTML page: `python scripts/report.py runs/a runs/b out=comparison.html`."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entry import launch

from osp.errors import UserError
from osp.files import printable
from osp.report.page import write_report
from osp.schema import FilePath, build


@dataclass(frozen=True)
class ReportConfig:
    paths: tuple[FilePath, ...] = ()  # run folders
    out: FilePath | None = None  # the file to write; None: report.html in the first run folder
    debug: bool = False  # show tracebacks of user errors


def main(values: dict[str, Any]) -> None:
    config = build(ReportConfig, values)
    if not config.paths:
        raise UserError(
            "usage: python scripts/report.py RUN [RUN ...] [out=FILE]; RUN is a folder like runs/quickstart"
        )
    folders = [Path(path) for path in config.paths]
    out = Path(config.out) if config.out else folders[0] / "report.html"
    for line in write_report(folders, out):
        print(printable(f"left out: {line}"), file=sys.stderr)
    print(out)


if __name__ == "__main__":
    launch(main, "report", defaults=dataclasses.asdict(ReportConfig()), positional="paths")
