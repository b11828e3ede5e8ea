"""Peaks by the name of the GPU, and what makes a process compute the same bits every time."""

import os
from collections.abc import Iterator

import pytest
import torch

from osp.device import compute_deterministically, peak_tflops_of

NAMES = {  # as CUDA reports them; dense bf16 TFLOP/s of the vendor's datasheets, half of what they give with sparsity
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 SXM": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA B200": 2250,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165,
    "Tesla T4": None,
    "": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_peak_of_a_gpu_by_its_name(name: str) -> None:
    assert peak_tflops_of(name) == NAMES[name]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no trace of `compute_deterministically` in this process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")  # with which torch refuses products
    cudnn, sdp = torch.backends.cudnn.deterministic, torch.backends.cuda.cudnn_sdp_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = cudnn
    torch.backends.cuda.enable_cudnn_sdp(sdp)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore


@pytest.mark.usefixtures("restored")
def test_determinism_is_strict_and_leaves_out_cudnn_attention() -> None:
    """Only without warn_only does torch choose the backward pass of attention that has no atomic sums."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    compute_deterministically()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
