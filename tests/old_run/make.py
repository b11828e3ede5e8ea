"""Make the archive of run folders that tests/test_old_run.py reads: `python tests/old_run/make.py CHECKOUT`.

CHECKOUT is a working tree of the version to archive, for example `git worktree add ../old d86633d`. Its scripts write
all files. Run it with one thread in an environment that this version supports.
"""

import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TRAINING = [
    "train.steps=12", "train.seq_len=32", "train.tokens_per_step=256", "train.micro_batch_size=2",
    "train.compile=false", "train.precision=fp32",
    "model.vocab_size=320", "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=2",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.max_position_embeddings=64",
    "model.embed_proj=true", "norm=ssnorm", "optimizer.lr=0.01", "optimizer.ns_dtype=fp32",
    "eval.every=3", "eval.tokens=1024", "eval.sample_tokens=4", "eval.quant.every=6", "eval.quant.tokens=256",
    "data=text", "data.paths=[corpus.jsonl]", "data.val_fraction=0.1", "data.cache_dir=shards", "data.num_workers=1",
    "tokenizer.vocab_size=320", "checkpoint.every=6", "checkpoint.keep_last=1",
    "monitor=full", "monitor.every=4", "monitor.tokens=128", "monitor.alerts.max_over_median.all.above=1.5",
    "logger.wandb=disabled", "logger.progress=false", "engine.device=cpu", "engine.threads=1",
]  # fmt: skip
MEASURING = [
    "texts=[held_out,essay.txt]", "seq_len=32", "max_tokens=512", "tasks=[quiz.jsonl,answers.jsonl]",
    "device=cpu", "threads=1", "progress=false",
]  # fmt: skip
EXPECTED = """
import json, torch, osp
torch.set_num_threads(1)
ids = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    logits = {name: osp.load_model(f"runs/{name}")(ids)[0, -1].tolist() for name in ("finished", "stopped")}
    logits["exported"] = osp.load_hf("exported")(ids)[0, -1].tolist()
events = [json.loads(line) for line in open("runs/finished/metrics.jsonl")]
losses = [event["train/loss"] for event in events if "train/loss" in event]
print(json.dumps({"ids": ids.tolist(), "logits": logits, "losses": losses}, indent=1))
"""


def make(checkout: Path, home: Path) -> None:
    """Write corpus, shards, runs, evaluations, the export and the conversion below `home`."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 7))) for _ in range(150)]
    documents = [" ".join(draw.choice(words) for _ in range(80)) + ".\n" for _ in range(60)]
    quiz = [{"query": f"Which word is {word}?", "choices": [word, word[::-1]], "gold": 0} for word in words[:6]]
    answers = [{"context": f"Say {word}", "answer": word, "aliases": [word.upper()]} for word in words[6:9]]
    (home / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    # the modification time is part of the name of the shards; tar stores whole seconds
    os.utime(home / "corpus.jsonl", (1_700_000_000, 1_700_000_000))
    (home / "essay.txt").write_text("".join(documents[:4]))
    (home / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in quiz))
    (home / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))

    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=home, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def script(name: str, *arguments: str) -> str:
        return run(str(checkout / "scripts" / f"{name}.py"), *arguments)

    script("train", *TRAINING, "run.name=finished")
    script("train", *TRAINING, "run.name=stopped", "train.stop_at=6")
    script("evaluate", "runs/finished", "quant=osp_paper", "ablate=true", *MEASURING)
    script("compare", "runs/finished", "quant.calibration_tokens=2048", *MEASURING)
    script("export", "runs/finished", "out=exported", "device=cpu")
    script("convert", "runs/finished", "to=rmsnorm", "out=converted", "device=cpu")
    text = script("generate", "runs/finished", "Say", "temperature=0", "max_new_tokens=16", "device=cpu", "threads=1")
    expected = json.loads(run("-c", EXPECTED))
    (home / "runs" / "finished" / "report.html").unlink()  # large and not read
    (home / "expected.json").write_text(json.dumps({**expected, "generated": text}) + "\n")


if __name__ == "__main__":
    checkout = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        make(checkout, Path(folder))
        with tarfile.open(Path(__file__).with_name("d86633d.tar.xz"), "w:xz") as archive:
            for path in sorted(Path(folder).iterdir()):
                archive.add(path, arcname=path.name)
