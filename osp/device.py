"""The device of a process: which one, its threads, the number formats it computes in natively, and its peak."""

import ctypes
import os
import sys
from typing import Literal

import torch

from osp.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def prepare_cpu(threads: int | None, *, local_ranks: int = 1) -> None:
    """Set the number of threads (None: the cores of the host shared among its ranks) and keep freed memory.

    glibc hands blocks above a threshold back to the kernel when they are freed, so that each large activation is
    mapped and zeroed anew in every step. Kept, products that write a large result run up to 1.5 times faster.
    """
    torch.set_num_threads(threads or max(1, _available_cores() // local_ranks))
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _available_cores() -> int:
    """Cores this process may run on, where the system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of a single process; `auto` is the GPU where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU here; set device=cpu")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


def native_bf16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware: CUDA from sm_80 on, CPUs with AMX or AVX512-BF16."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def native_fp8(device: torch.device | str) -> bool:
    """Whether `device` multiplies 8-bit floats in hardware: CUDA from sm_89 on."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of activations and of what is not in 8 bits, for a `train.precision` other than auto."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


# Dense bf16 TFLOP/s by vendor datasheet; the key is a part of the device's name. The first match counts.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0}


def peak_tflops(device: torch.device) -> float | None:
    """The dense bf16 peak of a GPU, TFLOP/s, that MFU is measured against; None where it is not known."""
    return peak_tflops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_tflops_of(name: str) -> float | None:
    """The same of a GPU by its name."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
