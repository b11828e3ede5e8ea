"""Fake quantization of a model: its own forward pass with rounded weights and hooks, undone at the end of a context.

    with quantized(model, spec, calibration=rows):
        loss = model(inputs, targets).loss

Only the weights that change are copied. Parameters get other tensors inside the context and their own tensors back at
its end, so a model in training is the same bits before and after.
"""

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from osp.errors import UserError
from osp.model.fold import absorb_projections, bake_recentring, fold_norm_gains
from osp.model.sites import layer_name, observe_site, replace_site, site_names, split_site
from osp.model.transformer import Block, Embedding, Linear, Transformer
from osp.quant.gptq import quantize_weights_gptq
from osp.quant.rotate import fuse_rotations, random_rotations, rotate_ffn_online, rotate_qk_online
from osp.quant.spec import (
    ACTIVATION_SITES,
    CACHE_SITES,
    END_ACTIVATION_SITES,
    END_WEIGHT_SITES,
    GATE_SITES,
    SITES,
    WEIGHT_SITES,
    QuantSpec,
    active_sites,
    check_spec,
)
from osp.quant.spinquant import StraightThrough, learn_rotations


@dataclass(frozen=True)
class Quantized:
    """The state of a model inside `quantized`."""

    sites: frozenset[str]  # that are quantized
    basis: Tensor | None = None  # (D, D) fp64 R1: the residual stream is h R1; None: h

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
        calibration: (N, T) token ids for GPTQ and SpinQuant, see `draw_calibration`.
        sites: Of the sites that `spec` quantizes, the ones to quantize. Without any, as at 16-16-16, the model is not
            touched.
        progress: Show a progress bar for the weights.
    """
    check_spec(spec, model.config)
    if unknown := set(sites) - set(SITES):
        raise UserError(f"unknown site {sorted(unknown)[0]!r}; choose from {', '.join(SITES)}")
    if spec.needs_calibration and calibration is None:
        raise UserError(f"quant.method={spec.method} with quant.rotation={spec.rotation} needs calibration text")
    active = active_sites(spec, model.config) & set(sites)
    if not active:
        yield Quantized(frozenset())
        return
    with ExitStack() as stack:
        _restore_at_exit(model, stack)
        stack.enter_context(_eager())
        bake_recentring(model)  # round the weights as the forward pass uses them
        with torch.no_grad():
            basis = _rotate(model, spec, calibration, active, stack, progress=progress)
            of_blocks, of_ends = active & {*WEIGHT_SITES, *GATE_SITES}, active & set(END_WEIGHT_SITES)
            if spec.method == "gptq" and of_blocks:
                assert calibration is not None
                quantize_weights_gptq(model, spec, calibration, sites=of_blocks, progress=progress)
            else:
                _quantize_weights(model, spec, of_blocks, progress=progress)
            _quantize_weights(model, spec, of_ends)
        _quantize_activations(model, spec, active, stack)
        yield Quantized(active, basis)


class PropagatedError(NamedTuple):
    """R_L = ||h_q - h||^2 / ||h||^2, both norms over all tokens, of h as the quantized model computes it."""

    layers: list[float]  # of the residual stream after each block
    last: float  # of the output of the last norm


@torch.no_grad()
def propagated_error(
    model: Transformer,
    spec: QuantSpec,
    rows: Tensor,
    *,
    calibration: Tensor | None = None,
    sites: Collection[str] = SITES,
) -> PropagatedError:
    """Return the relative error of the hidden states of `model` on `rows` (N, T) under quantization.

    The residual streams with and without quantization are kept on the CPU: 2 * num_hidden_layers * N * T * D values.
    """
    batches = rows.split(1)
    clean = [_residuals(model, batch) for batch in batches]
    with quantized(model, spec, calibration=calibration, sites=sites) as state:
        noisy = [[state.in_own_basis(h) for h in _residuals(model, batch)] for batch in batches]
    sums = torch.zeros(2, len(model.layers) + 1, dtype=torch.float64)  # (error, energy) of each layer and the norm
    device = model.embed_tokens.weight.device
    for states in zip(noisy, clean, strict=True):
        for hidden in states:  # the last norm has its own gain outside the context only
            hidden.append(model.norm(hidden[-1].to(device)).cpu())
        sums += torch.stack([_error_and_energy(h_q, h) for h_q, h in zip(*states, strict=True)], dim=1)
    *layers, last = (sums[0] / sums[1]).tolist()
    return PropagatedError(layers, last)


def draw_calibration(tokens: Tensor, spec: QuantSpec, *, seq_len: int) -> Tensor:
    """Return (N, seq_len) int64: N = ceil(calibration_tokens / seq_len) random windows of the text `tokens` (M,)."""
    if seq_len > len(tokens) or spec.calibration_tokens > len(tokens):
        raise UserError(
            f"quant.calibration={spec.calibration}: {len(tokens)} tokens are too few for sequences of {seq_len} and "
            f"quant.calibration_tokens={spec.calibration_tokens}; name a longer text or lower quant.calibration_tokens"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    number = -(-spec.calibration_tokens // seq_len)
    starts = torch.randint(0, len(tokens) - seq_len + 1, (number, 1), generator=generator)
    return tokens[starts + torch.arange(seq_len)].long()


def _eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled blocks run eagerly; compiled code ignores hooks."""
    # a compiled model has loaded dynamo already; loading it takes seconds
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _restore_at_exit(model: Transformer, stack: ExitStack) -> None:
    """Put back at exit what folding and rounding replace: parameter tensors, projections and the config."""
    for name in ("embed_proj", "head_proj", "config"):
        stack.callback(setattr, model, name, getattr(model, name))
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            stack.callback(setattr, module, "zero_mean", module.zero_mean)
    for parameter in model.parameters():
        stack.callback(setattr, parameter, "data", parameter.data)


def _rotate(
    model: Transformer,
    spec: QuantSpec,
    calibration: Tensor | None,
    active: frozenset[str],
    stack: ExitStack,
    *,
    progress: bool,
) -> Tensor | None:
    """Apply the rotations of `spec`, the online ones until `stack` ends; return R1."""
    if spec.rotation != "none" or active & {*END_WEIGHT_SITES, *END_ACTIVATION_SITES}:
        absorb_projections(model)
    for block in model.layers:
        assert isinstance(block, Block)
        if spec.ffn_hadamard and active & {"down_proj", "down_proj_in"}:
            stack.callback(rotate_ffn_online(block.mlp.down_proj).remove)
        if spec.qk_hadamard and "k" in active:
            stack.callback(rotate_qk_online(block.self_attn).remove)
    if spec.rotation == "none":
        return None
    fold_norm_gains(model)
    residual, values = random_rotations(model, seed=spec.seed)
    if spec.rotation == "spinquant":
        assert calibration is not None
        with ExitStack() as learning:
            _quantize_activations(model, spec, active, learning)
            residual, values = learn_rotations(
                model, spec, (residual, values), calibration, sites=active, progress=progress
            )
    fuse_rotations(model, residual, values)
    return residual.to(model.embed_tokens.weight.device)


def _quantize_weights(model: Transformer, spec: QuantSpec, sites: Collection[str], *, progress: bool = False) -> None:
    modules = [module for name, module in model.named_modules() if name.split(".")[-1] in sites]
    for module in tqdm(modules, desc="rounding weights", unit="matrix", leave=False, disable=not progress):
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        weight.data = spec.number_format("w").round(weight.data, group_size=spec.w_group_size, clip_search=spec.w_clip)


def _quantize_activations(model: Transformer, spec: QuantSpec, active: frozenset[str], stack: ExitStack) -> None:
    """Quantize what passes the active sites of activations and cache, until `stack` ends."""
    group_sizes: dict[str, int | None] = dict.fromkeys((*ACTIVATION_SITES, *END_ACTIVATION_SITES), spec.a_group_size)
    if spec.o_proj_by_head and "a" in spec.parts and spec.number_format("a").block_size is None:
        group_sizes["o_proj_in"] = model.config.head_size
    group_sizes |= dict.fromkeys(CACHE_SITES, spec.kv_group_size)
    for name in site_names(len(model.layers), active & group_sizes.keys()):
        _, kind = split_site(name)
        number_format = spec.number_format("kv" if kind in CACHE_SITES else "a")
        quantize = functools.partial(number_format.round, group_size=group_sizes[kind])
        stack.callback(replace_site(model, name, _with_gradient(quantize)).remove)


def _with_gradient(quantize: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `quantize` with the straight-through gradient."""
    return lambda x: StraightThrough.apply(x, quantize(x.detach()))


def _residuals(model: Transformer, rows: Tensor) -> list[Tensor]:
    """Return the residual stream (B, T, D) after each block, on the CPU."""
    seen: list[Tensor] = []
    names = [f"{layer_name(layer)}/block_out" for layer in range(len(model.layers))]
    handles = [observe_site(model, name, lambda x: seen.append(x.cpu())) for name in names]
    try:
        with _eager():
            model(rows.to(model.embed_tokens.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _error_and_energy(h_q: Tensor, h: Tensor) -> Tensor:
    """Return (||h_q - h||^2, ||h||^2), fp64."""
    h_q, h = h_q.double(), h.double()
    return torch.stack(((h_q - h).square().sum(), h.square().sum()))
