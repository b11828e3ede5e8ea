"""Write a trained model as a stock Hugging Face Llama: `python scripts/export.py RUN out=DIR`."""

import dataclasses
import logging
from typing import Any

from entry import launch

from osp.convert.config import ExportConfig
from osp.errors import UserError
from osp.schema import build


def main(values: dict[str, Any]) -> None:
    config = build(ExportConfig, values)
    if not config.path or not config.out:
        raise UserError("name the run and the folder to write: python scripts/export.py RUN out=DIR")
    from osp.convert.hf_export import export
    from osp.device import choose_device

    exported = export(
        config.path,
        config.out,
        dtype=config.dtype,
        max_shard_size=config.max_shard_size,
        text=config.text,
        device=choose_device(config.device),
    )
    logging.info(
        "%s: logits within %.1e of the largest, perplexity %.4f as exported, %.4f as trained",
        exported.folder,
        exported.folding.relative,
        exported.perplexity.after,
        exported.perplexity.before,
    )


if __name__ == "__main__":
    launch(main, "export", defaults=dataclasses.asdict(ExportConfig()), positional="path")
