"""A model under fake quantization: its own forward, with quantized weights and hooks, and afterwards as it was.

    with quantized(model, spec, calibration=rows):
        loss = model(inputs, targets)

Nothing is copied but the weights that change: parameters get other tensors for the time of the context and their own
ones back at its end, so that a model in training is the same bits before and after.
"""

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
from osp.model.transformer import Block, Embedding, Linear, Transformer
from osp.quant.gptq import quantize_weights_gptq
from osp.quant.grid import fake_quantize_activation, fake_quantize_weight
from osp.quant.rotate import fuse_rotations, random_rotations, rotate_ffn_online, rotate_qk_online
from osp.quant.spec import (
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

Quantize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quantized:
    """What `quantized` did to a model."""

    spec: QuantSpec
    sites: frozenset[str]  # those that are quantized
    basis: Tensor | None = None  # (D, D) fp64 R1: the residual stream is h R1; None: h

    def in_own_basis(self, h: Tensor) -> Tensor:
        """Residual vectors (..., D) of the quantized model, turned back to where the unquantized one has them."""
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
    """Let `model` compute as if quantized. It runs eagerly inside, as hooks and compiled code do not go together.

    calibration: (N, T) token ids for GPTQ and SpinQuant (`draw_calibration`). sites: quantize at these alone, of those
    that `spec` quantizes. If none is left, as at 16-16-16, the model is not touched at all. progress: show how far the
    weights are.
    """
    check_spec(spec, model.config)
    if unknown := set(sites) - set(SITES):
        raise UserError(f"unknown site {sorted(unknown)[0]!r}; choose from {', '.join(SITES)}")
    if spec.needs_calibration and calibration is None:
        raise UserError(f"quant.method={spec.method} with quant.rotation={spec.rotation} needs calibration text")
    active = active_sites(spec, model.config) & set(sites)
    if not active:
        yield Quantized(spec, frozenset())
        return
    with ExitStack() as stack:
        _restore_at_exit(model, stack)
        stack.enter_context(_eager())
        bake_recentring(model)  # what is rounded are the weights as they act
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
        yield Quantized(spec, active, basis)


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
    rows_per_batch: int = 1,
) -> PropagatedError:
    """How far the hidden states of `model` on `rows` (N, T) move under quantization; see `PropagatedError`.

    The residual streams of the unquantized model wait on the CPU: num_hidden_layers * N * T * D values.
    """
    batches = rows.split(rows_per_batch)
    clean = [_residuals(model, batch) for batch in batches]
    sums = torch.zeros(2, len(model.layers) + 1, dtype=torch.float64)  # (error, energy) of each
    norm = model.norm
    for_last: list[Tensor] = []
    with quantized(model, spec, calibration=calibration, sites=sites) as state:
        for batch, before in zip(batches, clean, strict=True):
            after = [state.in_own_basis(h) for h in _residuals(model, batch)]
            sums[:, :-1] += torch.stack([_error_and_energy(q, h) for q, h in zip(after, before, strict=True)], dim=1)
            for_last.append(after[-1])
    # outside, where the norm has its gain back
    device = model.embed_tokens.weight.device
    for after_last, before in zip(for_last, clean, strict=True):
        sums[:, -1] += _error_and_energy(norm(after_last.to(device)), norm(before[-1].to(device)))
    *layers, last = (sums[0] / sums[1]).tolist()
    return PropagatedError(layers, last)


def draw_calibration(tokens: Tensor, spec: QuantSpec, *, seq_len: int) -> Tensor:
    """(N, seq_len) int64: N = ceil(calibration_tokens / seq_len) windows of the text `tokens` (M,), drawn at random."""
    if seq_len > len(tokens) or spec.calibration_tokens > len(tokens):
        raise UserError(
            f"quant.calibration={spec.calibration}: {len(tokens)} tokens are too few for rows of {seq_len} and "
            f"quant.calibration_tokens={spec.calibration_tokens}; name a longer text or lower quant.calibration_tokens"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    number = -(-spec.calibration_tokens // seq_len)
    starts = torch.randint(0, len(tokens) - seq_len + 1, (number, 1), generator=generator)
    return tokens[starts + torch.arange(seq_len)].long()


def _eager() -> AbstractContextManager[Any]:
    """Compiled blocks run eagerly inside, or hooks would be passed by in silence."""
    # what compiles has loaded dynamo; to load it here for nothing takes seconds
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


# --- preparation --------------------------------------------------------------------------------------------------


def _restore_at_exit(model: Transformer, stack: ExitStack) -> None:
    """All that a conversion replaces: the tensors of parameters, the projections and what tells of them."""
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
    """Apply the rotations of `spec`, those online until `stack` ends; returns R1."""
    if spec.rotation != "none" or active & {*END_WEIGHT_SITES, *END_ACTIVATION_SITES}:
        absorb_projections(model)
    for block in _blocks(model):
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
        weight.data = fake_quantize_weight(
            weight.data,
            bits=spec.w_bits,
            group_size=spec.w_group_size,
            symmetric=spec.w_symmetric,
            clip_search=spec.w_clip,
        )


def _quantize_activations(model: Transformer, spec: QuantSpec, active: frozenset[str], stack: ExitStack) -> None:
    """Hooks that quantize what the active sites of activations and cache see, until `stack` ends."""

    def activation(group_size: int | None) -> Quantize:
        return _through(
            lambda x: fake_quantize_activation(x, bits=spec.a_bits, group_size=group_size, symmetric=spec.a_symmetric)
        )

    def cache(site: str) -> Quantize:
        if site not in active:
            return lambda x: x
        return _through(
            lambda x: fake_quantize_activation(
                x, bits=spec.kv_bits, group_size=spec.kv_group_size, symmetric=spec.kv_symmetric
            )
        )

    of_token = activation(spec.a_group_size)
    of_head = activation(model.config.head_size) if spec.o_proj_by_head else of_token
    inputs: list[tuple[str, nn.Module, Quantize]] = [("head_in", model.lm_head, of_token)]
    for block in _blocks(model):
        inputs += [
            ("attn_in", block.self_attn, of_token),
            ("o_proj_in", block.self_attn.o_proj, of_head),
            ("mlp_in", block.mlp, of_token),
            ("down_proj_in", block.mlp.down_proj, of_token),
        ]
        if active & {"k", "v"}:
            handle = block.self_attn.attend.register_forward_pre_hook(_on_cache(cache("k"), cache("v")))
            stack.callback(handle.remove)
    for site, module, quantize in inputs:
        if site in active:
            stack.callback(module.register_forward_pre_hook(_on_input(quantize)).remove)


def _through(quantize: Quantize) -> Quantize:
    """`quantize` with a gradient: straight through."""
    return lambda x: StraightThrough.apply(x, quantize(x.detach()))


def _on_input(quantize: Quantize) -> Callable[..., tuple[Any, ...]]:
    return lambda _, arguments: (quantize(arguments[0]), *arguments[1:])


def _on_cache(quantize_k: Quantize, quantize_v: Quantize) -> Callable[..., tuple[Any, ...]]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        q, k, v, mask = arguments
        return q, quantize_k(k), quantize_v(v), mask

    return hook


def _blocks(model: Transformer) -> Iterator[Block]:
    for layer in model.layers:
        assert isinstance(layer, Block)
        yield layer


# --- propagated error ---------------------------------------------------------------------------------------------


def _residuals(model: Transformer, rows: Tensor) -> list[Tensor]:
    """The residual stream (B, T, D) after each block, on the CPU."""
    seen: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda *call: seen.append(call[2].cpu())) for layer in model.layers]
    try:
        with _eager():
            model(rows.to(model.embed_tokens.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _error_and_energy(h_q: Tensor, h: Tensor) -> Tensor:
    """(||h_q - h||^2, ||h||^2), fp64."""
    h_q, h = h_q.double(), h.double()
    return torch.stack(((h_q - h).square().sum(), h.square().sum())).cpu()
