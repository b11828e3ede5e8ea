"""The map of sites: every place in a `Transformer` where activations are measured or quantized.

`SITES` is the only definition. The probe, the forensics, the quantizer and the certificates of conversions loop over
it. A site of a block is addressed as `layer_03/down_proj_in`, a site outside the blocks as `embed_out`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from osp.model.transformer import Transformer


@dataclass(frozen=True)
class SiteDefinition:
    """Where a site is, its writers and its readers. Paths of modules are relative to the block, else to the model."""

    module: str  # path of the module that the activation enters or leaves; "" is the block itself
    argument: int | None  # positional argument of the module's forward; None: its output
    in_block: bool = True
    writers: tuple[str, ...] = ()  # modules whose weights write a channel of the site directly; not all models have all
    readers: tuple[str, ...] = ()  # matrices that multiply the site; not all models have all
    sublayers: int | None = None  # of the stream and its norms: sublayers of this block already in it (0, 1 or 2)


SITES = {  # In the order of the forward pass. SiteDefinition(module, argument, ...)
    "embed_out": SiteDefinition("layers.0", 0, in_block=False, sublayers=0),
    "attn_in": SiteDefinition(
        "self_attn",
        0,
        writers=("input_layernorm",),
        readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.attention_gate"),
        sublayers=0,
    ),
    "q": SiteDefinition("self_attn.attend", 0, writers=("self_attn.q_proj", "self_attn.q_norm")),  # after RoPE
    "k": SiteDefinition("self_attn.attend", 1, writers=("self_attn.k_proj", "self_attn.k_norm")),  # after RoPE
    "v": SiteDefinition("self_attn.attend", 2, writers=("self_attn.v_proj",)),
    "o_proj_in": SiteDefinition(
        "self_attn.o_proj", 0, writers=("self_attn.v_proj", "self_attn.attention_gate"), readers=("self_attn.o_proj",)
    ),
    "mlp_in": SiteDefinition(
        "mlp", 0, writers=("post_attention_layernorm",), readers=("mlp.gate_proj", "mlp.up_proj"), sublayers=1
    ),
    "down_proj_in": SiteDefinition(
        "mlp.down_proj", 0, writers=("mlp.gate_proj", "mlp.up_proj", "mlp.ffn_norm"), readers=("mlp.down_proj",)
    ),
    "block_out": SiteDefinition("", None, sublayers=2),
    "final_norm_out": SiteDefinition("norm", None, in_block=False, writers=("norm",), sublayers=0),
    # Quantized but not measured: `final_norm_out`, or with `embed_proj` the output of `head_proj`.
    "head_in": SiteDefinition("lm_head", 0, in_block=False, readers=("lm_head",)),
}
# What adds to the residual stream in each block: the last matrix of a sublayer, and the norm after it with `peri`.
SUBLAYER_WRITERS = (("self_attn.o_proj", "attention_output_layernorm"), ("mlp.down_proj", "mlp_output_layernorm"))


def layer_name(layer: int) -> str:
    """Return the name of a block in site and metric names, `layer_03` for layer 3 counted from 0."""
    return f"layer_{layer:02d}"


def split_site(name: str) -> tuple[int | None, str]:
    """Return (layer counted from 0, key of `SITES`) of a site; the layer is None outside the blocks."""
    layer, _, kind = name.rpartition("/")
    return (int(layer.removeprefix("layer_")) if layer else None), kind


def site_names(num_layers: int, kinds: Collection[str]) -> list[str]:
    """Return the full names of the sites `kinds` (keys of `SITES`) in the order of the forward pass."""
    in_block = [kind for kind, site in SITES.items() if site.in_block and kind in kinds]
    before = [kind for kind in ("embed_out",) if kind in kinds]
    after = [kind for kind in ("final_norm_out", "head_in") if kind in kinds]
    return [*before, *(f"{layer_name(layer)}/{kind}" for layer in range(num_layers) for kind in in_block), *after]


def hook_site(model: Transformer, name: str, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call function(x) with the activation x at `name` in every forward pass; a result other than None replaces x.

    Compiled blocks ignore hooks that are added later: run the model under `torch.compiler.set_stance("force_eager")`.
    """
    layer, kind = split_site(name)
    site = SITES[kind]
    module = (model if layer is None else model.layers[layer]).get_submodule(site.module)

    def hook_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        i = site.argument or 0
        new = function(inputs[i])
        return None if new is None else (*inputs[:i], new, *inputs[i + 1 :])

    def hook_output(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        x, *others = output if isinstance(output, tuple) else (output,)  # a block returns its penalty too
        new = function(x)
        return (new, *others) if new is not None and others else new

    if site.argument is None:
        return module.register_forward_hook(hook_output)
    return module.register_forward_pre_hook(hook_input)
