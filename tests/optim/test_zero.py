"""Every element lies on exactly one rank, and the exchange returns updates to the ranks of their parameters."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from osp.optim.zero import Interval, Round, Whole, assign, flat_size, plan_rounds, rank_intervals
from tests.distributed import run_distributed


def interval_table(numels: Sequence[int], *, world_size: int, stage: int) -> list[list[Interval]]:
    """Return the intervals of each rank, in the order of its flat tensor."""
    return [rank_intervals(numels, rank=rank, world_size=world_size, stage=stage) for rank in range(world_size)]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", range(1, 10))
def test_every_element_is_on_exactly_one_rank(stage: int, world_size: int) -> None:
    chooser = random.Random(world_size)
    for _ in range(30):
        numels = [chooser.randint(1, 40) for _ in range(chooser.randint(1, 12))]
        size = flat_size(numels, world_size=world_size, stage=stage)
        seen = [[0] * numel for numel in numels]
        for intervals in interval_table(numels, world_size=world_size, stage=stage):
            position = 0
            for iv in intervals:
                assert iv.start < iv.stop <= numels[iv.index]
                assert position <= iv.offset
                position = iv.place.stop
                for element in range(iv.start, iv.stop):
                    seen[iv.index][element] += 1
            assert position <= size
        assert all(count == 1 for counts in seen for count in counts), (numels, seen)


def test_layout_of_three_parameters_on_two_ranks() -> None:
    """Three parameters of 5 elements on 2 ranks."""
    assert interval_table([5, 5, 5], world_size=2, stage=1) == [
        [(0, 0, 5, 0), (1, 0, 3, 5)],  # 15 elements padded to 16, 8 each
        [(1, 3, 5, 0), (2, 0, 5, 2)],
    ]
    assert interval_table([5, 5, 5], world_size=2, stage=3) == [
        [(0, 0, 3, 0), (1, 0, 3, 3), (2, 0, 3, 6)],  # chunks of 3, the second one padded
        [(0, 3, 5, 0), (1, 3, 5, 3), (2, 3, 5, 6)],
    ]


def plan(*groups: tuple[int, int], rank: int = 0, workspace: int = 10**9, **layout: int) -> list[Round]:
    """Return the rounds of groups of (numel, count), whose updates cost as much as they have elements."""
    return plan_rounds([Whole(n, count, n) for n, count in groups], rank=rank, workspace=workspace, **layout)


def test_whole_parameters_are_views_and_need_no_exchange() -> None:
    for stage, world_size in ((1, 1), (2, 1), (3, 1), (1, 2), (1, 4)):
        (work,) = plan((6, 8), world_size=world_size, stage=stage)
        assert work.sends is None
        assert len(work.shares[0].owned) == 8 // world_size
        values = torch.arange(48.0 // world_size)
        (whole,) = work.collect(values)
        assert whole.data_ptr() == values.data_ptr()
        assert work.distribute([whole])[0].data_ptr() == values.data_ptr()


def test_workspace_bounds_a_round_and_covers_the_group() -> None:
    for world_size, stage in ((1, 1), (2, 1), (3, 1), (3, 3)):
        for rank in range(world_size):
            rounds = plan((10, 12), world_size=world_size, rank=rank, stage=stage, workspace=25)
            assert max(10 * len(share.owned) for work in rounds for share in work.shares) <= 25 + 10
            places = [share.local for work in rounds for share in work.shares]
            held = {place for local in places for place in range(local.start, local.stop)}
            table = interval_table([10] * 12, world_size=world_size, stage=stage)[rank]
            assert held >= {place for iv in table for place in range(iv.place.start, iv.place.stop)}
    alone = plan((10, 2), world_size=1, stage=1, workspace=1)
    assert [len(work.shares[0].owned) for work in alone] == [1, 1], "never less than one"


@pytest.mark.parametrize("stage", [1, 3])
def test_all_groups_travel_in_one_round(stage: int) -> None:
    """Three groups that three ranks split, and one whose pieces are whole at stage 1."""
    for rank in range(3):
        rounds = plan((35, 5), (6, 9), (7, 1), (11, 2), world_size=3, rank=rank, stage=stage)
        exchanged = [work for work in rounds if work.sends is not None]
        assert len(exchanged) == 1
        assert [share.group for share in exchanged[0].shares] == ([0, 2, 3] if stage == 1 else [0, 1, 2, 3])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16, 100])
def test_costly_tasks_are_shared_as_evenly_as_they_can_be(world_size: int) -> None:
    chooser = random.Random(world_size)
    for _ in range(20):
        costs = tuple(chooser.choice((1, 10, 20)) for _ in range(chooser.randint(1, 40)))
        ranks = assign(costs, world_size)
        loads = [sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == r) for r in range(world_size)]
        assert sum(loads) == sum(costs)
        assert max(loads) <= 4 / 3 * max(max(costs), sum(costs) / world_size) + max(costs) / 3
        if len(costs) <= world_size:
            assert max(loads) == max(costs), "a rank has two tasks and another one none"
            assert len(set(ranks)) == len(costs)


def exchange(cases: list[tuple[tuple[tuple[int, int], ...], int, int]]) -> list[Any]:
    """Return each group's parameters of this rank and the change of its flat tensors by a round trip, for each case.

    cases: (groups of (numel, count), stage, workspace).
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = []
    for groups, stage, workspace in cases:
        layout, flats = {"world_size": world_size, "stage": stage}, []
        for numel, count in groups:
            whole = torch.arange(float(numel * count)).view(count, numel)
            flat = torch.full((flat_size([numel] * count, **layout),), -1.0)
            for iv in interval_table([numel] * count, **layout)[rank]:
                flat[iv.place] = whole[iv.index, iv.start : iv.stop]
            flats.append(flat)
        before, owned = [flat.clone() for flat in flats], [[] for _ in groups]
        for work in plan(*groups, rank=rank, workspace=workspace, **layout):
            parameters = work.collect(torch.cat([flats[share.group][share.local] for share in work.shares]))
            for share, stack in zip(work.shares, parameters, strict=True):
                owned[share.group].append((list(share.owned), stack.clone()))
            updates = work.distribute([torch.ones_like(stack) for stack in parameters])
            for share, update in zip(work.shares, updates, strict=True):
                flats[share.group][share.local] += update.flatten()
        changes = [flat - old for flat, old in zip(flats, before, strict=True)]
        results.append((owned, changes, [old >= 0 for old in before]))
    return results


def test_exchange_collects_every_parameter_once_and_returns_updates() -> None:
    shapes = ((35, 5), (6, 9), (1, 5), (8, 2), (7, 1), (4, 6))
    cases = [
        (groups, stage, workspace)
        for groups in (*((shape,) for shape in shapes), shapes, shapes[::-1])
        for stage in (1, 3)
        for workspace in (1, 20, 10**6)
    ]
    ranks = run_distributed(exchange, 3, cases)
    for index, (groups, stage, workspace) in enumerate(cases):
        for number, (numel, count) in enumerate(groups):
            owned = [part for rank in ranks for part in rank[index][0][number]]
            order = [i for indices, _ in owned for i in indices]
            assert sorted(order) == list(range(count)), (groups, stage, workspace)
            stacks = torch.cat([stack for _, stack in owned])
            expected = torch.arange(float(numel * count)).view(count, numel)
            assert torch.equal(stacks, expected[torch.tensor(order)]), (groups, stage, workspace)
            for rank in ranks:
                _, changes, real = rank[index]
                assert torch.equal(changes[number], real[number].float()), (groups, stage, workspace)
