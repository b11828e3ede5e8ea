"""Hadamard matrices: the defining identities in integers, and the fast product against a dense one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from osp.quant.hadamard import (
    hadamard_matrix,
    hadamard_transform,
    jacobsthal,
    orders,
    paley_kind,
    prime_power,
    random_hadamard,
    sign_matrix,
)
from tests.quant.quant_oracle import sylvester

MODELS = [yaml.safe_load(path.read_text()) for path in (Path(__file__).parents[2] / "configs/model").glob("*.yaml")]
MODEL_WIDTHS = {
    width
    for m in MODELS
    for width in (m["hidden_size"], m["intermediate_size"], m["hidden_size"] // m["num_attention_heads"])
}
PALEY = [12, 20, 24, 28, 36, 44, 60, 76, 100, 108, 140, 244, 344]  # 27, 49 and 343 are among their fields


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, *PALEY])
def test_signs_are_orthogonal_in_integers(order: int) -> None:
    h = sign_matrix(order)
    assert h.shape == (order, order)
    assert set(h.unique().tolist()) <= {-1, 1}
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.int64))


@pytest.mark.parametrize("q", [3, 5, 9, 13, 25, 27, 49, 343])
def test_jacobsthal_matrix_satisfies_its_identities(q: int) -> None:
    """Q Q^T = q I - J, rows that sum to 0, and Q^T = chi(-1) Q define it up to a relabelling of the field."""
    chi = jacobsthal(q)
    assert torch.equal(chi @ chi.T, q * torch.eye(q, dtype=torch.int64) - 1)
    assert torch.equal(chi.sum(1), torch.zeros(q, dtype=torch.int64))
    assert torch.equal(chi.T, chi if q % 4 == 1 else -chi)
    if q in (3, 5, 13):  # a prime: chi is Euler's criterion
        euler = [[((i - j) % q) ** ((q - 1) // 2) % q for j in range(q)] for i in range(q)]
        assert chi.tolist() == [[-1 if e == q - 1 else e for e in row] for row in euler]


def test_prime_powers_are_recognized() -> None:
    assert {q: prime_power(q) for q in (3, 9, 15, 27, 343, 344, 171, 1, 2, 4)} == {
        3: (3, 1), 9: (3, 2), 15: None, 27: (3, 3), 343: (7, 3), 344: None, 171: None, 1: None, 2: None, 4: None,
    }  # fmt: skip


@pytest.mark.parametrize("n", sorted({1, 2, 6, 48, 172, 688, 1376, 5504, 11008, 14336} | MODEL_WIDTHS))
def test_transform_is_orthogonal_and_flat_for_every_width(n: int) -> None:
    factors = orders(n)
    assert math.prod(factors) == n
    assert max(factors, default=1) <= 344  # the cost of the product, whatever the width
    hadamard = all(order & (order - 1) == 0 or paley_kind(order) for order in factors)
    assert hadamard or n in (6, 172)
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = hadamard_transform(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-12)
    if n <= 1408:
        h = hadamard_matrix(n)
        torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(y, x @ h, rtol=0, atol=1e-12)
        bound = 1 if hadamard else math.sqrt(2)  # how flat it makes a single outlier
        assert h.abs().max() <= bound / math.sqrt(n) + 1e-12


def test_ffn_width_of_osp_is_a_power_of_two_times_paley() -> None:
    assert orders(5504) == (16, 344)


def test_product_is_the_kronecker_product_of_the_factors() -> None:
    h = np.kron(sylvester(2), sign_matrix(344).numpy() / math.sqrt(344))
    np.testing.assert_allclose(hadamard_matrix(688).numpy(), h, rtol=0, atol=1e-14)
    np.testing.assert_allclose(hadamard_matrix(64).numpy(), sylvester(64), rtol=0, atol=1e-14)
    np.testing.assert_allclose(hadamard_matrix(256).numpy(), sylvester(256), rtol=0, atol=1e-14)


def test_transform_keeps_the_dtype_and_spreads_an_outlier() -> None:
    x = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    x[..., 5] = 1.0
    y = hadamard_transform(x)
    assert y.dtype == torch.bfloat16
    assert y.shape == x.shape
    assert torch.equal(y.abs(), torch.full_like(y, 1 / 8))


def test_random_hadamard_is_orthogonal_and_follows_its_generator() -> None:
    a, b, c = (random_hadamard(48, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.testing.assert_close(a @ a.T, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-12)
