"""Train a model: `deepspeed scripts/train.py +experiment=osp_1b`, `torchrun ... scripts/train.py`, or plain python."""

from typing import Any

from entry import launch

from osp.config import from_dict


def main(values: dict[str, Any]) -> None:
    config = from_dict(values)
    # torch after the checks: a typing mistake is reported at once
    from osp.engine import shutdown
    from osp.train import train

    try:
        train(config)
    finally:
        shutdown()


if __name__ == "__main__":
    launch(main)
