"""Rotary positions and causal attention against complex numbers, transformers and a loop in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from osp.model.attention import apply_rotary, causal_attention, document_mask, rotary_table

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None = None,
    *,
    off_by_one: bool = False,
    cap: float = math.inf,
    largest: list[float] | None = None,
) -> Tensor:
    """Return the attention (B, T, H, K) in float64, one softmax at a time; `largest` becomes that of each head."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [s for s in range(t + 1) if documents is None or documents[b, s] == documents[b, t]]
            for h in range(q.shape[2]):
                scores = [float(q[b, t, h] @ k[b, s, h // group]) / math.sqrt(q.shape[3]) for s in seen]
                if largest is not None:
                    largest[h] = max(largest[h], *scores)
                scores = [cap * math.tanh(s / cap) for s in scores] if cap < math.inf else scores
                weights = [math.exp(score - max(scores)) for score in scores]
                total = sum(weights) + (math.exp(-max(scores)) if off_by_one else 0)
                for s, weight in zip(seen, weights, strict=True):
                    out[b, t, h] += weight / total * v[b, s, h // group]
    return out


def test_rotary_is_multiplication_by_a_complex_phase() -> None:
    """Channels i and i + K/2 are real and imaginary part; position t rotates them by t theta^(-2 i / K)."""
    length, head_dim, theta = 50, 12, 1000.0
    x = normal(2, length, 3, head_dim)
    y = apply_rotary(x, *rotary_table(head_dim, length, theta, "cpu")).double()
    for t in (0, 1, 17, 49):
        for i in range(head_dim // 2):
            phase = complex(math.cos(t * theta ** (-2 * i / head_dim)), math.sin(t * theta ** (-2 * i / head_dim)))
            z = torch.complex(x[:, t, :, i].double(), x[:, t, :, i + head_dim // 2].double()) * phase
            torch.testing.assert_close(y[:, t, :, i], z.real, **CLOSE)
            torch.testing.assert_close(y[:, t, :, i + head_dim // 2], z.imag, **CLOSE)


def test_rotary_equals_transformers() -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    q, k = normal(2, 33, 4, 16), normal(2, 33, 2, 16, seed=1)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(33)[None])
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    table = rotary_table(16, 33, 500.0, "cpu")
    torch.testing.assert_close(apply_rotary(q, *table), expected[0].transpose(1, 2), **CLOSE)
    torch.testing.assert_close(apply_rotary(k, *table), expected[1].transpose(1, 2), **CLOSE)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)
    cos, sin = rotary_table(16, 64, 10_000.0, "cpu")

    def score(t: int, s: int) -> float:
        return float((apply_rotary(q, cos[t, None], sin[t, None]) * apply_rotary(k, cos[s, None], sin[s, None])).sum())

    for shift in (1, 13, 40):
        assert score(10 + shift, 3 + shift) == pytest.approx(score(10, 3), abs=1e-4)
    assert abs(score(10, 3) - score(11, 3)) > 1e-2


def test_rotary_returns_bf16_for_bf16() -> None:
    x = normal(1, 5, 2, 8).bfloat16()
    table = rotary_table(8, 5, 10_000.0, "cpu")
    y = apply_rotary(x, *table)
    assert y.dtype == torch.bfloat16
    assert table[0].dtype == torch.float32
    torch.testing.assert_close(y.float(), apply_rotary(x.float(), *table), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("off_by_one", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
def test_causal_attention_equals_a_float64_loop(kv_heads: int, off_by_one: bool) -> None:
    q, k, v = 2 * normal(2, 11, 6, 4), normal(2, 11, kv_heads, 4, seed=1), normal(2, 11, kv_heads, 4, seed=2)
    actual = causal_attention(q, k, v, off_by_one=off_by_one)
    torch.testing.assert_close(actual.double(), naive_attention(q, k, v, off_by_one=off_by_one), **CLOSE)


@pytest.mark.parametrize("off_by_one", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_masked_attention_equals_a_float64_loop(kv_heads: int, off_by_one: bool) -> None:
    """Documents of length 1 and a different packing in each sequence; ids need not be sorted or start at 0."""
    documents = torch.tensor([[7, 7, 7, 2, 2, 2, 2, 5], [0, 1, 1, 1, 1, 1, 3, 3]])
    q, k, v = 2 * normal(2, 8, 4, 6), normal(2, 8, kv_heads, 6, seed=1), normal(2, 8, kv_heads, 6, seed=2)
    actual = causal_attention(q, k, v, document_mask(documents), off_by_one=off_by_one)
    torch.testing.assert_close(actual.double(), naive_attention(q, k, v, documents, off_by_one=off_by_one), **CLOSE)


DOCUMENTS = torch.tensor([[7, 7, 7, 2, 2, 2, 2, 5, 5, 5, 5], [0, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3]])


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("off_by_one", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_cap_and_largest_logits_equal_a_float64_loop(
    cap: float | None, off_by_one: bool, documents: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 4 queries, with and without a gradient. The largest logits are those before the cap, and they add up
    over calls. A softmax without the cap is another one."""
    monkeypatch.setattr("osp.model.attention._BLOCK", 4)
    q, k, v = 2 * normal(2, 11, 6, 4), normal(2, 11, 3, 4, seed=1), normal(2, 11, 3, 4, seed=2)
    mask = None if documents is None else document_mask(documents)
    before = torch.tensor([0.0, 1e3, *(4 * [-math.inf])])
    expected = before.tolist()
    options: dict[str, Any] = {"off_by_one": off_by_one, "cap": cap or math.inf}
    exact = naive_attention(q, k, v, documents, largest=expected, **options)
    for leaf in (q, q.clone().requires_grad_()):
        largest = before.clone()
        actual = causal_attention(leaf, k, v, mask, off_by_one, cap, largest)
        torch.testing.assert_close(actual.detach().double(), exact, **CLOSE)
        assert largest.tolist() == pytest.approx(expected, rel=1e-5)
    assert (causal_attention(q, k, v, mask, off_by_one) - actual).abs().max() > 0.05 or cap is None


@pytest.mark.parametrize("off_by_one", [False, True])
def test_gradient_of_capped_attention_equals_autograd_in_float64(off_by_one: bool) -> None:
    """Over several blocks, whose logits are computed again in the backward pass."""
    x = [2 * normal(2, 150, heads, 4, seed=seed) for seed, heads in enumerate((4, 2, 2))]
    leaves = [t.clone().requires_grad_() for t in x]
    causal_attention(leaves[0], leaves[1], leaves[2], None, off_by_one, 1.5).square().sum().backward()
    wide = [t.double().requires_grad_() for t in x]
    q, k, v = wide[0], *(t.repeat_interleave(2, 2) for t in wide[1:])
    scores = 1.5 * torch.tanh(torch.einsum("bthk,bshk->bhts", q, k) / 2 / 1.5)
    weights = scores.exp() * torch.ones(150, 150).tril()
    out = torch.einsum("bhts,bshk->bthk", weights / (weights.sum(-1, keepdim=True) + off_by_one), v)
    out.square().sum().backward()
    for leaf, expected in zip(leaves, wide, strict=True):
        assert leaf.grad is not None
        assert expected.grad is not None
        assert (leaf.grad - expected.grad).norm() < 1e-5 * expected.grad.norm()


def test_capped_attention_holds_the_logits_of_one_block() -> None:
    """Neither forward nor backward pass makes a tensor of T^2 logits, and the tape keeps none of a block."""
    length, kept = 1024, set[int]()
    q, k, v = (normal(1, length, 2, 4, seed=seed).requires_grad_() for seed in range(3))

    def pack(x: Tensor) -> Tensor:
        kept.add(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), Largest() as forward:
        out = causal_attention(q, k, v, logit_cap=2.0)
    with Largest() as backward:
        out.sum().backward()
    for largest in (forward.numel, backward.numel, max(kept, default=0)):
        assert largest <= 2 * length**2 / 16


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_bf16_training_on_a_cpu_finds_the_largest_logits_too() -> None:
    q, k, v = (normal(2, 70, h, 8, seed=h).bfloat16().requires_grad_() for h in (4, 2, 2))
    fast, slow = torch.full((2, 4), -math.inf)
    causal_attention(q, k, v, largest=fast)
    with torch.no_grad():
        causal_attention(q, k, v, largest=slow)
    torch.testing.assert_close(fast, slow)


def test_document_mask_by_hand() -> None:
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 4]]))
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == expected


def test_mask_of_one_document_equals_no_mask() -> None:
    q, k, v = normal(2, 16, 4, 8), normal(2, 16, 2, 8, seed=1), normal(2, 16, 2, 8, seed=2)
    mask = document_mask(torch.full((2, 16), 3))
    torch.testing.assert_close(causal_attention(q, k, v, mask), causal_attention(q, k, v), rtol=1e-6, atol=1e-6)


def test_packed_documents_equal_separate_documents() -> None:
    """Tokens are rotated at their packed positions, because only distances matter."""
    lengths, table = (5, 1, 10), rotary_table(8, 16, 10_000.0, "cpu")
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    q, k, v = normal(1, 16, 4, 8), normal(1, 16, 2, 8, seed=1), normal(1, 16, 2, 8, seed=2)
    packed = causal_attention(apply_rotary(q, *table), apply_rotary(k, *table), v, document_mask(ids))
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        table = rotary_table(8, length, 10_000.0, "cpu")
        expected = causal_attention(apply_rotary(q[:, rows], *table), apply_rotary(k[:, rows], *table), v[:, rows])
        torch.testing.assert_close(packed[:, rows], expected, **CLOSE)
        start += length


@pytest.mark.parametrize(("heads", "groups", "length"), [(4, 4, 150), (6, 2, 64), (2, 1, 37)])
def test_bf16_cpu_attention_is_about_as_exact_as_torch(heads: int, groups: int, length: int) -> None:
    """Errors of output and gradients are compared with `scaled_dot_product_attention` in bf16, at odd lengths too."""
    shapes = [(2, length, n, 16) for n in (heads, groups, groups)]
    inputs = [(3 * normal(*shape, seed=i)).bfloat16() for i, shape in enumerate(shapes)]
    grad = normal(2, length, heads, 16, seed=9).bfloat16()

    def run(dtype: torch.dtype, attention: Any) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )

    exact, torch_bf16 = run(torch.float64, torch_attention), run(torch.bfloat16, torch_attention)
    for ours, theirs, truth in zip(run(torch.bfloat16, causal_attention), torch_bf16, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == truth.shape
        # probabilities are rounded once more than in torch, as in transformers' eager attention
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()
