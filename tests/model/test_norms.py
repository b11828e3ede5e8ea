"""Norms against formulas in float64 that are written here, value and gradient."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.errors import UserError
from osp.model.build_norms import block_norm, bound_warning, build_norm, final_norm, inner_norm
from osp.model.norms import NORMS, BHyT, Norm
from osp.model.transformer import Attention
from osp.model_config import ModelConfig, NormConfig

SHAPES = [(5, 123, 37), (2, 64), (1, 1, 8)]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
Parameters = dict[str, Tensor]


def layernorm(x: Tensor, p: Parameters, eps: float) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    y = (x - mean) / (variance + eps) ** 0.5
    return y * p.get("weight", 1.0) + p.get("bias", 0.0)


def rmsnorm(x: Tensor, p: Parameters, eps: float) -> Tensor:
    return p.get("weight", 1.0) * x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5


def crmsnorm(x: Tensor, p: Parameters, eps: float) -> Tensor:
    last = -x.sum(-1, keepdim=True)
    return p.get("weight", 1.0) * x / (((x**2).sum(-1, keepdim=True) + last**2) / (x.shape[-1] + 1) + eps) ** 0.5


def bhyt(x: Tensor, p: Parameters, eps: float) -> Tensor:
    s = ((x**2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    return p["weight"] * torch.tanh(p["lam"] * x / (7.0 * s))


def dyt(x: Tensor, p: Parameters, eps: float) -> Tensor:
    return p["weight"] * torch.tanh(p["alpha"] * x) + p["bias"]


def derf(x: Tensor, p: Parameters, eps: float) -> Tensor:
    return p["weight"] * torch.erf(p["alpha"] * x + p["shift"]) + p["bias"]


# id: norm, options, formula
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tensor, Parameters, float], Tensor]]] = {
    "layernorm": ("layernorm", {"eps": 1e-3}, layernorm),
    "layernorm-bias": ("layernorm", {"bias": True, "eps": 1e-3}, layernorm),
    "layernorm-plain": ("layernorm", {"affine": False, "eps": 1e-3}, layernorm),
    "rmsnorm": ("rmsnorm", {"eps": 1e-3}, rmsnorm),
    "rmsnorm-plain": ("rmsnorm", {"affine": False, "eps": 1e-3}, rmsnorm),
    "ssnorm": ("ssnorm", {"eps": 1e-3}, rmsnorm),
    "crmsnorm": ("crmsnorm", {"eps": 1e-3}, crmsnorm),
    "crmsnorm-affine": ("crmsnorm", {"affine": True, "eps": 1e-3}, crmsnorm),
    "bhyt": ("bhyt", {"kappa": 7.0, "lam": 2.0, "eps": 1e-3}, bhyt),
    "bhyt_star": ("bhyt_star", {"kappa": 7.0, "lam": 2.0, "eps": 1e-3}, bhyt),
    "dyt": ("dyt", {}, dyt),
    "derf": ("derf", {}, derf),
}
SQUASHING = ("bhyt", "bhyt_star", "dyt", "derf")
NUM_PARAMETERS = {  # scalars of a norm over D channels, as multiples of D and constants
    "layernorm": (1, 0),
    "layernorm-bias": (2, 0),
    "layernorm-plain": (0, 0),
    "rmsnorm": (1, 0),
    "rmsnorm-plain": (0, 0),
    "ssnorm": (0, 1),
    "crmsnorm": (0, 0),
    "crmsnorm-affine": (1, 0),
    "bhyt": (1, 1),
    "bhyt_star": (1, 1),
    "dyt": (2, 1),
    "derf": (2, 2),
}


def randomized(norm: Norm, seed: int = 1) -> Norm:
    """Return `norm` with every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 3)
    return norm


def sample(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return tokens of very different size with a nonzero mean, so that eps and centring matter."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-2, 2, math.prod(shape[:-1])).view(*shape[:-1], 1)
    return (torch.randn(shape, generator=generator) + 0.5) * rows


def test_every_norm_has_a_formula_here() -> None:
    assert {name for name, _, _ in CASES.values()} == set(NORMS)
    assert CASES.keys() == NUM_PARAMETERS.keys()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_float64_formula(case: str, shape: tuple[int, ...]) -> None:
    name, options, formula = CASES[case]
    norm = randomized(build_norm(name, shape[-1], **options))
    x, upstream = sample(shape), sample(shape, seed=2)
    if name in ("dyt", "derf"):
        x = x.clamp(-4, 4)  # the slope of a saturated tanh, 1 - y^2, has no digits in fp32
    x.requires_grad_()
    y = norm(x)
    y.backward(upstream)

    wide = {key: p.detach().double().requires_grad_() for key, p in norm.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    expected = formula(x64, wide, options.get("eps", 0.0))
    expected.backward(upstream.double())

    torch.testing.assert_close(y.double(), expected, **CLOSE)
    assert x.grad is not None
    assert x64.grad is not None
    scale = x64.grad.abs().amax(-1, keepdim=True)  # gradients of small tokens are large: compare token by token
    torch.testing.assert_close(x.grad.double() / scale, x64.grad / scale, **CLOSE)
    for key, parameter in norm.named_parameters():
        assert parameter.grad is not None, key
        actual, exact = parameter.grad.double(), wide[key].grad
        assert exact is not None
        torch.testing.assert_close(actual / exact.abs().max(), exact / exact.abs().max(), **CLOSE)


@pytest.mark.parametrize("case", ["rmsnorm", "ssnorm", "bhyt"])
def test_gradients_equal_finite_differences(case: str) -> None:
    """Check the hand-written backward pass in float64; for BHyT through both norms of a block."""
    name, options, _ = CASES[case]
    first, second = (randomized(build_norm(name, 5, **options, **place)).double() for place in PLACES[name])
    if isinstance(second, BHyT):
        second.attention_gain.fill_(3.0)
    x = sample((2, 3, 5)).double().div(20).requires_grad_()

    def block(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        y, carry = first(x, return_carry=True)
        return y, second(x * x.roll(1, -1) + y, carry)

    # lambda and gain of the first norm reach the second one through `carry` without a gradient
    learned = list(second.parameters()) if name == "bhyt" else [*first.parameters(), *second.parameters()]
    assert torch.autograd.gradcheck(block, (x, *learned), atol=1e-7)


PLACES: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {name: ({}, {}) for name in NORMS}
PLACES["bhyt"] = ({}, {"after_attention": True})


@pytest.mark.parametrize("case", CASES)
def test_parameter_count_and_shape(case: str) -> None:
    name, options, _ = CASES[case]
    norm = build_norm(name, 37, **options)
    per_channel, constant = NUM_PARAMETERS[case]
    assert sum(p.numel() for p in norm.parameters()) == 37 * per_channel + constant
    zero_dim = [key for key, value in norm.state_dict().items() if value.ndim == 0]
    assert not zero_dim, f"DeepSpeed cannot broadcast 0-dim tensors: {zero_dim}"


@pytest.mark.parametrize("case", CASES)
def test_bf16_equals_the_rounded_float64_formula(case: str) -> None:
    """Statistics in bf16 would differ in a third of the entries; one rounding at the end differs in next to none.

    Norms with a tanh round its argument too.
    """
    name, options, formula = CASES[case]
    norm = build_norm(name, 512, **options)  # initial gains of 1 add no rounding
    x = sample((16, 512)).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    wide = {key: value.double() for key, value in norm.state_dict().items()}
    expected = formula(x.double(), wide, options.get("eps", 0.0)).bfloat16()
    if name in SQUASHING:
        squash, inverse = (torch.erf, torch.erfinv) if name == "derf" else (torch.tanh, torch.atanh)
        exact = formula(x.double(), wide, options.get("eps", 0.0))
        shown = exact.abs() < 1  # a saturated output does not determine its argument
        argument = torch.where(shown, inverse(exact), 9.0 * exact)
        expected = squash(argument.bfloat16().double()).bfloat16()
    different = (y != expected).double().mean().item()
    assert different < 0.005, f"{different:.2%} of the entries differ"


@pytest.mark.parametrize("case", CASES)
def test_bf16_gradient_has_the_dtype_of_its_tensor(case: str) -> None:
    name, options, _ = CASES[case]
    norm = build_norm(name, 8, **options)
    x = sample((2, 8)).bfloat16().requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert {p.dtype for p in norm.parameters()} <= {torch.float32}
    assert {p.grad.dtype for p in norm.parameters() if p.grad is not None} <= {torch.float32}


@pytest.mark.parametrize(
    ("name", "eps"), [("layernorm", 1e-5), ("rmsnorm", 1e-6), ("ssnorm", 1e-6), ("crmsnorm", 1e-5)]
)
def test_default_eps_equals_the_value_of_the_source(name: str, eps: float) -> None:
    x = torch.tensor([[3e-3, -1e-3, 1e-3, 2e-3]])
    formula = {"layernorm": layernorm, "crmsnorm": crmsnorm}.get(name, rmsnorm)
    torch.testing.assert_close(build_norm(name, 4)(x).double(), formula(x.double(), {}, eps), rtol=1e-5, atol=1e-7)


def test_layernorm_equals_torch() -> None:
    ours, theirs = build_norm("layernorm", 37, bias=True), torch.nn.LayerNorm(37)
    randomized(ours)
    theirs.load_state_dict(ours.state_dict())
    x = sample((5, 123, 37))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_rmsnorm_equals_torch() -> None:
    ours, theirs = randomized(build_norm("rmsnorm", 37)), torch.nn.RMSNorm(37, eps=1e-6)
    theirs.load_state_dict(ours.state_dict())
    x = sample((5, 123, 37))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_ssnorm_equals_rmsnorm_with_constant_weight() -> None:
    ss, rms = build_norm("ssnorm", 37, init=0.07), build_norm("rmsnorm", 37, init=0.07)
    x = sample((5, 123, 37))
    assert ss.state_dict()["weight"].shape == (1,)
    assert torch.equal(ss(x), rms(x))


def test_ssnorm_gain_one_has_the_length_of_the_paper() -> None:
    """OSP eq. 3: gamma x / ||x||_2 with gamma = sqrt(D) at gain 1."""
    x = sample((4, 64))
    length = build_norm("ssnorm", 64, eps=0.0)(x).double().norm(dim=-1)
    torch.testing.assert_close(length, torch.full((4,), 8.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_crmsnorm_equals_layernorm_of_the_zero_mean_vector_in_one_more_dimension() -> None:
    x = sample((5, 123, 37)).double()
    extended = torch.cat((x, -x.sum(-1, keepdim=True)), dim=-1)
    reference = torch.nn.functional.layer_norm(extended, (38,), eps=0.0)[..., :-1]
    torch.testing.assert_close(build_norm("crmsnorm", 37, eps=0.0)(x.float()).double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(NORMS) - {"crmsnorm"}))
def test_initial_values_of_norms(name: str) -> None:
    """Gains at `init`, every other scalar at the default of its paper."""
    expected = {"weight": 0.3, "alpha": 0.5, "bias": 0.0, "lam": 1.0, "shift": 0.0}
    for key, value in build_norm(name, 5, init=0.3).state_dict().items():
        assert torch.equal(value, torch.full_like(value, expected[key])), key


# --- BHyT ---------------------------------------------------------------------------------------------------------


def bhyt_norm(**options: Any) -> BHyT:
    norm = build_norm("bhyt", options.pop("hidden_size", 4), **options)
    assert isinstance(norm, BHyT)
    return norm


def second_norm(**options: Any) -> BHyT:
    """Return the norm after attention."""
    return bhyt_norm(after_attention=True, **options)


def test_bhyt_default_is_lambda_one_kappa_ten() -> None:
    x = torch.tensor([[3.0, -1.0, 1.0, 5.0]])  # mean square 9
    expected = [math.tanh(v / (10 * math.sqrt(9 + 1e-6))) for v in (3, -1, 1, 5)]
    torch.testing.assert_close(build_norm("bhyt", 4)(x), torch.tensor([expected]), rtol=1e-6, atol=1e-7)


def test_bhyt_second_norm_adds_the_attention_gain_to_the_first_variance() -> None:
    first = bhyt_norm(lam=3.0, kappa=5.0, eps=0.0)
    second = second_norm(lam=2.0, kappa=4.0, eps=0.0)
    with torch.no_grad():
        second.attention_gain.fill_(10.0)
    x, after_attention = torch.tensor([[1.0, 3.0, 1.0, -5.0]]), torch.tensor([[2.0, 0.0, -1.0, 8.0]])
    _, carry = first(x, return_carry=True)
    deviation = math.sqrt(9 + 10 * (3 / 5) ** 2)  # (1 + 9 + 1 + 25) / 4 of the block's input, not of after_attention
    expected = [math.tanh(2 * v / (4 * deviation)) for v in (2, 0, -1, 8)]
    torch.testing.assert_close(second(after_attention, carry), torch.tensor([expected]), rtol=1e-6, atol=1e-7)


def test_bhyt_carry_passes_gradient_to_the_input_but_not_to_lambda_or_gain() -> None:
    first, second = bhyt_norm(lam=3.0), second_norm()
    with torch.no_grad():
        second.attention_gain.fill_(10.0)
    x = torch.tensor([[1.0, 3.0, 1.0, -5.0]], requires_grad=True)
    _, carry = first(x, return_carry=True)
    second(torch.tensor([[2.0, 0.5, -1.0, 8.0]]), carry).sum().backward()
    assert first.lam.grad is None or first.lam.grad.item() == 0
    assert not second.attention_gain.requires_grad
    assert second.lam.grad is not None
    assert second.lam.grad.abs().item() > 0
    assert x.grad is not None
    assert x.grad.abs().min().item() > 0


def test_attention_gain_mha_by_hand() -> None:
    norm = second_norm(hidden_size=2, seq_len=3)
    v, o = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    norm.refresh(v, o, head_dim=1)
    # O V = [[3, 4], [5, 8]]: squares 9 + 16 + 25 + 64 = 114, over T D = 3 * 2
    assert norm.attention_gain.tolist() == [19.0]


def test_attention_gain_gqa_by_hand() -> None:
    norm = second_norm(hidden_size=4, seq_len=2)
    v = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, -1.0]])  # two value heads of size 1
    o = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 1.0, 2.0], [1.0, 0.0, 0.0, 1.0]])
    norm.refresh(v, o, head_dim=1)
    # heads 0 and 1 read v0, heads 2 and 3 read v1: O expand(V) = [2 v0, 2 v0 + v1, 3 v1, v0 + v1],
    # |v0|^2 = 5, |v1|^2 = 2, v0 v1 = 0: 20 + (20 + 2) + 18 + (5 + 2) = 67, over T D = 2 * 4
    assert norm.attention_gain.tolist() == [67 / 8]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_gain_is_the_energy_of_the_attention_of_a_single_token(kv_heads: int) -> None:
    """With one token to attend to, attention is the linear map W_O W_V; its columns are the images of unit vectors."""
    config = ModelConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=kv_heads)
    attention, norm = Attention(config), second_norm(hidden_size=16, seq_len=7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(generator=generator)
        norm.refresh(attention.v_proj.weight, attention.o_proj.weight, head_dim=config.head_size)
        columns = attention(torch.eye(16)[:, None], torch.ones(1, 2), torch.zeros(1, 2), None)
    expected = columns.double().square().sum().item() / (7 * 16)
    assert norm.attention_gain.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1.0, 1.0, 1.0)),
        ({"lam": 3.0}, (3.0, 3.0, 3.0)),
        ({"lam": 2.0, "lam_post": 1.0}, (2.0, 1.0, 2.0)),
        ({"lam_post": 4.0}, (1.0, 4.0, 1.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bhyt", "bhyt_star"])
def test_lambdas_before_and_after_attention_and_before_the_head(
    name: str, given: dict[str, Any], expected: tuple[float, float, float]
) -> None:
    """`input_layer_lam` and `post_layer_lam` of the authors' code."""
    config = ModelConfig(norm=NormConfig(name, final=name, **given))
    norms = block_norm(config, before_attention=True), block_norm(config, after_attention=True), final_norm(config)
    assert tuple(norm.state_dict()["lam"].item() for norm in norms) == expected


def test_variance_after_attention_by_hand() -> None:
    """v = 9, c = 4, lambda / kappa = 3 / 5."""
    first, second = (bhyt_norm(lam=3.0, kappa=5.0, **{"after_attention": after}) for after in (False, True))
    with torch.no_grad():
        first.weight.copy_(torch.tensor([2.0, 3.0, 2.0, 3.0]))  # has no effect on the second norm
        second.attention_gain.fill_(4.0)
    _, carry = first(torch.tensor([[1.0, 3.0, 1.0, -5.0]]), return_carry=True)
    expected = 9 + 4 * 0.36
    variance = second.approximated(carry)
    assert variance is not None
    assert variance.item() == pytest.approx(expected, rel=1e-6)
    assert second.approximated(None) is None
    assert first.approximated(carry) is None
    y = second(torch.full((1, 4), 5.0), carry)
    torch.testing.assert_close(y, torch.full((1, 4), math.tanh(3 / 5 * 5 / math.sqrt(expected))), rtol=1e-5, atol=1e-6)
    assert "attention_gain" not in first.state_dict()


def test_bhyt_attention_gain_is_stored() -> None:
    norm = second_norm(hidden_size=2, seq_len=3)
    norm.refresh(torch.eye(2), torch.eye(2), head_dim=1)
    other = second_norm(hidden_size=2)
    other.load_state_dict(norm.state_dict())
    assert other.attention_gain.item() == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("lam", "layers", "warns"), [(1.0, 99, False), (1.0, 101, True), (2.0, 4, True), (1.9, 4, False)]
)
def test_bound_warning_at_the_limit(lam: float, layers: int, warns: bool) -> None:
    """lambda / kappa < 1 / sqrt(L): 1 / 10 holds below 100 layers; 2 / 4 is the limit at 4 layers."""
    kappa = 10.0 if lam == 1.0 else 4.0
    message = bound_warning(ModelConfig(num_hidden_layers=layers, norm=NormConfig(name="bhyt", lam=lam, kappa=kappa)))
    assert (message is not None) == warns, message
    if message:
        assert f"{lam / kappa:.3g}" in message
        assert f"{1 / math.sqrt(layers):.3g}" in message


def test_bound_warning_regards_lambda_after_attention() -> None:
    norm = NormConfig(name="bhyt", lam=1.0, lam_post=2.0, kappa=4.0)
    assert bound_warning(ModelConfig(num_hidden_layers=4, norm=norm)) is not None
    assert bound_warning(ModelConfig(num_hidden_layers=4, norm=replace(norm, lam_post=1.9))) is None


def test_bound_warning_concerns_bhyt_only() -> None:
    for name in sorted(set(NORMS) - {"bhyt", "bhyt_star"}):
        assert bound_warning(ModelConfig(num_hidden_layers=10_000, norm=NormConfig(name=name))) is None


# --- norms in a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NORMS))
def test_layernorm_scaling_divides_output_and_gradients_by_the_root_of_the_layer(name: str) -> None:
    actual = {}
    for lns in (False, True):
        config = ModelConfig(hidden_size=16, norm=NormConfig(name, lns=lns))
        norm, x = randomized(block_norm(config, layer=9)), sample((3, 16)).requires_grad_()
        y = norm(x)
        y.backward(sample((3, 16), seed=2))
        actual[lns] = [y.detach(), x.grad, *(p.grad for p in norm.parameters())]
        assert final_norm(config).output_scale == 1.0
    for scaled, plain in zip(actual[True], actual[False], strict=True):
        torch.testing.assert_close(3 * scaled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("ssnorm", "ssnorm"), ("dyt", "rmsnorm"), ("layernorm", "rmsnorm")])
def test_norm_of_queries_and_keys_is_over_a_head(name: str, kind: str) -> None:
    config = ModelConfig(hidden_size=16, num_attention_heads=4, norm=NormConfig(name))
    norm, x = randomized(inner_norm(config, config.head_size)), sample((2, 5, 4, 4))
    assert type(norm) is NORMS[kind]
    wide = {key: value.double() for key, value in norm.state_dict().items()}
    torch.testing.assert_close(norm(x).double(), rmsnorm(x.double(), wide, 1e-6), **CLOSE)


def test_dyt_has_a_separate_slope_before_attention() -> None:
    config = ModelConfig(norm=NormConfig("derf", alpha=0.2, alpha_attention=0.8))
    assert block_norm(config, before_attention=True).state_dict()["alpha"].item() == pytest.approx(0.8)
    assert block_norm(config, after_attention=True).state_dict()["alpha"].item() == pytest.approx(0.2)


# --- memory -------------------------------------------------------------------------------------------------------


def kept_for_backward(norm: Norm, dtype: torch.dtype) -> float:
    """Return the bytes per element of the input that autograd keeps in tensors as large as the input."""
    x = sample((64, 256)).to(dtype).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() == x.numel():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = norm(x)
    assert y.grad_fn is not None
    return sum(kept.values()) / x.numel()


# in fp32 and bf16: only the input; with a tanh; with the input in fp32; Derf's slope needs its argument too
KEPT = {"layernorm": (4, 2), "rmsnorm": (4, 2), "ssnorm": (4, 2), "bhyt": (8, 4), "bhyt_star": (8, 4)}
KEPT |= {"dyt": (8, 6), "derf": (12, 8)}


@pytest.mark.parametrize("name", KEPT)
def test_bytes_kept_for_backward(name: str) -> None:
    """Bounded norms keep the tanh; no norm keeps the normalized input."""
    actual = tuple(kept_for_backward(build_norm(name, 256), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert actual == KEPT[name]


def test_norm_after_attention_keeps_no_more_bytes_for_backward() -> None:
    first, second = build_norm("bhyt", 256), second_norm(hidden_size=256)
    _, carry = first(sample((64, 256)).requires_grad_(), return_carry=True)

    class WithCarry(Norm):
        def normalize(self, x: Tensor) -> Tensor:
            return second(x, carry._replace(variance=carry.variance.detach()))

    for dtype, index in ((torch.float32, 0), (torch.bfloat16, 1)):
        assert kept_for_backward(WithCarry(), dtype) == KEPT["bhyt"][index]


# --- building -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NORMS))
def test_final_norm_is_rmsnorm_for_bhyt_and_the_norm_itself_otherwise(name: str) -> None:
    norm = final_norm(ModelConfig(norm=NormConfig(name=name)))
    assert type(norm) is NORMS["rmsnorm" if name in ("bhyt", "bhyt_star") else name]


def test_final_norm_can_be_chosen_and_keeps_the_options_it_has() -> None:
    norm = final_norm(ModelConfig(norm=NormConfig(name="bhyt", lam=2.0, eps=0.25, final="crmsnorm")))
    x = sample((3, 256))
    assert type(norm) is NORMS["crmsnorm"]
    torch.testing.assert_close(norm(x).double(), crmsnorm(x.double(), {}, 0.25), **CLOSE)


def test_block_norm_passes_the_options() -> None:
    norm = block_norm(ModelConfig(norm=NormConfig(name="bhyt", lam=2.0, kappa=4.0)))
    x = torch.full((1, 256), 3.0)
    torch.testing.assert_close(norm(x), torch.full((1, 256), math.tanh(0.5)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [lambda n: build_norm(n, 8), lambda n: block_norm(ModelConfig(norm=NormConfig(n)))])
def test_unknown_norm_lists_the_valid_ones(build: Callable[[str], Norm]) -> None:
    with pytest.raises(UserError) as caught:
        build("rmsnrom")
    assert "'rmsnrom'" in str(caught.value)
    assert all(name in str(caught.value) for name in NORMS), caught.value


def test_unknown_final_norm_lists_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"norm.final='none'.*bhyt.*ssnorm"):
        final_norm(ModelConfig(norm=NormConfig(final="none")))


@pytest.mark.parametrize(
    ("name", "option", "valid"),
    [
        ("ssnorm", {"affine": False}, ["eps", "init"]),
        ("rmsnorm", {"bias": True}, ["affine", "eps", "init"]),
        ("dyt", {"eps": 1e-5}, ["alpha", "alpha_attention", "init"]),
        ("layernorm", {"lam": 1.0}, ["affine", "bias", "eps", "init"]),
        ("bhyt_star", {"seq_len": 8}, ["eps", "init", "kappa", "lam", "lam_post"]),
        ("bhyt", {"alpha": 1.0}, ["eps", "init", "kappa", "lam", "lam_post", "seq_len"]),
    ],
)
def test_option_of_another_norm_lists_the_valid_ones(name: str, option: dict[str, Any], valid: list[str]) -> None:
    key, value = next(iter(option.items()))
    for build in (
        lambda: build_norm(name, 8, **option),
        lambda: block_norm(ModelConfig(norm=NormConfig(name, **option))),
    ):
        with pytest.raises(UserError) as caught:
            build()
        message = str(caught.value)
        assert not [part for part in (f"norm.{key}={value!r}", name, str(valid)) if part not in message], message


def test_bias_without_affine_is_refused() -> None:
    with pytest.raises(UserError, match=r"norm\.bias=true needs norm\.affine=true$"):
        build_norm("layernorm", 8, bias=True, affine=False)
