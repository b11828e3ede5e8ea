"""The model against transformers' Llama, hand-computed sizes, and the properties of its initialisation."""

import copy
import dataclasses
import math
import typing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from osp.errors import UserError
from osp.evaluation.language_model import model_sha256
from osp.model.generate import generate
from osp.model.loss import IGNORE
from osp.model.norms import NORMS, BHyT
from osp.model.transformer import (
    TRUNCATED_STD,
    Block,
    Transformer,
    build_model,
    count_parameters,
    flops_per_token,
    parameter_shapes,
)
from osp.model_config import ROLES, AttentionConfig, ModelConfig, NormConfig
from osp.run.checkpoint import whole_parameters

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=48,
    rope_theta=500.0,
    norm=NormConfig(name="rmsnorm"),
)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def tiny(norm: str = "rmsnorm", **changes: Any) -> ModelConfig:
    seq_len = 16 if norm == "bhyt" else None
    return dataclasses.replace(TINY, norm=NormConfig(name=norm, seq_len=seq_len), **changes)


def tokens(batch_size: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def lively(config: ModelConfig, seed: int = 0) -> Transformer:
    """Return a model whose gains differ from 1 and whose weights are large enough for every part to matter."""
    model = build_model(dataclasses.replace(config, initializer_range=0.3), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.parameter_roles()[name] == "gain":
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def blocks(model: Transformer) -> list[Block]:
    return [layer for layer in model.layers if isinstance(layer, Block)]


def bhyt_norms(block: Block) -> tuple[BHyT, BHyT]:
    first, second = block.input_layernorm, block.post_attention_layernorm
    assert isinstance(first, BHyT)
    assert isinstance(second, BHyT)
    return first, second


def llama(model: Transformer) -> LlamaForCausalLM:
    """Return the `transformers` model with the same function: SSNorm as constant gains, EmbProj absorbed."""
    config = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    theirs.set_attn_implementation("eager")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if config.embed_proj:
        state["embed_tokens.weight"] = state["embed_tokens.weight"] @ state.pop("embed_proj.weight").T
        state["lm_head.weight"] = state["lm_head.weight"] @ state.pop("head_proj.weight")
    for key, value in state.items():
        if value.shape == (1,):
            state[key] = value.expand(config.hidden_size)
    theirs.load_state_dict(
        {key if key.startswith("lm_head") else f"model.{key}": value for key, value in state.items()}
    )
    return theirs.eval()


PARITY = {
    "mha": tiny(),
    "gqa": tiny(num_key_value_heads=2),
    "ssnorm": tiny("ssnorm"),
    "embed_proj": tiny(embed_proj=True),
    "osp-gqa": tiny("ssnorm", embed_proj=True, num_key_value_heads=1),
}


@pytest.mark.parametrize("case", PARITY)
def test_logits_and_greedy_text_equal_transformers(case: str) -> None:
    model = lively(PARITY[case])
    theirs, ids = llama(model), tokens(length=40)
    with torch.no_grad():
        expected = theirs(ids).logits
        logits = model(ids).logits
    assert expected.std() > 0.3, "logits must be far from 0 for the tolerance to mean anything"
    torch.testing.assert_close(logits, expected, **CLOSE)
    text = typing.cast(Any, theirs).generate(
        ids[:1, :8], max_new_tokens=16, do_sample=False, attention_mask=torch.ones(1, 8)
    )
    assert isinstance(text, Tensor)
    assert generate(model, ids[:1, :8].tolist(), 16) == text[:, 8:].tolist()


def test_loss_and_gradients_equal_transformers() -> None:
    model = lively(tiny(num_key_value_heads=2))
    theirs, ids = llama(model), tokens(length=17)
    loss = model(ids[:, :-1], ids[:, 1:]).loss / 32
    loss.backward()
    expected = theirs(ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert gradients[name] is not None, name
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- norms in the block -------------------------------------------------------------------------------------------


def test_bhyt_block_shares_the_variance_of_its_input() -> None:
    """The second norm uses the block's input and the attention gain, not the actual output of attention."""
    config = dataclasses.replace(tiny(), norm=NormConfig(name="bhyt", lam=2.0, kappa=4.0, seq_len=9))
    model = build_model(config, seed=0)
    block = blocks(model)[1]
    first, second = bhyt_norms(block)
    with torch.no_grad():
        first.lam.fill_(3.0)
        second.lam.fill_(1.5)
    x, table = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)), model.rotary(9, torch.device("cpu"))

    energy = (block.self_attn.o_proj.weight.double() @ block.self_attn.v_proj.weight.double()).square().sum()
    variance = x.double().square().mean(-1, keepdim=True)
    after = variance + energy / (9 * 32) * (3.0 / 4.0) ** 2
    with torch.no_grad():
        h = torch.tanh(3.0 / 4.0 * x / variance.sqrt().float())
        middle = x + block.self_attn(h, *table, None)
        expected = middle + block.mlp(torch.tanh(1.5 / 4.0 * middle / after.sqrt().float()))[0]
        torch.testing.assert_close(block(x, *table, None)[0], expected, rtol=1e-4, atol=1e-5)


def test_norm_statistics_follow_the_weights_and_are_stored() -> None:
    model = build_model(tiny("bhyt"), seed=0)
    assert model.has_norm_statistics
    assert not build_model(tiny(), seed=0).has_norm_statistics
    seconds = [bhyt_norms(block)[1] for block in blocks(model)]
    gains = [norm.attention_gain.item() for norm in seconds]
    assert min(gains) > 0
    with torch.no_grad():
        for block in blocks(model):
            block.self_attn.v_proj.weight.mul_(3)
    model.refresh_norms()
    for i, norm in enumerate(seconds):
        assert norm.attention_gain.item() == pytest.approx(9 * gains[i], rel=1e-5)
        assert torch.equal(
            model.state_dict()[f"layers.{i}.post_attention_layernorm.attention_gain"], norm.attention_gain
        )


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_every_parameter_gets_a_gradient(norm: str) -> None:
    model = lively(tiny(norm, embed_proj=True))
    ids = tokens(length=17)
    model(ids[:, :-1], ids[:, 1:]).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


# --- documents ----------------------------------------------------------------------------------------------------


def test_logits_of_packed_documents_equal_separate_documents() -> None:
    model, ids = lively(tiny(num_key_value_heads=2)), tokens(batch_size=1)
    documents = torch.tensor([[0] * 5 + [1] + [2] * 10])
    with torch.no_grad():
        packed = model(ids, document_ids=documents).logits
        separate = torch.cat([model(part).logits for part in ids.split([5, 1, 10], dim=1)], dim=1)
        mixed = model(ids).logits
    torch.testing.assert_close(packed, separate, **CLOSE)
    assert (mixed - packed)[:, 6:].abs().max() > 0.1, "without the mask documents must see each other"
    torch.testing.assert_close(mixed[:, :5], packed[:, :5], **CLOSE)


def test_one_document_equals_no_mask() -> None:
    model, ids = lively(tiny()), tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, document_ids=torch.ones_like(ids)).logits, model(ids).logits, **CLOSE)


def test_logits_do_not_depend_on_later_tokens() -> None:
    model, ids = lively(tiny()), tokens()
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % TINY.vocab_size
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax((0, 2))
    assert difference[:9].max() == 0
    assert difference[9:].min() > 0


# --- loss ---------------------------------------------------------------------------------------------------------


def loss_and_gradients(model: Transformer, *arguments: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(*arguments, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 7, 32, 8192])
def test_loss_with_targets_equals_cross_entropy_of_the_logits(chunk: int) -> None:
    model, ids, targets = lively(tiny("ssnorm", embed_proj=True)), tokens(), tokens(seed=1)
    targets[0, 3:9] = IGNORE
    model.lm_head.chunk_tokens = chunk
    loss, gradients = loss_and_gradients(model, ids, targets)
    model.zero_grad()
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(gradients[name] / scale, parameter.grad / scale, rtol=1e-4, atol=1e-5)


class Sizes(TorchDispatchMode):
    """Record the number of elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numels |= {v.numel() for v in (out if isinstance(out, list | tuple) else (out,)) if isinstance(v, Tensor)}
        return out


def test_training_never_allocates_all_logits() -> None:
    model, ids = build_model(tiny(vocab_size=997), seed=0), tokens(batch_size=4)
    with Sizes() as whole:
        F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
    model.lm_head.chunk_tokens = 8
    with Sizes() as chunked:
        model(ids, ids).loss.backward()
    assert max(whole.numels) == 64 * 997
    assert 8 * 997 in chunked.numels
    assert max(chunked.numels) == 32 * 997, "the largest is the head, not the logits"


# --- size ---------------------------------------------------------------------------------------------------------

OSP_1B = ModelConfig(
    vocab_size=49152, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16
)
NANO = ModelConfig(embed_proj=True)


def test_parameters_of_osp_1b() -> None:
    counts = count_parameters(OSP_1B)
    # a layer: 4 * 2048^2 = 16,777,216 of attention and 3 * 2048 * 5504 = 33,816,576 of MLP
    assert counts["matrix"] == 24 * (16_777_216 + 33_816_576) == 1_214_251_008
    assert counts["embedding"] == counts["head"] == 49_152 * 2_048 == 100_663_296
    assert counts["gain"] == 2 * 24 + 1
    assert counts["total"] == 1_415_577_649  # 1.416 B
    assert "embed_proj" not in counts
    projected = count_parameters(dataclasses.replace(OSP_1B, embed_proj=True))
    assert projected["embed_proj"] == 2 * 2048**2 == 8_388_608
    assert projected["total"] == 1_415_577_649 + 8_388_608


def test_parameters_of_nano() -> None:
    counts = count_parameters(NANO)
    # a layer: 4 * 256^2 = 262,144 and 3 * 256 * 768 = 589,824; six of them, and two times 4096 * 256 = 1,048,576
    assert counts["matrix"] == 6 * 851_968
    assert counts["total"] == 5_111_808 + 2 * 1_048_576 + 2 * 65_536 + 13 == 7_340_045


def test_parameters_with_grouped_query_attention() -> None:
    # q and o: 32 * 32, k and v: 32 * 16; MLP 3 * 32 * 40; rmsnorm: 32 gains in 5 norms
    counts = count_parameters(tiny(num_key_value_heads=2))
    assert counts == {
        "embedding": 61 * 32,
        "matrix": 2 * (2048 + 1024 + 3840),
        "gain": 160,
        "head": 61 * 32,
        "total": 17888,
    }


def test_tied_head_is_counted_once() -> None:
    untied = count_parameters(tiny())
    del untied["head"]
    assert count_parameters(tiny(tie_embeddings=True)) == untied | {"total": untied["total"] - 61 * 32}


def test_flops_of_osp_1b() -> None:
    # 6 * (1,214,251,008 + 100,663,296) for the weights, 6 * 24 * 2048 * (16 * 128) for causal attention
    assert flops_per_token(OSP_1B, 2048) == 7_889_485_824 + 603_979_776
    assert flops_per_token(dataclasses.replace(OSP_1B, embed_proj=True), 2048) == 8_493_465_600 + 6 * 8_388_608


@pytest.mark.parametrize(
    "config",
    [tiny(), tiny("ssnorm", num_key_value_heads=2, embed_proj=True), tiny(tie_embeddings=True)],
    ids=["mha", "gqa", "tied"],
)
def test_flops_of_the_weights_equal_what_torch_counts(config: ModelConfig) -> None:
    """PyTorch counts every matrix product of a forward and backward pass; attention is counted separately."""
    model, ids = build_model(config, seed=0), tokens()
    model.lm_head.chunk_tokens = 8
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(flops for operation, flops in counts.items() if "attention" not in str(operation))
    assert products == ids.numel() * flops_per_token(config, seq_len=0)


# --- initialisation -----------------------------------------------------------------------------------------------


def poison(model: Transformer) -> None:
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            value.fill_(torch.nan)


@pytest.mark.parametrize("embed_proj", [False, True])
@pytest.mark.parametrize(
    "norm",
    [
        *(NormConfig(name=name, seq_len=16 if name == "bhyt" else None) for name in sorted(NORMS)),
        NormConfig("layernorm", bias=True, final="dyt"),
        NormConfig("crmsnorm", affine=True),
        NormConfig("bhyt", seq_len=16, final="bhyt"),
    ],
    ids=lambda n: f"{n.name}-{n.final}",
)
def test_init_weights_sets_every_parameter_and_buffer(norm: NormConfig, embed_proj: bool) -> None:
    config = dataclasses.replace(tiny(), norm=norm, embed_proj=embed_proj)
    model, same = build_model(config, seed=3), Transformer(config)
    poison(same)
    same.init_weights(3)
    left = [name for name, value in same.state_dict().items() if value.isnan().any()]
    assert not left, f"init_weights left untouched: {left}"
    assert not [name for name, buffer in same.named_buffers() if name not in same.state_dict()], "unsaved buffers"
    for name, value in model.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name


@pytest.mark.parametrize(("given", "std"), [(None, 1 / math.sqrt(96)), (0.02, 0.02)])
def test_initial_matrices_have_the_given_standard_deviation_and_mean_zero(given: float | None, std: float) -> None:
    model = build_model(dataclasses.replace(tiny(), hidden_size=96, initializer_range=given), seed=0)
    for name, value in model.named_parameters():
        if value.ndim == 2:
            n = value.numel()
            assert float(value.detach().std()) == pytest.approx(std, rel=4 / math.sqrt(2 * n)), name
            assert abs(float(value.detach().mean())) < 4 * std / math.sqrt(n), name


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 320, "head_dim": 32, "num_key_value_heads": 2}


@pytest.mark.parametrize("variant", ["normal", "residual", "fan_in"])
def test_initial_deviation_of_every_matrix_equals_the_closed_form(variant: str) -> None:
    """In `normal` the deviation of all is 1/sqrt(D); SmolLM1 divides the two matrices that write to the stream.

    `fan_in` is Flax's default, which OSP's example code keeps: `lecun_normal`, a truncated normal of deviation
    1/sqrt(inputs), for matrices and head, and a normal of deviation 1/sqrt(D) for the embedding.
    """
    config = tiny(vocab_size=500, embed_proj=True, **WIDE)
    options = {"normal": {}, "residual": {"scale_residual_init": True}, "fan_in": {"init": "fan_in"}}[variant]
    model = build_model(dataclasses.replace(config, **options), seed=0)
    inputs = {"down_proj": 320, "o_proj": 4 * 32}
    for name, value in model.named_parameters():
        kind = name.split(".")[-2]
        if value.ndim != 2 or kind in ("embed_proj", "head_proj"):
            continue
        fan_in = inputs.get(kind, 64) if variant == "fan_in" else 64
        std = 1 / math.sqrt(fan_in * (2 * 2 if variant == "residual" and kind in inputs else 1))
        n, x = value.numel(), value.detach().double()
        assert x.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n)), name
        assert abs(x.mean().item()) < 4 * std / math.sqrt(n), name
        # beyond 2 parent deviations nothing, below it as many as in a normal distribution cut off there
        parent, cut = std / 0.87962566103423978, variant == "fan_in" and kind != "embed_tokens"
        assert (x.abs().max().item() <= 2 * parent * (1 + 1e-6)) == cut, name
        if cut:
            share = math.erf(1 / math.sqrt(2)) / math.erf(2 / math.sqrt(2))  # within 1 parent deviation
            assert (x.abs() < parent).double().mean().item() == pytest.approx(share, abs=2.5 / math.sqrt(n)), name


def test_deviation_of_a_truncated_normal() -> None:
    """Var[z | |z| < 2] = 1 - 2 * 2 phi(2) / (2 Phi(2) - 1), the constant of `jax.nn.initializers`."""
    phi = math.exp(-2) / math.sqrt(2 * math.pi)
    assert math.sqrt(1 - 4 * phi / math.erf(math.sqrt(2))) == pytest.approx(TRUNCATED_STD, rel=1e-12)


def test_a_deviation_besides_fan_in_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"initializer_range=0.02 with model.init=fan_in.*set .*null or model.init=norm"
    ):
        Transformer(tiny(init="fan_in", initializer_range=0.02))


def test_initial_matrices_are_independent() -> None:
    model = build_model(tiny(), seed=0)
    squares = [p.detach().flatten() for p in model.parameters() if p.shape == (32, 32)]
    assert len(squares) == 8
    correlation = torch.corrcoef(torch.stack(squares)) - torch.eye(8)
    assert correlation.abs().max() < 5 / 32


def test_scale_residual_init_affects_residual_outputs_only() -> None:
    plain, scaled = build_model(tiny(), seed=0), build_model(tiny(scale_residual_init=True), seed=0)
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = 1 / math.sqrt(2 * 2) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(b, a * factor, rtol=1e-6, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")


def test_initial_projections_are_orthogonal_and_different() -> None:
    model = build_model(tiny(embed_proj=True), seed=0)
    one, two = model.get_parameter("embed_proj.weight"), model.get_parameter("head_proj.weight")
    for weight in (one, two):
        torch.testing.assert_close(weight @ weight.T, torch.eye(32), rtol=0.0, atol=1e-5)
    assert not torch.equal(one, two)


def test_initial_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = build_model(tiny(embed_proj=True), seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second, other = build_model(tiny(embed_proj=True), seed=5), build_model(tiny(embed_proj=True), seed=6)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator must stay as it was"


# --- roles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_every_parameter_has_the_expected_role(norm: str) -> None:
    model = Transformer(tiny(norm, embed_proj=True))
    roles = model.parameter_roles()
    assert list(roles) == [name for name, _ in model.named_parameters()]
    for name, role in roles.items():
        part = name.split(".")
        if part[0] in ("embed_tokens", "lm_head"):
            assert role == {"embed_tokens": "embedding", "lm_head": "head"}[part[0]]
        elif part[0] in ("embed_proj", "head_proj"):
            assert role == "embed_proj"
        else:
            assert role == ("matrix" if part[-2].endswith("_proj") else "gain"), name
    assert set(roles.values()) == set(ROLES) - ({"gain"} if norm == "crmsnorm" else set())


def test_parameter_heads_divide_every_attention_matrix() -> None:
    """With grouped queries and a gate, the dimension with the heads is the number of heads times the head size."""
    gate = AttentionConfig(gate=True)
    config = dataclasses.replace(tiny("ssnorm"), num_key_value_heads=2, attention=gate, attention_bias=True)
    model = Transformer(config)
    heads = model.parameter_heads()
    assert set(heads) == {n for n, p in model.named_parameters() if "self_attn" in n and p.ndim == 2}
    for name, (count, dim) in heads.items():
        shape = model.get_parameter(name).shape
        assert shape[dim] == count * config.head_size, name
        assert shape[1 - dim] == config.hidden_size, name


# --- precision and memory -----------------------------------------------------------------------------------------


def test_bf16_compute_keeps_fp32_weights() -> None:
    model, ids = lively(tiny("ssnorm", embed_proj=True)), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        exact = model(ids).logits
    _, exact_gradients = loss_and_gradients(model, ids, ids)
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        logits = model(ids).logits
    loss, gradients = loss_and_gradients(model, ids, ids)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert float((logits - exact).norm() / exact.norm()) < 0.03
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, before[name]), name
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32, name
        if gradient.ndim == 2:  # the gradient of a scalar gain is a sum that cancels: bf16 leaves it few digits
            error = float((gradient - exact_gradients[name]).norm() / exact_gradients[name].norm())
            assert error < 0.15, (name, error)


@pytest.mark.parametrize("norm", ["ssnorm", "bhyt"])
def test_activation_checkpointing_is_bit_identical(norm: str) -> None:
    model, ids = lively(tiny(norm)), tokens()
    documents = (torch.arange(16) // 6).expand(2, 16)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    blocks(model)[0].mlp.register_forward_pre_hook(count)
    loss, gradients = loss_and_gradients(model, ids, ids, document_ids=documents)
    assert calls == 1
    model.activation_checkpointing = True
    again, recomputed = loss_and_gradients(model, ids, ids, document_ids=documents)
    assert calls == 3, "the block must run once forward and once more in backward"
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    assert not [name for name in gradients if not torch.equal(gradients[name], recomputed[name])]
    model.eval()
    loss_and_gradients(model, ids, ids)
    assert calls == 4, "evaluation recomputes nothing"


def test_activation_checkpointing_reads_no_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block draws no random numbers, and on a GPU reading the state would wait for it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the random state is read")

    model, ids = lively(tiny()), tokens()
    model.activation_checkpointing = True
    monkeypatch.setattr(torch, "get_rng_state", refuse)
    monkeypatch.setattr(torch, "set_rng_state", refuse)
    loss_and_gradients(model, ids, ids)


def test_sequences_may_exceed_the_table_of_positions() -> None:
    """The table grows, and a longer call does not change a shorter one."""
    model, ids = lively(tiny(max_position_embeddings=4)), tokens(length=24)
    with torch.no_grad():
        short, long = model(ids[:, :4]).logits, model(ids).logits
        expected = lively(tiny())(ids).logits
        assert torch.equal(model(ids[:, :4]).logits, short)
    torch.testing.assert_close(long, expected, **CLOSE)


# --- tied head ----------------------------------------------------------------------------------------------------


def test_tied_head_survives_devices_dtypes_and_copies() -> None:
    model = build_model(tiny(tie_embeddings=True), seed=0)
    untied = build_model(tiny(), seed=0)
    assert torch.equal(model.embed_tokens.weight, untied.embed_tokens.weight)
    assert torch.equal(blocks(model)[1].mlp.down_proj.weight, blocks(untied)[1].mlp.down_proj.weight)
    for other in (model, copy.deepcopy(model), model.to(torch.float64), model.to("meta").to_empty(device="cpu")):
        assert other.lm_head.weight is other.embed_tokens.weight
        assert [name for name, _ in other.named_parameters() if "layers" not in name] == [
            "embed_tokens.weight",
            "norm.weight",
        ]
        assert other.parameter_roles()["embed_tokens.weight"] == "embedding"


@pytest.mark.parametrize("changes", [{}, {"head_bias": True}], ids=str)
def test_gradient_of_a_tied_matrix_is_the_sum_of_the_gradients_of_both_uses(changes: dict[str, Any]) -> None:
    gradients, ids = [], tokens()
    for tied in (True, False):
        model = lively(tiny(tie_embeddings=tied, **changes)).double()
        model.compute_dtype, ends = torch.float64, (model.embed_tokens.weight, model.lm_head.weight)
        ends[1].data.copy_(ends[0].data)
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected = gradients[1]
    expected["embed_tokens.weight"] = expected["embed_tokens.weight"] + expected.pop("lm_head.weight")
    assert gradients[0].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-12, atol=1e-12)


def test_tied_checkpoints_hold_one_matrix_and_one_hash() -> None:
    """A tied model and its untied copy have one hash, so records of Hugging Face folders stay valid."""
    model, untied = build_model(tiny(tie_embeddings=True), seed=0), build_model(tiny(), seed=0)
    assert "lm_head.weight" not in parameter_shapes(model.config)
    assert [name for name, *_ in whole_parameters(model)].count("embed_tokens.weight") == 1
    untied.load_state_dict(model.state_dict())
    assert model_sha256(model) == model_sha256(untied)


# --- bad shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "model.hidden_size=32 is not divisible by model.num_attention_heads=5"),
        ({"num_attention_heads": 32}, "head size 1"),
        ({"num_key_value_heads": 3}, "model.num_attention_heads=4 is not divisible by model.num_key_value_heads=3"),
        ({"tie_embeddings": True, "embed_proj": True}, "two matrices then; set model.embed_proj=false or model.tie_em"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Transformer(dataclasses.replace(TINY, **changes))
    assert message in str(caught.value)
