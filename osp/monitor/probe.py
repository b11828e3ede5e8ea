"""The probe: forward passes of the validation split through the model as it is, observed by hooks.

A probe runs eagerly, without gradients and apart from the training step, because hooks that are added to a compiled
block never run, and hooks run twice under activation checkpointing. It draws no random numbers and restores weights,
gradients and modes, so training is bit-identical with and without probes. Under ZeRO-3 the weights of a module are
whole while its own hooks run.

Each rank reads one sequence at a time: the arithmetic of a sequence, and so the result, does not depend on the number
of ranks. Only the `Sample` of each site is kept.

Fake W4A4 (R_L) runs in lockstep: the sequence is doubled, every matrix product of a block quantizes its weight and
input for the second copy, and the copies are compared at the end of each block. No activations wait for a second pass.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from osp.config import MonitorConfig, Site, Statistic
from osp.model.attention import document_mask
from osp.model.norms import BHyT, Carry, Norm
from osp.model.sites import layer_name, observe_site, site_names
from osp.model.transformer import Block, Linear, Transformer
from osp.monitor import statistics as st
from osp.monitor.statistics import Sample
from osp.quant.formats import AsymmetricInteger, SymmetricInteger

# Of R_L
WEIGHT_FORMAT, ACTIVATION_FORMAT = SymmetricInteger(4), AsymmetricInteger(4)
VAR_ERROR = "bhyt/var_error"


@dataclass(frozen=True)
class ProbeText:
    """The text of a probe, R sequences of T tokens: all of them on every rank."""

    tokens: Tensor  # (R, T) int64, on the CPU
    document_ids: Tensor | None = None  # (R, T)


@dataclass(frozen=True)
class SiteReading:
    """The measurements at one site. The outlier is the value with the largest |x|."""

    statistics: dict[str, float]  # see osp.monitor.statistics.compute_statistics
    top_channel: int  # the channel with the most energy
    value: float  # of the outlier
    channel: int
    row: int  # its sequence, counted from 0
    position: int  # in the sequence, counted from 0
    token: int  # id of the token at that position
    channels: list[tuple[int, float]]  # the 8 channels with the largest |x|, each with that value
    octaves: tuple[int, list[int]]  # histogram of |x|, see osp.monitor.statistics.count_octaves


@dataclass(frozen=True)
class Reading:
    """The result of a probe: metrics by the name under which they are logged, and sites by name."""

    metrics: dict[str, float]
    sites: dict[str, SiteReading]


def probe(model: Transformer, rows: ProbeText, config: MonitorConfig) -> Reading:
    """Measure `model` on `rows`. Collective: the ranks share the sequences, and all return the same `Reading`."""
    recorder = _Recorder(model, config)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    num_rows = len(rows.tokens)
    with _undisturbed(model):
        for first in range(0, num_rows, world_size):
            # under ZeRO-3 every rank must take part: a rank without a sequence repeats the last one, uncounted
            row = min(first + rank, num_rows - 1)
            recorder.run(
                rows.tokens[row : row + 1],
                None if rows.document_ids is None else rows.document_ids[row : row + 1],
                row=row,
                counted=first + rank < num_rows,
            )
    recorder.reduce()
    return recorder.reading(rows)


def row_norms(weight: Tensor) -> Tensor:
    """Return the L2 norm of every row of a matrix, fp32."""
    return torch.linalg.vector_norm(weight.float(), dim=1)


class _Recorder:
    """Hooks on a model and what they accumulate: samples of sites, sums and maxima by name."""

    def __init__(self, model: Transformer, config: MonitorConfig):
        self.model = model
        self.sites = site_names(len(model.layers), get_args(Site) if config.sites == "all" else config.sites)
        self.statistics = set(get_args(Statistic) if config.statistics == "all" else config.statistics)
        self.samples: dict[str, Sample] = {}
        self.sums: dict[str, Tensor] = {}  # pairs (numerator, denominator)
        self.maxima: dict[str, Tensor] = {}
        self.row, self.counted, self.tokens_per_row = 0, True, 0
        self._mask: Tensor | None = None

    def run(self, tokens: Tensor, document_ids: Tensor | None, *, row: int, counted: bool) -> None:
        """Run the model on one sequence, tokens (1, T); accumulate the measurements if `counted`."""
        device = next(self.model.parameters()).device
        tokens = tokens.to(device)
        ids = None if document_ids is None else document_ids.to(device)
        self.row, self.counted, self.tokens_per_row = row, counted, tokens.shape[1]
        self._mask = None if ids is None else document_mask(ids)[0, 0]
        times = 2 if "R_L" in self.statistics else 1
        with ExitStack() as stack:
            self._hook(stack)
            if times == 2:
                for module in self.model.layers.modules():
                    if isinstance(module, Linear):
                        stack.enter_context(_forward(module, functools.partial(_lockstep_linear, module)))
            self.model(tokens.repeat(times, 1), document_ids=None if ids is None else ids.repeat(times, 1))
        if "osp_script" in self.statistics:
            with ExitStack() as stack:
                for name in _hidden_states(len(self.model.layers)):
                    stack.callback(observe_site(self.model, name, self._add_osp_script).remove)
                self.model(tokens.T)  # every token as a sequence of length 1

    def _hook(self, stack: ExitStack) -> None:
        """Observe the forward pass of a sequence until `stack` ends."""
        model = self.model
        for name in self.sites:
            stack.callback(observe_site(model, name, functools.partial(self._add_sample, name)).remove)
        if "R_L" in self.statistics:
            for name in site_names(len(model.layers), ("block_out", "final_norm_out")):
                key = "/".join(["R_L", *name.split("/")[:-1]])  # R_L/layer_03, and R_L of the whole model
                stack.callback(observe_site(model, name, functools.partial(self._add_error, key)).remove)

        def hook(module: nn.Module, function: Callable[..., None], *arguments: Any) -> None:
            handle = module.register_forward_pre_hook(lambda _, inputs: function(*arguments, *inputs))
            stack.callback(handle.remove)

        for name, layer in _blocks(model):
            if {"attn_logit_max", "attn_sink"} & self.statistics:
                hook(layer.self_attn.attend, self._add_attention, name)
            norm = layer.post_attention_layernorm
            if "var_error" in self.statistics and isinstance(norm, BHyT) and norm.approximates:
                hook(norm, self._add_variance_error, f"{VAR_ERROR}/{name}", norm)
        for name, module in _weighted(model):
            if name.split("/")[0] in self.statistics and name not in self.maxima:
                hook(module, self._add_weight, name, module)

    def _add_sample(self, name: str, x: Tensor) -> None:
        values = x[0].flatten(1)  # (T, D) of the copy that is not quantized
        if self.counted:
            new = st.take_sample(values, first_token=self.row * self.tokens_per_row)
        else:
            new = st.empty_sample(values.shape[1], values.device)
        self.samples[name] = st.merge_samples([self.samples[name], new]) if name in self.samples else new

    def _add_attention(self, name: str, query: Tensor, key: Tensor, *_: Any) -> None:
        """query: (copies, T, H, K), key: (copies, T, G, K), both after RoPE."""
        largest, sink, number = st.attention_statistics(
            query[0], key[0], self._mask, off_by_one=self.model.config.attention.off_by_one
        )
        if "attn_logit_max" in self.statistics:
            self._add_maximum(f"attn_logit_max/{name}", largest)
        if "attn_sink" in self.statistics:
            self._add_sum(f"attn_sink/{name}", torch.stack((sink, number)))

    def _add_variance_error(self, name: str, norm: BHyT, x: Tensor, carry: Carry) -> None:
        error = st.variance_error(norm.variance(x, carry)[0], x[0])
        self._add_sum(name, torch.stack((error.sum(), error.new_tensor(error.numel()))))

    def _add_error(self, name: str, x: Tensor) -> None:
        clean, quantized = x.double().unbind(0)
        self._add_sum(name, torch.stack(((quantized - clean).square().sum(), clean.square().sum())))

    def _add_osp_script(self, x: Tensor) -> None:
        values = st.osp_script_kurtosis(x)
        self._add_sum("kurtosis/osp_script", torch.stack((values.sum(), values.new_tensor(values.numel()))))

    def _add_weight(self, name: str, module: nn.Module, *_: Any) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        self._add_maximum(name, (row_norms(weight) if weight.ndim == 2 else weight.float().abs()).max())

    def _add_sum(self, name: str, value: Tensor) -> None:
        value = value if self.counted else torch.zeros_like(value)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_maximum(self, name: str, value: Tensor) -> None:
        value = value if self.counted else torch.full_like(value, -torch.inf)
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def reduce(self) -> None:
        """Merge the measurements of all ranks. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.samples = _merge_over_ranks(self.samples)
            self.sums = dict(zip(self.sums, _all_reduce(self.sums.values(), dist.ReduceOp.SUM), strict=True))
            self.maxima = dict(zip(self.maxima, _all_reduce(self.maxima.values(), dist.ReduceOp.MAX), strict=True))

    def reading(self, rows: ProbeText) -> Reading:
        sites = {name: _site_reading(self.samples[name], rows) for name in self.sites}
        metrics = {
            f"monitor/{statistic}/{name}": value
            for name, site in sites.items()
            for statistic, value in site.statistics.items()
            if statistic in self.statistics
        }
        for name, pair in self.sums.items():
            numerator, denominator = pair.tolist()
            key = name if name.startswith(VAR_ERROR) else f"monitor/{name}"
            metrics[key] = numerator / denominator if denominator else 0.0
        metrics |= {f"monitor/{name}": float(value) for name, value in self.maxima.items()}
        if sites and "kurtosis" in self.statistics:
            kurtosis = [site.statistics["kurtosis"] for site in sites.values()]
            metrics |= {"monitor/kurtosis/max": max(kurtosis), "monitor/kurtosis/mean": sum(kurtosis) / len(kurtosis)}
        if sites and "max_abs" in self.statistics:
            metrics["monitor/max_abs/max"] = max(site.statistics["max_abs"] for site in sites.values())
        return Reading(metrics, sites)


@contextmanager
def _undisturbed(model: Transformer) -> Iterator[None]:
    """Run `model` eagerly, without gradients, in eval mode (no activation checkpointing), and without its head."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _forward(model.lm_head, lambda x, *_: x):
            yield
    finally:
        model.train(training)


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the forward of `module`. Its hooks, DeepSpeed's among them, stay in effect."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _lockstep_linear(module: Linear, x: Tensor) -> Tensor:
    """Return the product of x (2, ..., in) with W: of the first copy as usual, of the second with both quantized."""
    weight, bias = module.affine()
    bias = None if bias is None else bias.to(x.dtype)
    usual = F.linear(x[:1], weight.to(x.dtype), bias)
    quantized_weight = WEIGHT_FORMAT.round(weight).to(x.dtype)
    return torch.cat((usual, F.linear(ACTIVATION_FORMAT.round(x[1:]), quantized_weight, bias)))


def _blocks(model: Transformer) -> Iterator[tuple[str, Block]]:
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        yield layer_name(index), layer


def _hidden_states(num_layers: int) -> list[str]:
    """Return the sites of Hugging Face's `hidden_states`: embedding, every block but the last, final norm."""
    last = f"{layer_name(num_layers - 1)}/block_out"
    names = site_names(num_layers, ("embed_out", "block_out", "final_norm_out"))
    return [name for name in names if name != last]


def _weighted(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """Yield (`gain_max/...`, norm) and (`weight_row_max/...`, matrix) of every module with a weight."""
    modules: list[tuple[str, nn.Module]] = []
    for name, layer in _blocks(model):
        for path, module in layer.named_modules():
            if isinstance(module, Norm | Linear):
                statistic = "gain_max" if isinstance(module, Norm) else "weight_row_max"
                modules.append((f"{statistic}/{name}/{path.rpartition('.')[2]}", module))
    modules.append(("gain_max/norm", model.norm))
    modules += [
        (f"weight_row_max/{name}", getattr(model, name))
        for name in ("embed_tokens", "embed_proj", "head_proj", "lm_head")
    ]
    return ((name, module) for name, module in modules if getattr(module, "weight", None) is not None)


def _merge_over_ranks(samples: dict[str, Sample]) -> dict[str, Sample]:
    """Return the samples of all ranks: moments are taken about the common mean, then everything adds up."""
    if not samples:
        return {}
    channels, channel_max, kurtosis, squares, token_max, histograms, peaks = zip(*samples.values(), strict=True)
    counts = _all_reduce([m.count for m in channels], dist.ReduceOp.SUM)
    sums = _all_reduce([m.count * m.mean for m in channels], dist.ReduceOp.SUM)
    means = [total / count.clamp(min=1) for total, count in zip(sums, counts, strict=True)]
    about = [st.recentre_moments(m, mean) for m, mean in zip(channels, means, strict=True)]
    powers = (_all_reduce([m[power] for m in about], dist.ReduceOp.SUM) for power in (2, 3, 4))
    of_ranks = [torch.empty_like(torch.stack(peaks)) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, torch.stack(peaks))
    columns = (  # the fields of Sample, in order
        itertools.starmap(st.Moments, zip(counts, means, *powers, strict=True)),
        _all_reduce(channel_max, dist.ReduceOp.MAX),
        _all_reduce(kurtosis, dist.ReduceOp.SUM),
        _all_reduce(squares, dist.ReduceOp.SUM),
        _all_reduce(token_max, dist.ReduceOp.MAX),
        _all_reduce(histograms, dist.ReduceOp.SUM),
        map(st.first_peak, torch.stack(of_ranks, dim=1)),
    )
    return {name: Sample(*values) for name, *values in zip(samples, *columns, strict=True)}


def _all_reduce(tensors: Collection[Tensor], operation: dist.ReduceOp.RedOpType) -> list[Tensor]:
    """Return the sum or maximum of each tensor over ranks, in one collective call."""
    if not tensors:
        return []
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, op=operation)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def _site_reading(sample: Sample, rows: ProbeText) -> SiteReading:
    num_channels = sample.channel_max.numel()
    token, channel = divmod(int(sample.peak[1]), num_channels)
    row, position = divmod(token, rows.tokens.shape[1])
    largest = sample.channel_max.topk(min(8, num_channels))
    return SiteReading(
        statistics=st.compute_statistics(sample),
        top_channel=int(st.channel_energy(sample).argmax()),
        value=float(sample.peak[2]),
        channel=channel,
        row=row,
        position=position,
        token=int(rows.tokens[row, position]),
        channels=list(zip(largest.indices.tolist(), largest.values.tolist(), strict=True)),
        octaves=st.count_octaves(sample),
    )
