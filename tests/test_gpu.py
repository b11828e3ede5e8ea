"""Training, quantization, generation and the probe on a GPU: `python -m pytest -m gpu tests` on a machine with one."""

import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from osp.config import MonitorConfig
from osp.device import native_fp8
from osp.model.attention import KERNELS
from osp.model.fp8 import fp8_linear
from osp.model.transformer import build_model
from osp.monitor.probe import ProbeText, probe
from osp.quant.gptq import quantize_weights_gptq
from osp.quant.spec import INNER_SITES, QuantSpec
from tests import device_checks as checks
from tests.device_checks import CPU, FLOATS, PRESETS, SHAPES, VARIANTS

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu
needs_fp8 = pytest.mark.skipif(find_spec("torchao") is None or not native_fp8("cuda"), reason="needs torchao and sm_89")


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("name", VARIANTS)
def test_model_starts_from_the_same_bits_on_every_device(name: str, device: torch.device) -> None:
    model, on_cpu = (build_model(checks.config_of(name), seed=0, device=place) for place in (device, CPU))
    for key, value in on_cpu.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key].cpu(), value, rtol=0, atol=1e-6 if "gain" in key else 0)


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_training_step_equals_float64(name: str, dtype: torch.dtype, documents: bool, device: torch.device) -> None:
    assert checks.model_error(name, device, dtype, documents=documents) < checks.MODEL_LIMIT[dtype]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_recomputed_activations_equal_float64(dtype: torch.dtype, device: torch.device) -> None:
    assert checks.model_error("bhyt", device, dtype, checkpointing=True) < checks.MODEL_LIMIT[dtype]


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_loss_in_chunks_equals_float64(fused: bool, device: torch.device) -> None:
    assert checks.loss_error(device, fused=fused) < checks.LOSS_LIMIT


@pytest.mark.parametrize("name", ["rmsnorm, grouped queries", "off by one"])
@pytest.mark.parametrize("attention", sorted(KERNELS.keys() - {"fa3"}))
def test_every_kernel_of_attention_equals_float64(attention: str, name: str, device: torch.device) -> None:
    assert checks.model_error(name, device, torch.bfloat16, attention=attention) < checks.MODEL_LIMIT[torch.bfloat16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", checks.ORTHOGONAL_LIMIT, ids=str)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_newton_schulz_equals_float64(method: str, dtype: torch.dtype, shape: Any, device: torch.device) -> None:
    error = checks.newton_schulz_error(device, method=method, dtype=dtype, shape=shape)
    assert error < checks.ORTHOGONAL_LIMIT[dtype]


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"method": "gram"}], ids=str)
def test_three_steps_of_every_rule_equal_the_formulas(options: dict[str, Any], device: torch.device) -> None:
    assert checks.optimizer_error(device, **options) < checks.OPTIMIZER_LIMIT


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("name", VARIANTS)
def test_probe_equals_float64(name: str, documents: bool, device: torch.device) -> None:
    assert checks.probe_error(device, name, documents=documents) < checks.PROBE_LIMIT


def test_number_of_waits_of_a_probe_does_not_depend_on_the_number_of_layers(device: torch.device) -> None:
    """The host waits for the upload of a sequence and, once, for all figures."""

    def waits(num_layers: int) -> int:
        model = checks.build_deep(num_layers, device)
        text = ProbeText(*checks.sequences(2))
        probe(model, text, MonitorConfig(sites="all", statistics="all"))  # fills caches
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                probe(model, text, MonitorConfig(sites="all", statistics="all"))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in seen)

    assert 1 <= waits(2) == waits(5) < 12


@pytest.mark.parametrize("preset", PRESETS)
def test_fake_quantization_equals_float64(preset: str, device: torch.device) -> None:
    assert checks.quantization_error(device, preset) < checks.QUANTIZATION_LIMIT


@pytest.mark.parametrize("scheme", ["qat_w4a4", "qat_w4a8", "qat_mxfp4"])
def test_quantization_aware_training_equals_float64(scheme: str, device: torch.device) -> None:
    assert checks.qat_error(device, scheme) < checks.QUANTIZATION_LIMIT


@pytest.mark.parametrize("options", [{}, {"act_order": True, "w_group_size": 20}], ids=str)
def test_gptq_reaches_the_objective_of_float64(options: dict[str, Any], device: torch.device) -> None:
    assert checks.gptq_error(device, **options) < checks.QUANTIZATION_LIMIT


def test_gptq_with_calibration_on_the_host_is_bit_identical(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantized_model() -> Any:
        model = build_model(checks.config_of("rmsnorm, grouped queries"), seed=0, device=device)
        quantize_weights_gptq(model, QuantSpec(w_bits=4), checks.sequences(8)[0], sites=INNER_SITES["w"])
        return model.state_dict()

    on_device = quantized_model()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    assert all(torch.equal(value, on_device[name]) for name, value in quantized_model().items())


@pytest.mark.parametrize("size", [128, 344, 172])
def test_hadamard_transform_equals_float64(size: int, device: torch.device) -> None:
    assert checks.hadamard_error(device, size) < 2e-6


def test_perplexity_equals_float64(device: torch.device) -> None:
    assert checks.perplexity_error(device) < checks.LOSS_LIMIT


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_generation_with_a_cache_equals_float64(name: str, dtype: torch.dtype, device: torch.device) -> None:
    assert checks.generation_error(name, device, dtype) < checks.CACHE_LIMIT[dtype]


@needs_fp8
def test_fp8_products_equal_the_emulated_ones(device: torch.device) -> None:
    x, weight = checks.draw(256, 128).to(device).bfloat16(), checks.draw(64, 128, seed=1).to(device).bfloat16()
    native, emulated = (fp8_linear(emulate=emulate)(x, weight, None) for emulate in (False, True))
    assert checks.relative_error(native, emulated) < 0.02


# Compilation takes seconds to minutes: these come last.


COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("ssnorm, projections", {}),
    ("ssnorm, projections", {"documents": True, "checkpointing": True}),
    ("bhyt", {"documents": True}),
    ("all of attention", {}),
    ("rmsnorm, grouped queries", {"attention": "flex", "documents": True}),
    ("all of attention", {"attention": "flex", "documents": True, "checkpointing": True}),
]


@pytest.mark.parametrize(("name", "options"), COMPILED, ids=str)
def test_compiled_blocks_equal_float64(name: str, options: dict[str, Any], device: torch.device) -> None:
    error = checks.model_error(name, device, torch.bfloat16, compiled=True, **options)
    assert error < checks.MODEL_LIMIT[torch.bfloat16]


@pytest.mark.parametrize("name", ["rmsnorm, grouped queries", "all of attention"])
def test_flex_attention_of_eager_blocks_equals_float64(name: str, device: torch.device) -> None:
    torch._dynamo.reset()  # a second cap in one process would become a symbol, which flex attention does not take
    error = checks.model_error(name, device, torch.bfloat16, attention="flex", documents=True)
    assert error < checks.MODEL_LIMIT[torch.bfloat16]


def test_compiled_passes_of_the_optimizer_equal_the_formulas(device: torch.device) -> None:
    assert checks.optimizer_error(device, compiled=True) < checks.OPTIMIZER_LIMIT


@pytest.mark.parametrize("name", ["ssnorm, projections", "rmsnorm, grouped queries", "all of attention"])
def test_generation_by_a_cuda_graph_equals_float64(name: str, device: torch.device) -> None:
    error = checks.generation_error(name, device, compile=True)
    assert error < checks.CACHE_LIMIT[torch.float32]
