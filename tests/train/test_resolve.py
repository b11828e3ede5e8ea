"""A configuration and a machine give one `Resolved`: every choice is made there, and nowhere else."""

import ast
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from osp.config import Config, from_dict, to_dict
from osp.device import prepare_attention
from osp.errors import UserError
from osp.run.folder import RunLock
from osp.train.resolve import resolve
from tests.conftest import ROOT

Tiny = Callable[..., Config]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AUTO = ("train.precision=auto", "train.compile=auto", "train.micro_batch_size=auto", "train.loss_chunk_tokens=auto")


def test_resolved_configuration_holds_no_auto_and_resolves_to_itself(tiny: Tiny) -> None:
    resolved = resolve(tiny(*AUTO, "train.steps=null", "train.tokens=600"), device=CPU, world_size=2, bf16=True)
    chosen = resolved.config.train
    assert (chosen.precision, chosen.compile, chosen.micro_batch_size) == ("bf16", False, 4)
    assert (chosen.attention, chosen.loss_chunk_tokens) == ("sdpa", 8192)
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


@pytest.mark.parametrize(
    ("vocab_size", "precision", "chunk"),
    [
        (49_152, "bf16", 4096),  # 384 MiB of logits; 8192 would take 768
        (32_768, "bf16", 8192),  # 512 MiB
        (32_769, "fp8", 4096),
        (49_152, "fp32", 2048),
        (500_000, "bf16", 1024),  # 977 MiB: no less
    ],
)
def test_chunk_of_the_loss_fits_512_mib_on_a_gpu(vocab_size: int, precision: str, chunk: int, tiny: Tiny) -> None:
    options = (f"train.precision={precision}", f"model.vocab_size={vocab_size}", "train.loss_chunk_tokens=auto")
    resolved = resolve(tiny(*options), device=CUDA, world_size=1, bf16=True)
    assert resolved.loss_chunk_tokens == resolved.config.train.loss_chunk_tokens == chunk
    assert resolve(tiny(*options), device=CPU, world_size=1).loss_chunk_tokens == 8192


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_given_chunk_of_the_loss_is_kept(device: torch.device, tiny: Tiny) -> None:
    assert resolve(tiny("train.loss_chunk_tokens=77"), device=device, world_size=1, bf16=True).loss_chunk_tokens == 77


@pytest.mark.parametrize(("stage", "compiled"), [(1, True), (2, True), (3, False)])
def test_compile_is_automatic_below_zero_3(stage: int, compiled: bool, tiny: Tiny) -> None:
    config = tiny("train.compile=auto", f"engine.zero_stage={stage}")
    assert resolve(config, device=CUDA, world_size=1, bf16=True).compiled == compiled
    assert not resolve(config, device=CPU, world_size=1).compiled


GPU = {"A100": (8, 0), "L40S": (8, 9), "H200": (9, 0), "B200": (10, 0), "B300": (10, 3), "RTX PRO 6000": (12, 0)}


def machine(monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int], cudnn: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)


@pytest.mark.parametrize(
    ("name", "cudnn", "expected"),
    [
        *((name, 91501, "cudnn" if name in ("H200", "B200", "B300") else "flash") for name in GPU),
        ("H200", 92000, "cudnn"),
        ("H200", 91500, "flash"),  # wrong at some lengths
        ("H200", None, "flash"),
    ],
)
def test_attention_on_a_gpu_is_cudnn_where_torch_itself_prefers_it(
    name: str, cudnn: int | None, expected: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Document masks go through flex attention, whose kernel needs heads of 16 channels; without a GPU it is sdpa."""
    machine(monkeypatch, capability=GPU[name], cudnn=cudnn)

    def choice(*overrides: str, device: torch.device = CUDA) -> str:
        resolved = resolve(tiny(*overrides), device=device, world_size=1)
        again = resolve(resolved.config, device=device, world_size=1)
        assert again.config == resolved.config
        return resolved.config.train.attention

    assert choice() == expected
    assert choice("train.deterministic=true") == "flash"
    assert choice("train.document_mask=true", "model.num_attention_heads=2") == "flex"
    assert choice("train.document_mask=true") == "flash"  # 4 heads of 8 channels
    for asked in ("sdpa", "flash", "cudnn", "fa3"):
        assert choice(f"train.attention={asked}") == asked
    assert {choice(mask, device=CPU) for mask in ("train.document_mask=true", "train.document_mask=false")} == {"sdpa"}


@pytest.mark.parametrize(
    ("overrides", "device", "message"),
    [
        *(
            ((f"train.attention={choice}",), CPU, f"train.attention={choice} trains on a GPU only; .*=auto")
            for choice in ("flash", "cudnn", "flex", "fa3")
        ),
        *(
            ((f"train.attention={choice}", "train.document_mask=true"), CUDA, f"={choice} takes no train.document_mask")
            for choice in ("sdpa", "cudnn", "fa3")
        ),
        (("train.attention=cudnn", "train.deterministic=true"), CUDA, "=cudnn sums in any order, .*=true; set flash"),
        (("train.attention=flex",), CUDA, "train.attention=flex: heads of 8 channels; it needs 16. Set flash"),
    ],
)
def test_attention_that_cannot_run_is_refused(
    overrides: tuple[str, ...], device: torch.device, message: str, tiny: Tiny
) -> None:
    with pytest.raises(UserError, match=message):
        resolve(tiny(*overrides), device=device, world_size=1, bf16=True)


def test_attention_that_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, capability=(8, 0), cudnn=91500)
    with pytest.raises(UserError, match=r"^train.attention=cudnn needs cuDNN 9.15.1 or later; set train.attention=fl"):
        prepare_attention("cudnn", CUDA)
    with pytest.raises(UserError, match=r"^train.attention=fa3 needs a GPU of compute capability 9; set train.att"):
        prepare_attention("fa3", CUDA)
    machine(monkeypatch, capability=(9, 0), cudnn=91501)
    prepare_attention("cudnn", CUDA)
    with pytest.raises(UserError, match=r"^train.attention=fa3: No module named 'flash_attn_interface'; set train.att"):
        prepare_attention("fa3", CUDA)
    switched: list[str] = []
    monkeypatch.setattr("osp.device.activate_flash_attention_impl", switched.append)
    for choice in ("sdpa", "flash", "cudnn", "flex", "fa3"):
        prepare_attention(choice, CUDA)
    assert switched == ["FA3"]


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
