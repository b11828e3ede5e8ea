"""A new update rule needs one class and one entry in `RULES`: sign descent with momentum, defined only here."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from osp.config import Config, OptimizerConfig
from osp.errors import UserError
from osp.optim.rules import RULES, ElementwiseRule
from osp.optim.zero import Piece
from osp.plan.config import MachineConfig, PlanConfig
from osp.plan.plan import make_plan
from osp.run.checkpoint import Checkpoint, find
from osp.train.setup import train
from tests.conftest import read_metrics
from tests.distributed import run_distributed
from tests.optim import workers
from tests.optim.reference import Model, batch, factor

Tiny = Callable[..., Config]
ROLES = ("matrix", "gain")  # parameters of many shapes, which one flat tensor holds together


class SignDescent(ElementwiseRule):
    """buf = g + momentum buf;  p -= lr (sign(buf) + decay p)"""

    STATE_NAMES = ("direction",)
    UPDATE_RMS = "1"

    def step(self, piece: Piece, grad: Tensor, *, number: int, record: bool) -> Tensor | None:
        group = piece.group
        update = piece.state["direction"].mul_(self.config.momentum).add_(grad).sign()
        piece.flat.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return update.square().sum() * group["lr"] ** 2 if record else None


@pytest.fixture
def tiny_signs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Return a function that returns the small configuration with the made-up rule for matrices and gains."""
    monkeypatch.setitem(RULES, "signs", SignDescent)
    rules = [f"optimizer.rules.{role}=signs" for role in ROLES] + ["optimizer.rules.embed_proj=muon"]
    rest = ["optimizer.rules.embedding=adamw", "optimizer.rules.head=adamw", "optimizer.lr=0.002"]
    return lambda *overrides, name: tiny(*rules, *rest, *overrides, name=name)


def state_of(folder: Path) -> dict[str, Tensor]:
    path = find(folder)
    assert path is not None
    checkpoint = Checkpoint(path)
    return {
        f"{kind}/{name}": checkpoint.read(kind, name, 0, math.prod(shape))
        for name, shape in checkpoint.shapes.items()
        for kind in checkpoint.kinds(name)
    }


def test_made_up_rule_trains_and_resumes_bit_identically(tiny_signs: Tiny, tmp_path: Path) -> None:
    train(tiny_signs(name="straight"))
    for overrides in (("train.stop_at=4",), ()):
        train(tiny_signs(*overrides, name="resumed"))
    straight, resumed = state_of(tmp_path / "straight"), state_of(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    assert {key.split("/")[0] for key in straight} == {"weight", "direction", "momentum", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    events = [event for event in read_metrics(tmp_path / "straight") if "train/loss" in event]
    assert events[-1]["train/loss"] < events[0]["train/loss"] - 0.1
    for event in events:
        assert event["train/update_rms/matrix"] == pytest.approx(event["train/lr/matrix"], rel=1e-3)


def test_plan_counts_the_state_and_the_workspace_of_a_made_up_rule(tiny_signs: Tiny) -> None:
    config = tiny_signs(name="plan")
    options = PlanConfig(world_size=1, machine=MachineConfig(device="cpu", bf16=False, peak_tflops=1.0))
    plan = make_plan(config, options)
    assert {group.rule for group in plan.updates.groups} == {"muon"}, "an elementwise rule exchanges nothing"
    total, adam = plan.parameters["total"], 2 * config.model.vocab_size * config.model.hidden_size
    assert plan.stages[1]["optimizer_state"] == pytest.approx(4 * (total + adam), rel=0.001), "AdamW has two states"
    rules = dict.fromkeys(config.optimizer.rules, "signs")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, rules=rules))
    memory = make_plan(config, options).stages[1]
    assert memory["optimizer_state"] == pytest.approx(4 * total, rel=0.001)
    blocks = total - adam - 2 * config.model.hidden_size**2  # without the two EmbProj matrices
    assert memory["update"] == pytest.approx(4 * (total + blocks), rel=0.01), "gradients, and a temporary of a group"


def weights_of_rank() -> dict[str, Tensor]:
    """Return the weights of `tests.optim.reference.Model` after training with the made-up rule, cut at any element."""
    RULES["signs"] = SignDescent
    rules = workers.CONFIG.rules | dict.fromkeys(ROLES, "signs")
    config = dataclasses.replace(workers.CONFIG, rules=rules)
    engine = workers.build(1, 1, clip=0.0, config=config)
    workers.run_steps(engine, range(workers.STEPS))
    engine.close()
    return workers.weights(engine)


def test_made_up_rule_on_two_ranks_equals_one_process() -> None:
    model = Model()
    named = {name: p for name, p in model.named_parameters() if model.parameter_roles()[name] in ROLES}
    others = {name: p for name, p in model.named_parameters() if name not in named}
    adamw = torch.optim.AdamW(others.values(), lr=workers.ADAM_LR, betas=(0.9, 0.95), weight_decay=workers.DECAY)
    buffers = {name: torch.zeros_like(p) for name, p in named.items()}
    for step in range(workers.STEPS):
        ids, count = batch(step)
        model.zero_grad()
        (model(ids) / count).backward()
        adamw.param_groups[0]["lr"] = workers.ADAM_LR * factor(step)
        adamw.step()
        lr = workers.LR * factor(step)
        with torch.no_grad():
            for name, p in named.items():
                assert p.grad is not None
                buffers[name] = p.grad + 0.95 * buffers[name]
                p -= lr * (buffers[name].sign() + workers.DECAY * p)
    for weights in run_distributed(weights_of_rank, 2):
        for name, p in model.named_parameters():
            torch.testing.assert_close(weights[name], p.detach(), atol=1e-5, rtol=1e-4)


def test_unregistered_rule_is_refused_in_one_line(tiny: Tiny) -> None:
    config = dataclasses.replace(tiny(), optimizer=OptimizerConfig(rules={"matrix": "signs"}))
    with pytest.raises(UserError, match=r"^optimizer.rules.\w+='?\w+'?: unknown rule; choose from adamw, muon, norm"):
        train(config)
