"""A configuration and a machine give one `Resolved`: every choice is made there, and nowhere else."""

import ast
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from osp.config import Config, from_dict, to_dict
from osp.errors import UserError
from osp.run.folder import RunLock
from osp.train.resolve import resolve
from tests.conftest import ROOT

Tiny = Callable[..., Config]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AUTO = ("train.precision=auto", "train.compile=auto", "train.micro_batch_size=auto")


def test_resolved_configuration_holds_no_auto_and_resolves_to_itself(tiny: Tiny) -> None:
    resolved = resolve(tiny(*AUTO, "train.steps=null", "train.tokens=600"), device=CPU, world_size=2, bf16=True)
    chosen = resolved.config.train
    assert (chosen.precision, chosen.compile, chosen.micro_batch_size) == ("bf16", False, 4)
    assert (chosen.steps, chosen.tokens) == (3, None)
    assert resolve(resolved.config, device=CPU, world_size=2, bf16=False) == resolved
    assert from_dict(to_dict(resolved.config)) == resolved.config


def test_fields_agree_with_the_configuration(tiny: Tiny) -> None:
    resolved = resolve(tiny(*AUTO), device=CUDA, world_size=2, bf16=True)
    assert (resolved.compiled, resolved.config.train.compile) == (True, True)
    assert resolved.compute_dtype == torch.bfloat16
    assert resolved.micro_batch_size == resolved.config.train.micro_batch_size
    assert resolved.micro_batch_size * resolved.gradient_accumulation_steps * 2 == 256 // 32
    assert resolved.total_steps == resolved.config.train.steps == 6


@pytest.mark.parametrize(("stage", "compiled"), [(1, True), (2, True), (3, False)])
def test_compile_is_automatic_below_zero_3(stage: int, compiled: bool, tiny: Tiny) -> None:
    config = tiny("train.compile=auto", f"engine.zero_stage={stage}")
    assert resolve(config, device=CUDA, world_size=1, bf16=True).compiled == compiled
    assert not resolve(config, device=CPU, world_size=1).compiled


@pytest.mark.parametrize(
    ("override", "world_size", "message"),
    [
        ("train.tokens_per_step=256", 3, r"8 sequences of train.seq_len=32, which 3 ranks do not divide; .*_step=288"),
        (
            "train.micro_batch_size=3",
            2,
            r"train.micro_batch_size=3 does not divide the 4 sequences that each of 2 ranks",
        ),
        ("engine.zero_stage=3", 1, r"train.compile=true does not work with engine.zero_stage=3"),
    ],
)
def test_impossible_choice_is_refused(override: str, world_size: int, message: str, tiny: Tiny) -> None:
    compile_ = "train.compile=true" if "zero" in override else "train.compile=false"
    with pytest.raises(UserError, match=message):
        resolve(tiny(override, compile_), device=CPU, world_size=world_size)


def test_resolved_is_frozen_and_no_other_file_rewrites_a_configuration(tiny: Tiny) -> None:
    resolved = resolve(tiny(), device=CPU, world_size=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.total_steps = 1  # pyright: ignore[reportAttributeAccessIssue]
    calls = [
        path.name
        for path in sorted((ROOT / "osp" / "train").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "dataclasses.replace"
    ]
    assert set(calls) == {"resolve.py"}


def test_lock_on_other_ranks_is_only_its_token(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    received = pickle.loads(pickle.dumps(lock))
    assert received.token == lock.token
    received.release()
    with pytest.raises(UserError, match="another training"):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()
