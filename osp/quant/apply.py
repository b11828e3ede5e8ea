"""Fake quantization of a model: its own forward pass with rounded weights and hooks, undone at the end of a context.

    with quantized(model, spec, calibration=sequences):
        loss = model(inputs, targets).loss

Only the weights that change are copied. Parameters get other tensors inside the context and their own tensors back at
its end, so a model in training is the same bits before and after.
"""

import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from osp.errors import UserError
from osp.model.fold import absorb_projections, fold_norm_gains, untie
from osp.model.sites import SITES as SITE_MAP
from osp.model.sites import hook_site, site_names, split_site
from osp.model.transformer import Transformer
from osp.quant.gptq import quantize_weights_gptq
from osp.quant.grid import Grid, StraightThrough, grouped
from osp.quant.rotate import fuse_rotations, random_rotations, rotate_online
from osp.quant.spec import END_SITES, INNER_SITES, SITES, Part, QuantSpec, active_sites, check_spec

_TOKENS_AT_ONCE = 4096  # of calibration text, for static ranges


@dataclass(frozen=True)
class Quantized:
    """The state of a model inside `quantized`."""

    sites: frozenset[str]  # that are quantized
    basis: Tensor | None = None  # (D, D) fp64 R1: the residual stream is h R1; None: h
    grids: dict[str, Grid] = field(default_factory=dict)  # parameter -> grid of its groups, if the format has one
    bounds: dict[str, Tensor] = field(default_factory=dict)  # parameter or site -> (2,) extremes that give its scale

    def in_own_basis(self, h: Tensor) -> Tensor:
        """Return residual vectors (..., D) of the quantized model in the basis of the unquantized one."""
        return h if self.basis is None else (h.double() @ self.basis.T.to(h.device)).to(h.dtype)


@contextmanager
def quantized(
    model: Transformer,
    spec: QuantSpec,
    *,
    calibration: Tensor | None = None,
    sites: Collection[str] = SITES,
    progress: bool = False,
) -> Iterator[Quantized]:
    """Let `model` compute as if quantized. It runs eagerly inside, because compiled code ignores hooks.

    Args:
        calibration: (N, T) token ids for GPTQ and static ranges, see `draw_calibration`.
        sites: the ones to quantize, of those that `spec` quantizes. Without any the model is not touched.
        progress: whether to show a progress bar for the weights.
    """
    check_spec(spec, model.config)
    if unknown := set(sites) - set(SITES):
        raise UserError(f"unknown site {sorted(unknown)[0]!r}; choose from {', '.join(SITES)}")
    if spec.needs_calibration and calibration is None:
        raise UserError(f"quant: {spec} needs calibration text")
    active = active_sites(spec, model.config) & set(sites)
    if not active:
        yield Quantized(frozenset())
        return
    with ExitStack() as stack:
        _restore_at_exit(model, stack)
        stack.enter_context(_eager())
        with torch.no_grad():
            ends = active & {*END_SITES["w"], *END_SITES["a"]}
            if spec.rotation != "none" or ends:
                absorb_projections(model)
            if len(active & {*END_SITES["w"]}) == 1:
                untie(model)
            if spec.fold_gains and spec.rotation == "none" and active - {*INNER_SITES["kv"]}:
                folded = ("attn_in", "mlp_in", "down_proj_in", *(["head_in"] if ends else []))
                fold_norm_gains(model, folded, for_rotation=False)
            ffn = spec.ffn_hadamard and bool(active & {"down_proj", "down_proj_in"})
            for handle in rotate_online(model, ffn=ffn, qk=spec.qk_hadamard and "k" in active):
                stack.callback(handle.remove)
            basis = _rotate(model, spec)
            state = Quantized(active, basis, bounds=_weight_bounds(model, spec, active))
            _round_weights(model, spec, state, calibration, progress=progress)
            state.bounds.update(_activation_bounds(model, spec, active, calibration))
        _quantize_activations(model, spec, active, stack, state.bounds)
        yield state


def error_and_energy(h_q: Tensor, h: Tensor) -> Tensor:
    """Return (||h_q - h||^2, ||h||^2), fp64; R_L is their quotient over all tokens."""
    h_q, h = h_q.double(), h.double()
    return torch.stack(((h_q - h).square().sum(), h.square().sum()))


@torch.no_grad()
def propagated_error(
    model: Transformer, spec: QuantSpec, sequences: Tensor, *, calibration: Tensor | None = None
) -> list[float]:
    """Return R_L = ||h_q - h||^2 / ||h||^2 on `sequences` (N, T) for each block, then for the output of the last norm.

    h is the residual stream, h_q as the quantized model computes it, and the norms are over all tokens. Both are kept
    on the CPU: 2 * num_hidden_layers * N * T * D values.
    """
    batches = sequences.split(1)
    clean = [_residuals(model, batch) for batch in batches]
    with quantized(model, spec, calibration=calibration) as state:
        noisy = [[state.in_own_basis(h) for h in _residuals(model, batch)] for batch in batches]
    sums = torch.zeros(2, len(model.layers) + 1, dtype=torch.float64)  # (error, energy) of each layer and the norm
    device = model.embed_tokens.weight.device
    for states in zip(noisy, clean, strict=True):
        for hidden in states:  # the last norm has its own gain outside the context only
            hidden.append(model.norm(hidden[-1].to(device)).cpu())
        sums += torch.stack([error_and_energy(h_q, h) for h_q, h in zip(*states, strict=True)], dim=1)
    return (sums[0] / sums[1]).tolist()


def draw_calibration(tokens: Tensor, spec: QuantSpec, *, seq_len: int) -> Tensor:
    """Return (N, seq_len) int64: N = ceil(calibration_tokens / seq_len) random windows of the text `tokens` (M,).

    Of sequences (R, L), the first seq_len tokens of N random ones.
    """
    if seq_len > tokens.shape[-1] or spec.calibration_tokens > tokens.numel():
        raise UserError(
            f"quant.calibration={spec.calibration}: {tokens.numel()} tokens are too few for sequences of {seq_len} and "
            f"quant.calibration_tokens={spec.calibration_tokens}; name a longer text or lower quant.calibration_tokens"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    number = -(-spec.calibration_tokens // seq_len)
    if tokens.ndim == 2:
        return tokens[torch.randint(0, len(tokens), (number,), generator=generator), :seq_len].long()
    starts = torch.randint(0, len(tokens) - seq_len + 1, (number, 1), generator=generator)
    return tokens[starts + torch.arange(seq_len)].long()


def _eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled blocks run eagerly; compiled code ignores hooks."""
    # a compiled model has loaded dynamo already; loading it takes seconds
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _restore_at_exit(model: Transformer, stack: ExitStack) -> None:
    """Put back at exit what folding and rounding replace: parameters, their tensors, projections and the config."""
    for name in ("embed_proj", "head_proj", "config"):
        stack.callback(setattr, model, name, getattr(model, name))
    stack.callback(setattr, model.lm_head, "weight", model.lm_head.weight)  # a tied head may get its own
    for parameter in model.parameters():
        stack.callback(setattr, parameter, "data", parameter.data)


def _rotate(model: Transformer, spec: QuantSpec) -> Tensor | None:
    """Fuse the rotations of `spec` into the weights; return R1."""
    if spec.rotation == "none":
        return None
    fold_norm_gains(model)
    rotations = random_rotations(model, seed=spec.seed)
    fuse_rotations(model, rotations)
    return rotations[0].to(model.embed_tokens.weight.device)


def _weight_bounds(model: Transformer, spec: QuantSpec, active: frozenset[str]) -> dict[str, Tensor]:
    """Return parameter -> (2,) extremes of the matrices that read the same input, for a format with a tensor scale.

    Engines fuse these matrices (q, k and v; gate and up) into one, which has one tensor scale.
    """
    bounds: dict[str, Tensor] = {}
    if spec.w_bits == 16 or not spec.number_format("w").tensor_scale:
        return bounds
    for index, layer in enumerate(model.layers):
        weights = dict(layer.named_parameters())
        for site in SITE_MAP.values():
            names = [f"{path}.weight" for path in site.readers if site.in_block and path.split(".")[-1] in active]
            fused = {f"layers.{index}.{name}": weights[name].flatten() for name in names if name in weights}
            if fused:
                bounds |= dict.fromkeys(fused, torch.stack(torch.cat(list(fused.values())).float().aminmax()))
    return bounds


def _round_weights(
    model: Transformer, spec: QuantSpec, state: Quantized, calibration: Tensor | None, *, progress: bool
) -> None:
    """Round the weights at the sites of `state`, and enter their grids in it."""

    def grid_of(name: str, weight: Tensor) -> Grid:
        number_format = spec.weight_format(name.split(".")[-2])
        groups = grouped(weight, group_size=number_format.block_size or spec.w_group_size)
        grid = number_format.grid(groups, clip_search=spec.w_clip, bounds=state.bounds.get(name))
        state.grids[name] = grid
        return grid

    by_gptq = state.sites & set(INNER_SITES["w"]) if spec.method == "gptq" else frozenset()
    if by_gptq:
        assert calibration is not None
        quantize_weights_gptq(model, spec, calibration, sites=by_gptq, grid_of=grid_of, progress=progress)
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and name.split(".")[-2] in state.sites - by_gptq
    }
    for name in tqdm(weights, desc="rounding weights", unit="matrix", leave=False, disable=not progress):
        weight, number_format = weights[name], spec.weight_format(name.split(".")[-2])
        rounds = grid_of(name, weight.data).round if number_format.has_grid else number_format.round
        weight.data = rounds(weight.data, group_size=number_format.block_size or spec.w_group_size)


def _activation_bounds(
    model: Transformer, spec: QuantSpec, active: frozenset[str], calibration: Tensor | None
) -> dict[str, Tensor]:
    """Return site -> (2,) extremes of its activations on `calibration` (N, T), for sites with a static scale.

    The weights are rounded by now, the activations are not.
    """
    bounds: dict[str, Tensor] = {}
    static = [name for name in site_names(len(model.layers), active) if spec.is_static(_part(name))]
    if not static:
        return bounds

    def observe(name: str, x: Tensor) -> None:
        seen = torch.stack(x.float().aminmax())
        low, high = bounds.get(name, torch.zeros_like(seen))
        bounds[name] = torch.stack((torch.minimum(low, seen[0]), torch.maximum(high, seen[1])))

    assert calibration is not None
    with ExitStack() as stack:
        for name in static:
            stack.callback(hook_site(model, name, functools.partial(observe, name)).remove)
        for sequences in calibration.split(max(1, _TOKENS_AT_ONCE // calibration.shape[1])):
            ids = sequences.to(model.embed_tokens.weight.device)
            model(ids, ids)  # the loss, and so the input of the head
    return bounds


def _part(site: str) -> Part:
    """Return what a site of activations belongs to."""
    return "kv" if split_site(site)[1] in INNER_SITES["kv"] else "a"


def _quantize_activations(
    model: Transformer, spec: QuantSpec, active: frozenset[str], stack: ExitStack, bounds: Mapping[str, Tensor]
) -> None:
    """Quantize what passes the active sites of activations and cache, until `stack` ends."""
    for name in site_names(len(model.layers), active):
        quantize = spec.activation_rounding(split_site(name)[1], model.config)
        if name in bounds:
            quantize = functools.partial(quantize, bounds=bounds[name])
        stack.callback(hook_site(model, name, functools.partial(StraightThrough.apply, quantize)).remove)


def _residuals(model: Transformer, sequences: Tensor) -> list[Tensor]:
    """Return the residual stream (B, T, D) after each block, on the CPU."""
    seen: list[Tensor] = []
    with _eager(), ExitStack() as stack:
        for name in site_names(len(model.layers), ("block_out",)):
            stack.callback(hook_site(model, name, lambda x: seen.append(x.cpu())).remove)
        model(sequences.to(model.embed_tokens.weight.device))
    return seen
