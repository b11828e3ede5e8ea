"""The chunked cross-entropy against torch's: value, gradient and memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from osp.model.loss import IGNORE, linear_cross_entropy
from osp.plan.memory import peak

N, D, V = 29, 8, 53


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def problem(dtype: torch.dtype = torch.float32, ignored: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(N, D, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[list(ignored)] = IGNORE
    return x, weight, targets


def reference(x: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, d loss / d x, d loss / d weight), computed by torch in float64."""
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = scale * F.cross_entropy(x64 @ weight64.T, targets, reduction="sum", ignore_index=-100)
    loss.backward()
    assert x64.grad is not None
    assert weight64.grad is not None
    return loss.detach(), x64.grad, weight64.grad


def assert_gradients(x: Tensor, weight: Tensor, expected: tuple[Tensor, Tensor, Tensor], tolerance: float) -> None:
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad.double(), expected[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight.grad.double(), expected[2], rtol=tolerance, atol=tolerance * N)


@pytest.mark.parametrize("ignored", [(), (0, 7, 28), tuple(range(14))], ids=["none", "some", "whole-chunks"])
@pytest.mark.parametrize("chunk", [1, 7, 10, N - 1, N, 4 * N])
def test_loss_and_gradients_equal_cross_entropy(chunk: int, ignored: tuple[int, ...]) -> None:
    x, weight, targets = problem(ignored=ignored)
    loss, _ = linear_cross_entropy(x, weight, targets, chunk_tokens=chunk)
    (0.37 * loss).backward()
    expected = reference(x, weight, targets, 0.37)
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    torch.testing.assert_close(0.37 * loss.double(), expected[0], rtol=1e-6, atol=1e-5)
    assert_gradients(x, weight, expected, 1e-5)


@pytest.mark.parametrize("ignored", [(), (0, 7, 28)], ids=["none", "some"])
@pytest.mark.parametrize("chunk", [7, 4 * N])
def test_z_loss_and_its_gradients_equal_autograd(chunk: int, ignored: tuple[int, ...]) -> None:
    x, weight, targets = problem(ignored=ignored)
    bias = torch.linspace(-1, 1, V).requires_grad_()
    loss, squares = linear_cross_entropy(x, weight, targets, bias=bias, chunk_tokens=chunk, z_loss=0.3)
    (0.37 * (loss + 0.3 * squares)).backward()
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    logits = leaves[0] @ leaves[1].T + leaves[2]
    expected = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    z_loss = logits.exp().sum(-1).log().square()[targets != IGNORE].sum()
    (0.37 * (expected + 0.3 * z_loss)).backward()
    torch.testing.assert_close(squares.double(), z_loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    for tensor, leaf in zip((x, weight, bias), leaves, strict=True):
        assert tensor.grad is not None
        assert leaf.grad is not None
        torch.testing.assert_close(tensor.grad.double(), leaf.grad, rtol=1e-5, atol=1e-5 * float(leaf.grad.abs().max()))


def test_z_loss_is_not_part_of_the_loss() -> None:
    x, weight, targets = problem(ignored=(5,))
    losses = [linear_cross_entropy(x, weight, targets, chunk_tokens=10, z_loss=z_loss) for z_loss in (0.0, 0.3)]
    assert torch.equal(*(loss for loss, _ in losses))
    assert torch.equal(*(squares for _, squares in losses))


def test_ignored_tokens_get_no_gradient() -> None:
    x, weight, targets = problem(ignored=(3, 4))
    linear_cross_entropy(x, weight, targets, chunk_tokens=5)[0].backward()
    assert x.grad is not None
    assert [i for i in range(N) if not x.grad[i].any()] == [3, 4]


def test_loss_is_zero_when_all_targets_are_ignored() -> None:
    x, weight, targets = problem(ignored=tuple(range(N)))
    loss, _ = linear_cross_entropy(x, weight, targets, chunk_tokens=10)
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert weight.grad is not None
    assert not x.grad.any()
    assert not weight.grad.any()


def test_large_logits_do_not_overflow() -> None:
    x, weight, targets = problem()
    with torch.no_grad():
        x.mul_(1000)
    loss, _ = linear_cross_entropy(x, weight, targets, chunk_tokens=10)
    torch.testing.assert_close(loss.double(), reference(x, weight, targets)[0], rtol=1e-5, atol=1e-2)


def test_loss_is_the_same_without_gradient() -> None:
    x, weight, targets = problem(ignored=(5,))
    with torch.no_grad():
        value, _ = linear_cross_entropy(x, weight, targets, chunk_tokens=10)
    assert not value.requires_grad
    assert torch.equal(value, linear_cross_entropy(x, weight, targets, chunk_tokens=10)[0].detach())


def test_bf16_input_keeps_fp32_loss_and_weight_gradient() -> None:
    """The loss equals the fp32 loss of bf16 logits, and gradients agree within bf16 rounding."""
    x, weight, targets = problem(torch.bfloat16, ignored=(5,))
    loss, _ = linear_cross_entropy(x, weight, targets, chunk_tokens=10)
    loss.backward()
    logits = (x.detach() @ weight.detach().bfloat16().T).double()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-4)
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    _, grad_x, grad_weight = reference(x, weight.bfloat16(), targets)
    assert float((x.grad.double() - grad_x).norm() / grad_x.norm()) < 0.02
    assert float((weight.grad.double() - grad_weight).norm() / grad_weight.norm()) < 0.02


def test_all_logits_are_never_in_memory_at_once() -> None:
    def largest(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
        x, weight, targets = problem()
        with LargestTensor() as probe:
            loss(x, weight, targets).backward()
        return probe.numel

    whole = largest(lambda x, w, t: F.cross_entropy(x @ w.T, t))
    assert whole == N * V, "the probe must see the logits of the plain loss"
    assert largest(lambda x, w, t: linear_cross_entropy(x, w, t, chunk_tokens=9)[0]) == 9 * V


def test_a_chunk_is_freed_before_the_next_is_allocated() -> None:
    """The peak memory of 4 chunks, without inputs and gradients, equals the peak memory of one chunk."""
    x, weight = torch.randn(256, 8, dtype=torch.bfloat16), torch.randn(1024, 8, requires_grad=True)
    targets = torch.randint(0, 1024, (256,))

    def peak_bytes(num_tokens: int) -> int:
        part = x[:num_tokens].requires_grad_()
        return peak(lambda: linear_cross_entropy(part, weight, targets[:num_tokens], chunk_tokens=64))

    assert peak_bytes(64) > 64 * 1024 * (2 + 4), "logits and probabilities"
    assert peak_bytes(256) - peak_bytes(64) < 2 * x.numel() * x.element_size()
