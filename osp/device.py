"""The device of a process: its choice, threads, native number formats and peak speed."""

import ctypes
import os
import sys
from typing import Literal

import torch
from torch.nn.attention import activate_flash_attention_impl

from osp.errors import UserError, as_user_error

SAFE_CUDNN = 91501  # attention by earlier versions is wrong at lengths that 128 does not divide (torch issue 169849)


def prepare_cpu(threads: int | None) -> None:
    """Set the number of threads (None: the cores of the host divided by its ranks) and keep freed memory.

    By default glibc returns large freed blocks to the kernel, which maps and zeroes them again in every step. Keeping
    them makes matrix products with a large result up to 1.5 times faster.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local_ranks()))
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def compute_deterministically() -> None:
    """Let this process compute the same bits every time, or raise an error; to be called before CUDA starts."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # fixed workspaces: cuBLAS chooses the same kernels every time
    torch.use_deterministic_algorithms(True)  # with warn_only, attention would keep its backward pass with atomic sums
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore - costs a write to every new tensor
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass sums in any order


def local_ranks() -> int:
    """Return the number of ranks on this host, from the variable of torchrun or deepspeed; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def choose_device(device: Literal["auto", "cpu", "cuda"], *, key: str = "device") -> torch.device:
    """Return the device of a single process. `auto` is the GPU if there is one. key: name of the key in the error."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}=cuda, but torch finds no GPU here; set {key}=cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def native_bf16(device: torch.device | str) -> bool:
    """Return whether `device` multiplies bf16 matrices in hardware: CUDA from sm_80, CPUs with AMX or AVX512-BF16."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def native_fp8(device: torch.device | str) -> bool:
    """Return whether `device` multiplies 8-bit floats in hardware: CUDA from sm_89 on."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def prefers_cudnn(device: torch.device) -> bool:
    """Return whether attention by cuDNN goes first: torch 2.13's own rule, sm_90, sm_100 or sm_103 and a safe cuDNN."""
    safe = torch.cuda.is_available() and (torch.backends.cudnn.version() or 0) >= SAFE_CUDNN
    return safe and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0), (10, 3))


def prepare_attention(choice: str, device: torch.device) -> None:
    """Put FlashAttention-3 in torch's place for fa3. Raises `UserError` if `train.attention=choice` cannot run here."""
    if choice == "cudnn" and (torch.backends.cudnn.version() or 0) < SAFE_CUDNN:
        raise UserError("train.attention=cudnn needs cuDNN 9.15.1 or later; set train.attention=flash")
    if choice == "fa3":
        if torch.cuda.get_device_capability(device)[0] != 9:
            raise UserError("train.attention=fa3 needs a GPU of compute capability 9; set train.attention=auto")
        with as_user_error("train.attention=fa3: ", ImportError, RuntimeError, after="; set train.attention=auto"):
            activate_flash_attention_impl("FA3")


# Dense bf16 TFLOP/s by vendor datasheet; keys are parts of a device's name, and the first match counts.
PEAK_TFLOPS = {"H200 NVL": 835.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0}
PEAK_TFLOPS |= {"B200": 2250.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "4090": 165.0}


def peak_tflops_of(name: str) -> float | None:
    """Return the dense bf16 peak in TFLOP/s of a GPU with this name, the denominator of MFU; None if unknown."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
