"""Hadamard matrices of any order that a model needs, by construction, and their product with activations.

A Hadamard matrix of order n has entries +-1 and H H^T = n I; divided by sqrt(n) it is the rotation that spreads an
outlier evenly over all channels. `orders(n)` writes n as a product of orders that Sylvester's or one of Paley's
constructions gives. The matrix is their Kronecker product, so the n x n matrix is never built and the product costs
n * sum(orders) instead of n^2. 5504, the FFN of OSP's model, is 16 x 344 and 344 = 7^3 + 1.

If n has no such product (172 = 4 x 43: neither 172 nor 43 x 4 is Paley's), its odd part is rotated by the discrete
Hartley transform, cos + sin of 2 pi i j / m over sqrt(m): orthogonal for every m, and its entries are at most
sqrt(2) times the entries of a Hadamard matrix.
"""

import functools
import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

SYLVESTER = 64  # largest power of two that is one dense factor: two of them make 4096


def hadamard_transform(x: Tensor) -> Tensor:
    """Return x H (..., n) for the H of `hadamard_matrix(n)`: computed in fp32 at least, in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = x.shape[-1]
    for order in reversed(orders(n)):
        matrix = _factor(order, wide.dtype, wide.device)
        # after one transposition per factor every axis is back at its place
        wide = (wide.reshape(-1, n // order, order) @ matrix).transpose(1, 2)
    return wide.reshape(x.shape).to(x.dtype)


def hadamard_matrix(n: int) -> Tensor:
    """Return (n, n) float64, orthogonal: the Kronecker product of the factors of `orders(n)`."""
    return hadamard_transform(torch.eye(n, dtype=torch.float64))


def random_hadamard(n: int, *, generator: torch.Generator) -> Tensor:
    """Return (n, n) float64, orthogonal: diag(s) H with random signs s (QuaRot, arXiv 2404.00456)."""
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return signs[:, None] * hadamard_matrix(n)


@functools.cache
def orders(n: int) -> tuple[int, ...]:
    """Return the orders of the factors of n at the least cost: powers of two, Paley's orders, at most one other."""
    assert n >= 1
    hadamard = _products(n)
    odd_part = n // (n & -n)  # for Hartley's transform, if n is no product of known orders
    others = (odd_part,) if hadamard is None else tuple(order for order in hadamard if order > 2)
    exponent = (n // math.prod(others)).bit_length() - 1  # of the power of two, which splits into nearly equal factors
    count = -(-exponent // (SYLVESTER.bit_length() - 1))
    return (*(2 ** ((exponent + i) // count) for i in range(count)), *others)


@functools.cache
def _factor(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (order, order), orthogonal up to rounding: one factor of a rotation, computed in float64."""
    if order & (order - 1) == 0 or paley_kind(order):
        matrix = sign_matrix(order).double()
    else:
        angle = torch.arange(order, dtype=torch.float64)
        angle = torch.outer(angle, angle) % order * (2 * math.pi / order)
        matrix = angle.cos() + angle.sin()
    return (matrix / math.sqrt(order)).to(device=device, dtype=dtype)


def sign_matrix(order: int) -> Tensor:
    """Return (order, order) int64 of +-1 with H H^T = order * I, for a power of two or an order of Paley's."""
    pair = torch.tensor([[1, 1], [1, -1]])
    if order & (order - 1) == 0:
        one = torch.ones(1, 1, dtype=torch.int64)
        return functools.reduce(torch.kron, [pair] * (order.bit_length() - 1), one)
    if paley_kind(order) == 1:
        matrix = F.pad(jacobsthal(order - 1) + torch.eye(order - 1, dtype=torch.int64), (1, 0, 1, 0), value=1)
        matrix[1:, 0] = -1
        return matrix
    core = F.pad(jacobsthal(order // 2 - 1), (1, 0, 1, 0), value=1)
    core[0, 0] = 0
    identity = torch.eye(len(core), dtype=torch.int64)
    return torch.kron(core, pair) + torch.kron(identity, torch.tensor([[1, -1], [-1, -1]]))


def paley_kind(order: int) -> int | None:
    """Return Paley's construction of this order, or None.

    For a prime power q: 1 if order = q + 1 and q = 3 mod 4, 2 if order = 2 (q + 1) and q = 1 mod 4.
    """
    if order % 4 == 0 and prime_power(order - 1):  # order - 1 is 3 mod 4
        return 1
    return 2 if order % 8 == 4 and prime_power(order // 2 - 1) else None


def jacobsthal(q: int) -> Tensor:
    """Return (q, q) int64 with entries chi(a_i - a_j): 1 for a square of GF(q), -1 for any other element, 0 for 0."""
    base = prime_power(q)
    assert base, f"{q} is not a power of a prime"
    p, k = base
    # element i of GF(p^k) is the polynomial whose coefficients are the digits of i in base p
    place = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // place % p  # (q, k)
    powers = (torch.tensor(_powers_of_primitive_element(p, k)) * place).sum(1)
    chi = torch.zeros(q, dtype=torch.int64)
    chi[powers[0::2]], chi[powers[1::2]] = 1, -1  # the squares are the even powers
    difference = (digits[:, None] - digits[None]) % p  # (q, q, k)
    return chi[(difference * place).sum(-1)]


def prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p^k and p an odd prime, else None."""
    if q < 3 or q % 2 == 0:
        return None
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None


@functools.cache
def _products(n: int) -> tuple[int, ...] | None:
    """Return the orders (2 or Paley's) with product n and the least sum, None without any."""
    if n == 1:
        return ()
    candidates = [
        (order, *others)
        for order in range(2, n + 1)
        if n % order == 0 and (order == 2 or (order & (order - 1) and paley_kind(order)))
        if (others := _products(n // order)) is not None
    ]
    return min(candidates, key=lambda orders: (sum(orders), orders), default=None)


def _powers_of_primitive_element(p: int, k: int) -> list[list[int]]:
    """Return the powers x^0, x^1, ... in GF(p)[x] / (x^k + m), coefficients from the lowest: all nonzero elements.

    The polynomial m is the first one for which x has all p^k - 1 nonzero elements as powers.
    """
    one = [1] + [0] * (k - 1)
    for m in product(range(1, p), *[range(p)] * (k - 1)):  # without m_0 = 0, for which x has no inverse
        powers = [one]
        while len(powers) == 1 or powers[-1] != one:
            *low, top = powers[-1]
            powers.append([(c - top * d) % p for c, d in zip([0, *low], m, strict=True)])  # x^k = -m
        if len(powers) == p**k:
            return powers[:-1]
    raise AssertionError("every finite field has a primitive element")
