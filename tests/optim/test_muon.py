"""Newton-Schulz against the SVD and against itself in other forms."""

import typing

import pytest
import torch
from torch import Tensor

from osp.config import OptimizerConfig
from osp.optim.muon import COEFFICIENTS, newton_schulz, newton_schulz_dtype, newton_schulz_flops
from osp.optim.rules import Muon, Normalized

DTYPES: dict[typing.Literal["standard", "gram"], torch.dtype] = {"standard": torch.bfloat16, "gram": torch.float16}
SHAPES = [(16, 16), (16, 48), (48, 16), (1, 7), (7, 1), (123, 5)]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def through_svd(x: Tensor, steps: int, name: str) -> Tensor:
    """U p(S) V^T: the polynomials applied to the singular values."""
    chosen = COEFFICIENTS[name]
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (torch.linalg.vector_norm(s) * chosen.margin + chosen.eps)
    for i in range(steps):
        a, b, c = chosen.triples[min(i, len(chosen.triples) - 1)]
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(name, method, shape, steps) -> None:
    x = random(*shape)
    result = newton_schulz(x, steps, method, name, dtype=torch.float64)
    torch.testing.assert_close(result, through_svd(x, steps, name), atol=1e-9, rtol=1e-9)


def test_rounded_coefficients_are_those_of_weakly_typed_scalars() -> None:
    """JAX gives a Python float beside a bf16 array the array's dtype."""
    (exact,), (rounded,) = (COEFFICIENTS[name].triples for name in ("keller_jordan", "keller_jordan_bf16"))
    assert torch.equal(torch.tensor(rounded), torch.tensor(exact).bfloat16().float())


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (96, 32)])
def test_newton_schulz_in_fp32_is_close_to_fp64(method, shape) -> None:
    x = random(*shape, dtype=torch.float32)
    result = newton_schulz(x, 5, method, dtype=torch.float32)
    torch.testing.assert_close(result.double(), through_svd(x, 5, "keller_jordan"), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["keller_jordan", "polar_express"])
def test_gram_in_fp16_is_more_accurate_than_standard_in_bf16(name) -> None:
    """Spectra over 4 decades and of low rank: rounding must not turn small eigenvalues of the Gram matrix negative."""
    u, _, vt = torch.linalg.svd(random(64, 256), full_matrices=False)
    wide = (u * torch.logspace(0, -4, 64, dtype=torch.float64)) @ vt
    x = torch.stack([wide, random(64, 4) @ random(4, 256)]).float()
    exact = torch.stack([through_svd(matrix, 5, name) for matrix in x])
    error = {
        method: float((newton_schulz(x, 5, method, name, dtype=dtype).double() - exact).norm() / exact.norm())
        for method, dtype in DTYPES.items()
    }
    assert error["gram"] < min(0.1, 0.5 * error["standard"]), error


def test_gram_takes_fewer_flops_on_wide_matrices_and_equals_standard_on_square_ones(monkeypatch) -> None:
    flops = {}
    bmm, baddbmm = torch.bmm, torch.baddbmm

    def count(x: Tensor, y: Tensor) -> None:
        flops[method] = flops.get(method, 0) + x.shape[0] * x.shape[1] * x.shape[2] * y.shape[2]

    monkeypatch.setattr(torch, "bmm", lambda x, y, **kw: (count(x, y), bmm(x, y, **kw))[1])
    monkeypatch.setattr(torch, "baddbmm", lambda z, x, y, **kw: (count(x, y), baddbmm(z, x, y, **kw))[1])
    for ratio, saves in ((1, False), (1.25, False), (2.6875, True), (4, True)):
        flops.clear()
        for method in ("standard", "gram"):
            newton_schulz(random(2, 16, int(16 * ratio)), 5, method)
            one = newton_schulz_flops((int(16 * ratio), 16), 5, method)
            assert 2 * flops[method] == 2 * one, "a multiplication and an addition each, of two matrices"
        assert flops["gram"] < flops["standard"] if saves else flops["gram"] == flops["standard"], (ratio, flops)


@pytest.mark.parametrize("shape", [(24, 24), (24, 80), (80, 24)])
def test_polar_express_is_close_to_the_polar_factor(shape) -> None:
    x = random(*shape)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    result = newton_schulz(x, 5, coefficients="polar_express", dtype=torch.float64)
    keller = newton_schulz(x, 5, dtype=torch.float64)
    error, keller_error = (float((y - u @ vt).norm() / (u @ vt).norm()) for y in (result, keller))
    assert error < 0.6 * keller_error, (error, keller_error)
    converged = newton_schulz(x, 40, coefficients="cubic", dtype=torch.float64)
    torch.testing.assert_close(converged, u @ vt, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_batch_equals_its_slices(method, shape) -> None:
    x = random(2, 3, *shape, dtype=torch.float32)
    result = newton_schulz(x, method=method)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(result[i, j], newton_schulz(x[i, j], method=method), atol=1e-5, rtol=1e-5)


def test_scale_of_the_input_does_not_matter() -> None:
    x = random(8, 12)
    torch.testing.assert_close(newton_schulz(1e6 * x), newton_schulz(x), atol=1e-6, rtol=1e-5)


def test_input_dtype_and_values_are_kept() -> None:
    x = random(8, 12, dtype=torch.float32).bfloat16()
    before = x.clone()
    assert newton_schulz(x).dtype == torch.bfloat16
    assert torch.equal(x, before)
    assert newton_schulz(torch.zeros(3, 4, 5)).abs().max() == 0
    assert newton_schulz(torch.zeros(0, 4, 5)).shape == (0, 4, 5)


def test_dtype_follows_choice_and_method() -> None:
    cpu = torch.device("cpu")
    assert newton_schulz_dtype(cpu, choice="fp32") == torch.float32
    assert newton_schulz_dtype(cpu, choice="bf16") == torch.bfloat16
    assert newton_schulz_dtype(cpu, choice="bf16", method="gram") == torch.float16
    assert newton_schulz_dtype(cpu, method="gram") == torch.float32, "a CPU emulates fp16"


def test_scaled_updates_have_the_rms_of_adamw() -> None:
    for shape in ((16, 16), (16, 64), (64, 16)):
        orthogonal = torch.linalg.svd(random(*shape), full_matrices=False)
        update = Muon(OptimizerConfig()).scale({"shapes": [shape], "heads": None}) * orthogonal[0] @ orthogonal[2]
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2)
    for size in (1, 64):
        rule = Normalized(OptimizerConfig())
        update = rule.scale({"shapes": [(size,)], "heads": None}) * rule.direction(random(3, size), {})
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2)
