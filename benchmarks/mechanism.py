"""Where an outlier channel comes from, step by step: the numbers behind docs/assets/mechanism.svg.

    python scripts/ablation.py scale=twice dir=ablations/mechanism 'rows=[muon,osp]' 'seeds=[0,1]' 'sweep.factors=[]' \\
        monitor.every=50 checkpoint.every=100 checkpoint.keep_last=0
    python benchmarks/mechanism.py ablations/mechanism
    python docs/pictures.py

Reads the probes of the runs, measures every checkpoint at 4-4-4 on the tokens that can be copied, and writes
benchmarks/mechanism.json: for each row one table a seed, a column for each quantity.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from osp.evaluation.language_model import open_model
from osp.evaluation.perplexity import Text, perplexity
from osp.evaluation.texts import COPIED, HELD_OUT, read_texts
from osp.model.transformer import Transformer
from osp.quant.apply import quantized
from osp.quant.spec import QuantSpec
from osp.run.read import read_run

OUT = Path(__file__).with_name("mechanism.json")
SITE = "layer_01/attn_in"  # of the last of two blocks
STATISTICS = {
    "before": "top_channel_share_before_gain",
    "after": "top_channel_share",
    "constancy": "top_channel_constancy",
    "gain": "top_channel_gain",
    "kurtosis": "kurtosis",
}
TOKENS = 32_768
PLAIN = "loss"
FOUR_BITS = QuantSpec(w_bits=4, a_bits=4, kv_bits=4)
SPECS = {"cost": FOUR_BITS, "cost_folded": dataclasses.replace(FOUR_BITS, fold_gains=True)}


def probes(run: Path) -> dict[str, list[float]]:
    """Return the steps of the probes of a run, and each statistic of `SITE` after them."""
    series = read_run(run).series
    columns = {name: series[f"monitor/{statistic}/{SITE}"] for name, statistic in STATISTICS.items()}
    steps = columns["after"].steps.tolist()
    return {"steps": steps} | {name: [round(v, 4) for v in column.values.tolist()] for name, column in columns.items()}


def measure(model: Transformer, texts: Sequence[Text]) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Yield the name of each text, the loss at 16 bits, and what each of `SPECS` adds, in nats per token."""
    losses: dict[str, list[float]] = {}
    for name, spec in ({PLAIN: QuantSpec()} | SPECS).items():
        with quantized(model, spec):
            losses[name] = [perplexity(model, text, seq_len=64, max_tokens=TOKENS).loss for text in texts]
    for i, text in enumerate(texts):
        yield text.name, losses[PLAIN][i], {name: losses[name][i] - losses[PLAIN][i] for name in SPECS}


def costs(run: Path) -> dict[str, list[float]]:
    """Return the steps of the checkpoints of a run, and what 4-4-4 costs on each text after them, in nats per token."""
    columns: dict[str, list[float]] = {"checkpoints": []}
    for checkpoint in sorted((run / "checkpoints").glob("step_*")):
        subject = open_model(checkpoint)
        columns["checkpoints"].append(subject.step or 0)
        for text, loss, added in measure(subject.model, read_texts([HELD_OUT, COPIED], subject)):
            for name, value in ({PLAIN: loss} | added).items():
                columns.setdefault(f"{text}_{name}", []).append(round(value, 5))
    return columns


def main() -> None:
    if len(sys.argv) != 2 or not (runs := sorted(Path(sys.argv[1]).glob("runs/*-seed*/"))):
        sys.exit("name the folder of an ablation that has runs: python benchmarks/mechanism.py ablations/mechanism")
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, list[float]]]] = {}
    for run in runs:
        rows.setdefault(run.name.partition("-seed")[0], []).append(probes(run) | costs(run))
        print(run.name)
    OUT.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
