"""Does a model with an outlier channel lose it when it goes on training, and with which norm and optimizer?

    python scripts/ablation.py scale=twice dir=ablations/twice 'rows=[muon]' 'seeds=[0]' 'sweep.factors=[]'
    python benchmarks/retrofit.py ablations/twice/runs/muon-seed0-*       # about ten minutes on two cores

Takes a run with RMSNorm and makes two starts of it: the model as it is, and with a planted outlier channel: in every
norm of a block the gain of channel 0 is 50 times its value, and the weights that read the channel are a 50th, so that
the function is the same. Each start goes on for 500 steps, on the data of the run, with AdamW or Muon, and with its
RMSNorm or as scripts/convert.py to=ssnorm turns it into SSNorm. Writes benchmarks/retrofit.json and retrofit.md.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from mechanism import measure
from torch import Tensor

from osp.config import MonitorConfig, leaves, to_dict
from osp.convert.hf_export import write_llama, write_tokenizer
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.texts import COPIED, HELD_OUT, read_texts
from osp.model.fold import residual_norms
from osp.monitor.probe import ProbeText, probe
from osp.run.folder import environment
from osp.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
STEPS, GAIN, CHANNEL = 500, 50.0, 0
WAYS = {  # name -> norm of the start, keys of the training
    "adam, RMSNorm": ("rmsnorm", ["optimizer=adamw", "optimizer.lr=2e-3"]),
    "muon, RMSNorm": ("rmsnorm", ["optimizer=muon", "optimizer.lr=5e-3"]),
    "muon, SSNorm": ("ssnorm", ["optimizer=muon", "optimizer.lr=5e-3"]),
}
TITLES = {"cost": "4-4-4", "cost_folded": "4-4-4 folded"}  # of the quantizations of mechanism.py
KEPT = ("train.seq_len", "train.tokens_per_step", "data.", "engine.threads")  # keys of the run


@torch.no_grad()
def plant(subject: LanguageModel) -> None:
    """Multiply the gain of one channel in every norm of a block, and divide the weights that read the channel."""
    for name, norm, readers in residual_norms(subject.model):
        if name != "norm" and isinstance(norm.weight, Tensor):
            norm.weight[CHANNEL] *= GAIN
            for reader in readers:
                subject.model.get_parameter(f"{reader}.weight")[:, CHANNEL] /= GAIN


def measure_model(path: Path, rows: LanguageModel) -> dict[str, float]:
    """Return the outliers of a model and its losses on the validation split of the run `rows`, nats per token."""
    subject = dataclasses.replace(open_model(path), run=rows.run, config=rows.config, folder=rows.folder)
    texts = read_texts([HELD_OUT, COPIED], subject)
    length = texts[0].row or 1
    sequences = texts[0].tokens[: 64 * length].view(-1, length)[:, :-1]
    statistics = ("kurtosis", "top_channel_share", "top_channel_share_before_gain", "top_channel_gain")
    seen = probe(subject.model, ProbeText(sequences), MonitorConfig(sites=("attn_in", "mlp_in"), statistics=statistics))
    site = max(seen.sites, key=lambda name: seen.sites[name].statistics["top_channel_share"])
    numbers = {name: seen.sites[site].statistics[name] for name in statistics}
    for text, loss, added in measure(subject.model, texts):
        numbers[f"{text} 16-16-16"] = loss
        numbers |= {f"{text} {TITLES[name]} costs": value for name, value in added.items()}
    return numbers


def run_script(name: str, *arguments: str) -> None:
    """Run scripts/NAME.py; its output goes to the terminal."""
    subprocess.run([sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments], check=True)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("name a run with RMSNorm: python benchmarks/retrofit.py ablations/twice/runs/muon-seed0-*")
    torch.set_num_threads(1)
    source = open_model(sys.argv[1])
    assert source.config is not None
    assert source.run is not None
    keys = [f"{key}={json.dumps(value)}" for key, value in leaves(to_dict(source.config)) if key.startswith(KEPT)]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for start in ("as trained", "planted"):
            subject, stock = open_model(sys.argv[1]), folder / f"{start}-hf"
            if start == "planted":
                plant(subject)
            stock.mkdir()
            write_llama(subject.model, stock, dtype="fp32", bos_id=subject.bos_id, eos_id=subject.eos_id)
            write_tokenizer(subject, stock)
            shutil.copyfile(source.run / "tokenizer.json", stock / "tokenizer.json")  # of the shards
            results[f"{start}: before"] = measure_model(stock, source)
            for way, (norm, overrides) in WAYS.items():
                converted, name = folder / f"{start}-{norm}", f"{start}: {way}"
                if not converted.exists():
                    run_script("convert", str(stock), f"to={norm}", f"out={converted}", f"text={source.run}")
                    if norm == "ssnorm":  # with RMSNorm it is the same model
                        results[f"{start}: ssnorm, before"] = measure_model(converted, source)
                out = folder / name.replace(" ", "_").replace(":", "").replace(",", "")
                length = [f"train.steps={STEPS}", "train.seed=100", f"run.dir={out}", "run.name=retrofit"]
                quiet = ["logger.wandb=disabled", "eval.every=0", "eval.sample_tokens=0", "checkpoint.every=0"]
                run_script("train", *keys, *overrides, *length, *quiet, f"checkpoint.init_from={converted}")
                results[name] = measure_model(out, source)
                shutil.rmtree(out)
    record = {"run": source.run.name, "model": source.sha256(), "environment": environment(), "results": results}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    columns = list(next(iter(results.values())))
    rows = [[name, *(f"{row[column]:.4f}" for column in columns)] for name, row in results.items()]
    path.with_suffix(".md").write_text(f"{markdown_table(['model', *columns], rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
