"""Quantization-aware training computes what `quantized` measures, with straight-through gradients, on every stage."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import osp.quant.apply
from osp.config import Config, from_dict, to_dict
from osp.data.loader import Batch
from osp.distributed import init_distributed
from osp.errors import UserError
from osp.evaluation.config import EvaluateConfig
from osp.evaluation.evaluate import evaluate
from osp.evaluation.language_model import open_model
from osp.model.sites import SITES, hook_site, site_names
from osp.model.transformer import Linear, Output, Transformer, build_model
from osp.model_config import AttentionConfig, ModelConfig, NormConfig
from osp.quant.apply import quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.qat import Rounding
from osp.train.resolve import resolve
from osp.train.setup import setup, train
from tests.conftest import losses, read_metrics
from tests.distributed import run_distributed
from tests.quant.quant_oracle import naive_quantize

Tiny = Callable[..., Config]
SCHEMES = ("w4a16", "w4a8", "w4a4", "nvfp4", "mxfp4")
SHAPE = ModelConfig(
    vocab_size=96, hidden_size=128, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, embed_proj=True
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate and groups": {"attention": AttentionConfig(gate=True), "num_key_value_heads": 2},
    "peri and biases": {"norm": NormConfig(placement="peri"), "mlp_bias": True, "attention_bias": True},
    "ffn_norm": {"ffn_norm": True, "qk_norm": True},
}


@pytest.fixture(scope="module", autouse=True)
def _group() -> None:
    init_distributed("cpu")


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    return partial(tiny, "eval.every=0", "eval.tokens=64", "eval.sample_tokens=0", "qat.start=4")


def shaken_model(**changes: Any) -> Transformer:
    """Return a model in which no gain is 1, no bias is 0, and the matrices of a site have different ranges."""
    model = build_model(dataclasses.replace(SHAPE, **changes), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.02 * (1 + i % 5) * torch.randn(parameter.shape, generator=generator)
    return model


def master(model: Transformer) -> Iterator[tuple[str, int, int, dict[str, Tensor]]]:
    """Return the weights as `optimizer.local_state` gives them, each in two slices."""
    for name, parameter in model.named_parameters():
        flat, middle = parameter.detach().flatten(), parameter.numel() // 3
        yield name, 0, middle, {"weight": flat[:middle]} if middle else {"weight": flat}
        yield name, middle, len(flat), {"weight": flat[middle:]}


def rounded(model: Transformer, scheme: str) -> Rounding:
    """Let `model` round by `scheme`."""
    rounding = Rounding(model, DEPLOYED[f"qat_{scheme}"])
    rounding.refresh(master(model))
    return rounding


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:].contiguous()


def loss_and_gradients(model: Transformer) -> tuple[float, Tensor]:
    loss = model.train()(*batch()).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_loss_is_the_evaluated_loss_to_the_bit(
    scheme: str, variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVFP4 with equal tensor scales of activations: evaluation takes them from calibration text, here from the batch.

    Without rounding of the weights and activations, and with a clip search, the loss is another one.
    """
    model, spec = shaken_model(**VARIANTS[variant]), DEPLOYED[f"qat_{scheme}"]
    model.compute_dtype = dtype
    rounded(model, scheme)
    extremes: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        extremes[name] = torch.stack(x.detach().float().aminmax())

    sites = ("attn_in", "o_proj_in", "mlp_in", "down_proj_in")
    handles = [hook_site(model, name, partial(observe, name)) for name in site_names(2, sites)]
    with torch.no_grad():
        trained = model.train()(*batch()).loss
        for handle in handles:
            handle.remove()
        plain = model.eval()(*batch()).loss
        if scheme == "nvfp4":
            monkeypatch.setattr(osp.quant.apply, "_activation_bounds", lambda *_: extremes)
        with quantized(model, spec, calibration=batch()[0]):
            evaluated = model(*batch()).loss
        with quantized(model, dataclasses.replace(spec, w_clip=True), calibration=batch()[0]):
            searched = model(*batch()).loss
    assert torch.equal(trained, evaluated), (trained.item(), evaluated.item(), plain.item())
    assert len({plain.item(), trained.item(), searched.item()}) == 3


def test_tensor_scales_of_activations_differ_little_from_static_ones() -> None:
    """Of NVFP4, where calibration text and batch have other extremes."""
    model = shaken_model()
    rounded(model, "nvfp4")
    with torch.no_grad():
        trained, plain = model.train()(batch()[0]).logits, model.eval()(batch()[0]).logits
        with quantized(model, DEPLOYED["qat_nvfp4"], calibration=batch()[0].flip(0, 1)):
            evaluated = model(batch()[0]).logits
    difference, error = ((trained - evaluated).norm() / plain.norm()), ((trained - plain).norm() / plain.norm())
    assert 0 < difference < error


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_straight_through(scheme: str) -> None:
    """dx = dy q(W), dW = dy^T q(x), db = the sum of dy."""
    model, spec = shaken_model(mlp_bias=True), DEPLOYED[f"qat_{scheme}"]
    rounded(model, scheme)
    layer = model.train().get_submodule("layers.1.mlp.down_proj")
    assert isinstance(layer, Linear)
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(2, 5, size, generator=generator) for size in (88, 128))
    x.requires_grad_()
    layer(x).backward(dy)
    w_q = spec.number_format("w").round(layer.weight.detach(), group_size=spec.w_group_size)
    x_q = x.detach() if spec.a_bits == 16 else spec.number_format("a").round(x.detach())
    if scheme == "w4a4":
        oracle = naive_quantize(x.detach().flatten(0, 1).double().numpy(), 4, symmetric=False)
        torch.testing.assert_close(x_q.flatten(0, 1).double(), torch.from_numpy(oracle), rtol=1e-5, atol=1e-6)
        oracle = naive_quantize(layer.weight.detach().double().numpy(), 4, symmetric=True)
        torch.testing.assert_close(w_q.double(), torch.from_numpy(oracle), rtol=1e-5, atol=1e-6)
    flat, bias = dy.flatten(0, 1), layer.bias
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert bias is not None
    assert bias.grad is not None
    torch.testing.assert_close(x.grad.double(), dy.double() @ w_q.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        layer.weight.grad.double(), flat.double().T @ x_q.flatten(0, 1).double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(bias.grad.double(), flat.double().sum(0), rtol=1e-5, atol=1e-5)
    assert (x.grad - dy @ layer.weight).norm() > 0.01 * x.grad.norm(), "the gradient sees the rounded weight"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluation_mode_and_stored_weights_are_not_rounded(scheme: str) -> None:
    model, plain = shaken_model(), shaken_model()
    rounded(model, scheme)
    model.train()(*batch())
    with torch.no_grad():
        assert torch.equal(model.eval()(batch()[0]).logits, plain.eval()(batch()[0]).logits)
    for (name, weight), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("scheme", ["w4a4", "nvfp4"])
def test_activation_checkpointing_changes_no_bit(scheme: str) -> None:
    models = [shaken_model(), shaken_model()]
    for model in models:
        rounded(model, scheme)
    models[1].activation_checkpointing = True
    (loss, gradients), (other, others) = map(loss_and_gradients, models)
    assert loss == other
    assert torch.equal(gradients, others)


@pytest.mark.parametrize(
    ("scheme", "backend"),
    [
        ("w4a8", "aot_eager"),
        ("nvfp4", "aot_eager"),
        pytest.param("w4a4", "inductor", marks=pytest.mark.slow),
        pytest.param("mxfp4", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_are_compiled_once_more_at_the_start(scheme: str, backend: str) -> None:
    """All blocks share the code, and other weights with other tensor scales compile nothing.

    Inductor computes other last bits than eager code, which move values to the next level.
    """
    torch._dynamo.reset()
    counters.clear()
    model, eager = shaken_model(num_hidden_layers=3), shaken_model(num_hidden_layers=3)
    for layer in model.layers:
        layer.compile(backend=backend)
    before = loss_and_gradients(model)[0]
    assert counters["stats"]["unique_graphs"] == 1
    roundings = [rounded(model, scheme), rounded(eager, scheme)]
    for _ in range(3):
        loss, gradients = loss_and_gradients(model)
        expected, others = loss_and_gradients(eager)
        assert loss == pytest.approx(expected, rel=0.02 if backend == "inductor" else 1e-6)
        assert loss != before
        if backend != "inductor":
            torch.testing.assert_close(gradients, others, rtol=1e-3, atol=1e-3)
        assert counters["stats"]["unique_graphs"] == 2
        for changed, rounding in zip((model, eager), roundings, strict=True):
            with torch.no_grad():
                for parameter in changed.parameters():
                    parameter *= 1.07
            rounding.refresh(master(changed))
    assert not counters["graph_break"]
    torch._dynamo.reset()


def both_losses(values: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (loss in training, loss of the same weights inside `quantized`) of the micro batches of two steps.

    The scales of NVFP4's activations are from the micro batch on both sides.
    """
    trainer = setup(from_dict(values))
    whole = build_model(trainer.config.model, seed=trainer.config.train.seed).eval()
    pairs, forward = [], trainer._forward

    def compare(batch: Batch) -> Output:
        output, ids = forward(batch), batch.tokens
        with torch.no_grad(), quantized(whole, DEPLOYED[f"qat_{trainer.config.qat.scheme}"], calibration=ids):
            evaluated = whole(ids[:, :-1], ids[:, 1:].contiguous()).loss
        assert output.loss is not None
        assert evaluated is not None
        pairs.append((output.loss.item(), evaluated.item()))
        return output

    trainer._forward = compare
    for step in (0, 1):
        with trainer.engine.gathered_parameters():
            whole.load_state_dict(trainer.model.state_dict())
        trainer.refresh_rounding(step)
        trainer.train_step(step, record=False)
    trainer.close()
    trainer.peers.dismiss()
    return pairs


def compared(runs: list[dict[str, Any]]) -> list[list[tuple[float, float]]]:
    """Return `both_losses` of each run."""
    osp.quant.apply._activation_bounds = lambda *_: {}  # this process ends after it
    return [both_losses(values) for values in runs]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_trains_what_is_evaluated(ranks: int, tiny: Tiny) -> None:
    """To the bit, with the weights of the step. Between stages the order of sums differs."""
    keys = ("qat.scheme=nvfp4", "qat.start=0")
    runs = [to_dict(tiny(*keys, f"engine.zero_stage={stage}", name=f"run{stage}")) for stage in (1, 2, 3)]
    for stages in run_distributed(compared, ranks, runs):
        for pairs in stages:
            assert len(pairs) == 2 * 4 // ranks
            assert all(loss == evaluated for loss, evaluated in pairs), pairs
        torch.testing.assert_close(torch.tensor(stages[1:]), torch.tensor(stages[:1] * 2), rtol=2e-3, atol=0)


@pytest.mark.parametrize("scheme", ["w4a4", "nvfp4"])
def test_rounding_begins_at_the_start_and_ends_with_the_run(scheme: str, tiny: Tiny, tmp_path: Path) -> None:
    """Also in a run that is resumed before and after it: the losses are the same bits."""
    train(tiny(name="plain"))
    train(tiny(f"qat.scheme={scheme}", "qat.start=50%", name="straight"))
    for stop in ("2", "3", "5", "6"):
        train(tiny(f"qat.scheme={scheme}", "qat.start=3", f"train.stop_at={stop}", name="pieces"))
    plain, straight, pieces = (losses(tmp_path / name) for name in ("plain", "straight", "pieces"))
    assert straight == pieces
    assert straight[:3] == plain[:3]
    assert all(a != b for a, b in zip(straight[3:], plain[3:], strict=True))


def test_live_perplexity_and_evaluation_measure_what_was_trained(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another rounding than the trained one is named in one line."""
    live = ("eval.quant.every=6", "eval.quant.tokens=128", 'eval.quant.formats=["qat_w4a4"]')
    train(tiny("qat.scheme=w4a4", *live))
    (event,) = [event for event in read_metrics(tmp_path / "run") if "quant/seconds" in event]
    subject, values = open_model(tmp_path / "run"), {}
    caplog.clear()
    caplog.set_level("INFO")
    for name in ("qat_w4a4", "mxfp4"):
        config = EvaluateConfig(
            path="", quant=dataclasses.replace(DEPLOYED[name], seed=5), max_tokens=128, progress=False
        )
        values[name] = evaluate(subject, config).results[0].value
        notes = [record.getMessage() for record in caplog.records if "was trained with" in record.getMessage()]
        note = "run was trained with qat.scheme=w4a4: quant=qat_w4a4 has its rounding"
        assert notes == ([] if name == "qat_w4a4" else [note])
    assert event["quant/perplexity/qat_w4a4"] == pytest.approx(values["qat_w4a4"], rel=1e-6)


def test_start_is_a_step_tokens_or_a_share(tiny: Tiny) -> None:
    def start(*overrides: str) -> int | None:
        config = tiny("qat.scheme=w4a4", *overrides)
        found = resolve(config, device=torch.device("cpu"), world_size=1).qat
        return found and found[0]

    assert [start(f"qat.start={value}") for value in (0, 5, "257 tokens", "80%", "50%", "99%")] == [0, 5, 2, 5, 3, 5]
    assert start("train.steps=1", "qat.start=80%") == 0
    assert resolve(tiny(), device=torch.device("cpu"), world_size=1).qat is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["qat.start=6"], r"^qat.start=6 is step 6, and the run has 6 steps; set an earlier start$"),
        (["qat.start=100%"], r"^qat.start='100%' is step 6, and the run has 6 steps; set an earlier start$"),
        (["qat.start=soon"], r"^qat.start='soon' is not a length; write 100 \(steps\), '5e9 tokens' or 20%$"),
        (
            ["qat.scheme=w4a16"],
            r"^qat.scheme=w4a16: quant.w_group_size=128 does not divide model.hidden_size=32; choose another scheme$",
        ),
        (
            ["train.precision=fp8"],
            r"^qat.scheme=w4a4: fp8 would round once more, unlike evaluation; set train.precision=bf16$",
        ),
    ],
)
def test_impossible_endings_are_refused_before_anything_is_written(
    overrides: list[str], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny("qat.scheme=w4a4", *overrides))
    assert not (tmp_path / "run").exists()


def test_schemes_are_the_ones_of_the_configuration() -> None:
    assert {f"qat_{scheme}" for scheme in SCHEMES} == {name for name in DEPLOYED if name.startswith("qat_")}
    assert all(not DEPLOYED[f"qat_{scheme}"].w_clip for scheme in SCHEMES)
    assert {len(site.readers) for site in SITES.values()} == {0, 1, 2, 4}
