"""Change the norm of a model without changing its function: `python scripts/convert.py MODEL to=rmsnorm out=DIR`."""

import dataclasses
from typing import Any

from entry import launch

from osp.convert.config import ConvertConfig
from osp.errors import UserError
from osp.schema import build


def main(values: dict[str, Any]) -> None:
    config = build(ConvertConfig, values)
    if not config.path or not config.to or not config.out:
        raise UserError("name the model, its norm and the folder: python scripts/convert.py MODEL to=rmsnorm out=DIR")
    from osp.convert.change_norm import convert_folder
    from osp.device import choose_device

    device = choose_device(config.device)
    keys = {"to": config.to, "weights": config.weights, "text": config.text, "device": device}
    print(convert_folder(config.path, config.out, **keys))
    print(config.out)


if __name__ == "__main__":
    launch(main, "convert", defaults=dataclasses.asdict(ConvertConfig()), positional="path")
