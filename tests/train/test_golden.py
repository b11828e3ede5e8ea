"""The first 20 losses of every ablation row and switch on a 4-layer model, fp32, one CPU thread: a refactor keeps them.

After a change of numerics, `pytest tests/train/test_golden.py --update-golden` writes them again, and the commit says
in one sentence why they changed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from osp.config import Config, leaves
from osp.train.setup import train
from tests.conftest import ROOT, losses

ROWS = ("adam", "muon_all", "muon", "muon_ssnorm", "muon_embproj", "osp")
# past the paper
ROWS += ("osp_ffn_norm", "osp_gate", "osp_off_by_one", "osp_per_head", "osp_penalty", "osp_kurtosis", "osp_sigmoid")
# switches without a row, on osp, as strong as 20 steps can show
SWITCHES = {
    "qat_w4a4": {"qat.scheme": "w4a4", "qat.start": 5},
    "qat_nvfp4": {"qat.scheme": "nvfp4", "qat.start": 5},
    "qat_mxfp4": {"qat.scheme": "mxfp4", "qat.start": 5},
    "qk_clip": {"qk_clip.tau": 0.2},
    "logit_cap": {"attention.logit_cap": 0.5},
    "v_scale": {"attention.v_scale": 0.1},
    "value_gate": {"attention.value_gate": True},
    "z_loss": {"train.z_loss": 0.03},
    "tied": {"model.tie_embeddings": True, "model.embed_proj": False},
    "derf": {"norm.name": "derf"},
}
GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-4  # relative; other vector units and BLAS versions round differently, and training amplifies it


@pytest.mark.parametrize("row", [*ROWS, *SWITCHES])
def test_losses_equal_the_golden_file(
    row: str, tiny: Callable[..., Config], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    values = _experiment("osp") | SWITCHES[row] if row in SWITCHES else _experiment(row)
    # with their own learning rate and penalty, rows differ too little after 20 steps
    values["optimizer.lr"] *= 4
    values["penalty.weight"] = 100 * values.get("penalty.weight", 0)
    overrides = [
        "train.steps=20",
        "eval.every=0",
        "checkpoint.every=0",
        "model.num_hidden_layers=4",
        *(f"{key}={json.dumps(value)}" for key, value in values.items()),
    ]
    train(tiny(*overrides))
    measured = losses(tmp_path / "run")
    file = GOLDEN / f"{row}.txt"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"{loss:.6f}\n" for loss in measured))
    golden = [float(line) for line in file.read_text().split()]
    torch.testing.assert_close(torch.tensor(measured), torch.tensor(golden), atol=0, rtol=TOLERANCE)


def test_golden_losses_differ_between_rows() -> None:
    """Otherwise the test above could not see that a row lost its norm, projection or optimizer."""
    curves = [tuple(float(x) for x in (GOLDEN / f"{row}.txt").read_text().split()) for row in [*ROWS, *SWITCHES]]
    for i, a in enumerate(curves):
        for b in curves[:i]:
            assert any(abs(x - y) > 2 * TOLERANCE * x for x, y in zip(a, b, strict=True))


def _experiment(row: str) -> dict[str, Any]:
    """Return the keys that the experiment sets, directly or through its groups and the experiment it inherits."""
    experiment = yaml.safe_load((ROOT / "configs" / "experiment" / f"{row}.yaml").read_text())
    values: dict[str, Any] = {}
    for entry in experiment.pop("defaults"):
        if isinstance(entry, dict):
            ((override, choice),) = entry.items()
            group = override.removeprefix("override /")
            values |= leaves(yaml.safe_load((ROOT / "configs" / group / f"{choice}.yaml").read_text()), group)
        elif entry != "_self_":
            values |= _experiment(entry)
    del experiment["run"]
    return values | dict(leaves(experiment))
