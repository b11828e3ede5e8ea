"""Reading of Hugging Face folders against `transformers`, and the refusals of unreadable ones."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import osp
from osp.convert.hf_export import write_llama
from osp.errors import UserError
from osp.evaluation.language_model import open_model
from osp.model.generate import generate
from osp.model.hf_llama import load_hf, load_hf_tokenizer
from tests.hf_models import BOS, STORIES, STORIES_TEXT, edit_json, random_llama, write_stories260k

IDS = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))


def assert_same_logits(theirs: Any, folder: Path, ids: torch.Tensor = IDS) -> None:
    ours = load_hf(folder)
    assert not ours.training
    with torch.no_grad():
        expected, actual = theirs(ids).logits, ours(ids).logits
    scale = expected.abs().max()
    assert scale > 0.5, "the logits are too small for a meaningful comparison"
    assert (actual - expected).abs().max() <= 1e-5 * scale, (actual - expected).abs().max() / scale


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 16},
        {"hidden_size": 36, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
    ],
    ids=str,
)
def test_logits_equal_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    assert_same_logits(random_llama(tmp_path, **config), tmp_path)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}


@pytest.mark.parametrize(
    "scaling", [LLAMA3, {"rope_type": "linear", "factor": 3.0}], ids=lambda scaling: scaling["rope_type"]
)
def test_logits_with_scaled_rope_equal_transformers(scaling: dict[str, Any], tmp_path: Path) -> None:
    """Read both layouts of the configuration, and the layout of our export."""
    from transformers import LlamaForCausalLM

    theirs = random_llama(tmp_path / "5", head_dim=16, rope_parameters={"rope_theta": 5000.0, **scaling})
    assert_same_logits(theirs, tmp_path / "5")
    ours = load_hf(tmp_path / "5")
    plain = load_hf(tmp_path / "5")
    plain.config = dataclasses.replace(ours.config, rope_scaling=None)
    plain._rotary = None
    with torch.no_grad():
        assert (plain(IDS).logits - ours(IDS).logits).abs().max() > 0.1
    (tmp_path / "ours").mkdir()
    write_llama(ours, tmp_path / "ours", dtype="fp32", bos_id=0, eos_id=0)
    shutil.copytree(tmp_path / "5", tmp_path / "4")
    edit_json(tmp_path / "4" / "config.json", rope_parameters=None, rope_theta=5000.0, rope_scaling=scaling)
    for name in ("ours", "4"):
        assert load_hf(tmp_path / name).config == ours.config
        assert_same_logits(LlamaForCausalLM.from_pretrained(tmp_path / name).eval(), tmp_path / name)
        with torch.no_grad():
            assert torch.equal(load_hf(tmp_path / name)(IDS).logits, ours(IDS).logits)


def test_tied_head_is_read_tied(tmp_path: Path) -> None:
    theirs = random_llama(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_same_logits(theirs, tmp_path)
    ours = load_hf(tmp_path)
    assert ours.config.tie_embeddings
    assert ours.lm_head.weight is ours.embed_tokens.weight


@pytest.mark.parametrize(("holds", "tied"), [("copy", True), ("head only", True), ("two matrices", False)])
def test_head_in_the_files_of_a_tied_model_is_read_as_transformers_reads_it(
    holds: str, tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import LlamaForCausalLM

    random_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if tied else 2)
    if holds == "head only":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_hf(tmp_path)
    assert [record.message.partition(": ")[2] for record in caplog.records] == (
        [] if tied else ["tie_word_embeddings=true, but the weights hold two different matrices: not tied"]
    )
    assert_same_logits(LlamaForCausalLM.from_pretrained(tmp_path).eval(), tmp_path)
    assert ours.config.tie_embeddings == tied
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == tied


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    theirs = random_llama(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(theirs, tmp_path)


def test_bf16_weights_become_fp32(tmp_path: Path) -> None:
    theirs = random_llama(tmp_path, dtype=torch.bfloat16)
    assert_same_logits(theirs, tmp_path)
    assert {p.dtype for p in load_hf(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "layout",
    [
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}, "rope_theta": None},
        {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 5000.0, "head_dim": None, "attention_bias": None, "mlp_bias": None},
    ],
    ids=["transformers 5", "transformers 4", "before head_dim"],
)
def test_all_layouts_of_config_json_are_read(layout: dict[str, Any], tmp_path: Path) -> None:
    theirs = random_llama(tmp_path)
    edit_json(tmp_path / "config.json", **layout)
    assert_same_logits(theirs, tmp_path)


def test_rotary_table_of_old_folders_is_ignored(tmp_path: Path) -> None:
    theirs = random_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_logits(theirs, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"model_type='mistral'; only models of type 'llama'"),
        ({"attention_bias": True}, r"the weights lack layers.0.self_attn.q_proj.bias and 11 more"),
        ({"mlp_bias": True}, r"the weights lack layers.0.mlp.gate_proj.bias and 8 more"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'"),
        ({"head_dim": 16}, r"k_proj.weight has the shape \[16, 32\] where config.json says \[32, 32\]"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 8}}, r"RoPE of the type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, r"RoPE of the type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling.factor=None: must be a number"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, r"rope_scaling.low_freq_factor=4.0 must be below"),
        ({"rope_scaling": "linear"}, r"rope_scaling='linear': expected a JSON object"),
        ({"quantization_config": {"bits": 4}}, r"the weights are quantized"),
        ({"hidden_size": "32"}, r"config.json: hidden_size='32': must be an integer"),
        ({"hidden_size": 34, "head_dim": None}, r"model.hidden_size=34 is not divisible"),
        ({"intermediate_size": 50}, r"_proj.weight has the shape .*52.* where config.json says .*50"),
        ({"num_hidden_layers": 4}, r"the weights lack layers.3"),
        ({"num_hidden_layers": 2}, r"the weights hold model.layers.2"),
        ({"rms_norm_eps": -1}, r"rms_norm_eps=-1: must be a number above 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_unreadable_configuration_is_refused_with_the_reason(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    random_llama(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(UserError, match=message) as error:
        load_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_unreadable_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json does not exist"):
        load_hf(tmp_path / "nowhere")
    random_llama(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: missing or no whole safetensors file"):
        load_hf(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no weights, neither"):
        load_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"code")
    with pytest.raises(UserError, match=r"only pickled weights, which could hold code"):
        load_hf(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../outside.safetensors"}}))
    with pytest.raises(UserError, match=r"names the file '../outside.safetensors' outside of its folder"):
        load_hf(tmp_path)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index.json: malformed JSON"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2**31}, r"num_hidden_layers=2147483648: must be at most 1000"),
        ({"num_hidden_layers": 900}, r"the weights lack layers.3"),
        ({"hidden_size": 2**20, "head_dim": 2**20, "num_attention_heads": 2**20}, r"has the shape"),
        (
            {"vocab_size": 2**24},
            r"has the shape \[97, 32\] where config.json says \[16777216, 32\]",
        ),
        ({"vocab_size": 2**40}, r"vocab_size=1099511627776: must be at most"),
        ({"intermediate_size": -52}, r"intermediate_size=-52: must be at least 1"),
        ({"hidden_size": 32.5}, r"hidden_size=32.5: must be an integer"),
        ({"hidden_size": True}, r"hidden_size=True: must be an integer"),
        ({"hidden_size": {"a": 1}}, r"hidden_size=.*: must be an integer"),
        ({"num_attention_heads": 5, "head_dim": None}, r"not divisible"),
        ({"num_attention_heads": 10**14}, r"num_attention_heads=100000000000000: must be at most"),
        ({"rope_parameters": {"rope_theta": 0}}, r"rope_theta=0: must be above 0"),
        ({"rope_parameters": {"rope_theta": math.inf}}, r"rope_theta=inf: must be a finite number"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, r"rope_theta='1e4': must be a number"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]: expected a JSON object"),
        ({"rope_parameters": {**LLAMA3, "factor": 1e-300}}, r"rope_scaling.factor=1e-300: must be at least"),
        ({"rms_norm_eps": True}, r"rms_norm_eps=True: must be a number above 0"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps=1000.*: must be a number above 0"),
        ({"max_position_embeddings": 2**40}, r"max_position_embeddings=1099511627776: must be at most"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_sizes_are_checked_against_the_files_before_memory_is_allocated(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_llama(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("allocates"))
    with pytest.raises(UserError, match=message) as error:
        load_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_many_positions_take_memory_only_where_they_are_used(tmp_path: Path) -> None:
    theirs = random_llama(tmp_path, max_position_embeddings=2**24)
    assert_same_logits(theirs, tmp_path)
    ours = load_hf(tmp_path)
    table, _ = ours.rotary(5, torch.device("cpu"))
    assert ours._rotary is not None
    assert len(ours._rotary[0]) == 2**16
    longer, _ = ours.rotary(2**16 + 1, torch.device("cpu"))
    assert torch.equal(longer[:5], table)


def test_tensors_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    random_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is I8; quantized weights cannot be read"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, tmp_path / "b.safetensors")
    files = {"lm_head.weight": "b.safetensors", "model.norm.weight": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match=r"b.safetensors: holds lm_head.weight, which the weights hold twice"):
        load_hf(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weight_that_is_not_finite_is_named(value: float, llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=r"hf: layers.1.mlp.up_proj.weight holds infinity or nan"):
        open_model(tmp_path / "hf")


def test_every_end_of_text_stops_as_in_transformers(
    llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """generation_config.json has the last word if it names any."""
    from transformers import AutoModelForCausalLM

    folder, prompt = tmp_path / "hf", [5, 6, 7]
    shutil.copytree(llama_folder, folder)
    (free,) = generate(load_hf(folder), [prompt], 12)
    early, late = free[3], next(token for token in free[5:] if token not in free[:5])
    lengths = []
    for of_config, of_generation in (
        ([late, early], None), (early, [late]), (late, [late, early]), (late, late), ([late], None),
    ):  # fmt: skip
        edit_json(folder / "config.json", eos_token_id=of_config)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if of_generation is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": of_generation}))
        subject = open_model(folder)
        (ours,) = generate(subject.model, [prompt], 12, eos_ids=subject.stop_ids)
        transformer: Any = AutoModelForCausalLM.from_pretrained(folder)
        theirs = transformer.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert ours == theirs[0, 3:].tolist()
        lengths.append(len(ours))
        assert subject.eos_id == (of_config[0] if isinstance(of_config, list) else of_config)
    assert lengths[0] == lengths[2] < lengths[1] == lengths[3] == lengths[4] < 12
    caplog.clear()
    edit_json(folder / "config.json", eos_token_id=["2", -1, True, 10**9], bos_token_id=300)
    subject = open_model(folder)
    assert (subject.bos_id, subject.eos_id, subject.stop_ids) == (None, None, ())
    assert "config.json: bos_token_id=300 names a token that the model does not have; it is ignored" in caplog.text


needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="needs the shared checkpoint")


@needs_stories
def test_stories260k_generates_its_reference_text(tmp_path: Path) -> None:
    write_stories260k(tmp_path)
    model = osp.load_hf(tmp_path)
    tokenizer, bos_id, *_ = load_hf_tokenizer(tmp_path)
    assert bos_id == BOS
    (ids,) = generate(model, [[BOS]], 120)
    assert tokenizer.decode(ids).startswith(STORIES_TEXT)


@needs_stories
def test_logits_of_stories260k_equal_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_stories260k(tmp_path)
    tokenizer, *_ = load_hf_tokenizer(tmp_path)
    ids = tokenizer.encode(STORIES_TEXT, add_special_tokens=False).ids
    assert re.sub(r"\s", "", tokenizer.decode(ids)) == re.sub(r"\s", "", STORIES_TEXT)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_logits(theirs, tmp_path, torch.tensor([[BOS, *ids]]))


@needs_stories
def test_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    random_llama(tmp_path / "small")
    write_stories260k(tmp_path / "stories")
    (tmp_path / "small" / "tokenizer.json").write_bytes((tmp_path / "stories" / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"tokenizer of another vocabulary, its ids go up to 511 and the model has 97"):
        load_hf_tokenizer(tmp_path / "small")
