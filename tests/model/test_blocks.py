"""The whole model against its formula in float64, value and gradient, at every combination of its blocks' options."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from osp.config import MonitorConfig
from osp.errors import UserError
from osp.model.attention import rotary_table
from osp.model.norms import NORMS
from osp.model.transformer import ACTIVATIONS, Block, Transformer, build_model
from osp.model_config import AttentionConfig, ModelConfig, NormConfig
from osp.monitor.forensics import behind
from osp.monitor.probe import ProbeText, probe
from osp.optim.muon import newton_schulz

SMALL: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 8,
}
IDS = torch.randint(0, 17, (2, 5), generator=torch.Generator().manual_seed(0))
EPS = 1e-3


class Reference:
    """The formula of a model with the parameters `p`, written without `osp.model.norms`."""

    def __init__(self, model: Transformer):
        self.config = model.config
        self.p = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        self.b = dict(model.named_buffers())
        self.seen: dict[str, list[Tensor]] = {}  # activations of the last sequences by site

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits (T, V) of one sequence (T,)."""
        config, p = self.config, self.p
        x = p["embed_tokens.weight"][ids]
        if config.norm.embed_scale:
            x = x * p["embed_tokens.scale"]
        if config.embed_proj:
            x = self.linear("embed_proj", x)
        for i in range(config.num_hidden_layers):
            block = f"layers.{i}"
            h = self.norm(f"{block}.input_layernorm", x, i + 1)
            before = x
            x = x + self.after(f"{block}.attention_output_layernorm", self.attention(f"{block}.self_attn", h), i + 1)
            h = self.norm(f"{block}.post_attention_layernorm", x, i + 1, before=before)
            x = x + self.after(f"{block}.mlp_output_layernorm", self.mlp(f"{block}.mlp", h), i + 1)
        final = {"bhyt": "rmsnorm", "bhyt_star": "rmsnorm"}.get(config.norm.name, config.norm.name)
        x = self.formula(final, "norm", x, 1)
        return self.linear("lm_head", self.linear("head_proj", x) if config.embed_proj else x)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = torch.einsum("ti,oi->to", x, self.p[f"{name}.weight"])
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def after(self, name: str, y: Tensor, layer: int) -> Tensor:
        return self.norm(name, y, layer) if self.config.norm.placement == "peri" else y

    def norm(self, name: str, x: Tensor, layer: int, before: Tensor | None = None) -> Tensor:
        """before: the residual stream before attention, for the norm after attention."""
        y = self.formula(self.config.norm.name, name, x, layer, before)
        return y / math.sqrt(layer) if self.config.norm.lns else y

    def formula(self, kind: str, name: str, x: Tensor, layer: int, before: Tensor | None = None) -> Tensor:
        options = self.config.norm

        def of(part: str) -> Any:
            return self.p.get(f"{name}.{part}", self.b.get(f"{name}.{part}"))

        gain, bias = of("weight"), of("bias")
        size, square = x.shape[-1], (x**2).sum(-1, keepdim=True) / x.shape[-1]
        if kind in ("rmsnorm", "ssnorm"):
            return gain * x / (square + EPS) ** 0.5
        if kind == "layernorm":
            mean = x.sum(-1, keepdim=True) / size
            return gain * (x - mean) / (((x - mean) ** 2).sum(-1, keepdim=True) / size + EPS) ** 0.5
        if kind == "crmsnorm":
            return x / ((square * size + x.sum(-1, keepdim=True) ** 2) / (size + 1) + EPS) ** 0.5
        if kind == "dyt":
            return gain * torch.tanh(of("alpha") * x) + bias
        if kind == "derf":
            return gain * torch.erf(of("alpha") * x + of("shift")) + bias
        if kind == "bhyt" and before is not None:
            lam = self.p[f"{name.rpartition('.')[0]}.input_layernorm.lam"].detach()
            added = of("attention_gain") * (lam / 10) ** 2
            square = (before**2).sum(-1, keepdim=True) / size + (added / layer if options.lns else added)
            true = (x**2).sum(-1, keepdim=True) / size
            self.see(f"var_error/layer_{layer - 1:02d}", (square - true).abs() / true)
        return gain * torch.tanh(of("lam") / 10 * x / (square + EPS) ** 0.5)

    def attention(self, name: str, h: Tensor) -> Tensor:
        config = self.config
        heads, groups, size = config.num_attention_heads, config.kv_heads, config.head_size
        q, k, v = (self.linear(f"{name}.{part}_proj", h).unflatten(-1, (-1, size)) for part in "qkv")
        if config.qk_norm:
            q, k = (
                self.p[f"{name}.{part}_norm.weight"] * x / ((x**2).sum(-1, keepdim=True) / size + self.head_eps) ** 0.5
                for part, x in (("q", q), ("k", k))
            )
        if config.attention.value_gate:
            w, b = (self.p[f"{name}.value_gate.{part}"] for part in ("weight", "bias"))
            gates = [1 / (1 + torch.exp(-(v[:, g] @ w[g * size : (g + 1) * size]) - b[g])) for g in range(groups)]
            v = v * torch.stack(gates, 1)[..., None]
        cos, sin = rotary_table(size, len(h), config.rope_theta, "cpu")
        turn = torch.complex(cos.double(), sin.double())[:, None]
        q, k = (torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn for x in (q, k))
        where = f"layer_{int(name.split('.')[1]):02d}"
        self.see(f"{where}/q", torch.cat((q.real, q.imag), -1))
        self.see(f"{where}/k", torch.cat((k.real, k.imag), -1))
        columns = []
        for head in range(heads):
            group = head * groups // heads
            scores = (q[:, head] @ k[:, group].conj().T).real / math.sqrt(size)
            self.see(f"logit/{where}", scores.tril())
            if cap := config.attention.logit_cap:
                scores = cap * torch.tanh(scores / cap)
            weights = torch.where(torch.ones_like(scores).tril() == 1, scores, -math.inf).exp()
            more = 1 if config.attention.off_by_one else 0
            columns.append(weights / (more + weights.sum(-1, keepdim=True)) @ v[:, group])
        out = torch.cat(columns, -1)
        if config.attention.gate:
            out = out / (1 + torch.exp(-self.linear(f"{name}.attention_gate", h)))
        self.see(f"{where}/o_proj_in", out)
        return self.linear(f"{name}.o_proj", out)

    def see(self, name: str, x: Tensor) -> None:
        self.seen.setdefault(name, []).append(x.detach())

    @property
    def head_eps(self) -> float:
        return self.config.norm.eps or 1e-6

    def mlp(self, name: str, h: Tensor) -> Tensor:
        gate = self.linear(f"{name}.gate_proj", h)
        act = {
            "silu": lambda z: z / (1 + torch.exp(-z)),
            "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
            "relu2": lambda z: torch.where(z > 0, z * z, 0.0),
            "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
        }[self.config.hidden_act]
        hidden = act(gate) * self.linear(f"{name}.up_proj", h)
        if self.config.ffn_norm:
            square = (hidden**2).sum(-1, keepdim=True) / hidden.shape[-1]
            hidden = self.p[f"{name}.ffn_norm.weight"] * hidden / (square + self.head_eps) ** 0.5
        return self.linear(f"{name}.down_proj", hidden)


def lively(config: ModelConfig) -> Transformer:
    """Return a model in float64 with every parameter away from its initial value."""
    model = build_model(dataclasses.replace(config, initializer_range=0.4), seed=0).double()
    model.compute_dtype = torch.float64
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 5)
        for name, buffer in model.named_buffers():
            if name.endswith("attention_gain"):
                buffer.mul_(100)  # in so small a model it would not be seen
    return model


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), (ids.flatten() + 1) % 17)


def assert_is_its_formula(config: ModelConfig) -> None:
    model = lively(config)
    reference = Reference(model)
    logits = model(IDS).logits
    mean_loss(logits, IDS).backward()
    expected = torch.stack([reference.logits(row) for row in IDS])
    mean_loss(expected, IDS).backward()
    assert (logits - expected).abs().max() < 1e-10
    for name, parameter in model.named_parameters():
        actual, expected = parameter.grad, reference.p[name].grad
        assert actual is not None, name
        assert expected is not None, name
        assert (actual - expected).abs().max() < 1e-9 * expected.abs().max(), name


def assert_every_parameter_learns(config: ModelConfig) -> None:
    """Check that the training loss is finite and that every parameter gets a gradient, with one block."""
    model = build_model(dataclasses.replace(config, num_hidden_layers=1), seed=0)
    loss = model(IDS[:1], IDS[:1]).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


# --- every combination --------------------------------------------------------------------------------------------

# what may not be combined, and the words that say why
REFUSED = {
    "bhyt-peri": "the variance approximation covers the output of attention, not a norm of it",
}


def refusal(config: ModelConfig) -> str | None:
    if config.norm.name == "bhyt" and config.norm.placement == "peri":
        return REFUSED["bhyt-peri"]
    return None


def norm_config(name: str, **options: Any) -> NormConfig:
    has_eps = name not in ("dyt", "derf")
    return NormConfig(name, eps=EPS if has_eps else None, seq_len=6 if name == "bhyt" else None, **options)


@pytest.mark.parametrize("placement", ["pre", "peri"])
@pytest.mark.parametrize("name", sorted(NORMS))
def test_every_combination_of_options_trains_or_is_refused(name: str, placement: Any) -> None:
    """With none and with all other options the model also equals its formula."""
    for options in itertools.product((False, True), repeat=4):
        lns, qk_norm, gate, embed_proj = options
        config = ModelConfig(
            **SMALL,
            norm=norm_config(name, placement=placement, lns=lns),
            attention=AttentionConfig(gate=gate, off_by_one=gate),
            qk_norm=qk_norm,
            ffn_norm=qk_norm,
            embed_proj=embed_proj,
        )
        reason = refusal(config)
        if reason is None:
            assert_every_parameter_learns(config)
            if len(set(options)) == 1:
                assert_is_its_formula(config)
        else:
            with pytest.raises(UserError) as caught:
                Transformer(config)
            assert reason in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "head_bias": True},
        {"norm": norm_config("dyt", embed_scale=True, alpha=0.3, alpha_attention=0.9)},
        {"norm": norm_config("bhyt", lns=True)},
        {"ffn_norm": True},
        {"ffn_norm": True, "norm": norm_config("rmsnorm"), "hidden_act": "sigmoid"},
        {"attention": AttentionConfig(off_by_one=True)},
        {"attention": AttentionConfig(logit_cap=0.7)},
        {"attention": AttentionConfig(value_gate=True, logit_cap=0.7, gate=True, off_by_one=True), "qk_norm": True},
        {"attention": AttentionConfig(value_gate=True), "attention_bias": True},
        {"hidden_act": "gelu"},
        {"hidden_act": "relu2"},
    ],
    ids=[
        "biases",
        "dyt-scale",
        "bhyt-lns",
        "ffn-norm",
        "ffn-norm-sigmoid",
        "off-by-one",
        "logit-cap",
        "all-of-attention",
        "value-gate",
        "gelu",
        "relu2",
    ],
)
def test_other_options_equal_their_formulas(changes: dict[str, Any]) -> None:
    assert_is_its_formula(ModelConfig(**{**SMALL, "norm": norm_config("ssnorm"), **changes}))


def gradients(model: Transformer) -> dict[str, Tensor]:
    model.zero_grad()
    mean_loss(model(IDS).logits, IDS).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_v_scale_changes_the_gradient_through_the_values_only() -> None:
    """By the factor in v_proj of the last block; a factor of 0 is a value that is a constant. Muon's update of this
    matrix does not change, since it does not depend on the scale, but the gradient of the stream does."""
    config = ModelConfig(**SMALL, attention=AttentionConfig(value_gate=True))
    plain = lively(config)
    expected, logits = gradients(plain), plain(IDS).logits
    for factor in (0.25, 1e-12):
        model = lively(dataclasses.replace(config, attention=AttentionConfig(value_gate=True, v_scale=factor)))
        assert torch.equal(model(IDS).logits, logits)
        actual = gradients(model)
        name = "layers.1.self_attn.v_proj.weight"
        torch.testing.assert_close(actual[name], factor * expected[name], rtol=1e-9, atol=0)
        muon = [newton_schulz(g.float()[None], 5, dtype=torch.float32) for g in (actual[name], expected[name])]
        assert (muon[0] - muon[1]).abs().max() < 1e-3 or factor < 1e-6  # below the eps of its first division
        last = [n for n in expected if n.startswith("layers.1") and not n.startswith("layers.1.input_layernorm")]
        for other in set(last) - {name}:
            torch.testing.assert_close(actual[other], expected[other], rtol=1e-9, atol=1e-15)
        assert (actual["embed_tokens.weight"] - expected["embed_tokens.weight"]).norm() > 1e-3
    detached = lively(config)
    for layer in detached.layers:
        layer.get_submodule("self_attn.v_proj").register_forward_hook(lambda *seen: seen[2].detach())
    rest = gradients(detached)
    for name in rest:
        torch.testing.assert_close(actual[name], rest[name], rtol=1e-6, atol=1e-9)
    model.eval()
    assert torch.equal(gradients(model)["embed_tokens.weight"], expected["embed_tokens.weight"])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rms_of_activation_equals_its_integral(name: str) -> None:
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    function, rms = ACTIVATIONS[name]
    square = torch.trapezoid(function(z) ** 2 * density, z)
    assert rms == pytest.approx(math.sqrt(square), abs=1e-4)


def rms_before_down_proj(config: ModelConfig) -> Tensor:
    """Return the RMS (T,) of each token in a new model of one block."""
    model, seen = build_model(config, seed=0), list[Tensor]()
    block = model.layers[0]
    assert isinstance(block, Block)
    block.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.arange(64)[None])
    return seen[0][0].detach().square().mean(-1).sqrt()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_ffn_norm_keeps_the_initial_strength_of_blocks(name: Any) -> None:
    """The RMS of the input of down_proj is the same, and with the norm it is the same for every token."""
    config = ModelConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=1, hidden_act=name)
    without, normalized = rms_before_down_proj(config), rms_before_down_proj(dataclasses.replace(config, ffn_norm=True))
    assert float(normalized.mean()) == pytest.approx(float(without.mean()), rel=0.1)
    assert float(normalized.std()) < 1e-5 < float(without.std())


# --- the probe ----------------------------------------------------------------------------------------------------


def test_probe_measures_values_computed_by_blocks_with_all_options() -> None:
    """Queries and keys after norm and RoPE, the input of o_proj after the gate, all gains and matrix rows."""
    config = ModelConfig(
        **SMALL, norm=norm_config("bhyt"), attention=AttentionConfig(gate=True), qk_norm=True, attention_bias=True
    )
    model = lively(config)
    reference = Reference(model)
    for row in IDS:
        reference.logits(row)
    metrics = probe(model, ProbeText(IDS), MonitorConfig(sites="all", statistics="all")).metrics
    for layer in ("layer_00", "layer_01"):
        for site in ("q", "k", "o_proj_in"):
            values = torch.stack(reference.seen[f"{layer}/{site}"])
            assert metrics[f"monitor/max_abs/{layer}/{site}"] == pytest.approx(float(values.abs().max()), rel=1e-9)
            rms = float(values.square().mean().sqrt())
            assert metrics[f"monitor/rms/{layer}/{site}"] == pytest.approx(rms, rel=1e-9)
        logits = torch.stack(reference.seen[f"logit/{layer}"])
        assert metrics[f"monitor/attn_logit_max/{layer}"] == pytest.approx(float(logits.max()), rel=1e-5)
        error = float(torch.stack(reference.seen[f"var_error/{layer}"]).mean())
        assert metrics[f"bhyt/var_error/{layer}"] == pytest.approx(error, rel=1e-9)
    for part in ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        gain = float(model.get_parameter(f"layers.1.{part}.weight").detach().abs().max())
        assert metrics[f"monitor/gain_max/layer_01/{part.rpartition('.')[2]}"] == pytest.approx(gain, rel=1e-6)
    rows = model.get_parameter("layers.0.self_attn.attention_gate.weight").detach().norm(dim=1)
    assert metrics["monitor/weight_row_max/layer_00/attention_gate"] == pytest.approx(float(rows.max()), rel=1e-6)
    assert not [key for key in metrics if "weight_row_max" in key and "norm" in key]


def test_var_error_is_reported_for_approximating_layers_only() -> None:
    for norm, layers in ((norm_config("bhyt"), {"layer_00", "layer_01"}), (norm_config("bhyt_star"), set())):
        model = lively(ModelConfig(**SMALL, norm=norm))
        metrics = probe(model, ProbeText(IDS), MonitorConfig(sites=(), statistics=("var_error",))).metrics
        assert set(metrics) == {f"bhyt/var_error/{layer}" for layer in layers}


def test_weights_behind_an_outlier_include_gates_head_norms_and_norms_after_sublayers() -> None:
    norm = norm_config("rmsnorm", placement="peri")
    model = lively(ModelConfig(**SMALL, norm=norm, attention=AttentionConfig(gate=True), qk_norm=True, ffn_norm=True))
    with torch.no_grad():
        model.get_parameter("layers.0.mlp_output_layernorm.weight")[5] = 300

    def places(kind: str, channel: int) -> list[tuple[str, str, int]]:
        actual = behind(kind, 1, channel, model)
        return [(w["parameter"].removeprefix("layers.1.self_attn."), w["axis"], w["index"]) for w in actual]

    # channel 13 is the second one of head 3, which reads value head 1; RoPE turns it with the fourth one
    assert places("o_proj_in", 13) == [("v_proj.weight", "row", 5), ("attention_gate.weight", "row", 13)]
    assert places("q", 13) == [
        *(("q_proj.weight", "row", 13), ("q_proj.weight", "row", 15)),
        *(("q_norm.weight", "gain", 1), ("q_norm.weight", "gain", 3)),
    ]
    assert places("down_proj_in", 7) == [
        *((f"layers.1.mlp.{part}_proj.weight", "row", 7) for part in ("gate", "up")),
        ("layers.1.mlp.ffn_norm.weight", "gain", 7),
    ]
    assert places("block_out", 5)[0] == ("layers.0.mlp_output_layernorm.weight", "gain", 5)


# --- options without effect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (NormConfig("bhyt_star", seq_len=8), "norm.seq_len=8: bhyt_star has no such option"),
        (NormConfig("ssnorm", kappa=3.0), "norm.kappa=3.0: ssnorm has no such option"),
        (NormConfig("layernorm", affine=False, bias=True), "norm.bias=true needs norm.affine=true"),
        (NormConfig("rmsnrom"), "unknown norm 'rmsnrom'; choose from"),
    ],
    ids=lambda value: value.name if isinstance(value, NormConfig) else "",
)
def test_options_without_effect_are_refused(norm: NormConfig, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Transformer(ModelConfig(**SMALL, norm=norm))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
