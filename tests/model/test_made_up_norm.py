"""A norm is one class: norms that only this file defines train, resume, are measured, and export or are refused."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from osp.config import Config, MonitorConfig
from osp.convert.export import export
from osp.errors import UserError
from osp.evaluation.language_model import open_model
from osp.evaluation.perplexity import perplexity
from osp.evaluation.texts import read_text
from osp.model.norms import NORMS, Norm
from osp.monitor.probe import ProbeText, probe
from osp.run.checkpoint import load_model
from osp.train.setup import train
from tests.conftest import losses

Tiny = Callable[..., Config]


class MaximumNorm(Norm):
    """y = g * x / (max |x| + eps), one gain per channel."""

    not_rmsnorm = "it divides by the largest channel"
    weight: nn.Parameter

    def __init__(self, hidden_size: int, *, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def normalize(self, x: Tensor) -> Tensor:
        return x / (x.abs().amax(-1, keepdim=True) + self.eps) * self.weight


class RootMeanSquare(Norm):
    """y = g * x / sqrt(mean(x^2) + eps), one gain per channel."""

    not_rmsnorm = None
    weight: nn.Parameter

    def __init__(self, hidden_size: int, *, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def normalize(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.fixture(autouse=True)
def made_up_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMS, "maximum", MaximumNorm)
    monkeypatch.setitem(NORMS, "root_mean_square", RootMeanSquare)


def test_made_up_norm_trains_resumes_and_is_measured(tiny: Tiny, tmp_path: Path) -> None:
    norm = ("norm.name=maximum", "norm.eps=1e-4", "checkpoint.every=2", "eval.every=4", "monitor.enabled=true")
    train(tiny(*norm, "train.steps=4", name="straight"))
    assert len(losses(tmp_path / "straight")) == 4
    assert losses(tmp_path / "straight")[-1] < losses(tmp_path / "straight")[0]
    model = load_model(tmp_path / "straight")
    norms = [module for module in model.modules() if isinstance(module, Norm)]
    assert len(norms) == 5
    assert all(isinstance(norm, MaximumNorm) and norm.eps == 1e-4 for norm in norms)
    assert any((norm.weight - 1).abs().max() > 1e-4 for norm in norms if norm.weight is not None), "gains are trained"

    text = read_text("held_out", open_model(tmp_path / "straight"))
    assert math.isfinite(perplexity(model, text, seq_len=32).perplexity)
    reading = probe(model, ProbeText(text.tokens[:64].view(2, 32)), MonitorConfig())
    assert reading.metrics["monitor/kurtosis/layer_01/attn_in"] == pytest.approx(
        reading.sites["layer_01/attn_in"].statistics["kurtosis"]
    )
    with pytest.raises(
        UserError, match=r"norm.name=maximum: a stock Llama has no such norm, it divides by the largest"
    ):
        export(tmp_path / "straight", tmp_path / "out")


def test_made_up_norm_resumes_bit_identically(tiny: Tiny, tmp_path: Path) -> None:
    norm = ("norm.name=maximum", "checkpoint.every=2", "eval.every=0", "eval.sample_tokens=0", "train.steps=4")
    train(tiny(*norm, name="run"))
    folder = tmp_path / "run" / "checkpoints"
    last = {name: p.clone() for name, p in load_model(folder / "step_00000004").named_parameters()}
    for path in sorted((folder / "step_00000004").iterdir()):
        path.unlink()
    (folder / "step_00000004").rmdir()
    train(tiny(*norm, name="run"))
    for name, parameter in load_model(folder / "step_00000004").named_parameters():
        assert torch.equal(parameter, last[name]), name


def test_made_up_norm_that_is_an_rmsnorm_exports(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("norm.name=root_mean_square", "train.steps=4", "eval.every=0", "eval.sample_tokens=0"))
    exported = export(tmp_path / "run", tmp_path / "out")
    assert exported.client.perplexity == pytest.approx(exported.trained.perplexity, rel=1e-4)


def test_options_of_a_made_up_norm_are_its_keywords(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"norm.lam=1.0: maximum has no such option; it has \['eps'\]"):
        train(tiny("norm.name=maximum", "norm.lam=1.0"))
