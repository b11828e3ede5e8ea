"""Planned bytes against the tensors of a running engine, and counted tensors against sums by hand."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import nn

import osp.model.loss as loss_module
from osp.config import Config, OptimizerConfig
from osp.model.transformer import Transformer, meta_model
from osp.model_config import AttentionConfig, Heads, ModelConfig
from osp.optim.groups import build_groups
from osp.optim.optimizer import PartitionedOptimizer
from osp.plan.config import MachineConfig, PlanConfig
from osp.plan.memory import activation_bytes, kept, peak, round_bytes
from osp.plan.plan import Plan, make_plan
from tests.distributed import run_distributed
from tests.optim.reference import OneRole
from tests.plan import workers

# nano with fewer layers and tokens: 256 x 256 matrices, whose count 2 and 3 ranks do not always divide
MODEL = ModelConfig(vocab_size=1024, num_hidden_layers=3, embed_proj=True)
MACHINE = MachineConfig(device="cpu", bf16=False, peak_tflops=1.0, memory=1.0, reserved=0.0)


def config(stage: int, **train: Any) -> Config:
    base = Config(model=MODEL)
    settings = {"steps": 10, "seq_len": 8, "tokens_per_step": 96, "micro_batch_size": 2, "precision": "fp32", **train}
    engine = dataclasses.replace(base.engine, zero_stage=cast(Literal[1, 2, 3], stage), device="cpu")
    return dataclasses.replace(base, engine=engine, train=dataclasses.replace(base.train, compile=False, **settings))


def planned(stage: int, world_size: int, **train: Any) -> Plan:
    return make_plan(config(stage, **train), PlanConfig(world_size=world_size, machine=MACHINE))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_planned_bytes_equal_a_running_engine(world_size: int, tmp_path: Path) -> None:
    """96 tokens are 12 sequences: several micro batches of 2 on every rank."""
    configs = [config(stage) for stage in (1, 2, 3)]
    ranks = run_distributed(workers.held, world_size, configs, tmp_path)
    for index, stage in enumerate((1, 2, 3)):
        plan = planned(stage, world_size)
        memory, measured = plan.stages[stage], [rank[index] for rank in ranks]
        most = {part: max(rank[part] for rank in measured) for part in measured[0]}
        assert most["weights"] == memory["weights"], stage
        assert most["optimizer_state"] == memory["optimizer_state"], stage
        assert most["reduced_gradients"] == pytest.approx(memory["reduced_gradients"], abs=1000), stage
        # at stage 2 the plan also counts the gradients of one micro batch while they are added
        accumulated = memory["gradients"] // (2 if stage == 2 else 1)
        assert most["accumulated"] == pytest.approx(accumulated, abs=1000), stage
        assert [rank["exchange"] for rank in measured] == plan.updates.bytes_sent, stage
        if world_size > 1:
            check_traffic(plan, stage, measured[0], others=(world_size - 1) / world_size)
        assert measured[0]["checkpoint"] == pytest.approx(plan.checkpoint_bytes, rel=0.01)


def check_traffic(plan: Plan, stage: int, measured: dict[str, int], *, others: float) -> None:
    """Compare the planned traffic with the bytes of DeepSpeed's collectives, each of which it sends once."""
    little = 20_000  # norms, flags, padding
    assert measured["allreduce"] < little
    reduced = measured["reduce_scatter"] if stage == 3 else measured["reduce"]
    assert reduced * others == pytest.approx(plan.traffic["gradients"], abs=little), stage
    gathered = measured["allgather"] * others
    if stage < 3:
        assert gathered == pytest.approx(plan.traffic["weights"], abs=little), stage
    else:
        assert 0 < gathered <= plan.traffic["weights"] + little


def test_planned_workspace_of_an_update_equals_its_allocations() -> None:
    """Every tensor of `PartitionedOptimizer.step` on one rank is counted as it is created and freed."""
    settings = OptimizerConfig(ns_dtype="bf16", per_head=True)
    splits = (None, Heads(2, dim=0), Heads(4, dim=0), Heads(4, dim=1), Heads(8, dim=1))
    for shape, heads in itertools.product(((64, 64), (32, 96), (96, 32)), splits):
        parameters = {str(i): nn.Parameter(torch.randn(shape)) for i in range(5)}
        heads_of = {} if heads is None else dict.fromkeys(parameters, heads)
        groups = build_groups(OneRole(parameters, heads=heads_of), settings)
        optimizer = PartitionedOptimizer(groups)
        values = torch.cat([p.detach().flatten() for p in parameters.values()])
        values.grad = torch.randn_like(values)
        optimizer.param_groups[0]["params"] = [values]
        optimizer.bind([values], stage=1)
        optimizer.set_step(1, 1.0)
        planned_bytes = max(round_bytes(groups, work, native_bf16=True) for work in optimizer.rounds)
        assert peak(optimizer.step) == pytest.approx(planned_bytes, rel=0.02), (shape, heads)


def test_kept_counts_each_storage_once_and_no_parameter() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(16, 8, requires_grad=True)
    parameters = list(layer.parameters())
    assert kept(lambda: layer(x), besides=parameters)[1] == 16 * 8 * 4  # the input, for the gradient of the weight
    assert kept(lambda: x * x, besides=parameters)[1] == 16 * 8 * 4
    assert kept(lambda: x.exp().view(8, 16).exp(), besides=parameters)[1] == 2 * 16 * 8 * 4  # both results


def test_peak_counts_tensors_that_are_alive_together() -> None:
    def run() -> None:
        a = torch.zeros(100)
        a = a + torch.ones(100)  # three tensors at a time
        torch.zeros(50)

    assert peak(run) == 1200


def model_of(settings: Config) -> Transformer:
    model = meta_model(settings.model)
    model.compute_dtype = torch.float32 if settings.train.precision == "fp32" else torch.bfloat16
    if isinstance(chunk := settings.train.loss_chunk_tokens, int):
        model.lm_head.chunk_tokens = chunk
    return model


def planned_activations(settings: Config, *, compiled: bool = False) -> tuple[int, int]:
    return activation_bytes(settings, model_of(settings), micro_batch_size=4, compiled=compiled)


def kept_by(settings: Config, *, compiled: bool = False) -> int:
    return planned_activations(settings, compiled=compiled)[0]


def test_planned_activations_equal_a_real_forward_pass() -> None:
    """The planned bytes against the same hooks on a real forward pass, with the CPU's own attention."""
    from osp.model.transformer import build_model

    settings = config(1, seq_len=64)
    model, ids = build_model(MODEL, seed=0), torch.zeros(4, 64, dtype=torch.long)
    real = kept(lambda: model.hidden_states(ids)[0], besides=list(model.parameters()))[1]
    assert kept_by(settings) == pytest.approx(real, rel=0.01)


def test_activations_grow_with_tokens_and_shrink_with_checkpointing_and_compilation() -> None:
    plain, twice = kept_by(config(1, seq_len=256)), kept_by(config(1, seq_len=512))
    assert twice == pytest.approx(2 * plain, rel=0.02)
    checkpointed = kept_by(config(1, seq_len=256, activation_checkpointing=True))
    inputs = 3 * 4 * 256 * 256 * 4  # of 3 blocks, fp32
    assert plain / 3 < checkpointed - inputs < plain / 2, "one block and the embedding"
    half = kept_by(config(1, seq_len=256, precision="bf16"))
    assert half < plain
    assert kept_by(config(1, seq_len=256, precision="bf16"), compiled=True) < half


def test_logits_of_a_chunk_bound_the_working_set() -> None:
    """The working set: fp32 logits of a chunk, their probabilities, one block here, and gradients of weights."""
    small, large = (planned_activations(config(1, seq_len=256, loss_chunk_tokens=n))[1] for n in (64, 512))
    assert small < large
    vocab = 1024
    assert large == pytest.approx(4 * vocab * (3 * 512 + 256), rel=0.5)


def test_probabilities_of_a_block_only_are_in_the_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the logits, probabilities of all 1024 tokens are the largest, and without them a (1024, 256) product."""
    settings = config(1, seq_len=256, loss_chunk_tokens=1024)
    whole = planned_activations(settings)[1]
    monkeypatch.setattr(loss_module, "GPU_BLOCK", 4 * 1024 * 8)  # bytes of 8 tokens
    assert whole - planned_activations(settings)[1] == pytest.approx(4 * 1024 * (1024 - 256), rel=0.05)


def test_logits_of_a_block_of_capped_attention_are_in_the_working_set() -> None:
    """Two heads of a block of queries, a sixteenth of the sequence: logits, tanh, mask, probabilities, gradients.

    Flex attention has the cap in its kernel.
    """
    shape = ModelConfig(64, 16, 16, num_hidden_layers=1, num_attention_heads=2)
    length, found = 1024, []
    for cap, attention in ((None, "flash"), (50.0, "flash"), (50.0, "flex")):
        model = dataclasses.replace(shape, attention=AttentionConfig(logit_cap=cap))
        settings = config(1, seq_len=length, loss_chunk_tokens=8, attention=attention)
        changed = dataclasses.replace(settings, model=model)
        found.append(activation_bytes(changed, model_of(changed), micro_batch_size=1, compiled=False))
    (kept_without, working_without), (kept_with, working_with), by_flex = found
    assert by_flex == found[0]
    assert kept_with == kept_without
    assert 3 < (working_with - working_without) / (4 * 2 * length**2 / 16) < 8


def test_flex_attention_keeps_no_mask_and_a_dense_mask_is_kept_by_every_block() -> None:
    """Documents leave the plan as it is with flex attention. Else 3 blocks of 4 sequences keep a bias each, 4 bytes."""
    length = 512
    settings = {"seq_len": length, "loss_chunk_tokens": 64}
    plain = planned_activations(config(1, **settings))
    assert planned_activations(config(1, **settings, document_mask=True, attention="flex")) == plain
    dense = kept_by(config(1, **settings, document_mask=True, attention="flash"))
    biases = 3 * 4 * length**2 * 4
    assert dense - plain[0] == pytest.approx(biases, rel=0.001)


def test_zero_stages_partition_more_and_more() -> None:
    stages = planned(1, 3).stages
    numel = sum(p.numel() for p in meta_model(config(1).model).parameters())
    assert stages[1]["weights"] == pytest.approx(4 * numel, rel=1e-3)
    assert stages[1]["gradients"] == 4 * numel
    assert stages[3]["gradients"] == pytest.approx(4 * numel / 3, rel=1e-3)
    assert stages[3]["gathered_weights"] == 4 * numel
    assert len({memory["optimizer_state"] for memory in stages.values()}) <= 2
    assert stages[2]["reduced_gradients"] == stages[1]["reduced_gradients"] < stages[1]["gradients"]
