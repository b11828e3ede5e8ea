"""Write a trained model for other programs: `python scripts/export.py RUN out=m.gguf format=gguf scheme=q4_0`."""

import dataclasses
import signal
import sys
from typing import Any

from entry import launch

from osp.convert.config import ExportConfig
from osp.errors import UserError
from osp.schema import build


def main(values: dict[str, Any]) -> None:
    config = build(ExportConfig, values)
    if not config.path or not config.out:
        raise UserError("name the run and the folder to write: python scripts/export.py RUN out=DIR")
    from osp.convert.export import export
    from osp.device import choose_device, prepare_cpu

    device = choose_device(config.device)
    if device.type == "cpu":
        prepare_cpu(config.threads)
    own = ("path", "out", "device", "threads", "debug")
    keys = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in own}
    print(export(config.path, config.out, device=device, **keys).markdown(), end="")
    print(config.out)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes what is written so far
    launch(main, "export", defaults=dataclasses.asdict(ExportConfig()), positional="path")
