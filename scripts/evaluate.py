"""Measure a model, quantized or not: `python scripts/evaluate.py RUN quant=osp_paper texts=[wikitext2]`."""

import dataclasses
from typing import Any

from entry import launch

from osp.errors import UserError
from osp.evaluation.config import EvaluateConfig
from osp.schema import build


def main(values: dict[str, Any]) -> None:
    config = build(EvaluateConfig, values)
    if not config.path:
        raise UserError("name the model: python scripts/evaluate.py RUN, a checkpoint or a Hugging Face folder")
    from osp.distributed import is_main, shutdown
    from osp.evaluation.evaluate import evaluate, open_subject, results_table, store_record

    try:
        subject = open_subject(config.path, config)
        record = evaluate(subject, config)
        if is_main():  # before it is written, which may fail
            print(results_table(record), end="")
        path = store_record(record, config.out, subject.run, record.name)
        if is_main() and path:
            print(path)
    finally:
        shutdown()


if __name__ == "__main__":
    launch(main, "evaluate", defaults=dataclasses.asdict(EvaluateConfig()), positional="path")
