"""QuantSpec: presets, mistakes, its line and its hash."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from osp.errors import UserError
from osp.model_config import AttentionConfig, ModelConfig, NormConfig
from osp.quant.spec import SITES, QuantSpec, active_sites, check_spec
from osp.schema import build

PRESETS = sorted((Path(__file__).parents[2] / "configs/quant").glob("*.yaml"))


def preset(name: str) -> QuantSpec:
    return build(QuantSpec, next(yaml.safe_load(path.read_text()) for path in PRESETS if path.stem == name))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_builds_and_fits_the_models(path: Path) -> None:
    spec = build(QuantSpec, yaml.safe_load(path.read_text()))
    for model in (PRESETS[0].parents[1] / "model").glob("*.yaml"):
        check_spec(spec, ModelConfig(**yaml.safe_load(model.read_text())))
    assert spec.is_identity == (path.stem == "none")


def test_presets_have_the_settings_of_their_names() -> None:
    paper, strict = preset("osp_paper"), preset("strict")
    assert paper == dataclasses.replace(QuantSpec(), w_bits=4, a_bits=4, kv_bits=4)  # the defaults are the paper's
    assert (paper.qk_hadamard, paper.o_proj_by_head, paper.w_clip, paper.embedding_and_head) == (
        True,
        True,
        True,
        False,
    )
    assert (strict.qk_hadamard, strict.o_proj_by_head, strict.w_clip, strict.embedding_and_head) == (
        False, False, False, True,
    )  # fmt: skip
    gated = ModelConfig(attention=AttentionConfig(gate=True))
    assert active_sites(strict, gated) == set(SITES)
    assert active_sites(strict, ModelConfig()) == set(SITES) - {"attention_gate"}
    assert not preset("osp_paper").needs_calibration
    assert preset("gptq").needs_calibration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"w_bits": 1}, r"quant\.w_bits=1: .* from 2 to 16"),
        ({"a_bits": 17}, r"quant\.a_bits=17: .* from 2 to 16"),
        ({"kv_bits": 0}, r"quant\.kv_bits=0: "),
        ({"w_bits": 4.5}, r"quant\.w_bits=4\.5: must be an integer"),
        ({"w_group_size": 0}, r"quant\.w_group_size=0: must be at least 1"),
        ({"calibration_tokens": -1}, r"quant\.calibration_tokens=-1: "),
        ({"damping": 0.0}, r"quant\.damping=0\.0: "),
        ({"damping": float("nan")}, r"quant\.damping=nan: "),
        ({"seed": -1}, r"quant\.seed=-1: "),
        ({"calibration": ""}, r"quant\.calibration='': must be text that is not empty"),
        ({"act_order": True}, r"quant\.act_order=true does nothing with quant\.method=rtn"),
        ({"method": "awq"}, r"quant\.method='awq': must be 'rtn' or 'gptq'"),
        ({"w_bit": 4}, r"unknown key 'quant\.w_bit'; did you mean 'quant\.w_bits'"),
    ],
)
def test_invalid_setting_is_a_one_line_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(QuantSpec, values, path="quant")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "model", "message"),
    [
        ({"w_bits": 4, "w_group_size": 96}, {}, r"w_group_size=96 does not divide model\.hidden_size=256"),
        (
            {"w_bits": 4, "w_format": "mxfp4"},
            {"hidden_size": 48, "num_attention_heads": 3},
            "block of mxfp4, 32 channels, does",
        ),
        ({"a_bits": 4, "a_group_size": 48}, {}, r"a_group_size=48 does not divide model\.hidden_size=256"),
        ({"kv_bits": 4, "kv_group_size": 48}, {}, r"kv_group_size=48 does not divide the head size=64"),
        ({"w_bits": 4, "rotation": "quarot"}, {"norm": NormConfig(name="bhyt")}, "not pass through the norm bhyt"),
        ({"w_bits": 4, "rotation": "quarot"}, {"norm": NormConfig(name="dyt")}, "not pass through the norm dyt"),
        ({"w_bits": 4, "rotation": "quarot"}, {"norm": NormConfig(name="layernorm")}, "the norm layernorm"),
        ({"w_bits": 4, "rotation": "quarot"}, {"norm": NormConfig(final="crmsnorm")}, "the norm crmsnorm"),
    ],
)
def test_spec_that_does_not_fit_the_model_is_refused(spec: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_spec(QuantSpec(**spec), ModelConfig(**model))
    untouched = {key: value for key, value in spec.items() if not key.endswith("_bits")}
    check_spec(QuantSpec(**untouched), ModelConfig(**model))  # at 16 bits nothing is grouped or rotated


def test_bits_are_written_as_in_the_papers() -> None:
    assert preset("osp_paper").at("4-8-16") == QuantSpec(w_bits=4, a_bits=8, kv_bits=16)
    assert QuantSpec(3, 5, 7).bits == "3-5-7"
    for wrong in ("4-8", "4-8-x", "4-4-4-4", "1-4-4"):
        with pytest.raises(UserError):
            QuantSpec().at(wrong)


def test_line_and_hash_distinguish_specs() -> None:
    specs = [preset(path.stem) for path in PRESETS]
    assert len({str(spec) for spec in specs}) == len({spec.hash for spec in specs}) == len(specs)
    assert str(preset("none")) == "16-16-16 (not quantized)"
    assert str(preset("osp_paper").at("4-8-16")) == "4-8-16 rtn, W sym/channel clip, A asym/token (o_proj by head)"
    assert str(preset("quarot")) == (
        "4-4-4 gptq damping 0.01 + quarot + ffn Hadamard, W sym/channel clip, A asym/token (o_proj by head), "
        "KV asym/head (K Hadamard), calibration train 262144 tokens, seed 0"
    )
    assert QuantSpec().hash == QuantSpec().hash == QuantSpec(16, 16, 16).hash
    changed: dict[str, Any] = {
        "w_bits": 4, "a_bits": 4, "kv_bits": 4, "w_symmetric": False, "w_group_size": 8, "w_clip": False,
        "a_symmetric": True, "a_group_size": 8, "o_proj_by_head": False, "kv_symmetric": True, "kv_group_size": 8,
        "embedding_and_head": True, "ffn_hadamard": True, "qk_hadamard": False, "method": "rtn", "act_order": True,
        "damping": 0.1, "rotation": "quarot", "calibration": "a.txt",
        "calibration_tokens": 1, "seed": 1, "w_format": "asym", "a_format": "sym", "kv_format": "sym",
        "static_activations": True, "ends_format": "q8_0", "fold_gains": True,
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(QuantSpec)}
    start = QuantSpec(method="gptq", embedding_and_head=True)
    changed["embedding_and_head"] = False
    hashes = {dataclasses.replace(start, **{key: value}).hash for key, value in changed.items()}
    assert len(hashes | {start.hash}) == len(changed) + 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "f4ae3ad43f13"),
        ("strict", "194b373e071e"),
        ("osp_paper", "0880f2168cf8"),
        ("hadamard", "5a457cac59b6"),
        ("gptq", "be128275c815"),
        ("quarot", "778a5dfbe21b"),
    ],
)
def test_hash_of_a_preset_never_changes(name: str, expected: str) -> None:
    """It is stored beside the results of earlier evaluations."""
    assert preset(name).hash == expected


def test_hash_of_static_activations_is_from_their_first_name() -> None:
    """`static_activations` was called `a_static`."""
    assert QuantSpec(a_bits=8, static_activations=True).hash == "3d0a7d5e72eb"
    values = {"a_bits": 8, "a_symmetric": True, "o_proj_by_head": False, "static_activations": True}
    assert build(QuantSpec, values).hash == "8e8a5f2cb4df"
    with pytest.raises(UserError, match=r"^unknown key 'quant.a_static'; did you mean 'quant.static_activations'\?$"):
        build(QuantSpec, {"a_bits": 8, "a_static": True}, path="quant")


def test_rotation_and_gains_after_a_sublayer() -> None:
    spec = QuantSpec(rotation="quarot").at("4-4-4")
    with pytest.raises(UserError, match=r"gains of norms after a sublayer \(norm.placement=peri\)"):
        check_spec(spec, ModelConfig(norm=NormConfig("rmsnorm", placement="peri")))
    check_spec(spec, ModelConfig(norm=NormConfig("rmsnorm", placement="peri", affine=False)))
    check_spec(spec, ModelConfig(norm=NormConfig("ssnorm", placement="peri")))


def test_groups_divide_the_input_of_o_proj_too() -> None:
    model = ModelConfig(hidden_size=64, intermediate_size=64, num_attention_heads=3, head_dim=16)
    with pytest.raises(
        UserError, match=r"quant.w_group_size=32 does not divide model.num_attention_heads \* head_dim=48"
    ):
        check_spec(QuantSpec(w_bits=4, w_group_size=32), model)
