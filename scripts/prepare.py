"""Tokenize text ahead of training: `python scripts/prepare.py data=text data.paths=[corpus/]`."""

import logging
from typing import Any

from entry import launch

from osp.config import from_dict


def main(values: dict[str, Any]) -> None:
    config = from_dict(values)
    from osp.data.manifest import load_manifest
    from osp.data.prepare import prepare

    folder = prepare(config.data, config.tokenizer, progress=config.logger.progress)
    manifest = load_manifest(folder)
    logging.info(
        "%s: %s training and %s held-out tokens in %d and %d documents",
        folder,
        f"{manifest.train.tokens:,}",
        f"{manifest.val.tokens:,}",
        manifest.train.documents,
        manifest.val.documents,
    )


if __name__ == "__main__":
    launch(main)
