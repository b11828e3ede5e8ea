"""Print tables 2 and 4 of the paper for several models: `python scripts/compare.py RUN RUN texts=[wikitext2]`."""

import dataclasses
from typing import Any

from entry import launch

from osp.evaluation.config import CompareConfig
from osp.schema import build


def main(values: dict[str, Any]) -> None:
    config = build(CompareConfig, values)
    from osp.distributed import is_main, shutdown
    from osp.evaluation.compare import compare, markdown
    from osp.evaluation.evaluate import store_record

    try:
        record = compare(config)
        store_record(record, config.out)
        if is_main():
            print(markdown(record.models, config.columns), end="")
    finally:
        shutdown()


if __name__ == "__main__":
    launch(main, "compare", defaults=dataclasses.asdict(CompareConfig()), positional="paths")
