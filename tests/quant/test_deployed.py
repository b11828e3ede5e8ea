"""The formats of inference engines against the libraries that define them, and in a whole model."""

import dataclasses
import itertools
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from osp.model.sites import hook_site
from osp.quant.apply import quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.formats import FORMATS, NVFP4
from osp.quant.spec import QuantSpec
from osp.schema import build
from tests.quant.quant_oracle import outlier_model

CONFIGS = Path(__file__).parents[2] / "configs" / "quant"


def hard_values(seed: int, rows: int = 64, columns: int = 256) -> Tensor:
    """Return normal values at magnitudes from 1e-6 to 1e3, with blocks of zeros, ties and outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.rand(rows, 1, generator=generator).mul(20).sub(14).exp()
    x[3] = 0.0
    x[5, :32] = 0.0
    x[7, 3] = 1e3
    x[9] = torch.arange(columns) % 13 / 2 - 3  # the values and the ties of E2M1
    x[11, :32] = -x[11, 32:64]
    return x


def library_values(x: Tensor, preset: str) -> Tensor:
    """Return x as the emulation of compressed-tensors rounds it, by its own choice of scales."""
    arguments = preset_name_to_scheme(preset, targets=["Linear"]).weights
    assert arguments is not None
    groups = x.unflatten(1, (-1, arguments.group_size or x.shape[1]))
    tensor_scale = generate_gparam(x.amin(), x.amax()) if preset == "NVFP4" else None
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), arguments, global_scale=tensor_scale)
    return fake_quantize(x, scale, zero, arguments, global_scale=tensor_scale)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("preset", "name", "bits", "group_size"),
    [
        ("NVFP4", "nvfp4", 4, None),
        ("MXFP4", "mxfp4", 4, None),
        ("W4A16", "half", 4, 128),
        ("W8A8", "half", 8, None),
    ],
)
def test_values_equal_compressed_tensors(preset: str, name: str, bits: int, group_size: int | None, seed: int) -> None:
    x = hard_values(seed)
    assert torch.equal(FORMATS[name](bits).round(x, group_size=group_size), library_values(x, preset))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_values_equal_gguf(name: str, seed: int) -> None:
    x, kind = hard_values(seed), gguf.GGMLQuantizationType[name.upper()]
    number_format = FORMATS[name](FORMATS[name].widths[0])
    rounded = number_format.round(x)
    assert np.array_equal(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind), rounded.numpy())
    assert torch.equal(number_format.round(rounded), rounded)  # a file of rounded weights has the same values


@pytest.mark.parametrize("seed", range(4))
def test_values_equal_torchao(seed: int) -> None:
    """torchao multiplies by the reciprocal of NVFP4's scale where compressed-tensors divides, so ties may differ."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    mode = pytest.importorskip("torchao.prototype.mx_formats.config").ScaleCalculationMode.EVEN
    x = hard_values(seed)
    scale, packed = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mode)
    expected = mx.to_dtype(packed, scale, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(FORMATS["mxfp4"](4).round(x), expected)

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    tensor_scale = nv.per_tensor_amax_to_scale(x.abs().amax())
    scale, levels = nv.nvfp4_quantize(x, per_tensor_scale=tensor_scale)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    low, high = levels & 15, levels >> 4
    codes = torch.stack((low, high), -1).flatten(-2).long()
    values = table[codes & 7] * (1 - 2 * (codes >> 3))
    expected = values * (scale.float() * tensor_scale).repeat_interleave(16, -1)
    torch.testing.assert_close(NVFP4(4).round(x), expected, rtol=1e-6, atol=0)


def test_e2m1_rounds_to_the_nearest_value_and_ties_to_even() -> None:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(values)])
    x = torch.cat((torch.linspace(-6, 6, 1000), ties, -ties))
    x = F.pad(F.pad(x, (0, -len(x) % 31)).view(-1, 31), (0, 1), value=6.0)  # every block has scale 1
    table = torch.tensor([*values, *(-v for v in values[1:])])
    distance = (x[..., None] - table).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    mantissa_even = torch.tensor([True, False] * 4 + [False, True] * 3 + [False])
    choice = torch.where(nearest.sum(-1, keepdim=True) > 1, nearest & mantissa_even, nearest)
    assert torch.equal(FORMATS["mxfp4"](4).round(x), table[choice.int().argmax(-1)])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "half"])
def test_clip_search_lowers_the_error_and_keeps_the_scales_storable(name: str) -> None:
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) ** 3
    number_format = FORMATS[name](4)
    plain, clipped = number_format.round(x), number_format.round(x, clip_search=True)
    error = [(q - x).abs().pow(2.4).sum() for q in (plain, clipped)]
    assert error[1] < error[0]
    if name != "half":
        grid = number_format.grid(x.unflatten(1, (-1, number_format.block_size or 0)), clip_search=True)
        if name == "mxfp4":
            assert torch.equal(torch.frexp(grid.scale)[0], torch.full_like(grid.scale, 0.5))
        else:
            stored = grid.scale * NVFP4.scale_of_tensor(x)
            torch.testing.assert_close(stored, stored.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", DEPLOYED)
def test_preset_is_the_deployed_format(name: str) -> None:
    assert build(QuantSpec, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())) == DEPLOYED[name]


@torch.no_grad()
@pytest.mark.parametrize("name", DEPLOYED)
def test_a_narrow_ffn_is_rounded_like_a_padded_one(name: str) -> None:
    """A group at the end of the FFN that is not full equals a group that zero channels fill."""
    spec, ids = DEPLOYED[name], torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(1))
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    narrow, wide = outlier_model(intermediate_size=88, **shape), outlier_model(intermediate_size=128, **shape)
    wide.load_state_dict({name: pad_ffn(name, value, 40) for name, value in narrow.state_dict().items()})
    logits = []
    for model in (narrow, wide):
        with quantized(model, spec, calibration=ids):
            logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


def pad_ffn(name: str, value: Tensor, channels: int) -> Tensor:
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return F.pad(value, (0, 0, 0, channels))
    return F.pad(value, (0, channels)) if name.endswith("down_proj.weight") else value


@torch.no_grad()
def test_matrices_with_one_input_share_the_tensor_scale_of_nvfp4() -> None:
    model = outlier_model(hidden_size=64, intermediate_size=64)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with quantized(model, DEPLOYED["nvfp4a16"]) as state:
        for layer in ("layers.0", "layers.1"):
            attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
            for fused in (attention, ("mlp.gate_proj", "mlp.up_proj")):
                together = torch.cat([before[f"{layer}.{name}.weight"] for name in fused])
                expected = (
                    NVFP4(4)
                    .round(together, clip_search=True)
                    .split([len(before[f"{layer}.{name}.weight"]) for name in fused])
                )
                for name, value in zip(fused, expected, strict=True):
                    assert torch.equal(model.get_parameter(f"{layer}.{name}.weight"), value)
                    bounds = state.bounds[f"{layer}.{name}.weight"]
                    assert bounds.tolist() == [together.amin().item(), together.amax().item()]
                    assert torch.equal(state.grids[f"{layer}.{name}.weight"].round(value, group_size=16), value)


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [QuantSpec(a_bits=8, static_activations=True, embedding_and_head=True), DEPLOYED["nvfp4"]],
    ids=["static_activations", "nvfp4"],
)
def test_static_scales_follow_the_calibration_text(spec: QuantSpec) -> None:
    """The range of a site is the range of its activations on the calibration text, whatever is evaluated."""
    model = outlier_model(hidden_size=64, intermediate_size=64)
    calibration = torch.arange(80).view(2, 40)
    seen: dict[str, list[Tensor]] = {}
    with quantized(model, dataclasses.replace(spec, a_bits=16)) as weights_only:  # the same weights
        assert not weights_only.bounds.keys() & {"layer_00/attn_in"}
        names = ["head_in"] if spec.embedding_and_head else []
        names += [
            f"layer_{i:02d}/{kind}" for i in (0, 1) for kind in ("attn_in", "o_proj_in", "mlp_in", "down_proj_in")
        ]
        handles = [hook_site(model, name, seen.setdefault(name, []).append) for name in names]
        model(calibration)
        for handle in handles:
            handle.remove()
    with quantized(model, spec, calibration=calibration) as state:
        inputs: list[Tensor] = []
        for name in names:
            x = torch.cat([part.flatten() for part in seen[name]]).float()
            assert state.bounds[name].tolist() == [min(0.0, x.min().item()), max(0.0, x.max().item())]
        handle = hook_site(model, "layer_01/down_proj_in", inputs.append)
        model(calibration[:1, :7])
        alone = inputs[-1][0, -1]
        model(calibration[:1, :20])
        handle.remove()
    # a token's values do not depend on the other tokens of the batch
    torch.testing.assert_close(inputs[-1][0, 6], alone)
    if spec.static_activations:
        low, high = state.bounds["layer_01/down_proj_in"].tolist()
        step = (high - low) / 255
        levels = inputs[-1].double() / step
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["nvfp4a16", "mxfp4a16", "w4a16_g32"])
def test_gptq_lowers_the_error_of_the_outputs(name: str) -> None:
    model, ids = outlier_model(hidden_size=64, intermediate_size=80), torch.randint(0, 96, (8, 64))
    exact, loss = model(ids).logits, {}
    for method in ("rtn", "gptq"):
        spec = dataclasses.replace(DEPLOYED[name], method=method)
        with quantized(model, spec, calibration=ids) as state:
            loss[method] = (model(ids).logits - exact).square().mean().item()
            weight = model.get_parameter("layers.1.mlp.down_proj.weight")
            size = spec.number_format("w").block_size or spec.w_group_size
            assert torch.equal(state.grids["layers.1.mlp.down_proj.weight"].round(weight, group_size=size), weight)
    assert loss["gptq"] < loss["rtn"]


def test_words_name_blocks_static_ranges_and_ends() -> None:
    assert str(DEPLOYED["nvfp4"]) == (
        "4-4-16 rtn, W nvfp4/block 16 clip, A nvfp4/block 16, calibration train 65536 tokens, seed 0"
    )
    assert str(DEPLOYED["q4_0"]) == "4-16-16 rtn, W q4_0/block 32, embedding and head q8_0"
    assert str(QuantSpec(a_bits=8, static_activations=True)).startswith(
        "16-8-16 rtn, A asym/tensor static, calibration train"
    )
    assert len({str(spec) for spec in DEPLOYED.values()}) == len({spec.hash for spec in DEPLOYED.values()}) == 14
