"""Where are the outliers of a model, and since when: `python scripts/inspect_outliers.py RUN_OR_CHECKPOINT`."""

import argparse
import sys
from pathlib import Path

from osp.config import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("path", type=Path, help="a run folder or one of its checkpoints")
    parser.add_argument("--text", type=Path, default=None, help="a text file; default: the run's held-out text")
    parser.add_argument("--out", type=Path, default=None, help="folder of the bundle; default: forensics of the run")
    arguments = parser.parse_args()
    from osp.monitor import inspect

    try:
        table, bundle = inspect(arguments.path, arguments.text, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{table}\n\nthe first line in full: {bundle} and .md beside it")


if __name__ == "__main__":
    main()
