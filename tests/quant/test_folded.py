"""`quant.fold_gains`: the quantized model is the quantization of a model that is folded by hand."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.model.fold import absorb_projections
from osp.model.transformer import Transformer
from osp.model_config import NormConfig
from osp.quant.apply import quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec
from tests.quant.quant_oracle import naive_logits, outlier_model, some_tokens

FOUR = QuantSpec(4, 4, 4)
STATIC: dict[str, Any] = {"static_activations": True, "o_proj_by_head": False}
SPECS = {
    "osp_paper": FOUR,
    "hadamard": dataclasses.replace(FOUR, ffn_hadamard=True),
    "gptq": QuantSpec(4, 16, 16, method="gptq"),
    "static": QuantSpec(8, 8, 16, **STATIC),
    "strict": dataclasses.replace(FOUR, w_clip=False, embedding_and_head=True),
    "nvfp4": DEPLOYED["nvfp4"],
    "mxfp4": DEPLOYED["mxfp4"],
    "q4_0": DEPLOYED["q4_0"],
}
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.ffn_norm": ("mlp.down_proj",),
}


def folded_by_hand(model: Transformer, *, head: bool) -> Transformer:
    if head:
        absorb_projections(model)
    with torch.no_grad():
        places = [(f"layers.{i}.", norm, readers) for i in range(2) for norm, readers in READERS.items()]
        for block, norm, readers in [*places, *([("", "norm", ("lm_head",))] if head else [])]:
            gain = model.get_parameter(f"{block}{norm}.weight")
            for reader in readers:
                model.get_parameter(f"{block}{reader}.weight").mul_(gain[None, :])
            gain.fill_(1)
    return model


def logits(model: Transformer, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def with_fold(spec: QuantSpec) -> QuantSpec:
    return dataclasses.replace(spec, fold_gains=True)


@pytest.mark.parametrize("name", SPECS)
def test_folding_composes_with_every_method(name: str) -> None:
    spec, ids, sequences = SPECS[name], some_tokens(2, 12), some_tokens(4, 12)
    model, reference = (outlier_model(ffn_norm=True, embed_proj=True) for _ in range(2))
    folded_by_hand(reference, head=spec.embedding_and_head)
    torch.testing.assert_close(logits(reference, ids), logits(model, ids), rtol=0, atol=1e-12)
    with quantized(reference, spec, calibration=sequences):
        expected = logits(reference, ids)
    with quantized(model, spec, calibration=sequences):
        unfolded = logits(model, ids)
    with quantized(model, with_fold(spec), calibration=sequences):
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-9)
    assert (expected - unfolded).abs().max() > 1e-3


def test_folded_model_is_the_naive_llama_with_folded_weights() -> None:
    ids = some_tokens(1, 12)
    model, reference = outlier_model(ffn_norm=True), folded_by_hand(outlier_model(ffn_norm=True), head=False)
    with quantized(model, with_fold(FOUR)) as state:
        quantized_logits = logits(model, ids)[0]
    expected = torch.from_numpy(naive_logits(reference, ids[0].tolist(), FOUR, state.sites))
    torch.testing.assert_close(quantized_logits, expected, rtol=0, atol=2e-5)


def test_nothing_is_folded_where_nothing_is_gained() -> None:
    """16 bits, cache alone, a rotation (which folds already) and norms with one gain have the same bits as without."""
    ids, sequences = some_tokens(2, 12), some_tokens(4, 12)
    cases: list[tuple[QuantSpec, dict[str, Any]]] = [
        (QuantSpec(), {}),
        (QuantSpec(16, 16, 4), {}),
        (dataclasses.replace(FOUR, rotation="quarot"), {}),
        (FOUR, {"norm": NormConfig(name="ssnorm")}),
        (DEPLOYED["mxfp4"], {"norm": NormConfig(name="ssnorm")}),
    ]
    for spec, shape in cases:
        model = outlier_model(**shape)
        with quantized(model, spec, calibration=sequences):
            expected = logits(model, ids)
        with quantized(model, with_fold(spec), calibration=sequences):
            assert torch.equal(logits(model, ids), expected), spec
    for spec, _ in cases[:3]:
        assert str(with_fold(spec)) == str(spec)
    assert str(with_fold(FOUR)).startswith("4-4-4 rtn + folded gains, W sym/channel clip")
    assert str(with_fold(SPECS["hadamard"])).startswith("4-4-4 rtn + folded gains + ffn Hadamard, ")


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "bhyt"])
def test_folded_model_is_restored(norm: str) -> None:
    """Parameters keep their bits, and what norms precompute is computed from them again."""
    options = {"layernorm": {"bias": True}, "bhyt": {"seq_len": 12}}.get(norm, {})
    model, ids = outlier_model(norm=NormConfig(name=norm, **options)), some_tokens(2, 12)
    clean, storage = logits(model, ids), {name: p.data_ptr() for name, p in model.named_parameters()}
    with quantized(model, with_fold(FOUR)):
        assert not torch.equal(logits(model, ids), clean)
    assert torch.equal(logits(model, ids), clean)
    assert storage == {name: p.data_ptr() for name, p in model.named_parameters()}
    gains = list(model.get_submodule("layers.0.input_layernorm").parameters())
    with torch.no_grad():
        for parameter in gains:
            parameter.mul_(1.5)
    assert not torch.equal(logits(model, ids), clean)
    loss = model(ids, ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in gains)


def test_folding_takes_away_the_cost_of_a_large_gain() -> None:
    """A gain of 50 makes one channel of attn_in an outlier, which folding moves into columns of the weights."""
    model, ids = outlier_model(), some_tokens(4, 12)
    with torch.no_grad():
        model.embed_tokens.weight[:, 3] /= 8  # no outlier in the residual stream
        for layer in model.layers:
            layer.get_parameter("input_layernorm.weight")[7] = 50.0
            for reader in READERS["input_layernorm"]:
                layer.get_parameter(f"{reader}.weight")[:, 7] /= 50
    clean, errors = logits(model, ids), []
    for spec in (FOUR, with_fold(FOUR)):
        with quantized(model, spec, sites=["attn_in"]):
            errors.append(float((logits(model, ids) - clean).norm()))
    assert errors[1] < errors[0] / 3
