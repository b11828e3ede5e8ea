"""Train a model: `deepspeed scripts/train.py +experiment=osp_1b`, `torchrun ... scripts/train.py`, or plain python."""

import sys
from typing import Any

from entry import launch

from osp.config import AT_TOP, from_dict
from osp.errors import UserError

OF_THE_MODEL = ("model", "tokenizer", *AT_TOP)


def main(values: dict[str, Any]) -> None:
    config = from_dict(values)
    if config.checkpoint.init_from is not None:
        for argument in sys.argv[1:]:
            if argument.lstrip("+~").split("=")[0].split(".")[0] in OF_THE_MODEL:
                raise UserError(
                    f"{argument}: model and tokenizer come from checkpoint.init_from={config.checkpoint.init_from}; "
                    "leave it out (scripts/convert.py changes the norm)"
                )
    # imports torch, after the checks: a typing mistake is reported at once
    from osp.distributed import shutdown
    from osp.train.setup import train

    try:
        train(config)
    finally:
        shutdown()


if __name__ == "__main__":
    launch(main)
