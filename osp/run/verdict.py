"""Is a model safe at 4 bits? The verdict on a run, and the judgement of its sites. Needs no torch.

verdict.yaml holds the thresholds, the measurements behind them, and the words.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from osp.config import AlertConfig, MonitorConfig, leaves
from osp.run.evaluations import format_short, label
from osp.run.read import Run

_FILE: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
LEVELS: dict[str, dict[str, Any]] = _FILE["levels"]
USUAL: dict[str, float] = _FILE["sites"]
_RULES: dict[Any, AlertConfig] = MonitorConfig().alerts["kurtosis"]
LIMITS: dict[str, float] = {kind: _RULES.get(kind, _RULES["all"]).above or math.inf for kind in USUAL}
BEFORE, AFTER = "16-16-16", "4-4-4"


@dataclass(frozen=True)
class SiteState:
    """The kurtosis of one kind of site, of its worst layer, at the first and the last probe, and its judgement."""

    kind: str
    first: tuple[int, float]  # step, excess kurtosis
    last: tuple[int, float]
    layer: int | None  # of `last`
    word: str  # "normal", "raised" or "outlier"
    since: int | None  # the probe since which it is that or worse; None: normal


def judge(kind: str, kurtosis: float) -> str:
    """Return the judgement of an excess kurtosis at a kind of site: "normal", "raised" or "outlier".

    Raised is more than any outlier-free model that was measured; an outlier is beyond the default of monitor.alerts.
    """
    return "outlier" if kurtosis > LIMITS[kind] else "raised" if kurtosis > USUAL[kind] else "normal"


def over_usual(name: str, kurtosis: float) -> float:
    """Return E[x^4] / Var[x]^2 of the site `layer_03/q` over the largest normal one; -1 if it is not known."""
    usual = USUAL.get(name.rpartition("/")[2], math.nan)
    return -1.0 if math.isnan(ratio := (kurtosis + 3) / (usual + 3)) else ratio


def judge_sites(run: Run) -> list[SiteState]:
    """Return the state of each kind of site whose kurtosis was measured, in the order of a forward pass."""
    worst: dict[str, dict[int, tuple[float, int | None]]] = {kind: {} for kind in USUAL}  # kind -> step -> value, layer
    for site, series in run.sites().items():
        if site.stat == "kurtosis" and site.kind in worst:
            steps = worst[site.kind]
            for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                if math.isfinite(value) and (step not in steps or value > steps[step][0]):
                    steps[step] = value, site.layer
    return [_state(kind, sorted(steps.items())) for kind, steps in worst.items() if steps]


def _state(kind: str, probes: list[tuple[int, tuple[float, int | None]]]) -> SiteState:
    """probes: (step, (kurtosis, layer)) of the worst layer, by step."""
    words = ("normal", "raised", "outlier")
    ranks = [words.index(judge(kind, value)) for _, (value, _) in probes]
    start = len(probes)
    while start and ranks[start - 1] >= ranks[-1]:
        start -= 1
    (first, (before, _)), (last, (value, layer)) = probes[0], probes[-1]
    since = probes[start][0] if ranks[-1] else None
    return SiteState(kind, (first, before), (last, value), layer, words[ranks[-1]], since)


@dataclass(frozen=True)
class Cost:
    """A measured cost of 4 bits."""

    before: float  # perplexity at 16 bits
    after: float
    quant: str
    where: str  # in words
    step: int

    @property
    def nats(self) -> float:
        """Nats per token; infinite if the perplexity at 4 bits is, nan without one at 16 bits."""
        known = 0 < self.before < math.inf and self.after > 0
        return math.log(self.after) - math.log(self.before) if known else math.nan


def measured_cost(run: Run) -> Cost | None:
    """Return the measured cost of 4-4-4, by preference of the preset, and of the newest step."""
    costs = [cost for cost in (*_of_records(run), *_in_training(run)) if not math.isnan(cost.nats)]
    return max(costs, key=lambda cost: (cost.quant == _FILE["preset"], cost.step), default=None)


def _in_training(run: Run) -> Iterator[Cost]:
    """Yield the last measurement of eval.quant.every."""
    before, after = (run.series.get(f"quant/perplexity/{bits}") for bits in (BEFORE, AFTER))
    if before and after and before.steps[-1] == after.steps[-1]:
        first, last = (float(np.nan_to_num(series.values[-1], nan=math.inf)) for series in (before, after))
        tokens, weights = map(dict(leaves(run.config)).get, ("eval.quant.tokens", "eval.weights"))
        where = f"{label('during training', weights or 'trained')}, on "
        where += (f"{tokens:,} tokens of " if isinstance(tokens, int) else "") + "the validation split"
        yield Cost(first, last, _FILE["preset"], where, int(after.steps[-1]))


def _of_records(run: Run) -> Iterator[Cost]:
    """Yield the costs by the records of scripts/evaluate.py and scripts/compare.py."""
    records = [record for record in run.evaluations if record.weights == "trained"]
    at_16 = {
        (record.step, result.what): result.value
        for record in records
        for result in record.results
        if result.metric == "perplexity" and record.quant["text"].startswith(BEFORE)
    }
    averaged = dict(leaves(run.config)).get("eval.weights") == "averaged"
    losses = None if averaged else run.series.get("val/loss")
    validation = dict(zip(losses.steps.tolist(), losses.values.tolist(), strict=True)) if losses else {}
    for record in records:
        quant, step = record.quant["text"], record.step
        if not quant.startswith(AFTER):
            continue
        if ablation := record.ablation:
            where = f"by scripts/evaluate.py on {ablation.text}"
            yield Cost(ablation.unquantized, ablation.quantized, quant, where, step)
        for result in record.results:
            before, where = at_16.get((step, result.what)), f"by scripts/evaluate.py on {result.what}"
            whole_split = result.what.startswith("held_out[") and "first=" not in result.what
            if before is None and whole_split and step in validation:
                before, where = math.exp(min(validation[step], 700)), f"{where}, against the validation loss"
            if before and result.metric == "perplexity":
                yield Cost(before, result.value, quant, where, step)
    if run.comparison:
        cells, specs = run.comparison.bits.get("", {}), run.comparison.specs
        quant = next((words for words in specs.values() if words.startswith(AFTER)), AFTER)  # of an older record
        quant = specs.get(run.comparison.hashes.get(AFTER, ""), quant)
        if BEFORE in cells and AFTER in cells:  # which lack a perplexity that is infinite
            first, last = (cells[bits].perplexity or math.inf for bits in (BEFORE, AFTER))
            yield Cost(first, last, quant, f"by scripts/compare.py on {run.comparison.what}", run.comparison.step)


@dataclass(frozen=True)
class FourBitVerdict:
    """What is known about a run at 4 bits, in words. A `command` stands between backticks."""

    level: str  # of LEVELS
    basis: str  # "measured", "estimated", or what it rests on without a cost
    nats: float  # the cost per token, measured or estimated; nan: unknown
    rests_on: str
    remarks: tuple[str, ...]  # the likely cause, and how sure the verdict is

    @property
    def title(self) -> str:
        title = LEVELS[self.level]["title"]
        return f"Probably {title[0].lower()}{title[1:]}" if self.basis == "estimated" else title

    @property
    def mark(self) -> str:
        """The title in a word or two."""
        return LEVELS[self.level]["mark"]


def judge_run(run: Run) -> FourBitVerdict:
    """Return the verdict by the best evidence: the measured cost of 4 bits, else R_L, else the sites' kurtosis."""
    cost, sites, path, fit = measured_cost(run), judge_sites(run), rate_times_steps(run), _FILE["estimate"]
    outliers, raised = (", ".join(s.kind for s in sites if s.word == word) for word in ("outlier", "raised"))
    in_format, probed = map(dict(leaves(run.config)).get, ("monitor.quant", "monitor.weights"))
    # the estimate is of 4-bit integers
    errors, nats, now = None if in_format else run.series.get("monitor/R_L"), math.nan, run.step
    step, error = (int(errors.steps[-1]), errors.last) if errors and len(errors.finite) else (-1, math.nan)
    words: dict[str, Any] = {"folder": run.folder, "sites": outliers, "raised": raised, "R_L": f"{error:.3g}", **fit}
    words["of"] = " for the averaged weights" * (probed == "averaged")
    if cost:
        rests_on, nats, step = "measured", cost.nats, cost.step
        words |= {"before": format_short(cost.before), "after": format_short(cost.after)}
        words |= {"quant": cost.quant, "where": cost.where}
    elif step > 0 and error >= 0 and not path < _FILE["path"]["early"]:
        rests_on, nats = "estimated", fit["factor"] * error ** fit["exponent"]
    elif step >= 0:
        rests_on = "early"
    else:
        rests_on = ("outliers" if outliers else "quiet") if sites else "unknown"
    level = rests_on
    if not math.isnan(nats):
        level = next((name for name, about in LEVELS.items() if nats < about.get("below", -math.inf)), "broken")
    costly = level in ("unsafe", "broken")
    remarks = {
        "outliers": costly and outliers,
        "rounding": costly and sites and not outliers,
        "measured": cost,
        "estimated": rests_on == "estimated",
        "stale": cost and step < now,
        "command": not cost,
        "short": path < _FILE["path"]["short"] and rests_on != "unknown" and not outliers,
        "raised": raised and not outliers,
    }
    in_nats = "infinitely many" if nats == math.inf else f"{nats:.3f}"
    words |= {"step": f"{step:,}", "now": f"{now:,}", "path": path, "nats": in_nats, "change": _change(nats)}
    texts = [_FILE["remarks"][name].format(**words) for name, holds in remarks.items() if holds]
    return FourBitVerdict(level, rests_on, nats, _FILE["rests_on"][rests_on].format(**words), tuple(texts))


def rate_times_steps(run: Run) -> float:
    """Return the sum of the learning rate of the matrices over the steps of a run, nan if it was not logged."""
    rates = run.series.get("train/lr/matrix")
    return float(np.trapezoid(rates.values, rates.steps) + rates.values[0] * rates.steps[0]) if rates else math.nan


def _change(nats: float) -> str:
    """Return the change of the perplexity in words."""
    if nats < 1:
        return f"{100 * math.expm1(nats):+.1f}%"
    return f"{math.exp(nats):,.1f} times as high" if nats < 20 else "beyond use"
