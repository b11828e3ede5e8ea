"""One map of sites: its modules exist, its hooks work, and every list of sites elsewhere equals it."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from osp.config import Site
from osp.model.norms import Norm
from osp.model.sites import SITES, SUBLAYER_WRITERS, hook_site, site_names, split_site
from osp.model.transformer import Linear, Transformer, build_model
from osp.model_config import AttentionConfig, ModelConfig, NormConfig
from osp.quant import spec
from osp.run import metrics

EVERYTHING = ModelConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    qk_norm=True,
    ffn_norm=True,
    attention=AttentionConfig(gate=True),
    norm=NormConfig(name="rmsnorm", placement="peri"),
)
READERS = tuple(reader for site in SITES.values() if site.in_block for reader in site.readers)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(EVERYTHING, seed=0).eval()


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits


def last_names(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(path.split(".")[-1] for path in paths)


def test_configuration_names_the_sites_of_the_map() -> None:
    assert get_args(Site) == tuple(name for name in SITES if name != "head_in")


def test_documentation_lists_the_sites_of_the_map() -> None:
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
    (paragraph,) = re.findall(r"^Sites: (.*?)\n\n", text, flags=re.DOTALL | re.MULTILINE)
    listed = re.findall(r"`(\S+?)`", paragraph.partition(". ")[0])
    assert listed == [f"<layer>/{site}" if SITES[site].in_block else site for site in get_args(Site)]


def test_quantizer_and_panels_name_the_sites_of_the_map() -> None:
    assert set(spec.SITES) <= {*SITES, *last_names(READERS), "embed_tokens", "lm_head"}
    assert set(spec.INNER_SITES["w"]) == set(last_names(READERS))
    assert tuple(name for name, site in SITES.items() if site.in_block and site.readers) == spec.INNER_SITES["a"]
    assert set(metrics.SITE_TITLES) < set(SITES)


def test_every_module_of_the_map_exists(model: Transformer) -> None:
    for site in SITES.values():
        root = model.layers[1] if site.in_block else model
        root.get_submodule(site.module)
        assert all(isinstance(root.get_submodule(path), Linear) for path in site.readers)
        assert all(isinstance(root.get_submodule(path), Linear | Norm) for path in site.writers)
    for matrix, norm in SUBLAYER_WRITERS:
        assert isinstance(model.layers[0].get_submodule(matrix), Linear)
        assert isinstance(model.layers[0].get_submodule(norm), Norm)


def test_readers_cover_all_matrices_of_a_block(model: Transformer) -> None:
    matrices = [name for name, module in model.layers[0].named_modules() if isinstance(module, Linear)]
    assert sorted(matrices) == sorted(READERS)


def test_site_names_follow_the_forward_pass() -> None:
    names = site_names(2, ("final_norm_out", "q", "attn_in", "embed_out", "head_in"))
    in_blocks = ["layer_00/attn_in", "layer_00/q", "layer_01/attn_in", "layer_01/q"]
    assert names == ["embed_out", *in_blocks, "final_norm_out", "head_in"]
    assert [split_site(name) for name in names[:2]] == [(None, "embed_out"), (0, "attn_in")]


def test_sites_are_observed_in_the_order_of_the_forward_pass(model: Transformer) -> None:
    seen: list[str] = []
    names = site_names(2, SITES)
    handles = [hook_site(model, name, lambda _, name=name: seen.append(name)) for name in names]
    logits(model)
    for handle in handles:
        handle.remove()
    assert sorted(seen) == sorted(names)
    # q, k and v enter attention together, and hooks of a module run in the order of their registration
    assert seen == names


@pytest.mark.parametrize("name", site_names(2, SITES))
def test_replaced_site_changes_the_output_until_it_is_removed(name: str, model: Transformer) -> None:
    before = logits(model)
    handle = hook_site(model, name, lambda x: x * torch.linspace(0.5, 1.5, x.shape[-1]))
    changed = logits(model)
    handle.remove()
    assert (changed - before).abs().max() > 1e-4
    assert torch.equal(logits(model), before)
