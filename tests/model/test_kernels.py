"""`train.attention`: flex attention against a softmax in float64, and the order of torch's kernels.

Flex attention runs on the CPU by its own eager path. It refuses gradients there, though that path has them: a fixture
lifts the refusal.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.nn.attention.flex_attention import create_mask

from osp.config import PenaltyConfig
from osp.model import attention
from osp.model.attention import KERNELS, block_mask, causal_attention, document_mask
from osp.model.transformer import Block, Transformer, build_model
from osp.model_config import AttentionConfig, ModelConfig

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
# 150 tokens are two blocks of flex attention. The second sequence's documents end inside of both, and their ids fall.
DOCUMENTS = torch.stack([torch.arange(150) // 128, 5 - torch.arange(150) // 37])


@pytest.fixture
def flex_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # a second cap in one process would become a symbol, which flex attention does not take
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, *, off_by_one: bool, cap: float | None
) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v in float64 from all T^2 logits, by the definition."""
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    logits = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    logits = logits if cap is None else cap * (logits / cap).tanh()
    seen = torch.tensor([[s <= t for s in range(length)] for t in range(length)])
    weights = logits.exp() * (seen & (documents[:, None, :, None] == documents[:, None, None, :]))
    return torch.einsum("bhts,bshk->bthk", weights / (weights.sum(-1, keepdim=True) + off_by_one), v)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("off_by_one", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.usefixtures("flex_gradients")
def test_flex_attention_equals_a_dense_softmax_in_float64(kv_heads: int, off_by_one: bool, cap: float | None) -> None:
    """Outputs and the gradients of q, k and v; with several documents per sequence, and with one in all."""
    inputs = [2 * normal(2, 150, heads, 16, seed=seed) for seed, heads in enumerate((4, kv_heads, kv_heads))]
    gradient = normal(2, 150, 4, 16, seed=9)
    for documents in (DOCUMENTS, torch.zeros_like(DOCUMENTS)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        wide = [x.double().requires_grad_() for x in inputs]
        out = causal_attention(leaves[0], leaves[1], leaves[2], block_mask(documents), off_by_one, cap)
        exact = dense_attention(wide[0], wide[1], wide[2], documents, off_by_one=off_by_one, cap=cap)
        ours, truth = (torch.autograd.grad(y, x, gradient.to(y)) for y, x in ((out, leaves), (exact, wide)))
        for actual, expected in ((out, exact), *zip(ours, truth, strict=True)):
            assert actual.dtype == torch.float32
            assert (actual - expected).norm() < 1e-6 * expected.norm()


def test_block_mask_is_the_document_mask_and_skips_blocks() -> None:
    mask = block_mask(DOCUMENTS)
    assert torch.equal(create_mask(mask.mask_mod, *mask.shape, device="cpu"), document_mask(DOCUMENTS))
    # the first sequence's second document is the second block; the second's third document is in both
    assert mask.to_dense()[:, 0].tolist() == [[[1, 0], [0, 1]], [[1, 0], [1, 1]]]


def test_largest_logits_of_flex_attention_are_those_of_the_dense_mask() -> None:
    q, k, v = (2 * normal(2, 150, heads, 16, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    flex, dense = torch.full((2, 4), -math.inf)
    causal_attention(q, k, v, block_mask(DOCUMENTS), largest=flex)
    causal_attention(q, k, v, document_mask(DOCUMENTS), largest=dense)
    assert torch.equal(flex, dense)
    assert flex.min() > 0


# --- the model ----------------------------------------------------------------------------------------------------


SHAPE = ModelConfig(61, 64, 96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def trained(choice: str, **options: Any) -> Transformer:
    model = build_model(dataclasses.replace(SHAPE, initializer_range=0.1, **options), seed=0)
    model.set_attention(choice)
    model.set_penalty(PenaltyConfig(weight=0.1))
    return model


def step(model: Transformer, documents: Tensor | None) -> tuple[float, list[Tensor]]:
    """Return the loss per token of a fixed batch and the gradients."""
    ids = torch.randint(0, 61, (2, 151), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    output = model(ids[:, :-1], ids[:, 1:], document_ids=documents)
    loss = (output.loss + 0.1 * output.penalty) / 300
    loss.backward()
    return loss.item(), [cast(Tensor, p.grad).clone() for p in model.parameters()]


def assert_same(gradients: list[Tensor], others: list[Tensor]) -> None:
    total = torch.stack([g.norm() for g in others]).norm()
    for ours, theirs in zip(gradients, others, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7 * total  # a gain's gradient may nearly cancel


@pytest.mark.parametrize("documents", [DOCUMENTS, None], ids=["documents", "causal"])
@pytest.mark.parametrize(
    "options",
    [{}, {"attention": AttentionConfig(off_by_one=True, logit_cap=5.0, value_gate=True), "qk_norm": True}],
    ids=["plain", "options"],
)
@pytest.mark.usefixtures("flex_gradients")
def test_training_with_flex_attention_equals_training_with_a_dense_mask(
    options: dict[str, Any], documents: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients in fp32, also when activations are computed again. Evaluation is the same code.

    Checkpointed blocks call the compiled function, as on a GPU: torch's eager one has wrong gradients there with a cap.
    """
    dense, flex = trained("sdpa", **options), trained("flex", **options)
    loss, gradients = step(dense, documents)
    for flex.activation_checkpointing in (False, True):
        if flex.activation_checkpointing:
            compiled = torch.compile(attention.flex_attention, backend="aot_eager")
            monkeypatch.setattr(attention, "flex_attention", compiled)
        other, others = step(flex, documents)
        assert other == pytest.approx(loss, rel=1e-6)
        assert_same(others, gradients)
    if documents is not None:
        assert abs(step(flex, None)[0] - loss) > 1e-3 * loss, "the documents matter"
    ids = torch.arange(60)[None].expand(2, -1)
    logits = [model.eval()(ids, document_ids=DOCUMENTS[:, :60]).logits for model in (dense, flex)]
    assert torch.equal(*logits)


@pytest.mark.usefixtures("flex_gradients")
def test_compiled_blocks_take_block_masks_without_compiling_again() -> None:
    """The whole block is one graph, which the masks of other batches do not change."""
    torch._dynamo.reset()
    model, eager, losses = trained("flex"), trained("flex"), []
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    step(model, DOCUMENTS)
    counters.clear()
    for documents in (DOCUMENTS, DOCUMENTS.flip(0), DOCUMENTS // 2):
        (loss, gradients), (expected, others) = step(model, documents), step(eager, documents)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert_same(gradients, others)
        losses.append(loss)
    assert len(set(losses)) == 3
    assert counters["aot_autograd"]["total"] == 0
    torch._dynamo.reset()


def test_flex_attention_is_compiled_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its eager path holds all T^2 scores. In a block that is compiled, it is compiled with the block."""
    calls: list[tuple[str, bool]] = []

    def recorded(name: str, *, compiled: bool) -> Callable[..., Any]:
        def call(x: Any, *_: Any, **__: Any) -> tuple[Any, None]:
            calls.append((name, compiled))
            return x, None

        call.__name__ = name
        return call

    monkeypatch.setattr(attention, "_compile", lambda function: recorded(function.__name__, compiled=True))
    for name in ("create_block_mask", "flex_attention"):
        monkeypatch.setattr(attention, name, recorded(name, compiled=False))
    for device, in_block, expected in (("cpu", False, False), ("cuda", False, True), ("cuda", True, False)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda in_block=in_block: in_block)
        with FakeTensorMode():
            x = torch.zeros(2, 8, 4, 16, device=device)
            attention._flex_attention(x, x, x, cast(Any, None), off_by_one=False, cap=None)
            block_mask(torch.zeros(2, 8, dtype=torch.long, device=device))
        assert calls == [("flex_attention", expected), ("create_block_mask", device == "cuda")]
        calls.clear()


# --- the order of kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("flash", [FLASH, EFFICIENT, MATH]),
        ("fa3", [FLASH, EFFICIENT, MATH]),
        ("cudnn", [CUDNN, FLASH, EFFICIENT, MATH]),
        ("sdpa", None),
    ],
)
@pytest.mark.parametrize("off_by_one", [False, True])
def test_kernels_are_tried_in_the_stated_order_in_training_only(
    choice: str, expected: list[SDPBackend] | None, off_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpointed block keeps the order when it runs again in the backward pass."""
    default, seen = _cur_sdpa_kernel_backends(with_priority=True), []
    attend = F.scaled_dot_product_attention

    def watched(*inputs: Any, **options: Any) -> Tensor:
        seen.append(_cur_sdpa_kernel_backends(with_priority=True))
        return attend(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = trained(choice, attention=AttentionConfig(off_by_one=off_by_one))
    model.activation_checkpointing = True
    step(model, None)
    assert seen == 4 * [expected or default], "two layers, each twice"
    seen.clear()
    model.eval()(torch.arange(8)[None])
    assert seen == 2 * [default]
    assert _cur_sdpa_kernel_backends(with_priority=True) == default


def test_compiled_code_holds_the_chosen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made while a block is traced, once for training mode and once for evaluation."""
    graphs: list[set[str]] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    flash = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    for kernels, training in itertools.product(([MATH], [FLASH, MATH]), (True, False)):
        torch._dynamo.reset()
        graphs.clear()
        monkeypatch.setitem(KERNELS, "flash", kernels)
        block = trained("flash").train(training).layers[0]
        assert isinstance(block, Block)
        block.self_attn.attend.compile(backend=aot_autograd(fw_compiler=keep), fullgraph=True)
        with torch.no_grad():
            block.self_attn.attend(*(normal(1, 8, 4, 16, seed=seed) for seed in range(3)), None)
        assert (flash in graphs[0]) == (FLASH in kernels or not training)
    torch._dynamo.reset()
