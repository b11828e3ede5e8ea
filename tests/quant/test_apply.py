"""A model inside `quantized` has the logits of an independent Llama, and is restored at the end."""

import dataclasses
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osp.errors import UserError
from osp.model.fold import absorb_projections
from osp.model.sites import hook_site
from osp.model.transformer import Transformer
from osp.model_config import AttentionConfig, NormConfig
from osp.quant.apply import draw_calibration, propagated_error, quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import SITES, QuantSpec
from tests.quant.quant_oracle import naive_logits, outlier_model, some_tokens

W4A4KV4 = QuantSpec(4, 4, 4)
SPECS = {
    "osp_paper": W4A4KV4,
    "strict": QuantSpec(
        4, 4, 4, w_clip=False, o_proj_by_head=False, qk_hadamard=False, embedding_and_head=True
    ),
    "hadamard": dataclasses.replace(W4A4KV4, ffn_hadamard=True),
    "other_grids": QuantSpec(
        3, 6, 5, w_symmetric=False, w_group_size=8, a_symmetric=True, a_group_size=16,
        kv_symmetric=True, kv_group_size=4,
    ),
    "weights_only": QuantSpec(4, 16, 16),
    "cache_only": QuantSpec(16, 16, 4),
}  # fmt: skip


def logits(model: Transformer, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def snapshot(model: Transformer) -> dict[str, Any]:
    """Return what quantization must restore: bits, storage, modules, hooks and config."""
    return {
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "storage": {name: p.data_ptr() for name, p in model.named_parameters()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
        "config": model.config,
    }


def assert_untouched(model: Transformer, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for name, bits in before.pop("bits").items():
        assert torch.equal(bits, after["bits"][name]), name
    after.pop("bits")
    assert after == before


@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_the_naive_llama(name: str) -> None:
    model, ids = outlier_model(), some_tokens(2, 12)
    spec = SPECS[name]
    with quantized(model, spec) as state:
        quantized_logits = logits(model, ids)
    for row_logits, sequence in zip(quantized_logits, ids.tolist(), strict=True):
        expected = torch.from_numpy(naive_logits(model, sequence, spec, state.sites))
        torch.testing.assert_close(row_logits, expected, rtol=0, atol=2e-5)
    assert (quantized_logits - logits(model, ids)).abs().max() > 0.01


@pytest.mark.parametrize("site", SITES)
def test_single_quantized_site_equals_the_naive_llama(site: str) -> None:
    attention = AttentionConfig(gate=True, off_by_one=True, value_gate=True, logit_cap=0.5)
    model, ids = outlier_model(attention=attention, ffn_norm=True), some_tokens(1, 12)
    spec = dataclasses.replace(W4A4KV4, embedding_and_head=True, ffn_hadamard=True, w_clip=False)
    with quantized(model, spec, sites=[site]) as state:
        quantized_logits = logits(model, ids)[0]
    assert state.sites == {site}
    expected = torch.from_numpy(naive_logits(model, ids[0].tolist(), spec, [site]))
    torch.testing.assert_close(quantized_logits, expected, rtol=0, atol=2e-5)
    assert (quantized_logits - logits(model, ids)[0]).abs().max() > 1e-3


def test_embedding_and_head_match_the_exported_model() -> None:
    """With projections, the input of the head is the input of the absorbed head."""
    model, ids = outlier_model(embed_proj=True), some_tokens(1, 12)
    exported = outlier_model(embed_proj=True)
    absorb_projections(exported)
    spec = dataclasses.replace(W4A4KV4, embedding_and_head=True, w_clip=False)
    for site in ("embed_tokens", "lm_head", "head_in"):
        with quantized(model, spec, sites=[site]), quantized(exported, spec, sites=[site]):
            torch.testing.assert_close(logits(model, ids), logits(exported, ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["rmsnorm", "ssnorm", "layernorm", "dyt", "bhyt"])
def test_16_bits_are_the_model_bit_for_bit(norm: str) -> None:
    seq_len = 12 if norm == "bhyt" else None
    model = outlier_model(norm=NormConfig(name=norm, seq_len=seq_len), embed_proj=True).float()
    model.compute_dtype = torch.float32
    ids = some_tokens(2, 12)
    clean, before = logits(model, ids), snapshot(model)
    for spec in (QuantSpec(), QuantSpec(ffn_hadamard=True, embedding_and_head=True, rotation="quarot", method="gptq")):
        with quantized(model, spec) as state:
            assert state.sites == frozenset()
            assert torch.equal(logits(model, ids), clean)
            assert snapshot(model)["hooks"] == before["hooks"]
    with quantized(model, dataclasses.replace(W4A4KV4, ffn_hadamard=True), sites=()):
        assert torch.equal(logits(model, ids), clean)


@pytest.mark.parametrize(
    "spec",
    [
        W4A4KV4,
        dataclasses.replace(W4A4KV4, ffn_hadamard=True, embedding_and_head=True),
        dataclasses.replace(W4A4KV4, ffn_hadamard=True, method="gptq", rotation="quarot"),
    ],
    ids=str,
)
def test_model_is_restored_bit_for_bit(spec: QuantSpec) -> None:
    model, ids = outlier_model(norm=NormConfig(name="ssnorm"), embed_proj=True).float(), some_tokens(2, 12)
    model.compute_dtype = torch.float32
    clean, before = logits(model, ids), snapshot(model)
    with quantized(model, spec, calibration=some_tokens(8, 12)):
        assert not torch.equal(logits(model, ids), clean)
    assert torch.equal(logits(model, ids), clean)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("spec", "sites"),
    [
        (W4A4KV4, SITES),
        (DEPLOYED["q4_0"], SITES),
        (DEPLOYED["q4_0"], {"embed_tokens"}),
        (DEPLOYED["q4_0"], {"lm_head"}),
        (dataclasses.replace(W4A4KV4, fold_gains=True, embedding_and_head=True), SITES),
        (dataclasses.replace(W4A4KV4, ffn_hadamard=True, method="gptq", rotation="quarot"), SITES),
        (dataclasses.replace(W4A4KV4, rotation="quarot", embedding_and_head=True), SITES),
    ],
    ids=["blocks", "q4_0", "embedding", "head", "folded gains", "quarot", "quarot of the ends"],
)
@pytest.mark.parametrize(
    "shape",
    [
        {"norm": NormConfig("rmsnorm", affine=False)},
        {"norm": NormConfig("rmsnorm", embed_scale=True)},
    ],
    ids=["no gains", "embed_scale"],
)
def test_tied_model_is_quantized_as_its_untied_copy_and_restored(
    shape: dict[str, Any], spec: QuantSpec, sites: Collection[str]
) -> None:
    model, untied = (outlier_model(tie_embeddings=tied, **shape).float() for tied in (True, False))
    model.compute_dtype = untied.compute_dtype = torch.float32
    untied.load_state_dict(model.state_dict())
    ids, calibration, quantized_logits = some_tokens(2, 32), some_tokens(8, 32), []
    before, parameters = snapshot(model), dict(model.named_parameters())
    for twin in (model, untied):
        with quantized(twin, spec, calibration=calibration, sites=sites):
            quantized_logits.append(logits(twin, ids))
    assert torch.equal(*quantized_logits)
    assert_untouched(model, before)
    assert model.lm_head.weight is model.embed_tokens.weight is parameters["embed_tokens.weight"]


def test_model_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = outlier_model(embed_proj=True)
    before = snapshot(model)
    spec = dataclasses.replace(W4A4KV4, rotation="quarot", ffn_hadamard=True)
    with pytest.raises(KeyError), quantized(model, spec):
        raise KeyError("in the body")
    assert_untouched(model, before)

    def fails(*_: Any, **__: Any) -> Tensor:
        raise MemoryError

    before = snapshot(model)
    monkeypatch.setattr("osp.quant.grid.Grid.round", fails)  # after rotation and online hooks
    with pytest.raises(MemoryError), quantized(model, spec):
        pass
    assert_untouched(model, before)


def test_training_is_unchanged_by_quantized_evaluation() -> None:
    def train(*, evaluate: bool) -> list[Tensor]:
        model, ids = outlier_model(norm=NormConfig(name="ssnorm"), embed_proj=True), some_tokens(2, 12)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids[:, :-1], ids[:, 1:].contiguous()).loss.backward()
            if evaluate:  # between backward and step: gradients are kept too
                with quantized(model, dataclasses.replace(W4A4KV4, ffn_hadamard=True)), torch.no_grad():
                    model(ids)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for plain, evaluated in zip(train(evaluate=False), train(evaluate=True), strict=True):
        assert torch.equal(plain, evaluated)


def test_compiled_blocks_are_quantized_too() -> None:
    """Compiled code silently ignores hooks that are added later."""
    model, ids = outlier_model(), some_tokens(1, 12)
    with quantized(model, W4A4KV4):
        expected = logits(model, ids)
    for layer in model.layers:
        layer.compile(backend="eager")
    clean = logits(model, ids)  # compiles
    with quantized(model, W4A4KV4):
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), clean)


def test_bf16_logits_are_close_to_the_unquantized_ones() -> None:
    model, ids = outlier_model().float(), some_tokens(2, 12)
    model.compute_dtype = torch.bfloat16
    with quantized(model, QuantSpec(8, 8, 8, ffn_hadamard=True)):
        quantized_logits = logits(model, ids)
    assert quantized_logits.dtype == torch.bfloat16
    torch.testing.assert_close(quantized_logits.float(), logits(model, ids).float(), rtol=0, atol=0.3)


def test_unknown_site_missing_text_and_wrong_group_size_are_refused() -> None:
    model = outlier_model()
    with (
        pytest.raises(UserError, match="unknown site 'qproj'; choose from q_proj, "),
        quantized(model, W4A4KV4, sites=["qproj"]),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"quant: 4-4-4 gptq .* needs calibration text"),
        quantized(model, dataclasses.replace(W4A4KV4, method="gptq")),
    ):
        pass
    with (
        pytest.raises(UserError, match="w_group_size=24 does not divide"),
        quantized(model, dataclasses.replace(W4A4KV4, w_group_size=24)),
    ):
        pass


def test_calibration_sequences_are_windows_of_the_text() -> None:
    tokens = torch.arange(1000)
    spec = QuantSpec(calibration_tokens=90, calibration="a.txt")
    sequences = draw_calibration(tokens, spec, seq_len=20)
    assert sequences.shape == (5, 20)
    assert torch.equal(sequences, sequences[:, :1] + torch.arange(20))
    assert torch.equal(sequences, draw_calibration(tokens, spec, seq_len=20))
    assert not torch.equal(sequences, draw_calibration(tokens, dataclasses.replace(spec, seed=1), seq_len=20))
    with pytest.raises(UserError, match=r"quant\.calibration=a\.txt: 80 tokens are too few .*calibration_tokens=90"):
        draw_calibration(tokens[:80], spec, seq_len=20)


@pytest.mark.parametrize("rotation", ["none", "quarot"])
def test_propagated_error_matches_its_definition(rotation: Any) -> None:
    """R_L is over all tokens, and for a rotated model in the basis of the unrotated one."""
    model, sequences = outlier_model(), some_tokens(4, 12)
    spec = dataclasses.replace(W4A4KV4, rotation=rotation, ffn_hadamard=True)
    clean, noisy = [], []

    def hidden(into: list[Tensor]) -> None:
        names = [f"layer_{layer:02d}/block_out" for layer in range(len(model.layers))] + ["final_norm_out"]
        handles = [hook_site(model, name, lambda x: into.append(x.double())) for name in names]
        logits(model, sequences)
        for handle in handles:
            handle.remove()

    hidden(clean)
    with quantized(model, spec) as state:
        hidden(noisy)
    if rotation == "quarot":
        assert state.basis is not None
        noisy = [h @ state.basis.T for h in noisy]
        norm = model.norm
        assert isinstance(norm.weight, nn.Parameter)
        noisy[-1] = noisy[-1] * norm.weight.detach()
    expected = [float(((q - h) ** 2).sum() / (h**2).sum()) for q, h in zip(noisy, clean, strict=True)]
    error = propagated_error(model, spec, sequences)
    assert error == pytest.approx(expected, rel=1e-6)
    assert 0.001 < error[0] < 1
    assert propagated_error(model, QuantSpec(), sequences) == [0.0, 0.0, 0.0]
