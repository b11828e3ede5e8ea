"""Watch a run in the terminal: `python scripts/watch.py runs/quickstart`; Ctrl-C leaves, `--once` prints and exits."""

import sys

from osp.errors import UserError


def main(arguments: list[str]) -> None:
    try:
        from rich.console import Console

        from osp.report.terminal import USAGE, parse, watch
    except ImportError as error:
        raise UserError(f"watching needs {error.name}; pip install 'osp[report]'") from error
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    folder, every, once = parse(arguments)
    watch(folder, every=every, once=once, console=Console())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
