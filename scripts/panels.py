"""Create the W&B workspace of a project: `python scripts/panels.py ENTITY/PROJECT`, for instance after `wandb sync`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from entry import launch

from osp.errors import UserError
from osp.schema import build


@dataclass(frozen=True)
class PanelsConfig:
    project: str = ""  # ENTITY/PROJECT, as in the address of the project
    debug: bool = False  # show tracebacks of user errors


def main(values: dict[str, Any]) -> None:
    entity, _, project = build(PanelsConfig, values).project.partition("/")
    if not entity or not project or "/" in project:
        raise UserError("usage: python scripts/panels.py ENTITY/PROJECT, the two names in the address of the project")
    from osp.run.metrics import build_workspace

    try:
        print(build_workspace(entity, project).save().url)
    except UserError:
        raise
    except Exception as error:  # an error of W&B, the network or GraphQL
        raise UserError(f"W&B refused the workspace: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    launch(main, "panels", defaults=dataclasses.asdict(PanelsConfig()), positional="project")
