"""Run a function on N gloo ranks and return the value of every rank."""

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from osp.distributed import init_distributed

# A server process imports these once and forks the ranks, because importing them in each rank takes seconds
_PRELOAD = ["torch.multiprocessing.spawn", "torch._dynamo", "deepspeed.runtime.zero.muon.original_muon"]


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Return [function(*args) of rank 0, of rank 1, ...]. `function` must be importable; its result must pickle.

    The ranks rendezvous through a file, so parallel test runs cannot collide on a port. One thread per rank.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when the server imports it
    multiprocessing.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _rank, (world_size, folder, function, args), nprocs=world_size, start_method="forkserver", join=True
        )
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    init_distributed("cpu")
    result = function(*args)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
