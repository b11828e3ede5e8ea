"""Mixed devices are found without a GPU: parts of the model run on fake CUDA tensors, which have no values.

In `FakeTensorMode` an operation on tensors of two devices raises, as on a GPU. So do a read of a value and a shape that
depends on one, for which the host would wait.
"""

import ctypes
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from osp.config import MonitorConfig, OptimizerConfig
from osp.model.attention import document_mask
from osp.model.generate import Decoder, Sampling, choose, prepare_for_generation
from osp.model.loss import fused_token_losses, linear_cross_entropy
from osp.model.transformer import Transformer
from osp.monitor.probe import ProbeText, probe
from osp.optim.groups import build_groups
from osp.optim.muon import newton_schulz
from osp.optim.optimizer import PartitionedOptimizer
from osp.optim.zero import flat_size
from osp.quant.apply import propagated_error, quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.gptq import quantize_weights_gptq
from osp.quant.hadamard import _factor
from osp.quant.qat import Rounding
from osp.quant.spec import QuantSpec
from tests.device_checks import PRESETS, SHAPES, VARIANTS, T, config_of, spec_of, train_once

CUDA = torch.device("cuda", 0)
CUDA_GUARD, META_GUARD = 1, 14  # c10/core/DeviceType.h
EVERYTHING = MonitorConfig(sites="all", statistics="all")


class Transfers(TorchDispatchMode):
    """Count copies from the GPU to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm.dtype_out:  # of which PyTorch 2.11 has no fake version
            *matrices, dtype = args
            return torch.addmm(*(matrix.to(dtype) for matrix in matrices), **kwargs)
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_cuda and out.device.type == "cpu":
            self.count += 1
        return out


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every new tensor fake, and let fake CUDA tensors be used in a build of torch without CUDA."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**40, 2**40))
    monkeypatch.setattr(Tensor, "backward", run_backward)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 0)  # by which checkpoints recompute only once
    library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    guards = (ctypes.c_void_p * 15).in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA_GUARD]
    if before is None:
        guards[CUDA_GUARD] = guards[META_GUARD]  # it does nothing
    _factor.cache_clear()
    with FakeTensorMode(), Transfers():
        yield
    _factor.cache_clear()
    guards[CUDA_GUARD] = before


def run_backward(loss: Tensor) -> None:
    """Call the backward pass of every operation, as `Tensor.backward` does, which needs a build with CUDA here."""
    root: Any = loss.grad_fn
    waiting, found = Counter[Any](), [root]
    for node in found:
        following = [child for child, _ in node.next_functions if child is not None]
        found += [child for child in dict.fromkeys(following) if child not in waiting]
        waiting.update(following)
    arrived: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    while ready:
        node = ready.pop()
        children = [(child, index) for child, index in node.next_functions if child is not None]
        for (child, index), gradient in zip(children, gradients_of(node, arrived.pop(node, {})), strict=True):
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
            if gradient is not None:
                expected, sums = child._input_metadata[index], arrived.setdefault(child, {})
                assert gradient.device == expected.device, (child, gradient.device)
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                sums[index] = sums[index] + gradient if index in sums else gradient


@torch.no_grad()
def gradients_of(node: Any, arrived: dict[int, Tensor]) -> list[Tensor | None]:
    """Return the gradients that a node of autograd's graph passes on, one for each input that needs one."""
    if hasattr(node, "variable"):
        node.variable.grad = arrived[0]
        return []
    inputs = [arrived.get(index) for index in range(len(node._input_metadata))]
    if not hasattr(node, "apply"):  # of torch
        outputs = node(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [output for output, (child, _) in zip(outputs, node.next_functions, strict=True) if child is not None]
    metadata = zip(inputs, node._input_metadata, strict=True)
    full = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if x is None else x for x, m in metadata]
    outputs = node.apply(*full)  # None for an input that is no tensor
    return [output for output in (outputs if isinstance(outputs, tuple) else (outputs,)) if output is not None]


def fake_model(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Transformer:
    """Return a model of one layer, which has every operation that more of them have."""
    with CUDA:
        model = Transformer(dataclasses.replace(config_of(name), **{"num_hidden_layers": 1, **changes}))
    model.compute_dtype = dtype
    return model


def ids(count: int = 2) -> Tensor:
    return torch.zeros(count, T, dtype=torch.int64, device=CUDA)


@pytest.mark.parametrize("name", VARIANTS)
def test_initialization_leaves_the_model_on_the_device(name: str) -> None:
    model = fake_model(name)
    model.init_weights()
    assert {value.device for value in model.state_dict().values()} == {CUDA}


def host_text(count: int) -> ProbeText:
    return ProbeText(torch.zeros(count, T, dtype=torch.int64), torch.zeros(count, T, dtype=torch.int32))


def assert_training_stays_on_the_device(model: Transformer) -> None:
    for document_ids in (None, ids().int()):
        assert {value.device for value in train_once(model, ids(), document_ids).values()} == {CUDA}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_stays_on_the_device(name: str) -> None:
    assert_training_stays_on_the_device(fake_model(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_that_recomputes_activations_stays_on_the_device(dtype: torch.dtype) -> None:
    model = fake_model("bhyt", dtype)
    model.activation_checkpointing = True
    assert_training_stays_on_the_device(model)


@pytest.mark.parametrize("scheme", [name for name in DEPLOYED if name.startswith("qat")])
def test_quantization_aware_training_stays_on_the_device(scheme: str) -> None:
    model = fake_model("ssnorm, projections")
    assert Rounding(model, DEPLOYED[scheme]).largest.device == CUDA
    assert_training_stays_on_the_device(model)


@pytest.mark.parametrize("compiled", [None, fused_token_losses], ids=["", "fused"])
def test_loss_with_a_bias_stays_on_the_device(compiled: Any) -> None:
    x, weight, bias = (
        torch.zeros(shape, device=CUDA, requires_grad=True) for shape in ((300, 64), (1000, 64), (1000,))
    )
    targets = torch.zeros(300, dtype=torch.int64, device=CUDA)
    options: dict[str, Any] = {"bias": bias, "chunk_tokens": 77, "z_loss": 0.1, "compiled": compiled}
    loss, squares = linear_cross_entropy(x, weight, targets, **options)
    loss.backward()
    assert squares.device == CUDA


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "dtype"), [("standard", torch.bfloat16), ("gram", torch.float16)])
def test_newton_schulz_stays_on_the_device(method: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    out = newton_schulz(torch.zeros(shape, device=CUDA), method=method)
    assert (out.device, out.shape, out.dtype) == (CUDA, shape, dtype)


@pytest.mark.parametrize("rule", ["muon", "adamw"])
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("stage", [1, 3])
def test_optimizer_stays_on_the_device(stage: int, method: Any, rule: str) -> None:
    model = fake_model("all of attention")
    config = OptimizerConfig(ns_method=method, per_head=rule == "muon")
    config = dataclasses.replace(config, rules=config.rules | {"matrix": rule, "embedding": "adamw"})
    optimizer = PartitionedOptimizer(build_groups(model, config))
    flats = []
    for group in optimizer.param_groups:
        size = flat_size([shape.numel() for shape in group["shapes"]], world_size=1, stage=stage)
        group["params"] = [torch.zeros(size, device=CUDA)]
        group["params"][0].grad = torch.zeros(size, device=CUDA)
        flats += group["params"]
    optimizer.bind(flats, stage=stage, average=True)
    optimizer.set_step(1, 1.0, clip=0.5, record=True)
    optimizer.step()
    optimizer.sample_average(0.1)
    optimizer.swap_average()
    squares = [*optimizer.update_squares.values(), *optimizer.parameter_squares().values()]
    assert {value.device for value in squares} == {CUDA}


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_stays_on_the_device(name: str) -> None:
    decoder = Decoder(prepare_for_generation(fake_model(name), torch.bfloat16), 2, 24)
    logits = decoder.read([[1, 2, 3], [4, 5]])
    for sampling in (Sampling(), Sampling(temperature=0.7), Sampling(temperature=0.7, top_k=5, top_p=0.9)):
        tokens = choose(logits, sampling, 0.5)
        logits = decoder.read_next(tokens)
        assert (tokens.device, logits.device, logits.shape) == (CUDA, CUDA, (2, 512))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the probe and the quantizers read values, all 0; return the number of values that each read had."""
    reads: list[int] = []

    def tolist(x: Tensor) -> list[float]:
        assert x.device.type == "cpu"
        reads.append(x.numel())
        return [0.0] * x.numel()

    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    monkeypatch.setattr(
        "osp.monitor.probe._site_reading", lambda figures, *_: SimpleNamespace(statistics=dict.fromkeys(figures, 0.0))
    )
    monkeypatch.setattr("osp.quant.grid.CLIP_RATIOS", (1.0, 0.9))
    monkeypatch.setattr(torch, "equal", lambda a, b: (a == b) is None)  # of the same device, and False
    return reads


def transfers(run: Callable[[], Any]) -> int:
    """Return the number of copies to the host."""
    with Transfers() as counter:
        run()
    return counter.count


@pytest.mark.parametrize("name", VARIANTS)
def test_probe_stays_on_the_device(name: str, unread: list[int]) -> None:
    model, text = fake_model(name), host_text(1)
    assert transfers(lambda: probe(model, text, EVERYTHING)) == 1


@pytest.mark.parametrize("quant", ["nvfp4", "mxfp4", "w8a8", "q4_0"])
def test_probe_in_a_deployed_format_stays_on_the_device(quant: Any, unread: list[int]) -> None:
    model, text = fake_model("bhyt"), host_text(1)
    assert transfers(lambda: probe(model, text, MonitorConfig(sites=(), statistics=("R_L",), quant=quant))) == 1


def test_probe_fetches_all_figures_at_once(unread: list[int]) -> None:
    """Of two sequences and of any number of layers, whose figures are more."""
    sizes = []
    for num_layers in (1, 4):
        model, text = fake_model("all of attention", num_hidden_layers=num_layers, ffn_norm=True), host_text(2)
        unread.clear()
        assert transfers(functools.partial(probe, model, text, EVERYTHING)) == 1
        sizes.append(sum(unread))
    assert sizes[1] > 2 * sizes[0] > 500


@pytest.mark.parametrize("preset", PRESETS)
def test_fake_quantization_stays_on_the_device(preset: str, unread: list[int]) -> None:
    spec = spec_of(preset)
    # GPTQ takes a dozen operations for each channel
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48} if spec.method == "gptq" else {}
    model = fake_model("ssnorm, projections", num_key_value_heads=2, **shape).eval()

    def run() -> None:
        with torch.no_grad(), quantized(model, spec, calibration=ids()) as state:
            assert model(ids()).logits.device == CUDA
        assert {value.device for value in state.bounds.values()} <= {CUDA}

    assert transfers(run) == 0


def test_propagated_error_stays_on_the_device(unread: list[int]) -> None:
    spec = dataclasses.replace(spec_of("quarot"), method="rtn")
    propagated_error(fake_model("rmsnorm, grouped queries").eval(), spec, ids(1))


def test_gptq_keeps_calibration_on_the_device_if_it_takes_half_of_the_free_memory(
    unread: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 sequences of T tokens with 32 channels in bf16: the outputs of the embedding and of 2 blocks."""
    model = fake_model("rmsnorm, grouped queries", hidden_size=32, num_hidden_layers=2).eval()

    def copies(free: int) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 2**40))
        spec = QuantSpec(w_bits=4, method="gptq")
        return transfers(lambda: quantize_weights_gptq(model, spec, ids(4), sites=["q_proj", "o_proj"]))

    size = 4 * T * 32 * 2
    assert copies(2 * size) == 0
    assert copies(2 * size - 1) == 4 * (2 + 1)


# --- the tests find what they are for ------------------------------------------------------------------------------


def mask_on_the_host(document_ids: Tensor) -> Tensor:
    return document_mask(document_ids.cpu())


def test_mask_on_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osp.model.transformer.document_mask", mask_on_the_host)
    with pytest.raises(RuntimeError, match=r"two (different )?devices"):
        train_once(fake_model("ssnorm, projections"), ids(), ids().int())


def test_gradient_on_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnHost(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
            return grad_outputs[0] * torch.ones(grad_outputs[0].shape)

    monkeypatch.setattr("osp.model.transformer.apply_rotary", lambda x, *_: OnHost.apply(x))
    with pytest.raises(RuntimeError, match=r"two (different )?devices"):
        train_once(fake_model("ssnorm, projections"), ids(), None)


def test_read_of_a_value_is_found(monkeypatch: pytest.MonkeyPatch, unread: list[int]) -> None:
    monkeypatch.setattr("osp.monitor.statistics.osp_script_kurtosis", lambda x: x.mean(-1) * float(x.sum()))
    with pytest.raises(DataDependentOutputException):
        probe(fake_model("bhyt"), host_text(1), EVERYTHING)
