"""Where are the outliers of a model, and since when: `python scripts/inspect_outliers.py RUN_OR_CHECKPOINT`."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from osp.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main() -> None:
    parser = Parser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("path", type=Path, help="a run folder or one of its checkpoints")
    parser.add_argument("--text", type=Path, default=None, help="a text file; default: the run's held-out text")
    parser.add_argument("--out", type=Path, default=None, help="folder of the bundle; default: forensics of the run")
    try:
        arguments = parser.parse_args()
        from osp.monitor import inspect  # torch after the arguments: a typing mistake is reported at once

        table, bundle = inspect(arguments.path, arguments.text, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{table}\n\nthe first line in full: {bundle} and .md beside it")


if __name__ == "__main__":
    main()
