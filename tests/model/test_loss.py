"""The chunked cross-entropy against torch's: value, gradient and memory."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import osp.model.loss as loss_module
from osp.model.loss import IGNORE, fused_token_losses, linear_cross_entropy, token_losses
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


# --- blocks of tokens ---------------------------------------------------------------------------------------------


def everything(compiled: Any = None, *, dtype: torch.dtype = torch.float32, z_loss: float = 0.0) -> list[Tensor]:
    """Return the two sums and the gradients of input, weight and bias for two chunks and a shorter one."""
    x, weight, targets = problem(dtype, ignored=(0, 12, 28))
    bias = torch.linspace(-1, 1, V).requires_grad_()
    options: dict[str, Any] = {"bias": bias, "chunk_tokens": 12, "z_loss": z_loss, "compiled": compiled}
    loss, squares = linear_cross_entropy(x, weight, targets, **options)
    (0.37 * (loss + z_loss * squares)).backward()
    gradients = [tensor.grad for tensor in (x, weight, bias) if tensor.grad is not None]
    return [loss.detach(), squares.detach(), *gradients]


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_size_of_a_block_changes_no_bit(dtype: torch.dtype, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for tokens in (1, 5, 12):
        monkeypatch.setattr(loss_module, "CPU_BLOCK", 4 * V * tokens)
        results.append(everything(dtype=dtype, z_loss=z_loss))
    assert len(results[0]) == 5
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


class LargestFp32(LargestTensor):
    """Record the number of elements of the largest fp32 tensor that any operation returns."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


def test_fp32_probabilities_exist_for_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(N, V, dtype=torch.bfloat16), torch.randint(0, V, (N,))
    for tokens in (N, 3):
        monkeypatch.setattr(loss_module, "CPU_BLOCK", 4 * V * tokens // torch.get_num_threads() + 1)
        with LargestFp32() as probe:
            token_losses(logits.clone(), targets, 0.3, grad=True)
        assert probe.numel == tokens * V


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_loss_and_gradients_equal_cross_entropy(dtype: torch.dtype, z_loss: float) -> None:
    """Against torch in float64. In bf16 the logits, their gradient and the gradient of x are rounded, as in `results`.

    The loss is compared at the logits that the head computes.
    """
    compiled = torch.compile(fused_token_losses, dynamic=False)
    results = everything(compiled, dtype=dtype, z_loss=z_loss)
    x, weight, targets = problem(dtype, ignored=(0, 12, 28))
    leaves = [t.detach().to(dtype).double().requires_grad_() for t in (x, weight, torch.linspace(-1, 1, V))]
    exact = leaves[0] @ leaves[1].T + leaves[2]
    logits = exact + (F.linear(*(leaf.detach().to(dtype) for leaf in leaves)).double() - exact).detach()
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    squares = logits.logsumexp(-1).square()[targets != IGNORE].sum()
    (0.37 * (loss + z_loss * squares)).backward()
    torch.testing.assert_close(results[0].double(), loss.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(results[1].double(), squares.detach(), rtol=1e-6, atol=1e-5)
    for gradient, leaf in zip(results[2:], leaves, strict=True):
        assert leaf.grad is not None
        error = float((gradient.double() - leaf.grad).norm() / leaf.grad.norm())
        assert error < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_code_stores_nothing_of_the_size_of_the_logits(dtype: torch.dtype) -> None:
    """The buffers of the generated code; the gradient is written over the logits."""
    from torch._inductor.utils import run_and_get_code

    def sizes(function: Callable[..., Tensor], *arguments: Any) -> list[int]:
        logits, targets = torch.randn(24, 512).to(dtype), torch.randint(0, 512, (24,))
        _, codes = run_and_get_code(torch.compile(function, dynamic=False), logits, targets, *arguments)
        shapes = re.findall(r"empty_strided\w*\(\(([\d, ]*)\)", "".join(codes))
        return [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]

    def stores_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.float().softmax(-1).gather(1, targets[:, None])[:, 0] + logits.float().softmax(-1).amax(-1)

    assert 24 * 512 in sizes(stores_probabilities), "the pattern must see a stored tensor"
    assert 0 < max(sizes(fused_token_losses, 0.3)) <= 2 * 24


def test_a_last_chunk_that_is_shorter_compiles_one_more_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    for _ in range(2):
        everything(torch.compile(fused_token_losses, backend=counter, dynamic=False))
    assert counter.frame_count == 2


def test_loss_without_gradients_runs_no_compiled_code() -> None:
    x, weight, targets = problem()
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets, chunk_tokens=10, compiled=lambda *_, **__: pytest.fail("compiled"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weight_gradient_on_a_gpu_is_accumulated_in_fp32() -> None:
    """Against the product in float64. Rounding it to bf16 costs 1e-3. The logits are integers, hence exact."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-2, 3, (size, D), generator=generator).float().cuda() for size in (N, V))
    targets = torch.randint(0, V, (N,), generator=generator).cuda()
    delta = (x @ weight.T).bfloat16()
    token_losses(delta, targets, 0.0, grad=True)
    expected = delta.double().T @ x.double()
    for chunk in (1, 7, N):
        leaf = weight.clone().requires_grad_()
        linear_cross_entropy(x.bfloat16(), leaf, targets, chunk_tokens=chunk)[0].backward()
        assert leaf.grad is not None
        assert float((leaf.grad.double() - expected).norm() / expected.norm()) < 1e-5
