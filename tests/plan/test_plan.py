"""`python scripts/plan.py`: its page, its JSON, and its one-line errors."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.config import Config
from osp.errors import UserError
from osp.plan.config import MachineConfig, PlanConfig
from osp.plan.plan import make_plan
from osp.train.resolve import resolve
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import entry
import plan as script

Capture = pytest.CaptureFixture[str]
SMALL = ("train.steps=100", "train.seq_len=256", "train.tokens_per_step=32768", "train.compile=false")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs the script with arguments and returns its output."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        entry.run(script.main, "plan", defaults=script.DEFAULTS)
        return capsys.readouterr().out

    return run


@pytest.fixture
def error_of(typed: Callable[..., str], capsys: Capture, tmp_path: Path) -> Callable[..., str]:
    """Return a function that returns the error line of the script, and checks that no file is written."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            typed(*arguments)
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.split("\n") if line]
        assert not list(tmp_path.iterdir())
        return line

    return run


def test_page_and_json_of_osp_1b(typed: Callable[..., str], tmp_path: Path) -> None:
    page = typed("+experiment=osp_1b", "world_size=256", "out=plan.json", "machine.disk=3", "train.compile=false")
    assert re.search(r"osp_1b on 256 x NVIDIA H100 SXM, ZeRO-1, bf16, blocks eager", page)
    assert re.search(r"4,194,304 tokens in sequences of 2,048; each rank 1 \(gradient accumulation\) times 8", page)
    assert re.search(r"ZeRO-1 \(set\)  ZeRO-2  ZeRO-3", page)
    assert re.search(r"matrix \(muon\) +96  2048x2048 +1 on 96 ranks, 0 on 160 ", page)
    assert re.search(r"matmul_share=0.5 +assumed", page)
    assert re.search(r"disk=3 +the command line", page)
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["world_size"] == 256
    assert figures["checkpoint_bytes"] == pytest.approx(12.2e9, rel=0.01)  # 4 bytes x (2 x 1.22 B muon + 3 x 0.2 B)
    owners = [group["owners"] for group in figures["updates"]["groups"]]
    assert 0 <= owners[1]["layers.0.self_attn.q_proj.weight"] < 256
    matrices = [owner for group in owners[1:] for owner in group.values()]
    assert len(set(matrices)) == len(matrices) == 170, "no rank has two while another one has none"
    assert figures["step"]["total"] == pytest.approx(sum(v for k, v in figures["step"].items() if k != "total"))
    assert figures["days"] == pytest.approx(figures["step"]["total"] * 23842 / 86400)
    assert figures["fits"] == {"1": True, "2": True, "3": True}
    assert "warning" not in page


def test_plan_that_does_not_fit_names_a_remedy(typed: Callable[..., str]) -> None:
    page = typed(*SMALL, "gpu_memory=2.3", "world_size=2", "train.micro_batch_size=64")
    assert "DOES NOT FIT" in page
    (warning,) = [line for line in page.split("\n") if line.startswith("warning")]
    assert re.search(r"GiB do not fit into 2.3 GiB at ZeRO-1; try .*train.activation_checkpointing=true", warning)
    assert "train.micro_batch_size=32" in warning


def test_batch_is_divided_as_in_training(tiny: Callable[..., Config]) -> None:
    config = tiny("train.micro_batch_size=auto")
    for world_size in (1, 2, 4, 8):
        resolved = resolve(config, device=torch.device("cpu"), world_size=world_size, bf16=False)
        options = PlanConfig(world_size=world_size, machine=cpu())
        planned = make_plan(config, options)
        size = resolved.micro_batch_size
        assert (planned.config, planned.micro_batch_size) == (resolved.config, size)
        assert planned.accumulation * size == 8 // world_size


def cpu(**changes: Any) -> MachineConfig:
    return MachineConfig(**{"device": "cpu", "bf16": False, "peak_tflops": 0.1, **changes})


def test_steps_and_tokens_give_the_same_days(tiny: Callable[..., Config]) -> None:
    steps, tokens = (
        make_plan(tiny(*overrides), PlanConfig(world_size=2, machine=cpu()))
        for overrides in (["train.steps=10"], ["train.steps=null", "train.tokens=2560"])
    )
    assert tokens.days == steps.days == pytest.approx(10 * steps.step["total"] / 86400)


def test_activation_checkpointing_costs_a_forward_pass(tiny: Callable[..., Config]) -> None:
    plain, again = (
        make_plan(tiny(f"train.activation_checkpointing={way}"), PlanConfig(world_size=2, machine=cpu()))
        for way in ("false", "true")
    )
    assert again.step["passes"] == pytest.approx(plain.step["passes"] * 4 / 3)
    assert again.mfu < plain.mfu, "repeated flops do not count"


def test_gpu_without_a_known_peak_is_refused(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"machine.peak_tflops is not set and 'Abacus' is no GPU of the table"):
        make_plan(tiny(), PlanConfig(world_size=2, machine=cpu(name="Abacus", peak_tflops=None)))


MISTAKES = [
    ("world_size=0", r"error: world_size=0: must be at least 1"),
    ("world_size=abc", r"error: world_size='abc': must be an integer"),
    ("world_size=100000", r"error: world_size=100000: must be at most 4096"),
    ("wrold_size=8", r"error: unknown key 'wrold_size'; did you mean 'world_size'\?"),
    ("machine.disc=1", r"error: unknown key 'machine.disc'; did you mean 'machine.disk'\?"),
    ("machine=b300", r"error: Could not find 'machine/b300' Available options in 'machine': .*h100"),
    ("machine.matmul_share=0", r"error: machine.matmul_share=0: must be above 0"),
    ("gpu_memory=-1", r"error: gpu_memory=-1: must be above 0"),
    ("train.step=3", r"error: unknown key 'train.step'; did you mean 'train.steps'\?"),
    ("+experiment=osp_2b", r"error: Could not find 'experiment/osp_2b' Available options .* osp_1b"),
    (
        "+experiment=osp_1b world_size=48",
        r"error: train.tokens_per_step=4194304 is 2048 sequences .* 48 ranks do not divide; .*tokens_per_step=4227072",
    ),
    ("train.tokens_per_step=4095", r"error: train.tokens_per_step=4095 is not a multiple of train.seq_len=256"),
    (
        "world_size=2 train.micro_batch_size=3",
        r"error: train.micro_batch_size=3 does not divide the 8 sequences that each of 2 ranks",
    ),
    ("world_size=2 out=missing/plan.json", r"error: out=missing/plan.json: cannot write there: No such file"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistake_is_reported_in_one_line(arguments: str, message: str, error_of: Callable[..., str]) -> None:
    assert re.match(message, error_of(*arguments.split()))


def test_nothing_is_started(typed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group, no data, no memory for a model."""
    monkeypatch.setattr("osp.distributed.init_distributed", lambda *_, **__: pytest.fail("a process group"))
    monkeypatch.setattr("osp.model.transformer.Transformer.init_weights", lambda *_: pytest.fail("weights"))
    monkeypatch.setattr("osp.train.setup.start_preparing", lambda *_, **__: pytest.fail("data"))
    assert "expected" in typed(*SMALL, "world_size=4")
