"""Keys of `scripts/plan.py` beyond the configuration of a training."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from osp.schema import Count, FilePath, Int, NotNegative, Positive, PositiveFraction, Text


@dataclass(frozen=True)
class MachineConfig:
    """What one rank of a planned run has: a choice of configs/machine. Bandwidths in GB/s, both ways at once."""

    name: Text = "unnamed"
    device: Literal["cuda", "cpu"] = "cuda"
    bf16: bool = True  # multiplies bf16 natively
    ranks_per_host: Count = 8
    memory: Positive = 80.0  # GiB
    reserved: NotNegative = 2.0  # GiB of it that a process has before the first tensor, and loses to fragmentation
    peak_tflops: Positive | None = None  # of matrix products; None: the table of known GPUs, by `name`
    matmul_share: PositiveFraction = 0.5  # of that peak: forward and backward pass
    ns_share: PositiveFraction = 0.5  # of that peak: Newton-Schulz
    network: Positive = 50.0  # GB/s of a rank to ranks of other hosts
    host_network: Positive = 450.0  # GB/s of a rank to ranks of its host
    network_share: PositiveFraction = 0.7  # of these: what collectives reach
    disk: Positive = 2.0  # GB/s that the ranks of a host write together
    sources: dict[str, str] = field(default_factory=dict)  # where the figure of a key is from


@dataclass(frozen=True)
class PlanConfig:
    """Keys of scripts/plan.py beyond the configuration of a training; see osp.plan.plan."""

    world_size: Annotated[Int, Field(ge=1, le=4096)] = 8
    gpu_memory: Positive | None = None  # GiB; None: the machine's
    machine: MachineConfig = field(default_factory=MachineConfig)
    out: FilePath | None = None  # JSON file for the figures
