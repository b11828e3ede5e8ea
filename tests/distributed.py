"""Functions on N gloo ranks, and scripts in child processes, forked from a server that has imported torch once."""

import gc
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from osp.distributed import init_distributed

# A server process imports these once and forks the ranks, because importing them in each rank takes seconds
_PRELOAD = [
    *("torch.multiprocessing.spawn", "torch._dynamo", "deepspeed.runtime.zero.muon.original_muon"),
    *("hydra", "osp.train.setup", "osp.evaluation.compare"),
]
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECONDS_TO_END = 200.0  # for a process that was asked to end, or that has lost another one


def server() -> ForkServerContext:
    """Return a context whose processes are forked with the large modules already imported."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when the server imports it
    multiprocessing.set_forkserver_preload(_PRELOAD)
    return multiprocessing.get_context("forkserver")


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Return [function(*args) of rank 0, of rank 1, ...]. `function` must be importable; its result must pickle.

    The ranks rendezvous through a file, so parallel test runs cannot collide on a port. One thread per rank.
    """
    server()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _rank, (world_size, folder, function, args), nprocs=world_size, start_method="forkserver", join=True
        )
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


def exit_codes(function: Callable[..., Any], world_size: int, *args: Any) -> list[int | None]:
    """Return how every rank of `function(*args)` ended: 0, 1 after an exception, -9 if it was killed.

    Nothing ends a rank that outlives another one; None if it does not end by itself.
    """
    context = server()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, function, args)) for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(SECONDS_TO_END)
        codes = [rank.exitcode for rank in ranks]
        _end(ranks)
        return codes


class ForkedProcess:
    """An `osp.train.launch.Process` whose interpreter does not start: the server forks it, or each of its ranks.

    Arguments, environment, output, signals and exit status are those of the process that it replaces.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: Path,
        *,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        """prepare: called in the child process before the script"""
        arguments, self.output = list(command[1:]), output
        num_ranks = 1
        if arguments[:3] == ["-P", "-m", "torch.distributed.run"]:
            num_ranks, arguments = int(arguments[5]), arguments[6:]
        output.write_bytes(b"")
        env = {key: value for key, value in os.environ.items() if key not in _LAUNCHER} | dict(environment or {})
        context, self._folder = server(), tempfile.TemporaryDirectory()
        place = (num_ranks, self._folder.name)
        self._ranks = [
            context.Process(target=_script, args=(rank, *place, arguments, output, env, os.getcwd(), prepare))
            for rank in range(num_ranks)
        ]
        for process in self._ranks:
            process.start()

    def poll(self) -> int | None:
        """Return None while a rank runs, then a status other than 0 if there is one."""
        codes = [process.exitcode for process in self._ranks]
        return None if None in codes else next(filter(None, codes), 0)

    def wait(self, timeout: float | None = None) -> int:
        for process in self._ranks:
            process.join(timeout)
        status = self.poll()
        assert status is not None, self.output.read_text()
        return status

    def terminate(self) -> None:
        for process in self._ranks:
            process.terminate()

    def stop(self) -> None:
        """End the process if it runs, and wait for it."""
        self.terminate()
        self.wait(SECONDS_TO_END)


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _join(rank, world_size, folder)
    init_distributed("cpu")
    result = function(*args)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _join(rank: int, world_size: int, folder: str) -> None:
    gc.freeze()  # DeepSpeed collects garbage when it starts, and there are a million objects of the imports
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)


def _script(
    rank: int,
    num_ranks: int,
    folder: str,
    arguments: list[str],
    output: Path,
    env: dict[str, str],
    cwd: str,
    prepare: Callable[[], None] | None,
) -> None:
    """Become `python ARGUMENTS`, as one of the ranks if there are several."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if num_ranks > 1:
        _join(rank, num_ranks, folder)
        # as a launcher sets them; the ranks have met already
        os.environ |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    if prepare:
        prepare()
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
