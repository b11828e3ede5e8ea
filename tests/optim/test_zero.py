"""Every element lies on exactly one rank, and the exchange returns updates to the ranks of their parameters."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from osp.optim.zero import Interval, batches, flat_size, rank_intervals
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


def test_whole_parameters_are_views_and_need_no_exchange() -> None:
    for stage, world_size in ((1, 1), (2, 1), (3, 1), (1, 2), (1, 4)):
        work = batches(6, 8, world_size=world_size, rank=0, stage=stage)
        assert len(work) == 1
        assert work[0].sends is None
        assert work[0].num_owned == 8 // world_size
        values = torch.arange(48.0 // world_size)
        assert work[0].collect(values).data_ptr() == values.data_ptr()
        assert work[0].distribute(work[0].collect(values)).data_ptr() == values.data_ptr()


def test_workspace_bounds_a_batch_and_covers_the_group() -> None:
    for world_size, stage in ((1, 1), (2, 1), (3, 1), (3, 3)):
        for rank in range(world_size):
            work = batches(10, 12, world_size=world_size, rank=rank, stage=stage, workspace=25)
            assert max(batch.num_owned for batch in work) <= 2
            held = {place for batch in work for place in range(batch.local.start, batch.local.stop)}
            table = interval_table([10] * 12, world_size=world_size, stage=stage)[rank]
            assert held >= {place for iv in table for place in range(iv.place.start, iv.place.stop)}
    assert batches(10, 2, world_size=1, rank=0, stage=1, workspace=1)[0].num_owned == 1  # never less than one


def exchange(cases: list[tuple[int, int, int, int]]) -> list[Any]:
    """Return the parameters of this rank and the change of its flat tensor by a round trip, for each case.

    cases: (numel, count, stage, workspace).
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = []
    for numel, count, stage, workspace in cases:
        layout = {"world_size": world_size, "stage": stage}
        whole = torch.arange(float(numel * count)).view(count, numel)
        flat = torch.full((flat_size([numel] * count, **layout),), -1.0)
        for iv in interval_table([numel] * count, **layout)[rank]:
            flat[iv.place] = whole[iv.index, iv.start : iv.stop]
        before, owned = flat.clone(), []
        for batch in batches(numel, count, rank=rank, workspace=workspace, **layout):
            whole_parameters = batch.collect(flat[batch.local])
            owned.append(whole_parameters.clone())
            update = batch.distribute(torch.ones_like(whole_parameters))
            flat[batch.local] += update
        results.append((torch.cat(owned) if owned else None, flat - before, before >= 0))
    return results


def test_exchange_collects_every_parameter_once_and_returns_updates() -> None:
    cases = [
        (numel, count, stage, workspace)
        for numel, count in ((35, 5), (6, 9), (1, 5), (8, 2), (7, 1), (4, 6))
        for stage in (1, 3)
        for workspace in (1, 10**6)
    ]
    ranks = run_distributed(exchange, 3, cases)
    for index, (numel, count, stage, _) in enumerate(cases):
        owned = torch.cat([rank[index][0] for rank in ranks if rank[index][0] is not None])
        expected = torch.arange(float(numel * count)).view(count, numel)
        assert torch.equal(owned[owned[:, 0].argsort()], expected), (numel, count, stage)
        for rank in ranks:
            _, change, real = rank[index]
            assert torch.equal(change, real.float()), (numel, count, stage)
