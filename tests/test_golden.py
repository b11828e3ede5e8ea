"""The first 20 losses of every ablation row on a 4-layer model, CPU, fp32, one thread: a refactor leaves them alone.

A change of numerics moves them: `pytest tests/test_golden.py --update-golden` writes them anew, and the commit says in
one sentence why they moved.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from osp.config import Config
from osp.train import train
from tests.conftest import ROOT, losses

ROWS = ("adam", "muon_all", "muon", "muon_ssnorm", "muon_embproj", "osp")
GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-4  # relative; other vector units and BLAS versions round differently, and training amplifies it


@pytest.mark.parametrize("row", ROWS)
def test_losses_are_the_golden_ones(
    row: str, tiny: Callable[..., Config], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    experiment = yaml.safe_load((ROOT / "configs" / "experiment" / f"{row}.yaml").read_text())
    groups = {k.split("/")[1]: v for entry in experiment.pop("defaults") for k, v in entry.items()}
    experiment["optimizer"]["lr"] *= 4  # a row's own rate moves too little in 20 steps to tell the rows apart
    overrides = [
        "train.steps=20",
        "eval.every=0",
        "checkpoint.every=0",
        "model.num_hidden_layers=4",
        f"norm={json.dumps(_group('norm', groups['norm']))}",
        f"optimizer={json.dumps({**_group('optimizer', groups['optimizer']), **experiment['optimizer']})}",
        f"model.embed_proj={json.dumps(experiment['model']['embed_proj'])}",
    ]
    train(tiny(*overrides))
    found = losses(tmp_path / "run")
    file = GOLDEN / f"{row}.txt"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"{loss:.6f}\n" for loss in found))
    golden = [float(line) for line in file.read_text().split()]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(golden), atol=0, rtol=TOLERANCE)


def test_golden_losses_tell_the_rows_apart() -> None:
    """Otherwise the test above could not see that a row lost its norm, projection or optimizer."""
    curves = [tuple(float(x) for x in (GOLDEN / f"{row}.txt").read_text().split()) for row in ROWS]
    for i, a in enumerate(curves):
        for b in curves[:i]:
            assert any(abs(x - y) > 2 * TOLERANCE * x for x, y in zip(a, b, strict=True))


def _group(name: str, choice: str) -> dict:
    return yaml.safe_load((ROOT / "configs" / name / f"{choice}.yaml").read_text()) or {}
