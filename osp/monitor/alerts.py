"""Early warning: rules on the metrics of probes. A rule alerts once, and again only after it has cleared."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from osp.config import AlertConfig, MonitorConfig
from osp.model.sites import split_site
from osp.monitor.probe import SiteReading

CLEARED = 0.8  # an alert clears when its value falls below this share of the threshold
CONSTANT = 0.9  # |mean| / rms over tokens from which a channel is called constant


@dataclass(frozen=True)
class Alert:
    """A rule that a metric has just broken."""

    rule: str  # "above" or "growth"
    key: str  # of the metric
    value: float
    threshold: float
    step: int

    @property
    def place(self) -> str:
        """The site (`layer_03/down_proj_in`) or the layer; empty for the whole model."""
        return "/".join(self.key.split("/")[2:])

    @property
    def message(self) -> str:
        limit = "above {:g}" if self.rule == "above" else "it has grown beyond {:g} since half of the steps"
        name = self.key.removeprefix("monitor/")
        return f"outlier alert: {name} is {self.value:.4g} after step {self.step}, {limit.format(self.threshold)}"

    def details(self) -> dict[str, Any]:
        """Return the fields for events.jsonl and forensics."""
        of_layer = self.place.startswith("layer_") and "/" not in self.place
        layer, site = split_site(f"{self.place}/" if of_layer else self.place)
        where = {"site": site or None, "layer": layer}
        return {"rule": self.rule, "key": self.key, **where, "value": self.value, "threshold": self.threshold}


def mechanism(name: str, site: SiteReading) -> str:
    """Return what makes the top channel of a site large, and what the gain of a norm adds, in words.

    "channel 41 of layer_01/attn_in is constant (98%), holds 37% of the energy, and its gain is 3.6 times the median".
    The gain is left out if no norm writes the site, or if its gains do not differ for this channel.
    """
    numbers, others = site.statistics, site.channel != site.top_channel
    constancy, gain = numbers["top_channel_constancy"], numbers.get("top_channel_gain", 1.0)
    where = "" if others else f" (position {site.position} of sequence {site.row})"
    if constancy >= CONSTANT:
        nature = f"is constant ({_two_digits(100 * constancy)}%)"
    elif site.spike >= 0.5:
        nature = f"has {_two_digits(100 * site.spike)}% of its energy at one token{where}"
    else:
        nature = f"varies between tokens (its mean is {_two_digits(100 * constancy)}% of its RMS)"
    share = f"holds {_two_digits(100 * numbers['top_channel_share'])}% of the energy"
    amplified = f"{nature}, {share}, and its gain is {gain:.{int(gain < 10)}f} times the median"
    largest = f"; the largest value is in channel {site.channel}" if others else ""
    return f"channel {site.top_channel} of {name} {f'{nature} and {share}' if gain == 1 else amplified}{largest}"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


class Alerts:
    """The state of a run's rules: a pure function of the metrics of its probes, in order.

    above: value > rule.above. growth: value > rule.growth * max(value at half of the steps, rule.floor), which means
    the same early and late in training. The untrained model at step 0 breaks no rule.
    """

    def __init__(self, config: MonitorConfig):
        self._rules: Mapping[Any, Mapping[Any, AlertConfig]] = config.alerts
        self._past: dict[str, list[tuple[int, float]]] = {}
        self.active: set[tuple[str, str]] = set()  # (metric, kind) of what is broken as of the last probe

    def replay(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Restore the state from the lines of a metrics.jsonl, so that a resumed run repeats no alert."""
        for event in events:
            self.update(int(event["step"]), {key: value for key, value in event.items() if value is not None})

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Return the new alerts that the metrics of the probe after `step` raise."""
        raised = []
        for key, value in metrics.items():
            rule = self._rule(key)
            if rule is None or not math.isfinite(value):
                continue
            thresholds = {} if rule.above is None else {"above": rule.above}
            earlier = [past for at, past in self._past.get(key, []) if 2 * at <= step]
            if rule.growth is not None and earlier:
                thresholds["growth"] = rule.growth * max(earlier[-1], rule.floor)
            for kind, threshold in thresholds.items():
                if value > threshold and step > 0:
                    if (key, kind) not in self.active:
                        raised.append(Alert(kind, key, value, threshold, step))
                    self.active.add((key, kind))
                elif value < CLEARED * threshold:
                    self.active.discard((key, kind))
            self._past.setdefault(key, []).append((step, value))
        return raised

    def _rule(self, key: str) -> AlertConfig | None:
        """Return the rule for `monitor/STATISTIC[/PLACE]` or `bhyt/...`; aggregates over sites have none."""
        prefix, _, name = key.partition("/")
        statistic, _, place = name.partition("/")
        if prefix not in ("monitor", "bhyt") or place in ("max", "mean", "osp_script"):
            return None
        by_site = self._rules.get(statistic, {})
        return by_site.get(place.split("/")[-1], by_site.get("all"))
