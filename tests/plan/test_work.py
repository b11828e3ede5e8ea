"""Exchange of `osp_1b`'s groups: every element is held and owned once, and every part sent is received."""

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from osp.config import OptimizerConfig
from osp.model.transformer import meta_model
from osp.model_config import Heads, ModelConfig
from osp.optim.groups import build_groups
from osp.optim.muon import newton_schulz
from osp.optim.rules import Group
from osp.optim.zero import MatrixBatch, batches, flat_size
from osp.plan.config import MachineConfig, PlanConfig
from osp.plan.work import GroupWork, batches_of, group_work, step_time, traffic
from tests.conftest import ROOT
from tests.optim.reference import OneRole
from tests.optim.test_zero import interval_table

SHAPES = {(1,): 49, (2048, 2048): 96, (5504, 2048): 48, (2048, 5504): 24}  # the matrices of the blocks, and the gains


@functools.cache
def groups_of_model(model: str) -> list[Group]:
    """Return the parameter groups of a choice of configs/model with EmbProj, on the meta device."""
    values = yaml.safe_load((ROOT / "configs" / "model" / f"{model}.yaml").read_text())
    shapes = meta_model(ModelConfig(**values, embed_proj=True))
    return build_groups(shapes, OptimizerConfig())


def structured(model: str = "osp_1b") -> list[Group]:
    return [group for group in groups_of_model(model) if group["rule"] != "adamw"]


def tiles(parts: Iterable[tuple[int, int]], size: int) -> bool:
    """Return whether intervals, in any order, cover [0, size) exactly once."""
    position = 0
    for start, stop in sorted(parts):
        if start != position:
            return False
        position = stop
    return position == size


def test_groups_of_osp_1b() -> None:
    actual = [(group["role"], group["shapes"][0], len(group["shapes"])) for group in structured()]
    assert sorted(actual) == sorted([*(("matrix", s, n) for s, n in SHAPES.items() if len(s) == 2),
                                    ("gain", (1,), 49), ("embed_proj", (2048, 2048), 2)])  # fmt: skip


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world_size", [1, 3, 8, 48, 512, 1024])
def test_every_element_of_every_matrix_is_held_once_and_owned_once(world_size: int, stage: int) -> None:
    """Compare the ends of intervals on every rank; stage 2 cuts like stage 1."""
    for group in structured():
        numel, count = torch.Size(group["shapes"][0]).numel(), len(group["shapes"])
        ranks = batches_of(group, world_size=world_size, stage=stage)
        held: dict[int, list[tuple[int, int]]] = defaultdict(list)
        if (ranks[0] and ranks[0][0].sends is None) or not all(ranks):  # whole pieces: nothing moves
            owned = sorted(b.first + i for work in ranks for b in work for i in range(b.num_owned))
            assert owned == list(range(count))
            table = interval_table([numel] * count, world_size=world_size, stage=stage)
            assert all(iv.size == numel for intervals in table for iv in intervals)
            continue
        assert len({len(work) for work in ranks}) == 1, "all ranks must take part in a batch, which is a collective"
        for batch_of in zip(*ranks, strict=True):
            check_batch(batch_of, numel, held)
        assert sorted(held) == list(range(count))
        assert all(tiles(parts, numel) for parts in held.values())


def check_batch(work: Sequence[MatrixBatch], numel: int, held: dict[int, list[tuple[int, int]]]) -> None:
    """Check one batch on all ranks: every part that is sent is expected, and the parts make whole parameters."""
    sends, receives = np.array([b.sends for b in work]), np.array([b.receives for b in work])
    assert (sends == receives.T).all()
    owner = {b.first + i: rank for rank, b in enumerate(work) for i in range(b.num_owned)}
    assert len(owner) == sum(b.num_owned for b in work), "a parameter with two owners"
    sent: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)  # (sender, owner) -> parts in order
    for rank, batch in enumerate(work):
        position = 0
        for iv in batch.held:
            assert position <= iv.offset, "parts are in the order of the flat tensor"
            position = iv.place.stop
            held[iv.index].append((iv.start, iv.stop))
            sent[rank, owner[iv.index]].append((iv.index, iv.start, iv.stop))
        assert position <= batch.local.stop - batch.local.start
        assert [owner[iv.index] for iv in batch.held] == sorted(owner[iv.index] for iv in batch.held)
    for rank, batch in enumerate(work):
        parts = iter(batch.owned)
        whole: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for sender in range(len(work)):
            for part in sent.get((sender, rank), []):
                iv = next(parts)
                assert part == (batch.first + iv.index, iv.start, iv.stop)
                whole[iv.index].append((iv.start, iv.stop))
        assert next(parts, None) is None
        assert sorted(whole) == list(range(batch.num_owned))
        assert all(tiles(parts, numel) for parts in whole.values())


class Wire:
    """Simulate the all-to-all of ranks that run one after the other: first all send, then all receive."""

    def __init__(self) -> None:
        self.sent: list[list[Tensor]] = []
        self.rank: int | None = None

    def __call__(
        self, output: Tensor, values: Tensor, *, output_split_sizes: list[int], input_split_sizes: list[int]
    ) -> None:
        assert output.numel() == sum(output_split_sizes)
        if self.rank is None:
            self.sent.append(list(values.split(input_split_sizes)))
        else:
            torch.cat([parts[self.rank] for parts in self.sent], out=output)


@pytest.mark.parametrize("stage", [1, 3])
def test_exchange_of_512_ranks_moves_every_number_to_its_place_and_back(stage: int) -> None:
    """EmbProj's two matrices of 2048 x 2048, each element a different number, packed and unpacked on all 512 ranks."""
    numel, count, world_size = 2048 * 2048, 2, 512
    layout = {"world_size": world_size, "stage": stage}
    whole = torch.arange(numel * count, dtype=torch.float32).view(count, numel)  # below 2^24: exact
    table = interval_table([numel] * count, **layout)
    flats = [torch.full((flat_size([numel] * count, **layout),), -1.0) for _ in table]
    for flat, intervals in zip(flats, table, strict=True):
        for iv in intervals:
            flat[iv.place] = whole[iv.index, iv.start : iv.stop]
    work = [batches(numel, count, rank=rank, **layout)[0] for rank in range(world_size)]
    locals_ = [flat[batch.local] for flat, batch in zip(flats, work, strict=True)]
    collected = through_wire([lambda b=b, x=x: b.collect(x) for b, x in zip(work, locals_, strict=True)])
    assert torch.equal(torch.cat(collected), whole)
    returned = through_wire([lambda b=b, x=x: b.distribute(x + 1) for b, x in zip(work, collected, strict=True)])
    for local, update in zip(locals_, returned, strict=True):
        assert torch.equal(update, local + 1)


def through_wire(ranks: list) -> list[Tensor]:
    wire, results = Wire(), []
    with patch("torch.distributed.all_to_all_single", wire):
        for act in ranks:
            act()
        for wire.rank, act in enumerate(ranks):
            results.append(act())
    return results


def instructions(action: Callable[[], object]) -> int:
    """Return how many bytecode instructions Python executes in `action`: its work, on any machine."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(("stage", "most"), [(1, 50), (3, 200)])
def test_work_of_a_rank_of_1024_does_not_grow_with_ranks_times_parameters(stage: int, most: int) -> None:
    """At most so many instructions for every parameter and rank alone; it takes milliseconds."""
    for shape, count in SHAPES.items():
        numel = torch.Size(shape).numel()
        work = instructions(lambda n=numel, k=count: batches(n, k, world_size=1024, rank=700, stage=stage))
        assert work < most * (1024 + count) < 10 * 1024 * count, shape


def work_of(world_size: int, stage: int = 1) -> list[GroupWork]:
    return [group_work(group, batches_of(group, world_size=world_size, stage=stage)) for group in structured()]


@pytest.mark.parametrize(("world_size", "fullest"), [(1, 96), (8, 12), (48, 2), (256, 1), (1024, 1)])
def test_whole_matrices_are_shared_evenly(world_size: int, fullest: int) -> None:
    square = next(group for group in work_of(world_size) if len(group.owners) == 96)
    assert max(square.num_owned) == fullest == -(-96 // world_size)
    assert sum(square.num_owned) == 96
    assert square.num_owned.count(0) == max(world_size - 96, 0)
    assert len(set(square.owners)) == 96
    assert [list(square.owners.values()).count(rank) for rank in range(world_size)] == square.num_owned


def test_critical_path_is_the_sum_over_groups_of_the_fullest_rank() -> None:
    """5 steps of 4 m^2 n + 2 m^3; on one rank all matrices, on 256 one of each shape."""
    square, wide = 5 * 6 * 2048**3, 5 * (4 * 2048**2 * 5504 + 2 * 2048**3)
    assert sum(group.critical_flops for group in work_of(1)) == 98 * square + 72 * wide
    assert sum(group.critical_flops for group in work_of(256)) == 2 * square + 2 * wide


@pytest.mark.parametrize(("heads", "matrix"), [(Heads(4, dim=0), (8, 48)), (Heads(4, dim=1), (32, 12))])
def test_flops_of_heads_equal_counted_products(heads: Heads, matrix: tuple[int, int]) -> None:
    """Compare the products of the optimizer with the plan's for 5 matrices of 4 heads."""
    parameters = {str(i): nn.Parameter(torch.randn(32, 48)) for i in range(5)}
    model = OneRole(parameters, heads=dict.fromkeys(parameters, heads))
    (group,) = build_groups(model, OptimizerConfig(per_head=True))
    work = group_work(group, batches_of(group, world_size=1, stage=1))
    with FlopCounterMode(display=False) as counter:
        for _ in range(5 * 4):
            newton_schulz(torch.randn(matrix), dtype=torch.float32)
    assert work.critical_flops == 5 * work.flops == counter.get_total_flops()


@pytest.mark.parametrize("world_size", [3, 48])
@pytest.mark.parametrize("stage", [1, 3])
def test_bytes_sent_are_the_parts_that_owners_do_not_hold(world_size: int, stage: int) -> None:
    for group in work_of(world_size, stage):
        numels = [torch.Size(group.shape).numel()] * len(group.owners)
        owners = list(group.owners.values())
        own = sum(
            iv.size
            for rank, intervals in enumerate(interval_table(numels, world_size=world_size, stage=stage))
            for iv in intervals
            if owners[iv.index] == rank
        )
        assert sum(group.bytes_sent) == 2 * 4 * (sum(numels) - own), "to the owners, and back"


def test_traffic_and_time_of_two_ranks_by_hand() -> None:
    """nano on 2 ranks: every byte by the ring's formulas, every second by its constant."""
    groups = groups_of_model("nano")
    total = 4 * sum(p.numel() for group in groups for p in group["params"])
    work = [group_work(g, batches_of(g, world_size=2, stage=1)) for g in structured("nano")]
    padding = 8 * len(groups)
    machine = MachineConfig(
        matmul_share=0.5, ns_share=0.25, network=1.0, host_network=10.0, network_share=0.5, peak_tflops=100.0
    )
    options = {n: PlanConfig(world_size=n, machine=machine) for n in (2, 8, 9, 16)}
    sent = {s: traffic(groups, work, options[2], stage=s, accumulation=3) for s in (1, 2, 3)}
    for stage, gradients, weights in ((1, 0.5, 0.5), (2, 1.5, 0.5), (3, 1.5, 3)):
        assert sent[stage]["gradients"] == pytest.approx(total * gradients, abs=3 * padding)
        assert sent[stage]["weights"] == pytest.approx(total * weights, abs=3 * padding)
    eight, nine = (traffic(groups, work, options[n], stage=2, accumulation=3)["gradients"] for n in (8, 9))
    assert nine / eight == pytest.approx(2 * (8 / 9) / (7 / 8), rel=0.01), "all-reduced beyond a host"
    first = step_time(work, sent[1], options[2], stage=1, flops=1e12)
    assert first["passes"] == pytest.approx(1e12 / 50e12)
    assert first["gradients"] == pytest.approx(sent[1]["gradients"] / 5e9)
    assert first["newton_schulz"] == pytest.approx(sum(g.critical_flops for g in work) / 25e12)
    assert step_time(work, sent[3], options[2], stage=3, flops=1e12)["gradients"] == 0, (
        "the transfer overlaps with the passes"
    )
    far = step_time(work, sent[1], options[16], stage=1, flops=1e12)
    assert far["gradients"] == pytest.approx(first["gradients"] * 10 / 8), "a ring uses the 8 adapters of a host"
