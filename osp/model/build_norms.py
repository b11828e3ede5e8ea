"""Build the norms of a model from its configuration. The options of a norm are the keywords of its class."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, cast

from osp.errors import UserError
from osp.model.norms import NORMS, BHyTStar, Norm
from osp.model_config import ModelConfig, NormConfig

# Keywords for the position of a norm. The model sets them; they are not options.
PLACE = ("before_attention", "after_attention")


def build_norm(name: str, hidden_size: int, **options: Any) -> Norm:
    """Return the norm `name`; `options` are keywords of its class. Raises `UserError` for an unknown name or option."""
    if name not in NORMS:
        raise UserError(f"unknown norm {name!r}; choose from {sorted(NORMS)}")
    keywords = _keywords(NORMS[name])
    for key in sorted(options.keys() - {*PLACE, *keywords}):
        valid = sorted(keywords - {*PLACE})
        raise UserError(f"norm.{key}={options[key]!r}: {name} has no such option; it has {valid}")
    build = cast(Callable[..., Norm], NORMS[name])  # each class has its own keywords
    return build(hidden_size, **{key: value for key, value in options.items() if key in keywords})


def block_norm(config: ModelConfig, *, layer: int = 1, **place: bool) -> Norm:
    """Return a norm of block `layer`, counted from 1. place: `before_attention` or `after_attention`, if it is."""
    norm = build_norm(config.norm.name, config.hidden_size, **_given(config.norm), **place)
    if config.norm.lns:
        norm.output_scale = layer**-0.5
    return norm


def final_norm(config: ModelConfig) -> Norm:
    """Return the norm before the head: `norm.final`, or the default of the class of `norm.name`."""
    name = final_norm_name(config.norm)
    if name not in NORMS:
        raise UserError(f"norm.final={name!r}; choose from {sorted(NORMS)}")
    keywords = _keywords(NORMS[name])
    given = {key: value for key, value in _given(config.norm).items() if key in keywords}
    return build_norm(name, config.hidden_size, **given)


def final_norm_name(config: NormConfig) -> str:
    """Return the key of the norm before the head."""
    return config.final or NORMS[config.name].final or config.name


def inner_norm(config: ModelConfig, size: int, **options: float) -> Norm:
    """Return the norm of `size` channels inside a sublayer (`qk_norm`, `ffn_norm`), with the eps of the block."""
    given = {} if config.norm.eps is None else {"eps": config.norm.eps}
    return build_norm(NORMS[config.norm.name].inner, size, **given, **options)


def bound_warning(config: ModelConfig) -> str | None:
    """Return a warning if lambda / kappa < 1 / sqrt(num_hidden_layers), BHyT's bound, is violated at the start.

    Within the bound the output variance of every layer is below that with LayerNorm scaling (arXiv 2601.09719).
    """
    norms = [block_norm(config, after_attention=after) for after in (False, True)]
    bound = 1 / math.sqrt(config.num_hidden_layers)
    ratio = max((norm.initial["lam"] / norm.kappa for norm in norms if isinstance(norm, BHyTStar)), default=0.0)
    if ratio < bound:
        return None
    return (
        f"norm.lam / norm.kappa = {ratio:.3g} is not below 1 / sqrt(num_hidden_layers) = {bound:.3g}: "
        "BHyT's variance bound does not hold at this depth"
    )


def _keywords(norm: type) -> set[str]:
    """Return the keywords of a norm. A class that takes `**options` has the keywords of its base class too."""
    parameters = inspect.signature(norm).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return keywords | _keywords(norm.__bases__[0]) if takes_more else keywords


def _given(config: NormConfig) -> dict[str, Any]:
    """Return the options of the norm that the user set."""
    of_model = ("name", "final", "placement", "lns", "embed_scale")
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in of_model and v is not None}
