"""The mathematics of Muon: replace each update matrix by the nearest one whose singular values are all about 1.

For a weight matrix W (m, n) with gradient G, momentum mu, learning rate lr and weight decay wd:

    M <- G + mu M                               momentum, a sum and not a mean
    U  = G + mu M                               Nesterov; without it U = M
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(m, n)) newton_schulz(U)

Source: Jordan et al. 2024; the scale is Moonlight's (Liu et al. 2025, arXiv 2502.16982), as in OSP (arXiv 2506.19697).
These functions know nothing of optimizers and ranks; `osp.optim.rules` applies them to parameter groups.

X: (..., m, n) matrices, transposed so that m <= n.  S: singular values.  A = X X^T: (..., m, m), the Gram matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from osp.device import native_bf16
from osp.model_config import Heads

Triple = tuple[float, float, float]
_RESTART = 3  # steps between fresh Gram matrices


@dataclass(frozen=True)
class Coefficients:
    """Polynomials s -> a s + b s^3 + c s^5, one per step, the last one repeated. X starts as X / (margin |X| + eps)."""

    triples: tuple[Triple, ...]
    margin: float = 1.0
    eps: float = 1e-8


COEFFICIENTS = {
    "keller_jordan": Coefficients(((3.4445, -4.7750, 2.0315),)),  # Jordan et al. 2024; OSP's optimization.py
    "keller_jordan_bf16": Coefficients(((3.4375, -4.78125, 2.03125),)),  # as JAX rounds them beside bf16 matrices
    "polar_express": Coefficients(  # Amsel et al. 2025, arXiv 2505.16932: optimal for 5 steps, 2% safety
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        margin=1.02,
        eps=1e-6,
    ),
    "cubic": Coefficients(((1.5, -0.5, 0.0),)),  # Newton-Schulz for the polar factor, Higham 2008, eq. 8.20
}


@torch.no_grad()
def newton_schulz(
    x: Tensor,
    steps: int = 5,
    method: Literal["standard", "gram"] = "standard",
    coefficients: str = "keller_jordan",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return U p(S) V^T for x = U S V^T: every singular value moves towards 1.

    x: (..., m, n); the result has its shape, and the dtype of the products. steps: number of polynomials whose
    composition is p, after a division by the Frobenius norm. method: `gram` computes the same through (m, m) matrices
    only, see `_iterate_gram`. coefficients: a key of `COEFFICIENTS`. dtype: of the products; None:
    `newton_schulz_dtype` of x's device.
    """
    chosen = COEFFICIENTS[coefficients]
    dtype = dtype or newton_schulz_dtype(x.device, method=method)
    y = x.mT if x.shape[-2] > x.shape[-1] else x
    if y.numel() == 0:
        return x.to(dtype)
    # fp32: the sum of squares of a large matrix overflows fp16 and has no digits left in bf16
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    y = torch.div(y, norm.mul_(chosen.margin).add_(chosen.eps), out=y.new_empty(y.shape, dtype=dtype))
    triples = [chosen.triples[min(i, len(chosen.triples) - 1)] for i in range(steps)]
    y = _METHODS[method](y.view(-1, *y.shape[-2:]), triples).view(y.shape)
    return y.mT if x.shape[-2] > x.shape[-1] else y


def newton_schulz_dtype(
    device: torch.device, *, method: str = "standard", choice: Literal["auto", "bf16", "fp32"] = "auto"
) -> torch.dtype:
    """Return the dtype of the matrix products: bf16 where it is native, else fp32.

    `gram` needs the small eigenvalues of A to survive rounding, so it uses fp16, which has three more bits, in place of
    bf16: entries stay below a thousand, far from fp16's limit. A CPU emulates fp16 and gets fp32.
    """
    emulated = not native_bf16(device) or (method == "gram" and device.type == "cpu")
    if choice == "fp32" or (choice == "auto" and emulated):
        return torch.float32
    return torch.float16 if method == "gram" else torch.bfloat16


def whole_shape(shape: Sequence[int], heads: Heads | None) -> tuple[int, ...]:
    """Return the shape that is orthogonalized as a whole: the parameter's, or with `heads` the shape of one head."""
    whole = list(shape)
    if heads is not None:
        whole[heads.dim] //= heads.count
    return tuple(whole)


def newton_schulz_flops(shape: Sequence[int], steps: int = 5, method: str = "standard") -> int:
    """Return the floating point operations of the matrix products of `newton_schulz` on one matrix."""
    m, n = sorted(shape)
    standard = steps * (4 * m * m * n + 2 * m**3)  # X X^T and B X; A^2
    return min(standard, _gram_flops(m, n, steps)) if method == "gram" else standard


def _iterate(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, once per triple. x: (K, m, n), overwritten

    Buffers are allocated once. torch copies the terms a X and b A to the result before it adds a product. With a on the
    diagonal of the factor, or b on the diagonal of c A, nothing is copied, but bf16 then rounds them once more: the
    error against float64 grows from 1% to 2%.
    """
    other, gram = torch.empty_like(x), x.new_empty(len(x), x.shape[1], x.shape[1])
    factor = torch.empty_like(gram)
    for a, b, c in triples:
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=factor)
        x, other = torch.baddbmm(x, factor, x, beta=a, out=other), x
    return x


def _iterate_gram(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Compute `_iterate` from (m, m) products: Z = a I + b A + c A^2, Q <- Z Q, A <- Z A Z; at the end X <- Q X.

    Rounding gives A negative eigenvalues that the iteration would amplify, so A is recomputed from Q X every `_RESTART`
    steps (Gram Newton-Schulz, Dao et al. 2026). A restart costs two products with X, so for nearly square matrices
    `_iterate` has fewer flops and is used instead.
    """
    m, n = x.shape[-2:]
    if _gram_flops(m, n, len(triples)) >= newton_schulz_flops((m, n), len(triples)):
        return _iterate(x, triples)
    for part in (triples[i : i + _RESTART] for i in range(0, len(triples), _RESTART)):
        gram = torch.bmm(x, x.mT)
        product = None
        for step, (a, b, c) in enumerate(part):
            z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            z.diagonal(dim1=-2, dim2=-1).add_(a)
            product = z if product is None else torch.bmm(z, product)
            if step < len(part) - 1:
                gram = torch.bmm(torch.bmm(z, gram), z)
        if product is not None:
            x = torch.bmm(product, x)
    return x


def _gram_flops(m: int, n: int, steps: int) -> int:
    """A part costs X X^T and Q X, and A^2, Z A, (Z A) Z, Z Q except for what its first and last step can skip."""
    lengths = [min(_RESTART, steps - i) for i in range(0, steps, _RESTART)]
    return sum(4 * m * m * n + 2 * m**3 * (4 * length - 3) for length in lengths)


_METHODS = {"standard": _iterate, "gram": _iterate_gram}
