"""What travels between ranks, over which backend, and how long a rank waits for the others."""

import os
import sys
import time
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

from osp import distributed
from osp.distributed import add_up, gather_objects, init_distributed, on_main
from osp.train.stop import count_flags
from tests.distributed import run_distributed


class Ops(ModuleType):
    """Like `deepspeed.ops`, whose table of compatible ops is made at the first access."""

    def __init__(self) -> None:
        super().__init__("deepspeed.ops")
        self.table: dict[str, bool] = {}
        self.probes = 0

    def __getattr__(self, name: str) -> Any:
        if name != "__compatible_ops__":
            raise AttributeError(name)
        self.probes += 1
        return self.table


@pytest.mark.parametrize(("place", "backend", "probes"), [("cuda", "cpu:gloo,cuda:nccl", 0), ("cpu", "gloo", 1)])
def test_backend_of_a_device(place: str, backend: str, probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU tensors travel over NCCL, CPU tensors over gloo; no CUDA op of DeepSpeed is probed."""
    ops, calls = Ops(), list[Any]()
    deepspeed, utils = ModuleType("deepspeed"), ModuleType("deepspeed.utils")
    vars(utils).update(logger=SimpleNamespace(setLevel=lambda _: None), numa=SimpleNamespace(get_numa_cores=len))
    vars(deepspeed).update(ops=ops, utils=utils, init_distributed=lambda dist_backend, **_: calls.append(dist_backend))
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "0")  # is removed again afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "device_of_rank", lambda _: torch.device(place))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.append((backend, options)))
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    assert init_distributed("auto", timeout_seconds=60.0).type == place
    (started, options), wrapped = calls
    assert (started, wrapped, options["timeout"]) == (backend, backend, timedelta(seconds=60))
    assert ops.probes == probes
    assert ops.table == ({"deepspeed_shm_comm": False} if probes else {})


class NoTensors(TorchFunctionMode):
    """Raises where a tensor is made or used."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is called")


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a collective is called")


def test_one_rank_counts_flags_and_gathers_objects_without_tensor_or_collective(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("all_reduce", "all_gather_object", "new_group", "barrier"):
        monkeypatch.setattr(dist, name, refuse)
    with NoTensors():
        assert count_flags(True, False, True) == [1, 0, 1]
        assert gather_objects("x") == ["x"]
        assert on_main(lambda: 3) == 3


def exchange_with_a_slow_rank(seconds: float) -> tuple[Any, ...]:
    """Exchange flags, then let rank 0 work for longer than the process group waits."""
    rank = dist.get_rank()
    sent, all_reduce = [], dist.all_reduce

    def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append((tensor.device.type, tensor.dtype))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = watched
    flags = count_flags(True, rank == 1, False)
    dist.all_reduce = all_reduce
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), None)

    def prepare() -> int:
        time.sleep(3 * seconds)
        return os.getpid()

    first = on_main(prepare)
    distributed_c10d._set_pg_timeout(timedelta(seconds=200), None)
    group: Any = distributed._patient_group()
    again = gather_objects(rank)
    same = distributed._patient_group() is group
    total = float(add_up(torch.tensor(1.0)))
    return flags, sent, first, again, same, dist.get_backend(group), total


def test_objects_wait_for_a_rank_that_works_longer_than_the_timeout() -> None:
    first, second = run_distributed(exchange_with_a_slow_rank, 2, 1.0)
    assert first == second
    flags, sent, _, again, same, backend, total = first
    assert flags == [2, 1, 0]
    assert sent == [("cpu", torch.int32)], "flags wait for no GPU"
    assert (again, same, backend, total) == ([0, 1], True, "gloo", 2.0)


def test_group_of_objects_is_gloo_whatever_the_process_group_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects are gathered there and nowhere else, so that no NCCL watchdog ends a rank that waits for another."""
    made, gathered = list[Any](), list[Any]()
    monkeypatch.setattr(distributed, "num_ranks", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(options) or "patient")
    monkeypatch.setattr(dist, "all_gather_object", lambda values, value, group: gathered.append(group))
    distributed._patient_group.cache_clear()
    try:
        assert gather_objects("x") == ["x", "x"]
        gather_objects("y")
    finally:
        distributed._patient_group.cache_clear()
    assert made == [{"backend": "gloo", "timeout": timedelta(days=7)}]
    assert gathered == ["patient", "patient"]
