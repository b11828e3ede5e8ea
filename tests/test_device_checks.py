"""The comparisons of tests/test_gpu.py on a CPU: they hold there, and a planted fault exceeds each limit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from osp.model.attention import KVCache, causal_attention, visible_logits
from osp.optim.muon import COEFFICIENTS
from osp.optim.rules import WholeRule
from osp.quant.gptq import gptq
from osp.quant.hadamard import _factor
from osp.quant.spec import QuantSpec
from tests import device_checks as checks
from tests.device_checks import CPU, FLOATS, SHAPES

FEW = ("ssnorm, projections", "bhyt", "all of attention")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", FEW)
def test_training_step_equals_float64(name: str, dtype: torch.dtype) -> None:
    assert checks.model_error(name, CPU, dtype) < checks.MODEL_LIMIT[dtype]
    assert checks.model_error(name, CPU, dtype, documents=True, checkpointing=True) < checks.MODEL_LIMIT[dtype]


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_newton_schulz_equals_float64(dtype: torch.dtype, method: str) -> None:
    for shape in SHAPES:
        assert checks.newton_schulz_error(CPU, method=method, dtype=dtype, shape=shape) < checks.ORTHOGONAL_LIMIT[dtype]


@pytest.mark.parametrize("name", FEW)
def test_probe_and_generation_equal_float64(name: str) -> None:
    for documents in (False, True):
        assert checks.probe_error(CPU, name, documents=documents) < checks.PROBE_LIMIT
    for dtype in FLOATS:
        assert checks.generation_error(name, CPU, dtype) < checks.CACHE_LIMIT[dtype]


@pytest.mark.parametrize("preset", ["strict", "quarot", "nvfp4", "q4_0"])
def test_fake_quantization_equals_float64(preset: str) -> None:
    assert checks.quantization_error(CPU, preset) < checks.QUANTIZATION_LIMIT


def test_other_comparisons_hold() -> None:
    assert checks.loss_error(CPU) < checks.LOSS_LIMIT
    assert checks.loss_error(CPU, fused=True) < checks.LOSS_LIMIT
    assert checks.perplexity_error(CPU) < checks.LOSS_LIMIT
    assert checks.optimizer_error(CPU, per_head=True) < checks.OPTIMIZER_LIMIT
    assert checks.qat_error(CPU, "qat_w4a4") < checks.QUANTIZATION_LIMIT
    assert checks.gptq_error(CPU, act_order=True) < checks.QUANTIZATION_LIMIT
    assert checks.hadamard_error(CPU, 344) < 2e-6


def scaled(function: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    """Return the function with results that are wrong by a factor, except in float64, which the oracle computes in."""

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        result = function(*arguments, **options)
        return result if result.dtype == torch.float64 else result * factor

    return wrong


def without_documents(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options: Any) -> Tensor:
    return causal_attention(q, k, v, mask if q.dtype == torch.float64 else None, *options)


class Unrounded:
    @staticmethod
    def apply(quantize: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return quantize(x) if x.dtype == torch.float64 else x


def sees_all_slots(cache: KVCache, positions: Tensor) -> Tensor:
    return torch.ones(len(positions), 1, positions.shape[1], cache.width, dtype=torch.bool)


def without_hessian(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> Tensor:
    return gptq(weight, hessian if weight.dtype == torch.float64 else torch.eye(len(hessian)), spec)


scale = WholeRule.scale
OSP = "ssnorm, projections"
FAULTS: dict[str, tuple[str, Any, Callable[[], float], float]] = {  # what is broken, by what, a comparison, its limit
    "attention": (
        "osp.model.transformer.causal_attention", scaled(causal_attention, 1.001),
        lambda: checks.model_error(OSP, CPU, torch.float32), checks.MODEL_LIMIT[torch.float32],
    ),
    "document mask": (
        "osp.model.transformer.causal_attention", without_documents,
        lambda: checks.model_error(OSP, CPU, torch.bfloat16, documents=True), checks.MODEL_LIMIT[torch.bfloat16],
    ),
    "softmax": ("torch.nn.functional.softmax", scaled(F.softmax, 1.0001), lambda: checks.loss_error(CPU), 1e-5),
    "coefficients": (
        "osp.optim.muon.COEFFICIENTS", {"keller_jordan": COEFFICIENTS["keller_jordan_bf16"]},
        lambda: checks.newton_schulz_error(CPU, method="gram", dtype=torch.float32, shape=SHAPES[1]),
        checks.ORTHOGONAL_LIMIT[torch.float32],
    ),
    "scale of Muon": (
        "osp.optim.rules.WholeRule.scale", lambda rule, group: 1.001 * scale(rule, group),
        lambda: checks.optimizer_error(CPU), checks.OPTIMIZER_LIMIT,
    ),
    "logits in the probe": (
        "osp.monitor.statistics.visible_logits", scaled(visible_logits, 1.05),
        lambda: checks.probe_error(CPU), checks.PROBE_LIMIT,
    ),
    "rounding of activations": (
        "osp.quant.apply.StraightThrough", Unrounded,
        lambda: checks.quantization_error(CPU, "osp_paper"), checks.QUANTIZATION_LIMIT,
    ),
    "rounding in training": (
        "osp.quant.qat.StraightThrough", Unrounded, lambda: checks.qat_error(CPU, "qat_w4a8"), checks.QUANTIZATION_LIMIT
    ),
    "GPTQ": (
        "tests.device_checks.gptq", without_hessian, lambda: checks.gptq_error(CPU), checks.QUANTIZATION_LIMIT
    ),
    "Hadamard": ("osp.quant.hadamard._factor", scaled(_factor, 1.0001), lambda: checks.hadamard_error(CPU, 172), 2e-6),
    "perplexity": (
        "osp.model.transformer.causal_attention", scaled(causal_attention, 1.01),
        lambda: checks.perplexity_error(CPU), checks.LOSS_LIMIT,
    ),
    "cache": (
        "osp.model.attention.KVCache.mask", sees_all_slots,
        lambda: checks.generation_error(OSP, CPU, torch.bfloat16), checks.CACHE_LIMIT[torch.bfloat16],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_comparison_finds_a_planted_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, replacement, comparison, limit = FAULTS[fault]
    assert comparison() < limit
    monkeypatch.setattr(broken, replacement)
    assert comparison() > 2 * limit
