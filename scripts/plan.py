"""Plan a training without starting it: `python scripts/plan.py +experiment=osp_1b world_size=256`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from entry import launch

from osp.config import Config, from_dict, to_dict
from osp.errors import UserError
from osp.files import write_text
from osp.plan.config import PlanConfig
from osp.schema import build

OPTIONS = dataclasses.asdict(PlanConfig())
DEFAULTS = to_dict(Config()) | OPTIONS


def main(values: dict[str, Any]) -> None:
    options = build(PlanConfig, {key: values.pop(key) for key in OPTIONS if key in values})
    config = from_dict(values)
    # the file does not describe a constant that the command line overrides
    overridden = {word.lstrip("+").split("=")[0].removeprefix("machine.") for word in sys.argv if "machine." in word}
    sources = options.machine.sources | dict.fromkeys(overridden, "the command line")
    options = dataclasses.replace(options, machine=dataclasses.replace(options.machine, sources=sources))
    from osp.plan.plan import describe, make_plan, to_json

    plan = make_plan(config, options)
    if options.out is not None:
        try:
            write_text(Path(options.out), json.dumps(to_json(plan), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"out={options.out}: cannot write there: {error.strerror or error}") from error
    print(describe(plan))


if __name__ == "__main__":
    launch(main, "plan", defaults=DEFAULTS)
