"""Continue texts: `python scripts/generate.py MODEL "Once upon a time" temperature=0.7 top_p=0.9`."""

import dataclasses
import sys
from typing import Any

from entry import launch

from osp.config import GenerateConfig, build, check_bounds
from osp.errors import UserError


def main(values: dict[str, Any]) -> None:
    path, *prompts = values.pop("arguments") or ("",)
    config = build(GenerateConfig, values, path="")
    check_bounds(config)
    if not path or not (prompts or config.prompts):
        raise UserError('name the model and a prompt: python scripts/generate.py MODEL "Once upon a time"')
    from osp.evaluation.completion import complete

    speed = complete(path, prompts, config, lambda piece: print(piece, end="", flush=True))
    print(speed, file=sys.stderr)


if __name__ == "__main__":
    launch(
        main,
        "generate",
        defaults={**dataclasses.asdict(GenerateConfig()), "arguments": []},
        positional="arguments",
    )
