"""Products in 8-bit floats against explicit rounding in float64, and their use in models and runs."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.config import Config
from osp.errors import UserError
from osp.model.fp8 import check_fp8, fp8_linear
from osp.model.transformer import Linear, build_model
from osp.model_config import ModelConfig
from osp.train.launch import training_command
from osp.train.setup import train
from tests.conftest import ROOT, losses
from tests.distributed import ForkedProcess

Tiny = Callable[..., Config]
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: pip install -e '.[fp8]'")
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # bits of mantissa, smallest exponent, largest value


def rounded(x: Tensor, form: tuple[int, int, float]) -> Tensor:
    """Return x rounded to the format with one scale per tensor, in float64, by the definition of the format."""
    bits, smallest, largest = form
    x = x.double()
    scale = largest / x.abs().max()
    y = x * scale
    unit = torch.exp2(torch.floor(torch.log2(y.abs().clamp_min(2.0**smallest))) - bits)
    return torch.round(y / unit) * unit / scale


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_torchao
def test_fp8_product_and_gradients_equal_float64_with_rounding() -> None:
    x, weight, g = normal(3, 16, 64), normal(32, 64, seed=1), normal(3, 16, 32, seed=2)
    x.requires_grad_()
    weight.requires_grad_()
    y = fp8_linear(emulate=True)(x, weight, None)
    y.backward(g)
    x8, w8, g8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(g, E5M2)
    assert y.dtype == torch.bfloat16
    expected = {"y": (y, x8 @ w8.T), "x": (x.grad, g8 @ w8), "w": (weight.grad, g8.flatten(0, 1).T @ x8.flatten(0, 1))}
    for name, (actual, exact) in expected.items():
        assert actual is not None
        torch.testing.assert_close(actual.double(), exact, rtol=2**-8, atol=2**-8 * exact.std().item(), msg=name)
    plain = (x @ weight.T).double()
    assert (y.double() - plain).norm() / plain.norm() > 0.02, "three bits of mantissa are seen"


@needs_torchao
def test_one_outlier_beyond_the_range_rounds_all_other_values_to_zero() -> None:
    x, weight = torch.ones(16, 16), torch.eye(16)
    x[0, 0] = 2.0**19  # 448 is 2^18 times the smallest number of e4m3
    y = fp8_linear(emulate=True)(x, weight, None)
    assert y[0, 0] == 2.0**19
    assert y[1:].count_nonzero() == 0
    x[0, 0] = 2.0**16
    torch.testing.assert_close(fp8_linear(emulate=True)(x, weight, None)[1:], torch.ones(15, 16), rtol=0.2, atol=0.2)


@needs_torchao
def test_only_blocks_compute_in_fp8_and_only_in_training() -> None:
    shape = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, embed_proj=True)  # fmt: skip
    model, ids = build_model(shape, seed=0), torch.arange(32).view(2, 16)
    model.compute_dtype = torch.bfloat16
    plain = model.eval()(ids).logits
    seen: list[tuple[int, ...]] = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(weight.shape))
        assert (x.dtype, weight.dtype, bias) == (torch.bfloat16, torch.float32, None)
        return fp8_linear(emulate=True)(x, weight, bias)

    model.use_in_blocks(product)
    assert torch.equal(model(ids).logits, plain)
    assert not seen
    coarse = model.train()(ids).logits
    assert seen == [(32, 32)] * 4 + [(48, 32)] * 2 + [(32, 48)] + [(32, 32)] * 4 + [(48, 32)] * 2 + [(32, 48)]
    assert 0.001 < (coarse - plain).norm() / plain.norm() < 0.2


@needs_torchao
def test_fp8_layer_keeps_its_bias() -> None:
    layer, x = Linear(16, 16, bias=True), normal(16, 16)
    torch.nn.init.normal_(layer.weight)
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    plain = layer(x)
    layer.training_product = fp8_linear(emulate=True)
    assert 0.001 < (layer(x) - plain).norm() / plain.norm() < 0.1


@needs_torchao
@pytest.mark.parametrize("stage", [1, 3])
def test_fp8_training_loses_little_and_resumes(stage: int, tiny: Tiny) -> None:
    """Losses differ from bf16 training, but only a little."""
    zero = f"engine.zero_stage={stage}"
    coarse, plain = tiny("train.precision=fp8", zero, name="fp8"), tiny("train.precision=bf16", zero, name="bf16")
    train(plain)
    train(coarse)
    actual, expected = (losses(Path(config.run.dir)) for config in (coarse, plain))
    assert actual != expected
    assert actual == pytest.approx(expected, abs=0.05)
    again = tiny("train.precision=fp8", zero, "train.steps=3", name="again")
    train(again)
    more = tiny("train.precision=fp8", zero, f"resume={again.run.dir}", name="more")
    train(more)
    assert losses(Path(again.run.dir)) + losses(Path(more.run.dir)) == actual


@needs_torchao
def test_two_ranks_train_in_fp8_and_one_logs_the_emulation(tiny: Tiny, tmp_path: Path) -> None:
    config, log = tiny("train.precision=fp8", "engine.zero_stage=2"), tmp_path / "log"
    command = training_command(config, script=ROOT / "scripts" / "train.py", ranks=2, path=tmp_path / "config.yaml")
    assert ForkedProcess(command, log).wait() == 0, log.read_text()
    assert log.read_text().count("has no fp8; it is emulated") == 1
    assert len(losses(Path(config.run.dir))) == 6


def test_sizes_unsuitable_for_fp8_are_refused() -> None:
    check_fp8({"layers.0.mlp.up_proj.weight": (1376, 512)}, 2048)
    with pytest.raises(UserError, match=r"up_proj.weight is 344x128: change model.hidden_size or"):
        check_fp8({"layers.0.mlp.up_proj.weight": (344, 128)}, 2048)
    with pytest.raises(UserError, match=r"train.seq_len is 24$"):
        check_fp8({}, 24)


def test_missing_torchao_is_reported_with_the_package_to_install(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    fp8_linear.cache_clear()
    config: Any = tiny("train.precision=fp8")
    with pytest.raises(UserError, match=r"train.precision=fp8 needs torchao: pip install -e '.\[fp8\]'"):
        train(config)
    assert not Path(config.run.dir).exists()
