"""The probe measures what the model computes: planted outliers, a naive forward pass, any number of ranks."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from osp.config import Deployed, MonitorConfig, Site
from osp.model.norms import Norm
from osp.model.sites import site_names
from osp.model.transformer import Block, Transformer, build_model
from osp.model_config import NormConfig
from osp.monitor.probe import ProbeText, Reading, probe
from osp.quant.deployed import DEPLOYED
from osp.quant.formats import NVFP4
from tests.distributed import run_distributed
from tests.monitor import workers
from tests.monitor.test_statistics import naive
from tests.monitor.workers import FULL, LAYER, POSITION, ROW, SITES, TOKEN
from tests.quant.integers import round_activation, round_weight

# --- planted outliers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2])
def by_rank(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The measurements of every rank."""
    return [workers.everything(0)] if request.param == 1 else ranks_of(request.param)


_RANKS: dict[int, list[dict[str, Any]]] = {}


def ranks_of(world_size: int) -> list[dict[str, Any]]:
    if world_size not in _RANKS:
        _RANKS[world_size] = run_distributed(workers.everything, world_size, 0)
    return _RANKS[world_size]


@pytest.fixture(scope="module")
def clean() -> Reading:
    return probe(workers.planted(None), workers.probe_text(), FULL)


@pytest.mark.parametrize("site", SITES)
def test_statistics_and_place_name_the_planted_outlier(
    site: str, by_rank: list[dict[str, Any]], clean: Reading
) -> None:
    name, channel, _ = SITES[site]
    for rank in by_rank:
        outlier = rank["planted"][site]["reading"].sites[name]
        assert (outlier.channel, outlier.row, outlier.position, outlier.token) == (channel, ROW, POSITION, TOKEN)
        assert outlier.top_channel == channel
        assert outlier.channels[0] == (channel, abs(outlier.value))
        assert abs(outlier.value) > 300
        assert (outlier.value < 0) == (site == "embed_out")
        for statistic, value in outlier.statistics.items():
            if statistic == "massive_count":  # the outlier makes 6 sigma so wide that nothing else is beyond
                assert value == 1
            elif statistic == "mean_energy":  # the outlier is at one token of 36
                assert value == pytest.approx(1 / 36, rel=0.03)
            elif statistic == "top_channel_constancy":
                assert value == pytest.approx(1 / 6, rel=0.02)
            elif statistic == "top_channel_share_before_gain":  # one token of 36, one channel of 32
                assert value < 1 / 36
            else:
                assert value > 1.1 * clean.sites[name].statistics[statistic], statistic


# further sites that the outlier passes
ALSO = {
    "embed_out": {"layer_00/block_out", "layer_01/block_out"},
    "v": {"layer_01/o_proj_in"},
    "o_proj_in": {"layer_01/v", "layer_01/block_out"},
    "block_out": {"layer_01/down_proj_in"},
}


@pytest.mark.parametrize("site", SITES)
def test_alert_names_the_planted_outlier(site: str, by_rank: list[dict[str, Any]]) -> None:
    name = SITES[site][0]
    for rank in by_rank:
        alerts = rank["planted"][site]["alerts"]
        assert {alert.place for alert in alerts} == {name} | ALSO.get(site, set())
        (alert,) = [alert for alert in alerts if alert.place == name]
        assert alert.value == rank["planted"][site]["reading"].sites[name].statistics["max_over_median"]
        assert name in alert.message


@pytest.mark.parametrize("site", SITES)
def test_forensics_name_the_planted_outlier(site: str, by_rank: list[dict[str, Any]]) -> None:
    name, channel, parameter = SITES[site]
    for rank in by_rank:
        contents = rank["planted"][site]["bundle"]
        assert contents["site"] == name
        assert contents["layer"] == (LAYER if "/" in name else None)
        assert (contents["channel"], contents["row"], contents["position"]) == (channel, ROW, POSITION)
        assert (contents["token"], contents["token_text"]) == (TOKEN, f" t{TOKEN}")
        tokens = workers.probe_text().tokens[ROW, POSITION - 8 :].tolist()
        assert contents["text"] == "".join(f" t{token}" for token in tokens)
        assert contents["growth"] == [[0, None], [1, abs(contents["value"])]]
        assert contents["since"] == 1
        largest = max(contents["weights"], key=lambda weight: weight["ratio"])
        assert largest["parameter"] == parameter
        expected = {"o_proj_in": 9}.get(site, channel)
        assert largest["index"] == expected
        assert largest["ratio"] > 3


def test_words_give_the_planted_constant_and_its_gain(by_rank: list[dict[str, Any]]) -> None:
    nature = "channel 7 of layer_01/attn_in is constant (98%)"
    for rank in by_rank:
        assert rank["words"] == f"{nature}, holds 37% of the energy, and its gain is 3.6 times the median"
    share = 1.162**2 * 1.04 / (1.162**2 * 1.04 + 31)
    assert workers.constant_channel_words("ssnorm") == f"{nature} and holds {100 * share:.2g}% of the energy"


# --- a forward pass spelled out -----------------------------------------------------------------------------------

Product = Callable[[Tensor, Tensor], Tensor]


def forward(model: Transformer, ids: Tensor, product: Product) -> dict[str, Tensor]:
    """Return every site of a sequence, (T, D) each, with RMSNorm; `product` computes the matrices of the blocks."""
    config = model.config
    heads, groups, size = config.num_attention_heads, config.kv_heads, config.head_size
    x = model.embed_tokens.weight[ids]
    activations = {"embed_out": x}
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        attention, mlp = layer.self_attn, layer.mlp
        h = rms_norm(x, layer.input_layernorm.weight)
        q, k, v = (product(h, p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = rotate(q, size, config.rope_theta), rotate(k, size, config.rope_theta)
        out = torch.zeros_like(q)
        for head in range(heads):
            query, shared = slice(head * size, (head + 1) * size), head * groups // heads
            key = slice(shared * size, (shared + 1) * size)
            for t in range(len(ids)):
                logits = k[: t + 1, key] @ q[t, query] / math.sqrt(size)
                out[t, query] = logits.softmax(0) @ v[: t + 1, key]
        x = x + product(out, attention.o_proj.weight)
        h2 = rms_norm(x, layer.post_attention_layernorm.weight)
        act = F.silu(product(h2, mlp.gate_proj.weight)) * product(h2, mlp.up_proj.weight)
        x = x + product(act, mlp.down_proj.weight)
        sites = {"attn_in": h, "q": q, "k": k, "v": v, "o_proj_in": out, "mlp_in": h2, "down_proj_in": act}
        activations |= {f"layer_{index:02d}/{name}": value for name, value in {**sites, "block_out": x}.items()}
    return {**activations, "final_norm_out": rms_norm(x, model.norm.weight)}


def rms_norm(x: Tensor, gain: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def rotate(x: Tensor, size: int, theta: float) -> Tensor:
    """RoPE with complex numbers: (x_i + j x_(i + K/2)) rotated by t theta^(-2i/K)."""
    first, second = x.unflatten(-1, (-1, size)).chunk(2, -1)
    angle = torch.arange(len(x))[:, None] * theta ** (-2 * torch.arange(size // 2) / size)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1).flatten(1)


def quantized_product(x: Tensor, weight: Tensor) -> Tensor:
    return round_activation(x, bits=4) @ round_weight(weight, bits=4).T


@pytest.fixture(scope="module")
def naive_pass() -> tuple[Reading, dict[str, Tensor], dict[str, Tensor], float]:
    """Return (reading of the probe, sites of all sequences, the same under fake W4A4, OSP's script)."""
    model, text = workers.small_model(), workers.probe_text()
    with torch.no_grad():
        for layer in model.layers:
            assert isinstance(layer, Block)
            layer.mlp.up_proj.weight[3] *= 8  # some outliers
        plain = [forward(model, row, lambda x, w: x @ w.T) for row in text.tokens]
        noisy = [forward(model, row, quantized_product) for row in text.tokens]
        single_tokens = [forward(model, token[None], lambda x, w: x @ w.T) for row in text.tokens for token in row]
    states = ("embed_out", "layer_00/block_out", "final_norm_out")  # as Hugging Face gives them
    script = []
    for state in states:
        x = torch.stack([activations[state] for activations in single_tokens])
        script.append(torch.relu((x**4).mean(-1) / x.std(-1) ** 4 - 3).mean())
    together = [
        {name: torch.cat([row[name] for row in activations]) for name in activations[0]}
        for activations in (plain, noisy)
    ]
    return probe(model, text, FULL), together[0], together[1], float(torch.stack(script).mean())


def test_every_site_is_measured_as_the_model_computes_it(naive_pass: Any) -> None:
    reading, sites, _, _ = naive_pass
    assert set(reading.sites) == set(sites) == set(site_names(2, get_args(Site)))
    for name, values in sites.items():
        expected = naive(values)
        if name.endswith(("attn_in", "mlp_in", "final_norm_out")):  # all gains are 1
            before = {"top_channel_share_before_gain": expected["top_channel_share"]}
            expected |= {**before, "top_channel_gain": 1.0, "gain_share": 1 / 32}
        # medians and counts are of values rounded to bf16, and a value halfway between may be rounded to either
        assert reading.sites[name].statistics == pytest.approx(expected, rel=5e-3 if expected["kurtosis"] else 1e-3)
        for key in ("kurtosis", "kurtosis_pooled", "max_abs", "rms", "top_channel_share", "few_tokens"):
            assert reading.sites[name].statistics[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (name, key)
            assert reading.metrics[f"monitor/{key}/{name}"] == reading.sites[name].statistics[key]


def test_error_under_fake_quantization_equals_a_second_pass(naive_pass: Any) -> None:
    reading, plain, noisy, _ = naive_pass
    for key, name in (("R_L", "final_norm_out"), *((f"R_L/layer_0{i}", f"layer_0{i}/block_out") for i in range(2))):
        expected = float((noisy[name] - plain[name]).square().sum() / plain[name].square().sum())
        assert 1e-3 < expected < 1
        # a value halfway between two levels may be rounded to either
        assert reading.metrics[f"monitor/{key}"] == pytest.approx(expected, rel=2e-2), key


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "w8a8", "q4_0"])
def test_error_in_a_deployed_format_equals_a_second_pass(name: Deployed) -> None:
    """Weights and, where the format has them, activations are rounded; a static range is that of the plain pass."""
    model, text, spec = workers.small_model(), ProbeText(workers.probe_text().tokens[:1]), DEPLOYED[name]
    weights = spec.number_format("w")
    inputs: list[Tensor] = []

    def remember(x: Tensor, w: Tensor) -> Tensor:
        inputs.append(x)
        return x @ w.T

    def rounded_product(x: Tensor, w: Tensor) -> Tensor:
        clean = inputs.pop(0)
        if name == "nvfp4":
            x = NVFP4(4).round(x, bounds=torch.stack((clean.min(), clean.max())))
        elif spec.a_bits < 16:
            x = spec.number_format("a").round(x)
        return x @ weights.round(w).T

    with torch.no_grad():
        plain = forward(model, text.tokens[0], remember)
        noisy = forward(model, text.tokens[0], rounded_product)
    metrics = probe(model, text, MonitorConfig(sites=(), statistics=("R_L",), quant=name)).metrics
    for key, site in (("R_L", "final_norm_out"), ("R_L/layer_00", "layer_00/block_out")):
        expected = float((noisy[site] - plain[site]).square().sum() / plain[site].square().sum())
        assert expected > 1e-6
        assert metrics[f"monitor/{key}"] == pytest.approx(expected, rel=2e-2), key


def test_osp_script_reads_the_hidden_states_of_hugging_face(naive_pass: Any) -> None:
    reading, _, _, script = naive_pass
    assert reading.metrics["monitor/kurtosis/osp_script"] == pytest.approx(script, rel=1e-5)


def test_gain_max_and_weight_row_max_are_the_largest_of_the_weights() -> None:
    model = workers.planted("attn_in")
    metrics = probe(model, workers.probe_text(), FULL).metrics
    assert metrics["monitor/gain_max/layer_01/input_layernorm"] == 400
    assert metrics["monitor/gain_max/layer_00/input_layernorm"] == 1
    assert metrics["monitor/gain_max/norm"] == 1
    for name, parameter in (("layer_01/down_proj", "layers.1.mlp.down_proj.weight"), ("lm_head", "lm_head.weight")):
        expected = max(math.sqrt(sum(v * v for v in row)) for row in model.get_parameter(parameter).tolist())
        assert metrics[f"monitor/weight_row_max/{name}"] == pytest.approx(expected, rel=1e-6)


NORM_KINDS: list[dict[str, Any]] = [
    {"name": "rmsnorm"}, {"name": "rmsnorm", "affine": False}, {"name": "rmsnorm", "placement": "peri", "lns": True},
    {"name": "ssnorm"}, {"name": "layernorm", "bias": True}, {"name": "layernorm", "affine": False},
    {"name": "crmsnorm", "affine": True}, {"name": "crmsnorm"}, {"name": "dyt", "lns": True}, {"name": "derf"},
    {"name": "bhyt_star"}, {"name": "bhyt", "seq_len": 12, "lns": True},
]  # fmt: skip


WRITTEN = {f"layers.{i}.{norm}": f"layer_0{i}/{site}" for i in range(2) for norm, site in (
    ("input_layernorm", "attn_in"), ("post_attention_layernorm", "mlp_in"), ("mlp.ffn_norm", "down_proj_in")
)} | {"norm": "final_norm_out"}  # fmt: skip


@pytest.mark.parametrize("options", NORM_KINDS, ids=lambda options: " ".join(map(str, options.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gains_are_those_of_the_norm_that_writes_the_site(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Before the gain: the output of the norm with gain 1 and bias 0. Gains of both signs, some 0, a dead channel."""
    config = dataclasses.replace(workers.small_model().config, norm=NormConfig(**options), ffn_norm=True, qk_norm=True)
    model = build_model(config, seed=0)
    model.compute_dtype = dtype
    draw, passed = torch.Generator().manual_seed(2), dict[str, Any]()

    def remember(path: str, _: Any, inputs: Any, output: Any) -> None:
        passed.setdefault(path, (inputs, output))

    for path, module in model.named_modules():
        if isinstance(module, Norm):
            for parameter in (module.weight, module.bias):
                if parameter is not None and parameter.numel() > 1:
                    parameter.data = torch.randn(parameter.shape, generator=draw)
                    parameter.data[3:5] = 0.0
            module.register_forward_hook(functools.partial(remember, path))
    model.embed_tokens.weight.data[:, 5] = 0.0  # dead in layer 0, whose output is the bias as bf16 rounds it
    first: Any = model.get_submodule("layers.0.input_layernorm")
    if first.bias is not None:
        first.weight.data[5], first.bias.data[5] = 1e-4, 0.3
    sites = probe(model, ProbeText(workers.probe_text().tokens[:1]), FULL).sites
    assert {name for name, site in sites.items() if "gain_share" in site.statistics} == set(WRITTEN.values())
    for path, site in WRITTEN.items():
        inputs, output = passed[path]
        norm: Any = copy.deepcopy(model.get_submodule(path))
        y = (output[0] if isinstance(output, tuple) else output)[0].double()
        gain = (torch.ones(1) if norm.weight is None else norm.weight).detach().double().expand(y.shape[-1]).clone()
        for parameter, value in ((norm.weight, 1.0), (norm.bias, 0.0)):
            if parameter is not None:
                torch.nn.init.constant_(parameter, value)
        with torch.no_grad():
            energy = norm(*inputs)[0].double().square().sum(0) * (gain != 0)
        top = int(y.square().sum(0).argmax())
        live = sorted(gain[gain != 0].abs().tolist())
        expected = {
            "top_channel_share_before_gain": float(energy[top] / energy.sum()),
            "top_channel_gain": abs(float(gain[top])) / live[(len(live) - 1) // 2],
            "gain_share": float(gain.square().max() / gain.square().sum()),
        }
        measured = {name: sites[site].statistics[name] for name in expected}
        rounding = 0.02 if norm.bias is None else 0.2  # of a sum of a large bias and a small product
        assert measured == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else rounding), site
        assert all(map(math.isfinite, sites[site].statistics.values()))


def test_metrics_of_the_whole_model_aggregate_its_sites(naive_pass: Any) -> None:
    reading = naive_pass[0]
    kurtosis = [site.statistics["kurtosis"] for site in reading.sites.values()]
    assert reading.metrics["monitor/kurtosis/max"] == max(kurtosis)
    assert reading.metrics["monitor/kurtosis/mean"] == pytest.approx(sum(kurtosis) / len(kurtosis))
    assert reading.metrics["monitor/max_abs/max"] == max(s.statistics["max_abs"] for s in reading.sites.values())


# --- ranks and settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4])
def test_reading_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    """Five sequences of documents on 2 and 4 ranks; maxima, places and counts are bit-identical."""
    one = workers.heavy_reading()
    for rank in ranks_of(world_size):
        many = rank["reading"]
        assert many.metrics == pytest.approx(one.metrics, rel=1e-12)
        assert many.metrics.keys() == one.metrics.keys()
        for name, site in one.sites.items():
            other = many.sites[name]
            assert (other.value, other.channel, other.row, other.position) == (
                site.value,
                site.channel,
                site.row,
                site.position,
            )
            assert other.channels == site.channels


@pytest.mark.parametrize("world_size", [2, 4])
def test_probe_without_sites_merges_over_ranks(world_size: int) -> None:
    one = probe(workers.small_model(), workers.probe_text(), MonitorConfig(sites=(), statistics=("R_L",)))
    for rank in ranks_of(world_size):
        assert rank["without_sites"].sites == {}
        assert rank["without_sites"].metrics == pytest.approx(one.metrics, rel=1e-12)


def test_probe_leaves_the_model_unchanged() -> None:
    model = workers.small_model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    probe(model, workers.probe_text(), FULL)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


def test_probe_that_fails_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = workers.small_model().train()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("osp.monitor.statistics.take_sample", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        probe(model, workers.probe_text(), FULL)
    assert all(m.training and not m._forward_hooks and "forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    ("sites", "statistics", "expected"),
    [
        (("block_out",), ("kurtosis",), {"kurtosis/layer_00/block_out", "kurtosis/max", "kurtosis/mean"}),
        ((), ("R_L",), {"R_L", "R_L/layer_00", "R_L/layer_01"}),
        (("q",), ("attn_sink", "rms"), {"attn_sink/layer_01", "rms/layer_01/q"}),
        (("v",), ("osp_script",), {"kurtosis/osp_script"}),
        ((), ("gain_max",), {"gain_max/layer_00/input_layernorm", "gain_max/norm"}),
    ],
)
def test_only_chosen_sites_and_statistics_are_measured(sites: Any, statistics: Any, expected: set[str]) -> None:
    config = MonitorConfig(sites=sites, statistics=statistics)
    metrics = probe(workers.small_model(), workers.probe_text(), config).metrics
    names = {key.removeprefix("monitor/") for key in metrics}
    assert expected <= names
    kinds = set(statistics) - {"osp_script"} | ({"kurtosis"} if "osp_script" in statistics else set())
    assert {name.split("/")[0] for name in names} == kinds
    if "osp_script" in statistics:
        assert names == expected


@pytest.mark.parametrize("norm", ["layernorm", "ssnorm", "crmsnorm", "bhyt", "dyt"])
def test_every_norm_can_be_probed(norm: str) -> None:
    metrics = probe(workers.small_model(norm, embed_proj=True), workers.probe_text(), FULL).metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert ("monitor/gain_max/layer_00/input_layernorm" in metrics) == (norm != "crmsnorm")
    assert "monitor/weight_row_max/embed_proj" in metrics


def test_bf16_model_is_measured_in_fp64() -> None:
    """Fourth powers in bf16 would have no correct digit."""
    model = workers.planted("block_out")
    model.compute_dtype = torch.bfloat16
    outlier = probe(model, workers.probe_text(), FULL).sites["layer_01/block_out"]
    assert (outlier.channel, outlier.row, outlier.position) == (13, ROW, POSITION)
    assert outlier.value == torch.tensor(outlier.value).bfloat16().item()
