"""Exchange of `osp_1b`'s groups: every element is held and owned once, and every part sent is received."""

import functools
import itertools
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
from osp.optim.zero import Round, Whole, assign, flat_size, plan_rounds
from osp.plan.config import MachineConfig, PlanConfig
from osp.plan.work import WholeWork, rounds_of, step_time, traffic, whole_work
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
    groups = structured()
    numels = [torch.Size(group["shapes"][0]).numel() for group in groups]
    ranks = rounds_of(groups, world_size=world_size, stage=stage)
    held: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    owned = sorted((s.group, i) for rounds in ranks for work in rounds for s in work.shares for i in s.owned)
    assert owned == [(g, i) for g, group in enumerate(groups) for i in range(len(group["shapes"]))]
    exchanges = [[work for work in rounds if work.sends is not None] for rounds in ranks]
    assert len({len(rounds) for rounds in exchanges}) == 1, "all ranks must take part in a round, which is a collective"
    assert len(exchanges[0]) <= 1 or world_size < 48, "all matrices travel together"
    for works in zip(*exchanges, strict=True):
        check_round(works, numels, held)
    assert all(tiles(parts, numels[group]) for (group, _), parts in held.items())
    alone = [share for rounds in ranks for work in rounds if work.sends is None for share in work.shares]
    assert all(share.num_held == len(share.owned) * share.numel for share in alone), "nothing moves"
    assert sorted([*held, *((share.group, i) for share in alone for i in share.owned)]) == owned


def locate(place: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Return which of consecutive parts of these sizes holds a place, and the place in it."""
    for number, size in enumerate(sizes):
        if place < size:
            return number, place
        place -= size
    raise AssertionError(place)


def check_round(
    works: Sequence[Round], numels: Sequence[int], held: dict[tuple[int, int], list[tuple[int, int]]]
) -> None:
    """Check one round on all ranks: every part that is sent is expected, and the parts make whole parameters."""
    sends, receives = np.array([work.sends for work in works]), np.array([work.receives for work in works])
    assert (sends == receives.T).all()
    owner = {(s.group, i): rank for rank, work in enumerate(works) for s in work.shares for i in s.owned}
    assert len(owner) == sum(len(s.owned) for work in works for s in work.shares), "a parameter with two owners"
    sent: dict[tuple[int, int], list[tuple[int, int, int, int]]] = defaultdict(list)  # (sender, owner) -> in order
    for rank, work in enumerate(works):
        places, owners = [], []
        for iv in work.held:
            number, _ = locate(iv.offset, [s.num_held for s in work.shares])
            group = work.shares[number].group
            places.append((iv.offset, iv.place.stop))
            owners.append(owner[group, iv.index])
            held[group, iv.index].append((iv.start, iv.stop))
            sent[rank, owners[-1]].append((group, iv.index, iv.start, iv.stop))
        assert owners == sorted(owners)
        places.sort()
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places)), "parts overlap"
    for rank, work in enumerate(works):
        parts = iter(work.owned)
        whole: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for sender in range(len(works)):
            for part in sent.get((sender, rank), []):
                iv = next(parts)
                number, place = locate(iv.offset, [len(s.owned) * s.numel for s in work.shares])
                share = work.shares[number]
                index, start = share.owned[place // share.numel], place % share.numel
                assert (
                    part == (share.group, iv.index, iv.start, iv.stop) == (share.group, index, start, start + iv.size)
                )
                whole[share.group, index].append((iv.start, iv.stop))
        assert next(parts, None) is None
        assert sorted(whole) == [(s.group, i) for s in work.shares for i in s.owned]
        assert all(tiles(parts, numels[group]) for (group, _), parts in whole.items())


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
    work = [plan_rounds([Whole(numel, count, 1)], rank=rank, **layout)[0] for rank in range(world_size)]
    locals_ = [flat[one.shares[0].local] for flat, one in zip(flats, work, strict=True)]
    collected = through_wire([lambda b=b, x=x: b.collect(x)[0] for b, x in zip(work, locals_, strict=True)])
    assert torch.equal(torch.cat(collected), whole)
    returned = through_wire([lambda b=b, x=x: b.distribute([x + 1])[0] for b, x in zip(work, collected, strict=True)])
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


@pytest.mark.parametrize(("stage", "most"), [(1, 150), (3, 400)])
def test_work_of_a_rank_of_1024_does_not_grow_with_ranks_times_parameters(stage: int, most: int) -> None:
    """At most so many instructions for every parameter and rank alone; it takes milliseconds."""
    groups = [Whole(torch.Size(shape).numel(), count, 1) for shape, count in SHAPES.items()]
    total = sum(SHAPES.values())
    assign.cache_clear()
    work = instructions(lambda: plan_rounds(groups, world_size=1024, rank=700, stage=stage))
    assert work < most * (1024 + total) < 10 * 1024 * total


def work_of(world_size: int, stage: int = 1) -> WholeWork:
    groups = structured()
    return whole_work(groups, rounds_of(groups, world_size=world_size, stage=stage))


@pytest.mark.parametrize("world_size", [1, 8, 48, 256, 1024])
def test_matrices_are_shared_by_their_work(world_size: int) -> None:
    """The fullest rank has at most one matrix more than its share, and no rank has two while another one has none."""
    work = work_of(world_size)
    loads = [sum(group.num_owned[rank] * group.flops for group in work.groups) for rank in range(world_size)]
    total = sum(group.flops * len(group.owners) for group in work.groups)
    largest = max(group.flops for group in work.groups)
    assert sum(loads) == total
    assert max(loads) <= total / world_size + largest
    assert loads.count(0) == max(world_size - 170, 0), "98 square and 72 long matrices"
    for group in work.groups:
        assert [list(group.owners.values()).count(rank) for rank in range(world_size)] == group.num_owned


def test_critical_path_is_the_fullest_rank() -> None:
    """5 steps of 4 m^2 n + 2 m^3; on one rank all matrices, on 256 one of the long ones: no group waits for another."""
    square, wide = 5 * 6 * 2048**3, 5 * (4 * 2048**2 * 5504 + 2 * 2048**3)
    assert work_of(1).critical_flops == 98 * square + 72 * wide
    assert work_of(256).critical_flops == work_of(1024).critical_flops == wide


@pytest.mark.parametrize(("heads", "matrix"), [(Heads(4, dim=0), (8, 48)), (Heads(4, dim=1), (32, 12))])
def test_flops_of_heads_equal_counted_products(heads: Heads, matrix: tuple[int, int]) -> None:
    """Compare the products of the optimizer with the plan's for 5 matrices of 4 heads."""
    parameters = {str(i): nn.Parameter(torch.randn(32, 48)) for i in range(5)}
    model = OneRole(parameters, heads=dict.fromkeys(parameters, heads))
    (group,) = build_groups(model, OptimizerConfig(per_head=True))
    work = whole_work([group], rounds_of([group], world_size=1, stage=1))
    with FlopCounterMode(display=False) as counter:
        for _ in range(5 * 4):
            newton_schulz(torch.randn(matrix), dtype=torch.float32)
    assert work.critical_flops == 5 * work.groups[0].flops == counter.get_total_flops()


@pytest.mark.parametrize("world_size", [3, 48])
@pytest.mark.parametrize("stage", [1, 3])
def test_bytes_sent_are_the_parts_that_owners_do_not_hold(world_size: int, stage: int) -> None:
    work, moved = work_of(world_size, stage), 0
    for group in work.groups:
        numels = [torch.Size(group.shape).numel()] * len(group.owners)
        owners = list(group.owners.values())
        moved += sum(
            iv.size
            for rank, intervals in enumerate(interval_table(numels, world_size=world_size, stage=stage))
            for iv in intervals
            if owners[iv.index] != rank
        )
    assert sum(work.bytes_sent) == 2 * 4 * moved, "to the owners, and back"


def test_traffic_and_time_of_two_ranks_by_hand() -> None:
    """nano on 2 ranks: every byte by the ring's formulas, every second by its constant."""
    groups = groups_of_model("nano")
    total = 4 * sum(p.numel() for group in groups for p in group["params"])
    work = whole_work(groups, rounds_of(groups, world_size=2, stage=1))
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
    assert first["newton_schulz"] == pytest.approx(work.critical_flops / 25e12)
    assert step_time(work, sent[3], options[2], stage=3, flops=1e12)["gradients"] == 0, (
        "the transfer overlaps with the passes"
    )
    far = step_time(work, sent[1], options[16], stage=1, flops=1e12)
    assert far["gradients"] == pytest.approx(first["gradients"] * 10 / 8), "a ring uses the 8 adapters of a host"
