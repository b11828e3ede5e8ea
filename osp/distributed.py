"""Ranks: start the process group, exchange values, detect a dead rank, share the batches of an evaluation."""

import functools
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore  # dist.HashStore, which torch's stubs leave out
from tqdm import tqdm

from osp.device import choose_device, local_ranks
from osp.errors import RunError, UserError
from osp.files import printable

log = logging.getLogger(__name__)

T = TypeVar("T")


def device_of_rank(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device of this rank. Raises `UserError` if the host has too few GPUs, or none where one is wanted."""
    chosen, local_rank = choose_device(device, key="engine.device"), int(os.environ.get("LOCAL_RANK", "0"))
    # not only this rank's: then every rank refuses, and none waits for the others
    num_ranks = max(local_rank + 1, local_ranks())
    if chosen.type == "cuda" and num_ranks > torch.cuda.device_count():
        raise UserError(
            f"{num_ranks} ranks on a host with {torch.cuda.device_count()} GPUs; start at most that many processes "
            f"per host (deepspeed --num_gpus, torchrun --nproc-per-node), or set engine.device=cpu"
        )
    return torch.device("cuda", local_rank) if chosen.type == "cuda" else chosen


def init_distributed(device: Literal["auto", "cpu", "cuda"] = "auto", *, timeout_seconds: float = 1800) -> torch.device:
    """Start torch's process group (NCCL on CUDA, gloo on CPU) and DeepSpeed on it; return the device of this rank.

    The launcher's RANK, WORLD_SIZE and LOCAL_RANK describe the ranks. Without them this is the only process, and it
    opens no port that another job on the host could hold.
    """
    place = device_of_rank(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        ranks: dict[str, Any] = {"store": HashStore(), "rank": 0, "world_size": 1} if alone else {}
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **ranks)
        except (RuntimeError, OSError) as error:  # of sockets
            if alone:
                raise UserError(
                    f"torch finds no network interface, and needs at least the loopback: {error}"
                ) from error
            address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
            if "EADDRINUSE" in str(error):
                raise UserError(f"{address}: the port is in use; name another one with --master_port") from error
            raise UserError(f"{address}: the ranks cannot connect there: {str(error).splitlines()[0]}") from error
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asserts that it is set
    os.environ["DS_ACCELERATOR"] = place.type  # else DeepSpeed takes a GPU it finds, or warns that it finds none
    import deepspeed
    from deepspeed.utils import numa

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if place.type == "cpu":  # on CUDA the table would cost seconds: DeepSpeed fills it by probing every op
        # an optional shared-memory all-reduce, which takes a compiler and most of a minute to build
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # on CPUs DeepSpeed starts `numactl` in every backward pass of ZeRO-3
    numa.get_numa_cores = functools.cache(numa.get_numa_cores)
    # DeepSpeed calls renamed collectives of torch at every step
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return place


class Peers:
    """The ranks of this run, watched so that a dead rank ends the others.

    A rank on this host is dead when its process is gone. A rank on another host is noticed by its connection: at once
    on gloo, after the timeout of the process group on NCCL.
    """

    POLL_SECONDS = 2.0
    SECONDS_TO_DIE = 3.0  # from a broken connection to the end of the process
    GRACE_SECONDS = 10.0  # for the collective in progress to fail by itself, which ends the run more gently

    def __init__(self) -> None:
        """End this process if a rank of this host dies before `dismiss`. Collective."""
        self._all: list[tuple[str, int]] = gather_objects((socket.gethostname(), os.getpid()))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="osp-peers")
        if len(self._all) > 1:
            self._thread.start()

    def dismiss(self) -> None:
        """Stop watching: from here on ranks may end. Call it after the last collective."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()  # at once: the thread only waits for the event

    def dead(self) -> list[int]:
        """Return the ranks of this host whose process is gone."""
        here = socket.gethostname()
        return [rank for rank, (host, pid) in enumerate(self._all) if host == here and not psutil.pid_exists(pid)]

    def cause(self, error: BaseException) -> str | None:
        """Return which rank has died if that is why a collective failed with `error`; None for any other error."""
        names_it = any(word in str(error) for word in ("gloo", "NCCL", "Connection", "Timed out"))
        lost = isinstance(error, RuntimeError) and not isinstance(error, RunError) and names_it
        if not lost and not isinstance(error, dist.DistBackendError | dist.DistNetworkError):
            return None
        until = time.monotonic() + self.SECONDS_TO_DIE
        while not self.dead() and time.monotonic() < until:
            time.sleep(0.1)
        return self._describe(self.dead())

    def _describe(self, ranks: list[int]) -> str:
        if not ranks:
            return "the connection to another rank broke; the first error is in the log of the host where a rank died"
        names = ", ".join(f"rank {r} (process {self._all[r][1]} on {self._all[r][0]})" for r in ranks)
        return f"{names} {'has' if len(ranks) == 1 else 'have'} died"

    def _watch(self) -> None:
        while not self._end.wait(self.POLL_SECONDS):
            if dead := self.dead():
                if not self._end.wait(self.GRACE_SECONDS):
                    log.error("error: %s; this rank ends too", self._describe(dead))
                    os._exit(1)
                return


def shutdown() -> None:
    """End the process group, as the last act of a process: DeepSpeed cannot begin a second one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Return whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def num_ranks() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank. A `UserError` is raised on every rank. Collective."""
    results: list[Any] = on_all_ranks(action if is_main() else lambda: None)
    return results[0]


def on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return all results. A `UserError` of one is raised on every rank. Collective."""
    try:
        outcome = action(), None
    except UserError as error:
        outcome = None, error
    outcomes: list[Any] = gather_objects(outcome)
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [result for result, _ in outcomes]


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in order, on every rank; its own is the object itself. Collective."""
    values = [value] * num_ranks()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=_patient_group())
        values[dist.get_rank()] = value
    return values


@functools.cache
def _patient_group() -> Any:
    """Return the group for objects, in which a rank may tokenize a large text while the others wait. Collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))  # gloo has no watchdog, NCCL does


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return the indices of the sequences of each batch, longest first, at most `batch_tokens` with padding."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def my_share(batches: Sequence[T], *, what: str, progress: bool) -> Iterator[tuple[int, T]]:
    """Yield (number, batch) of this rank's share; with `progress`, rank 0 shows a progress bar."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    numbers = range(rank, len(batches), num_ranks())
    for number in tqdm(numbers, desc=printable(what), unit="batch", leave=False, disable=not progress or rank > 0):
        yield number, batches[number]


def add_up(results: Tensor) -> Tensor:
    """Return the sum over all ranks, on every rank; in place. Collective."""
    if num_ranks() > 1:
        dist.all_reduce(results)
    return results
