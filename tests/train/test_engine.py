"""ZeRO 1, 2, 3 x ranks x accumulation against the plain loop of `tests.optim.reference`."""

import dataclasses
import functools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.distributed import init_distributed
from osp.errors import UserError
from osp.model.transformer import build_model
from tests.distributed import run_distributed, server
from tests.optim import workers
from tests.optim.reference import ROWS, Model, train

GRID = [(stage, accumulation) for stage in (1, 2, 3) for accumulation in (1, 4)]
SETTINGS: dict[str, Any] = {"lr": workers.LR, "adam_lr": workers.ADAM_LR, "decay": workers.DECAY}


@functools.cache
def results(world_size: int) -> list[dict[str, Any]]:
    return run_distributed(workers.everything, world_size, world_size, GRID, world_size != 2)


@pytest.fixture(scope="module", params=[1, 2, 4])
def trained(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return what each rank measures in trainings on every stage."""
    return results(request.param)


@pytest.fixture(scope="module", params=[1, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return what each rank measures in all checks, on the fewest and the most ranks."""
    return results(request.param)


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], list[float]]:
    return train(steps=workers.STEPS, clip=workers.CLIP, **SETTINGS)


def update_error(weights: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Per parameter |update - reference update| / |reference update|, from the common start."""
    start = dict(Model().named_parameters())
    assert weights.keys() == reference.keys()
    return {n: float((weights[n] - w).norm() / (w - start[n].detach()).norm()) for n, w in reference.items()}


def test_training_equals_single_process_reference(trained, reference) -> None:
    weights, norms = reference
    assert min(norms) > 2 * workers.CLIP, "clipping must be active for the test to mean anything"
    for result in trained:
        for setting, run in result["train"].items():
            errors = update_error(run["weights"], weights)
            assert max(errors.values()) < 1e-4, (setting, errors)
            assert run["norms"] == pytest.approx(norms, rel=1e-4), setting


def test_per_head_equals_reference_on_matrices_split_into_heads(ranks, reference) -> None:
    """Heads as rows (square and wide matrices) and as columns, on every stage, also where ranks hold parts.

    In the same runs gains do not decay.
    """
    weights, _ = train(steps=workers.STEPS, clip=workers.CLIP, per_head=True, gain_decay=0.0, **SETTINGS)
    cut, roles = Model().parameter_heads(), Model().parameter_roles()
    different = update_error(weights, reference[0])
    assert min(different[name] for name in cut) > 0.1, "the reference must be another one"
    assert min(error for name, error in different.items() if roles[name] == "gain") > 0.01
    for result in ranks:
        for stage, measured in result["per head"].items():
            errors = update_error(measured, weights)
            assert max(errors.values()) < 1e-4, (stage, errors)


def test_gradient_of_penalty_equals_single_process(ranks) -> None:
    """On every stage, over ranks, micro batches and checkpointed blocks; the penalty contributes to it."""
    ids, norms = workers.PENALIZED_IDS, {}
    for weight in (0.0, workers.PENALTY.weight):
        model = build_model(workers.PENALIZED, seed=0)
        model.set_penalty(workers.PENALTY)
        loss, _, penalty, *_ = model(ids[:, :-1], ids[:, 1:])
        ((loss + weight * penalty) / ids[:, 1:].numel()).backward()
        norms[weight] = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    without, expected = norms.values()
    assert expected["layers.0.mlp.up_proj.weight"] > 1.1 * without["layers.0.mlp.up_proj.weight"]
    for result in ranks:
        for stage, measured in result["penalized"].items():
            assert measured == pytest.approx(expected, rel=1e-4, abs=1e-6), stage


def train_untied() -> dict[str, Tensor]:
    """Return the weights of an untied model whose two matrices take the sum of their gradients, by AdamW of torch."""
    ids, config = workers.PENALIZED_IDS, workers.TIED_OPTIMIZER
    model = build_model(dataclasses.replace(workers.TIED, tie_embeddings=False), seed=0)
    ends = model.embed_tokens.weight, model.lm_head.weight
    ends[1].data.copy_(ends[0].data)
    rates: dict[str, Any] = {"lr": workers.ADAM_LR, "weight_decay": config.weight_decay, "eps": config.adam_eps}
    optimizer = torch.optim.AdamW(model.parameters(), betas=config.adam_betas, **rates)
    for _ in range(workers.STEPS):
        logits = model(ids[:, :-1]).logits.flatten(0, 1)
        squares = logits.logsumexp(-1).square().mean()
        (torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()) + workers.Z_LOSS * squares).backward()
        total = torch.stack([weight.grad for weight in ends if weight.grad is not None]).sum(0)
        for weight in ends:
            weight.grad = total
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(*ends)
    return {name: p.detach() for name, p in model.named_parameters() if p is not ends[1]}


def test_tied_training_with_z_loss_equals_an_untied_one_with_the_sum_of_the_gradients(ranks) -> None:
    """On every stage, over ranks, micro batches and checkpointed blocks."""
    expected, start = train_untied(), dict(build_model(workers.TIED, seed=0).named_parameters())
    for result in ranks:
        for stage, measured in result["tied"].items():
            assert measured.keys() == expected.keys()
            for name, weight in expected.items():
                error = (measured[name] - weight).norm() / (weight - start[name].detach()).norm()
                assert error < 1e-3, (stage, name, error)


def logits_by_head(weights: dict[str, Tensor]) -> Tensor:
    """Return the logits (L, B, H, T, T) of a model in float64 on all sequences, -inf where a query sees no key."""
    model, seen = build_model(workers.CLIPPED, seed=0).double(), list[Tensor]()
    model.load_state_dict(weights)
    model.compute_dtype = torch.float64
    for layer in model.layers:
        attend = layer.get_submodule("self_attn.attend")
        attend.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:2]))
    with torch.no_grad():
        model(workers.PENALIZED_IDS[:, :-1])
    logits = [
        torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(3, 2)) / 2
        for q, k in zip(seen[::2], seen[1::2], strict=True)
    ]
    length = logits[0].shape[-1]
    return torch.stack(logits).masked_fill(torch.ones(length, length).triu(1) == 1, -math.inf)


def test_qk_clip_scales_the_logits_of_every_head_by_its_own_factor(ranks) -> None:
    """In groups of three heads that share a key, of which some need no clip. On every stage, over ranks, micro batches
    and checkpointed blocks: the largest logits of the whole batch are tau afterwards, and the others as before."""
    start = {name: p.detach() for name, p in workers.clipped_model().named_parameters()}
    before = logits_by_head(start)
    largest = before.amax((1, 3, 4))  # (L, H)
    gamma = (workers.TAU / largest).clamp(max=1)
    in_groups = (gamma < 1).unflatten(1, (2, 3)).sum(-1)
    assert ((in_groups > 0) & (in_groups < 3)).any(), "some heads of a group must be clipped, and some not"
    for result in ranks:
        for stage, ((metrics, weights), (metrics_of_next, next_weights)) in result["qk clip"].items():
            assert metrics["train/qk_clip_heads"] == (gamma < 1).sum(), stage
            assert metrics["train/attn_logit_max"] == pytest.approx(largest.max().item(), rel=1e-5)
            first = logits_by_head(weights)[0]
            torch.testing.assert_close(first, gamma[0, None, :, None, None] * before[0], rtol=1e-5, atol=1e-5)
            keys = gamma.unflatten(1, (2, 3)).amin(-1).sqrt()
            factors = {"q_proj": (gamma / keys.repeat_interleave(3, 1)), "k_proj": keys}
            for name, weight in weights.items():
                expected = start[name]
                if (part := name.split(".")[-2]) in factors:
                    rows = factors[part][int(name.split(".")[1])].float().repeat_interleave(4)
                    expected = rows.reshape(-1, *[1] * (weight.ndim - 1)) * expected
                torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0, msg=f"{stage} {name}")
            again = logits_by_head(weights)[1].amax((0, 2, 3))  # of layer 1, whose input has changed
            assert metrics_of_next["train/attn_logit_max"] == pytest.approx(max(again.max().item(), workers.TAU), 1e-5)
            assert logits_by_head(next_weights)[1].max().item() <= workers.TAU * (1 + 1e-5)


def test_grad_clip_zero_means_off(ranks) -> None:
    weights, norms = train(steps=workers.STEPS, clip=0.0, **SETTINGS)
    for result in ranks:
        for stage, run in result["unclipped"].items():
            errors = update_error(run["weights"], weights)
            assert max(errors.values()) < 1e-4, (stage, errors)
            assert run["norms"] == pytest.approx(norms, rel=1e-4), stage


def test_bhyt_constants_are_equal_on_every_rank_world_size_and_stage(ranks) -> None:
    config = dataclasses.replace(workers.BHYT, vocab_size=32, intermediate_size=24, num_hidden_layers=2)
    constants = [float(b) for name, b in build_model(config, seed=0).named_buffers() if name.endswith("attention_gain")]
    assert len(constants) == 2
    assert min(constants) > 0
    for result in ranks:
        assert result["bhyt"] == {1: constants, 3: constants}


def assemble(ranks: list[dict[str, Any]], setting: tuple[int, int], key: str) -> dict[str, Tensor]:
    """Return the tensor `key` of every parameter from the intervals of all ranks, without overlap or gap."""
    result = {name: torch.full((p.numel(),), torch.nan) for name, p in Model().named_parameters()}
    for rank in ranks:
        for name, start, stop, tensors in rank["train"][setting]["state"]:
            if key in tensors:
                assert tensors[key].shape == (stop - start,)
                assert tensors[key].dtype == torch.float32
                assert result[name][start:stop].isnan().all(), f"{name}[{start}:{stop}] is on two ranks"
                result[name][start:stop] = tensors[key]
    return result


def test_local_state_covers_every_weight_exactly_once(trained) -> None:
    for setting in GRID:
        masters = assemble(trained, setting, "weight")
        for rank in trained:
            for name, weight in rank["train"][setting]["weights"].items():
                torch.testing.assert_close(masters[name], weight.flatten(), rtol=0, atol=0)


def test_optimizer_state_by_name_is_equal_on_every_stage(trained) -> None:
    roles = Model().parameter_roles()
    for key, kinds in (("momentum", ("matrix", "gain")), ("exp_avg", ("embedding", "head"))):
        expected = assemble(trained, (1, 1), key)
        for setting in GRID:
            for name, value in assemble(trained, setting, key).items():
                if roles[name] in kinds:
                    assert value.isfinite().all(), (setting, name)
                    assert value.abs().max() > 0, (setting, name)
                    torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)
                else:
                    assert value.isnan().all(), (setting, name)


def test_optimizer_state_is_divided_among_the_ranks(trained) -> None:
    roles, model = Model().parameter_roles(), Model()
    total = sum(p.numel() for n, p in model.named_parameters() if roles[n] in ("matrix", "gain"))
    for setting in GRID:
        held = [
            sum(t["momentum"].numel() for _, _, _, t in rank["train"][setting]["state"] if "momentum" in t)
            for rank in trained
        ]
        assert sum(held) == total
        assert max(held) <= total / len(trained) + 40, held  # padding of the small groups


def test_statistics_agree_between_settings_and_with_the_weights(trained) -> None:
    expected = trained[0]["statistics"][1, 1]
    weights = trained[0]["train"][1, 1]["weights"]
    norm = torch.stack([w.double().square().sum() for w in weights.values()]).sum().sqrt()
    assert expected["param_norm"] == pytest.approx(float(norm), rel=1e-5)
    rate = workers.LR * 0.6  # factor of the last step
    assert expected["lr/matrix"] == pytest.approx(rate)
    assert expected["update_rms/gain"] == pytest.approx(0.2 * rate, rel=1e-4)
    assert 0.1 * rate < expected["update_rms/matrix"] < 0.25 * rate
    assert 0 < expected["update_rms/head"] < 2 * workers.ADAM_LR
    for rank in trained:
        for setting, statistics in rank["statistics"].items():
            assert statistics == pytest.approx(expected, rel=1e-3), setting


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_discarded_gradients_leave_no_trace(ranks, reference, stage: int) -> None:
    for result in ranks:
        errors = update_error(result[f"discard {stage}"], reference[0])
        assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_written_back_by_name_continues_the_run(ranks, reference, stage: int) -> None:
    for run in [run for result in ranks for run in result[f"round trip {stage}"]]:
        for name, value in run["before"].items():
            torch.testing.assert_close(run["after"][name], value, rtol=0, atol=0)
        errors = update_error(run["end"], reference[0])
        assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_change_only_in_step(ranks, stage: int) -> None:
    assert [result[f"backward only {stage}"] for result in ranks] == [0.0] * len(ranks)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_non_finite_gradient_is_not_applied_and_leaves_no_trace(ranks, stage: int) -> None:
    assert [result[f"not finite {stage}"] for result in ranks] == [(False, 0.0, 0.0)] * len(ranks)


def test_broadcast_and_sum(ranks) -> None:
    for result in ranks:
        value, total, world_size = result["broadcast"]
        assert (value, world_size) == ({"from": 0}, len(ranks))
        assert total == sum(range(1, world_size + 1))


def test_more_local_ranks_than_gpus_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"4 ranks on a host with 2 GPUs"):
        init_distributed("cuda")


def test_cuda_without_a_gpu_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"set engine.device=cpu"):
        init_distributed("cuda")


def start_without_launcher(folder: str) -> dict[str, Any]:
    """Start plain python without a launcher: no RANK, no port, no compiled op, nothing logged below a warning."""
    import os
    import sys

    import torch.distributed as dist

    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    device = init_distributed("auto" if not torch.cuda.is_available() else "cpu")
    engine = workers.build(1, 1)
    workers.run_steps(engine, range(1))
    from deepspeed.utils import logger

    result = {
        "device": str(device),
        "group": (dist.get_backend(), dist.get_rank(), dist.get_world_size()),
        "port": os.environ.get("MASTER_PORT"),
        "level": logger.level,
        "built": [name for name in sys.modules if name.startswith("deepspeed_")],
    }
    engine.close()
    return result


def test_start_without_a_launcher_compiles_nothing(tmp_path: Path) -> None:
    with server().Pool(1) as pool:
        result = pool.apply(start_without_launcher, (str(tmp_path),))
    assert result["device"] == "cpu"
    assert result["group"] == ("gloo", 0, 1)
    assert result["port"] is None
    assert result["level"] == logging.WARNING
    assert result["built"] == []
    assert not any(tmp_path.iterdir())


def test_no_step_synchronizes_the_device(ranks) -> None:
    assert [result["synchronizations"] for result in ranks] == [[0, 0, 0]] * len(ranks)


def test_settings_of_deepspeed_have_one_source_for_each_quantity(trained) -> None:
    for result in trained:
        settings = result["settings"]
        assert settings["gradient_clipping"] == 0  # our optimizer clips
        assert settings["timers"]["throughput"]["enabled"] is False
        assert settings["train_micro_batch_size_per_gpu"] * len(trained) * 4 == ROWS
        assert settings["gradient_accumulation_steps"] == 4
        assert not {"scheduler", "optimizer", "bf16", "fp16", "torch_autocast"} & settings.keys()
