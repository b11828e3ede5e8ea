"""Folders of format=compressed-tensors hold our rounded values, and `transformers` computes with them as we do."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from osp.config import from_dict
from osp.convert.file_format import LlamaSource
from osp.convert.hf_export import stock_llama
from osp.convert.packed import CompressedTensors, library_scheme
from osp.errors import UserError
from osp.evaluation.language_model import open_model
from osp.evaluation.texts import read_text
from osp.model.hf_llama import HEAD
from osp.quant.apply import quantized
from osp.train.setup import train

pytest.importorskip("compressed_tensors")

FORMAT = CompressedTensors()
CALIBRATION = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(2))
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of the lower three bits of a nibble; the fourth is the sign
Q_PROJ, DOWN_PROJ = "layers.0.self_attn.q_proj.", "layers.1.mlp.down_proj."
FFN = 256
CASES: list[tuple[str, dict[str, Any]]] = [
    *((scheme, {}) for scheme in FORMAT.schemes),
    ("W4A16", {"w_clip": False}),
    ("W4A16", {"method": "gptq"}),
    ("W4A16_G32", {"method": "gptq", "act_order": True}),
    ("W8A8", {"method": "gptq"}),
    ("NVFP4", {"method": "gptq"}),
    ("NVFP4A16", {"w_clip": False}),
    ("MXFP4", {"w_clip": False}),
]


class Written(NamedTuple):
    """A folder and what it has to hold."""

    folder: Path
    weights: dict[str, Tensor]  # parameter -> our rounded fp32 values
    ids: Tensor  # (64, 32) text
    nats: float  # per token of it, by fake quantization


Write = Callable[..., Written]


@pytest.fixture(scope="module")
def run(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tiny_values, tmp_path_factory.mktemp("trained") / "run")


def _train(values: dict[str, Any], folder: Path, **model: Any) -> Path:
    model = {**values["model"], "hidden_size": 128, "intermediate_size": 172, **model}  # padded to 256
    train(from_dict({**values, "model": model, "run": {"name": "run", "dir": str(folder)}}))
    return folder


@pytest.fixture(scope="module")
def write(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return a function that writes the folder of a scheme with rounding keys of the quantization, each once."""
    made: dict[Any, Written] = {}

    def write(scheme: str, **rounding: Any) -> Written:
        key = (scheme, *rounding.items())
        if key not in made:
            made[key] = _write(run, scheme, tmp_path_factory.mktemp(scheme), rounding)
        return made[key]

    return write


@torch.no_grad()
def _write(run: Path, scheme: str, folder: Path, rounding: dict[str, Any]) -> Written:
    subject = open_model(run)
    model = stock_llama(subject.model, ffn_multiple=FORMAT.ffn_multiple("W4A16"))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids = read_text("held_out", subject).tokens[:2048].view(64, 32).long()
    spec = dataclasses.replace(FORMAT.schemes[scheme], **rounding)
    with quantized(model, spec, calibration=CALIBRATION) as state:
        FORMAT.write(LlamaSource(model, subject, FORMAT.dtype(scheme)), state, scheme, folder)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return Written(folder, weights, ids, nats(lambda ids: model(ids).logits, ids))


def nats(logits: Callable[[Tensor], Any], ids: Tensor) -> float:
    return F.cross_entropy(logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def stored(written: Written) -> dict[str, Tensor]:
    """Return the tensors of the file; names of parameters are ours."""
    return {
        name.removeprefix("model."): tensor for name, tensor in load_file(written.folder / "model.safetensors").items()
    }


def unpack(tensors: dict[str, Tensor], module: str) -> Tensor:
    """Return the fp32 values of a matrix by shifts and masks."""
    scale = tensors[f"{module}weight_scale"]
    if f"{module}weight" in tensors:
        assert tensors[f"{module}weight"].dtype == torch.int8
        levels = tensors[f"{module}weight"].float()
    elif tensors[f"{module}weight_packed"].dtype == torch.int32:
        words = tensors[f"{module}weight_packed"].long()
        levels = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], dim=-1).flatten(1).float() - 8
    else:
        bytes_ = tensors[f"{module}weight_packed"].int()
        nibbles = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(1)
        levels = E2M1[nibbles & 7] * (1 - 2 * (nibbles >> 3))
        if scale.dtype == torch.uint8:
            scale = torch.ldexp(torch.ones(scale.shape), scale.int() - 127)
        else:
            scale = scale.float() / tensors[f"{module}weight_global_scale"]
    groups = scale.shape[1]
    return (levels.unflatten(1, (groups, -1)) * scale.unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize(("scheme", "rounding"), CASES)
def test_the_file_holds_our_rounded_values(scheme: str, rounding: dict[str, Any], write: Write) -> None:
    written = write(scheme, **rounding)
    tensors = stored(written)
    matrices = 0
    for name, ours in written.weights.items():
        if name.endswith("_proj.weight"):
            assert torch.equal(unpack(tensors, name.removesuffix("weight")), ours), name
            matrices += 1
        else:
            assert tensors[name].dtype == torch.bfloat16
            assert torch.equal(tensors[name].float(), ours), name
    assert matrices == 14
    assert FORMAT.above_four_bits(written.folder) == [
        name if name == HEAD else f"model.{name}"
        for name in sorted(written.weights, key=lambda name: (name != HEAD, name))
        if scheme == "W8A8" or not name.endswith("_proj.weight")
    ]


@pytest.mark.parametrize(("scheme", "rounding"), CASES)
def test_transformers_has_our_weights_and_perplexity(
    scheme: str, rounding: dict[str, Any], write: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    written = write(scheme, **rounding)
    capfd.readouterr()
    client: Any = FORMAT.open(written.folder, torch.device("cpu"))
    assert capfd.readouterr() == ("", "")
    assert client.logits(written.ids).dtype == torch.float32
    assert math.exp(nats(client.logits, written.ids) - written.nats) == pytest.approx(1, abs=1e-4)
    theirs = {name.removeprefix("model."): p for name, p in client.model.named_parameters()}
    for name, ours in written.weights.items():
        close = torch.allclose(theirs[name], ours, rtol=2e-7, atol=0)  # the tensor scale is divided by at another place
        assert close if scheme.startswith("NVFP4") else torch.equal(theirs[name], ours), name


def test_a_tied_head_is_the_embedding(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    run = _train(tiny_values, tmp_path / "run", tie_embeddings=True, embed_proj=False)
    for scheme in ("W4A16", "NVFP4"):
        (folder := tmp_path / scheme).mkdir()
        written = _write(run, scheme, folder, {})
        assert HEAD not in stored(written)
        assert HEAD not in FORMAT.above_four_bits(folder)
        client: Any = FORMAT.open(folder, torch.device("cpu"))
        assert client.model.lm_head.weight is client.model.model.embed_tokens.weight
        assert math.exp(nats(client.logits, written.ids) - written.nats) == pytest.approx(1, abs=1e-4)


def test_roundings_differ(write: Write) -> None:
    """Otherwise the cases above could not show that clipping and GPTQ survive."""
    weights = [write("W4A16", **rounding).weights for scheme, rounding in CASES if scheme == "W4A16"]
    for i, name in ((i, name) for i in range(3) for name in (f"{Q_PROJ}weight", f"{DOWN_PROJ}weight")):
        assert not torch.equal(weights[i][name], weights[i - 1][name])


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4", "W8A8"])
def test_activations_are_quantized_in_transformers(scheme: str, write: Write) -> None:
    """By more than the tolerance, so equal perplexities show that transformers and we round activations alike."""
    written = write(scheme)
    client: Any = FORMAT.open(written.folder, torch.device("cpu"))
    for module in client.model.modules():
        module.quantization_enabled = False
    assert abs(nats(client.logits, written.ids) - written.nats) > 2e-4


@pytest.mark.parametrize("scheme", FORMAT.schemes)
def test_plain_from_pretrained_computes_in_bf16(scheme: str, write: Write) -> None:
    """What a user does: no option, and a library that finds every tensor that it looks for, and no other."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(write(scheme).folder, output_loading_info=True)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        in_bf16 = nats(lambda ids: model(ids).logits.float(), write(scheme).ids)
    assert in_bf16 == pytest.approx(write(scheme).nats, rel=0.01)


@pytest.mark.parametrize("scheme", FORMAT.schemes)
def test_names_types_and_shapes_are_what_vllm_allocates(scheme: str, write: Write) -> None:
    """vLLM 0.33.0, model_executor/layers/quantization/compressed_tensors/schemes/, `create_weights`."""
    pack = ("weight_packed", torch.uint8, (128, FFN // 2))
    g = ("weight_global_scale", torch.float32, (1,))
    nvfp4 = [pack, ("weight_scale", torch.float8_e4m3fn, (128, FFN // 16)), g]
    mxfp4 = [pack, ("weight_scale", torch.uint8, (128, FFN // 32))]
    w4 = [("weight_packed", torch.int32, (128, FFN // 8)), ("weight_shape", torch.int64, (2,))]
    expected = {
        "W4A16": [*w4, ("weight_scale", torch.float32, (128, FFN // 128))],
        "W4A16_G32": [*w4, ("weight_scale", torch.float32, (128, FFN // 32))],
        "W8A8": [("weight", torch.int8, (128, FFN)), ("weight_scale", torch.float32, (128, 1))],
        "NVFP4": [*nvfp4, ("input_global_scale", torch.float32, (1,))],
        "NVFP4A16": nvfp4,
        "MXFP4": mxfp4,
        "MXFP4A16": mxfp4,
    }
    found = {
        (name.removeprefix(DOWN_PROJ), tensor.dtype, tuple(tensor.shape))
        for name, tensor in stored(write(scheme)).items()
        if name.startswith(DOWN_PROJ)
    }
    assert found == set(expected[scheme])


def test_config_describes_the_scheme(write: Write) -> None:
    for scheme in FORMAT.schemes:
        config = json.loads((write(scheme).folder / "config.json").read_text())
        described = config["quantization_config"]
        assert config["dtype" if "dtype" in config else "torch_dtype"] == "bfloat16"
        assert described["quant_method"] == "compressed-tensors"
        assert described["quantization_status"] == "compressed"
        assert described["ignore"] == ["lm_head"]
        (group,) = described["config_groups"].values()
        assert group["targets"] == ["Linear"]
        assert group["weights"]["num_bits"] == (8 if scheme == "W8A8" else 4)
        assert (group["input_activations"] is None) == scheme.startswith(("W4A16", "NVFP4A16", "MXFP4A16"))
        sizes = {"W4A16": 128, "W4A16_G32": 32, "W8A8": None, "NVFP4": 16, "NVFP4A16": 16}
        assert group["weights"].get("group_size") == sizes.get(scheme, 32)
    assert library_scheme("W4A16").weights.group_size == 128  # the preset of the library was not changed


def test_fused_matrices_share_the_scales_of_nvfp4(write: Write) -> None:
    """vLLM makes one matrix of q, k and v, and of gate and up, and takes the largest of their tensor scales."""
    tensors = stored(write("NVFP4"))
    for layer in range(2):
        for names in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            for scale in ("weight_global_scale", "input_global_scale"):
                assert len({tensors[f"layers.{layer}.{name}_proj.{scale}"].item() for name in names}) == 1
    scales = {tensor.item() for name, tensor in tensors.items() if name.endswith("global_scale")}
    assert len(scales) == 2 * 2 * 4  # and nothing else does


@torch.no_grad()
def test_input_scale_of_nvfp4_is_that_of_the_calibration_text(write: Write) -> None:
    """Measured in transformers: the scheme without quantized activations has the same weights."""
    client: Any = FORMAT.open(write("NVFP4A16").folder, torch.device("cpu"))
    largest: dict[str, float] = {}
    for name, module in client.model.model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda module, args, name=name: largest.__setitem__(name, args[0].abs().max().item())
            )
    client.logits(CALIBRATION)
    tensors = stored(write("NVFP4"))
    assert len(largest) == 14
    for name, value in largest.items():
        assert tensors[f"{name}.input_global_scale"].item() == pytest.approx(448 * 6 / value, rel=1e-5)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    subject = open_model(run)
    for library in ("compressed_tensors", "transformers"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            with pytest.raises(UserError) as refused:
                FORMAT.check(subject.model.config, subject.tokenizer, "W4A16")
        assert str(refused.value) == f"format=compressed-tensors needs {library}: pip install -e '.[deploy]'"
    FORMAT.check(subject.model.config, subject.tokenizer, "W4A16")
