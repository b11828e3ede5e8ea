"""Write runs as one HTML page: `python scripts/report.py runs/a runs/b out=comparison.html`."""

import sys
from pathlib import Path

from osp.errors import UserError
from osp.report import write_report

USAGE = "usage: python scripts/report.py RUN [RUN...] [out=FILE]; RUN is a folder such as runs/quickstart"


def main(arguments: list[str]) -> None:
    outs = [Path(argument.removeprefix("out=")) for argument in arguments if argument.startswith("out=")]
    folders = [Path(argument) for argument in arguments if not argument.startswith("out=")]
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    if not folders:
        raise UserError(USAGE)
    out = outs[-1] if outs else folders[0] / "report.html"
    for line in write_report(folders, out):
        print(f"left out: {line}", file=sys.stderr)
    print(out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
