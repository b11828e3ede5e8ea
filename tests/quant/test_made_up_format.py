"""A number format that only this file knows is used wherever formats are, or is refused with a reason."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from osp.errors import UserError
from osp.evaluation.config import EvaluateConfig
from osp.evaluation.evaluate import evaluate, live_perplexity
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.perplexity import perplexity
from osp.evaluation.texts import read_text
from osp.quant.apply import propagated_error, quantized
from osp.quant.formats import FORMATS, NumberFormat
from osp.quant.spec import QuantSpec, check_spec
from osp.schema import build
from tests.conftest import made_text


class PowersOfTwo(NumberFormat):
    """A sign and a power of two: 0 and +-2^e for the 2^(bits-1) - 1 largest exponents of a group."""

    name = "powers_of_two"
    widths = range(3, 6)

    def round(self, x: Tensor, *, group_size: int | None = None, clip_search: bool = False) -> Tensor:
        groups = x.float().unflatten(-1, (-1, group_size or x.shape[-1]))
        exponent = groups.abs().log2().round()
        top = exponent.amax(-1, keepdim=True)
        kept = exponent > top - (2 ** (self.bits - 1) - 1)
        return torch.where(kept, groups.sign() * exponent.exp2(), 0.0).reshape(x.shape).to(x.dtype)


class Blocks(PowersOfTwo):
    name = "blocks"
    block_size = 8

    def round(self, x: Tensor, *, group_size: int | None = None, clip_search: bool = False) -> Tensor:
        return super().round(x, group_size=self.block_size)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for number_format in (PowersOfTwo, Blocks):
        monkeypatch.setitem(FORMATS, number_format.name, number_format)


NAME = PowersOfTwo.name
SPEC = {"w_bits": 4, "a_bits": 5, "kv_bits": 3, "w_format": NAME, "a_format": NAME, "kv_format": NAME}


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    (tmp_path / "text.txt").write_text("".join(made_text(2)))
    spec = build(QuantSpec, SPEC)
    return EvaluateConfig(texts=(str(tmp_path / "text.txt"),), seq_len=32, max_tokens=128, quant=spec, progress=False)


@torch.no_grad()
def test_weights_activations_and_cache_are_rounded_to_the_format(llama: LanguageModel) -> None:
    before = {name: weight.clone() for name, weight in llama.model.named_parameters()}
    inputs: dict[str, Tensor] = {}

    def observe(name: str, number: int) -> None:
        module = llama.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, arguments: inputs.update({name: arguments[number]}))
        handles.append(handle)

    handles: list[torch.utils.hooks.RemovableHandle] = []
    with quantized(llama.model, build(QuantSpec, SPEC)):
        observe("layers.0.mlp.down_proj", 0)  # hooks run in the order of their registration
        observe("layers.1.self_attn.attend", 2)
        llama.model(torch.arange(20)[None])
        weight = llama.model.get_parameter("layers.0.mlp.down_proj.weight")
        assert torch.equal(weight, PowersOfTwo(4).round(before["layers.0.mlp.down_proj.weight"]))
    for handle in handles:
        handle.remove()
    assert torch.equal(inputs["layers.0.mlp.down_proj"], PowersOfTwo(5).round(inputs["layers.0.mlp.down_proj"]))
    assert torch.equal(
        inputs["layers.1.self_attn.attend"],
        PowersOfTwo(3).round(inputs["layers.1.self_attn.attend"]),
    )
    assert all(torch.equal(before[name], weight) for name, weight in llama.model.named_parameters())


def test_evaluation_and_live_perplexity_use_the_format(llama: LanguageModel, config: EvaluateConfig) -> None:
    text = read_text(config.texts[0], llama)
    with quantized(llama.model, config.quant):
        expected = perplexity(llama.model, text, seq_len=32, max_tokens=128).perplexity
    record = evaluate(llama, config)
    assert record.results[0].value == expected
    integers = evaluate(llama, dataclasses.replace(config, quant=QuantSpec().at("4-5-3")))
    assert integers.results[0].value != expected
    assert record.quant["text"] == "4-5-3 rtn, W powers_of_two/channel, A powers_of_two/token (o_proj by head), " + (
        "KV powers_of_two/head (K Hadamard)"
    )
    assert record.quant["hash"] not in {QuantSpec().at("4-5-3").hash, QuantSpec().hash}
    live = live_perplexity(llama.model, text, seq_len=32, formats={"made_up": (config.quant, None)})
    with quantized(llama.model, config.quant):
        assert live["quant/perplexity/made_up"] == perplexity(llama.model, text, seq_len=32).perplexity


def test_propagated_error_falls_with_the_bits_of_the_format(llama: LanguageModel) -> None:
    ids = torch.arange(60).view(2, 30)
    errors = []
    for bits in ("3-16-16", "5-16-16"):
        spec = build(QuantSpec, {"w_format": NAME}).at(bits)
        errors.append(propagated_error(llama.model, spec, ids)[-1])
    assert errors[0] > errors[1] > 0


def test_format_works_with_rotations_and_groups(llama: LanguageModel) -> None:
    ids = torch.arange(30)[None]
    for changes in ({"rotation": "quarot"}, {"ffn_hadamard": True}, {"w_group_size": 4, "a_group_size": 4}):
        with quantized(llama.model, build(QuantSpec, {**SPEC, **changes})), torch.no_grad():
            assert llama.model(ids).logits.isfinite().all()


def test_prescribed_blocks_are_checked_against_the_model(llama: LanguageModel) -> None:
    spec = QuantSpec(a_bits=4, a_format="blocks")
    check_spec(spec, llama.model.config)
    wrong = dataclasses.replace(llama.model.config, hidden_size=60, head_dim=16)
    with pytest.raises(UserError, match=r"the block of blocks, 8 channels, does not divide model.hidden_size=60"):
        check_spec(spec, wrong)


def test_format_is_ignored_at_16_bits(llama: LanguageModel) -> None:
    """The format has at most 5 bits, so it does not exist at 16."""
    for bits in ("16-16-16", "4-16-16", "16-4-16", "16-16-4"):
        spec = build(QuantSpec, {"w_format": NAME, "a_format": NAME, "kv_format": NAME}).at(bits)
        check_spec(spec, llama.model.config)
        assert str(spec).count(NAME) == bits.count("4")
        with quantized(llama.model, spec), torch.no_grad():
            assert llama.model(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"w_format": "nf4"}, r"quant.w_format='nf4'; choose from asym, blocks, half, "),
        ({"a_bits": 8, "a_format": NAME}, r"quant.a_bits=8: the format powers_of_two has 3, 4, 5 bits"),
        ({"w_bits": 4, "w_format": NAME, "method": "gptq"}, r"quant.method=gptq: .* powers_of_two has no grid"),
        (
            {"a_bits": 4, "a_format": NAME, "static_activations": True},
            r"quant.static_activations=true: the format powers_of_two takes",
        ),
        (
            {"a_bits": 8, "a_group_size": 8, "static_activations": True},
            r"quant.a_group_size=8: quant.static_activations=true has one",
        ),
        ({"w_bits": 8, "ends_format": "q8_0"}, r"quant.ends_format=q8_0 does nothing without quant.embedding_and"),
        ({"w_bits": 8, "ends_format": "q9_0"}, r"quant.ends_format='q9_0'; choose from asym"),
        (
            {"w_bits": 4, "w_format": "blocks", "w_group_size": 16},
            r"group_size=16: .* blocks has groups of 8",
        ),
    ],
)
def test_unsupported_settings_of_a_format_are_refused_with_a_reason(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(QuantSpec, values, path="quant")
    assert not re.search("\n", str(caught.value))
