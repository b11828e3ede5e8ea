"""Keys of `scripts/plan.py` beyond the configuration of a training."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from osp.schema import Count, FilePath, Int, NotNegative, Positive, PositiveFraction, Text


@dataclass(frozen=True)
class MachineConfig:
    """What one rank of a planned run has: a choice of configs/machine. Bandwidths in GB/s, both ways at once."""

    name: Text = "unnamed"  # name of the device
    device: Literal["cuda", "cpu"] = "cuda"  # kind of the device
    bf16: bool = True  # whether it multiplies bf16 natively
    ranks_per_host: Count = 8  # GPUs or processes of a host
    memory: Positive = 80.0  # GiB of a rank
    reserved: NotNegative = 2.0  # GiB that a process uses before the first tensor, and loses to fragmentation
    peak_tflops: Positive | None = None  # TFLOP/s of matrix products; None: a table of known GPUs, by `name`
    matmul_share: PositiveFraction = 0.5  # share of the peak that the forward and backward pass reach
    ns_share: PositiveFraction = 0.5  # share of the peak that Newton-Schulz reaches
    network: Positive = 50.0  # GB/s of a rank to ranks of other hosts
    host_network: Positive = 450.0  # GB/s of a rank to ranks of its host
    network_share: PositiveFraction = 0.7  # share of both bandwidths that collectives reach
    disk: Positive = 2.0  # GB/s that the ranks of a host write together
    sources: dict[str, str] = field(default_factory=dict)  # origin of the figure of each key


@dataclass(frozen=True)
class PlanConfig:
    """Keys of scripts/plan.py beyond the configuration of a training; see osp.plan.plan."""

    world_size: Annotated[Int, Field(ge=1, le=4096)] = 8  # number of ranks
    gpu_memory: Positive | None = None  # GiB of a rank; None: machine.memory
    machine: MachineConfig = field(default_factory=MachineConfig)  # what a rank has
    out: FilePath | None = None  # JSON file for all figures
