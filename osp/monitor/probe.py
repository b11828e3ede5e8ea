"""The probe: forward passes of the validation split through the model as it is, observed by hooks.

A probe runs eagerly, without gradients and apart from the training step, because hooks that are added to a compiled
block never run, and hooks run twice under activation checkpointing. It draws no random numbers and changes nothing in
the model, so training is bit-identical with and without probes. Under ZeRO-3 the weights of a module are whole while
its own hooks run.

Each rank reads one sequence at a time, so the result does not depend on the number of ranks. Only the `Sample` of each
site is kept. The host waits for the device once, at the end, when all figures are fetched together.

Fake W4A4 (R_L) runs in lockstep: the sequence is doubled, every matrix product of a block quantizes its weight and
input for the second copy, and the copies are compared at the end of each block. No activations wait for a second pass.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from osp.config import MonitorConfig, Site, Statistic
from osp.model.attention import document_mask
from osp.model.norms import BHyT, Norm
from osp.model.sites import SITES, hook_site, layer_name, site_names, split_site
from osp.model.transformer import CausalAttention, Linear, Transformer
from osp.monitor import statistics as st
from osp.monitor.statistics import Gains, Sample
from osp.quant.apply import error_and_energy
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec

FOUR_BITS = QuantSpec(w_bits=4, a_bits=4, w_clip=False, o_proj_by_head=False)  # of R_L


@dataclass(frozen=True)
class ProbeText:
    """The text of a probe, R sequences of T tokens: all of them on every rank."""

    tokens: Tensor  # (R, T) int64, on the CPU
    document_ids: Tensor | None = None  # (R, T)


@dataclass(frozen=True)
class SiteReading:
    """The measurements at one site. The outlier is the value with the largest |x|."""

    channel: int  # of the outlier
    value: float
    row: int  # its sequence, counted from 0
    position: int  # in the sequence, counted from 0
    token: int  # id of the token at that position
    statistics: dict[str, float]  # see osp.monitor.statistics.compute_statistics
    channels: list[tuple[int, float]]  # the 8 channels with the largest |x|, each with that value
    top_channel: int  # the channel with the most energy
    spike: float  # share of its energy that is at one token


@dataclass(frozen=True)
class Reading:
    """The result of a probe: metrics by the name under which they are logged, sites by name, and the text."""

    metrics: dict[str, float]
    sites: dict[str, SiteReading]
    text: ProbeText


def probe(model: Transformer, text: ProbeText, config: MonitorConfig) -> Reading:
    """Measure `model` on `text`. Collective: the ranks share the sequences, and all return the same `Reading`."""
    recorder = _Recorder(model, text, config)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    training = model.training
    model.eval()  # without activation checkpointing
    try:
        without_head = _replaced_forward(model.lm_head, lambda x, *_: x)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), without_head:
            for first in range(0, len(text.tokens), world_size):
                recorder.run(first + rank)
    finally:
        model.train(training)
    return recorder.reading()


@contextmanager
def _replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
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


class _Recorder:
    """Hooks on a model and what they accumulate: samples by site, sums and maxima by metric."""

    def __init__(self, model: Transformer, text: ProbeText, config: MonitorConfig):
        self.model, self.text = model, text
        self.sites = site_names(len(model.layers), get_args(Site) if config.sites == "all" else config.sites)
        self.statistics = set(get_args(Statistic) if config.statistics == "all" else config.statistics)
        self.spec = DEPLOYED[config.quant] if config.quant else FOUR_BITS
        self.samples: dict[str, Sample] = {}
        self.gains: dict[str, Gains] = {}
        self.sums: dict[str, Tensor] = {}  # pairs (numerator, denominator)
        self.maxima: dict[str, Tensor] = {}
        self.row, self.counted = 0, True
        self._mask: Tensor | None = None

    def run(self, number: int) -> None:
        """Run the model on sequence `number`. A rank without one repeats the last, uncounted, as ZeRO-3 needs it."""
        model, text = self.model, self.text
        self.row = min(number, len(text.tokens) - 1)
        self.counted = number == self.row
        device = next(model.parameters()).device
        tokens = text.tokens[self.row : self.row + 1].to(device)
        ids = None if text.document_ids is None else text.document_ids[self.row : self.row + 1].to(device)
        self._mask = None if ids is None else document_mask(ids)[0, 0]
        times = 2 if "R_L" in self.statistics else 1
        with ExitStack() as stack:
            self._observe(self.sites, self._add_sample, stack)
            for module, hook in itertools.chain(self._module_hooks(), self._gain_hooks()):
                stack.callback(module.register_forward_pre_hook(hook).remove)
            if times == 2:
                self._observe(site_names(len(model.layers), ("block_out", "final_norm_out")), self._add_error, stack)
                for module in model.layers.modules():
                    if isinstance(module, Linear):
                        product = functools.partial(_lockstep_linear, module, self.spec)
                        stack.enter_context(_replaced_forward(module, product))
            model(tokens.repeat(times, 1), document_ids=None if ids is None else ids.repeat(times, 1))
        if "osp_script" in self.statistics:
            # Hugging Face's `hidden_states`: the embedding, every block but the last, and the final norm
            names = site_names(len(model.layers), ("embed_out", "block_out", "final_norm_out"))
            del names[-2]
            with ExitStack() as stack:
                self._observe(names, self._add_osp_script, stack)
                model(tokens.T)  # every token as a sequence of length 1

    def _observe(self, names: list[str], function: Callable[[str, Tensor], None], stack: ExitStack) -> None:
        """Call function(name, x) with the activation x at every site until `stack` ends."""
        for name in names:
            stack.callback(hook_site(self.model, name, functools.partial(function, name)).remove)

    def _module_hooks(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """Yield each module that is measured itself, with the hook before its forward pass."""
        for path, module in self.model.named_modules():
            parts = path.split(".")
            layer = [layer_name(int(parts[1]))] if parts[0] == "layers" and len(parts) > 2 else []
            if isinstance(module, CausalAttention) and {"attn_logit_max", "attn_sink"} & self.statistics:
                yield module, functools.partial(self._add_attention, layer[0])
            if isinstance(module, BHyT) and module.refreshes and "var_error" in self.statistics:
                yield module, functools.partial(self._add_variance_error, f"bhyt/var_error/{layer[0]}")
            statistic = "gain_max" if isinstance(module, Norm) else "weight_row_max"
            key = "/".join(["monitor", statistic, *layer, parts[-1]])
            once = statistic in self.statistics and key not in self.maxima
            if once and getattr(module, "weight", None) is not None:
                yield module, functools.partial(self._add_weight, key)

    def _gain_hooks(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """Yield the norm that writes each site, with the hook before its first forward pass."""
        for name in set(self.sites) - self.gains.keys():
            layer, kind = split_site(name)
            block = "" if layer is None else f"layers.{layer}."
            writers = () if kind in ("q", "k") else SITES[kind].writers  # RoPE mixes the channels after norms of heads
            for norm in (self.model.get_submodule(block + path) for path in writers if path.endswith("norm")):
                if isinstance(norm, Norm):
                    yield norm, functools.partial(self._add_gains, name)

    def _add_gains(self, name: str, norm: Norm, inputs: tuple[Any, ...]) -> None:
        x, scale = inputs[0], norm.output_scale
        weight = x.new_ones(1) if norm.weight is None else norm.weight.to(x.dtype)  # as the norm itself rounds it
        bias = x.new_zeros(1) if norm.bias is None else norm.bias.to(x.dtype)
        self.gains[name] = Gains(*(value.double().expand(x.shape[-1]) * scale for value in (weight, bias)))

    def _add_sample(self, name: str, x: Tensor) -> None:
        values = x[0].flatten(1)  # (T, D) of the copy that is not quantized
        new = st.take_sample(values, first_token=self.row * len(values))
        if not self.counted:
            new = st.uncounted(new)
        self.samples[name] = st.merge_samples([self.samples[name], new]) if name in self.samples else new

    def _add_attention(self, layer: str, module: CausalAttention, inputs: tuple[Any, ...]) -> None:
        query, key = (x[0] for x in inputs[:2])  # (T, H, K) and (T, G, K), both after RoPE
        options = self._mask, module.off_by_one, module.logit_cap
        largest, sink, number = st.attention_statistics(query, key, *options)
        if "attn_logit_max" in self.statistics:
            self._add_maximum(f"monitor/attn_logit_max/{layer}", largest)
        if "attn_sink" in self.statistics:
            self._add_sum(f"monitor/attn_sink/{layer}", torch.stack((sink, number)))

    def _add_variance_error(self, name: str, norm: BHyT, inputs: tuple[Any, ...]) -> None:
        """Add |s'^2 - v| / v of every token: the relative error of BHyT's approximation s'^2 of v = mean(x^2)."""
        x, carry = inputs
        true, variance = x[0].double().square().mean(-1), norm.approximated(carry)
        assert variance is not None
        self._add_mean(name, (variance[0, :, 0].double() - true).abs() / true)

    def _add_error(self, name: str, x: Tensor) -> None:
        key = "/".join(["monitor/R_L", *name.split("/")[:-1]])  # R_L/layer_03, and R_L of the whole model
        self._add_sum(key, error_and_energy(x[1], x[0]))

    def _add_osp_script(self, _: str, x: Tensor) -> None:
        self._add_mean("monitor/kurtosis/osp_script", st.osp_script_kurtosis(x))

    def _add_weight(self, name: str, module: nn.Module, _: Any) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        sizes = torch.linalg.vector_norm(weight.float(), dim=1) if weight.ndim == 2 else weight.float().abs()
        self._add_maximum(name, sizes.max())

    def _add_mean(self, name: str, values: Tensor) -> None:
        self._add_sum(name, torch.stack((values.sum(), values.new_full((), values.numel()))))

    def _add_sum(self, name: str, value: Tensor) -> None:
        value = value if self.counted else torch.zeros_like(value)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_maximum(self, name: str, value: Tensor) -> None:  # a repeated sequence does not change it
        self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)

    def reading(self) -> Reading:
        """Merge the measurements of all ranks and divide the sums. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.samples = _merge_over_ranks(self.samples) if self.samples else {}
            self.sums = dict(zip(self.sums, _all_reduce(self.sums.values(), dist.ReduceOp.SUM), strict=True))
            self.maxima = dict(zip(self.maxima, _all_reduce(self.maxima.values(), dist.ReduceOp.MAX), strict=True))
        figures = {name: _site_figures(self.samples[name], self.gains.get(name)) for name in self.sites}
        fetched = _fetch({**figures, "sums": self.sums, "maxima": self.maxima})
        sites = {name: _site_reading(fetched[name], self.samples[name], self.text) for name in self.sites}
        metrics = {
            f"monitor/{statistic}/{name}": value
            for name, site in sites.items()
            for statistic, value in site.statistics.items()
            if statistic in self.statistics
        }
        for name, (numerator, denominator) in fetched["sums"].items():
            metrics[name] = numerator / denominator if denominator else 0.0
        metrics |= {name: value for name, (value,) in fetched["maxima"].items()}
        if sites and "kurtosis" in self.statistics:
            kurtosis = [site.statistics["kurtosis"] for site in sites.values()]
            metrics |= {"monitor/kurtosis/max": max(kurtosis), "monitor/kurtosis/mean": sum(kurtosis) / len(kurtosis)}
        if sites and "max_abs" in self.statistics:
            metrics["monitor/max_abs/max"] = max(site.statistics["max_abs"] for site in sites.values())
        return Reading(metrics, sites, self.text)


def _lockstep_linear(module: Linear, spec: QuantSpec, x: Tensor) -> Tensor:
    """Return the product of x (2, ..., in) with W: of the first copy as usual, of the second with both quantized.

    Static ranges come from the first copy.
    """
    weight, bias = module.weight, None if module.bias is None else module.bias.to(x.dtype)
    usual, noisy = F.linear(x[:1], weight.to(x.dtype), bias), x[1:]
    if "a" in spec.parts:
        bounds = torch.stack(x[:1].aminmax()) if spec.is_static("a") else None
        noisy = spec.number_format("a").round(noisy, group_size=spec.a_group_size, bounds=bounds)
    weight = spec.number_format("w").round(weight, group_size=spec.w_group_size).to(x.dtype)
    return torch.cat((usual, F.linear(noisy, weight, bias)))


def _merge_over_ranks(samples: dict[str, Sample]) -> dict[str, Sample]:
    """Return the samples of all ranks: moments are taken about the common mean, then everything adds up."""
    channels, channel_max, tokens, token_max, histograms, peaks = zip(*samples.values(), strict=True)
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
        _all_reduce(tokens, dist.ReduceOp.SUM),
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


def _fetch(tables: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, list[float]]]:
    """Return the values of all tensors, each flattened, in one transfer."""
    tensors = [tensor.double().flatten() for table in tables.values() for tensor in table.values()]
    pieces = iter(torch.cat(tensors).cpu().split([len(tensor) for tensor in tensors])) if tensors else iter(())
    return {key: {name: next(pieces).tolist() for name in table} for key, table in tables.items()}


def _site_figures(sample: Sample, gains: Gains | None) -> dict[str, Tensor]:
    """Return the statistics of a site by name and what else its `SiteReading` needs, on the device."""
    largest, energy = sample.channel_max.topk(min(8, sample.channel_max.numel())), st.channel_energy(sample)
    top = energy.argmax()
    spike = torch.where(energy.take(top) == 0, 0.0, sample.channel_max.take(top) ** 2 / energy.take(top))
    figures = {"peak": sample.peak, "channels": largest.indices, "values": largest.values, "top": top, "spike": spike}
    return figures | st.compute_statistics(sample, gains)


def _site_reading(figures: dict[str, list[float]], sample: Sample, text: ProbeText) -> SiteReading:
    (_, place, value), (top,), (spike,) = (figures.pop(name) for name in ("peak", "top", "spike"))
    place, channel = divmod(int(place), len(sample.channel_max))
    row, position = divmod(place, text.tokens.shape[1])
    token = int(text.tokens[row, position])
    channels = list(zip(map(int, figures.pop("channels")), figures.pop("values"), strict=True))
    statistics = {name: statistic for name, (statistic,) in figures.items()}
    return SiteReading(channel, value, row, position, token, statistics, channels, int(top), spike)
