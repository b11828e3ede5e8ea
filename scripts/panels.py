"""Make the W&B workspace of a project: `python scripts/panels.py ENTITY/PROJECT`, for instance after `wandb sync`."""

import sys

from osp.errors import UserError
from osp.run.metrics import create_workspace


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].count("/") != 1 or not all(arguments[0].split("/")):
        raise UserError("usage: python scripts/panels.py ENTITY/PROJECT, the two names in the address of the project")
    entity, project = arguments[0].split("/")
    try:
        print(create_workspace(entity, project))
    except UserError:
        raise
    except Exception as error:  # W&B raises its own, the network's and GraphQL's errors alike
        raise UserError(f"W&B did not take the workspace: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
