"""Rules that raise and clear alerts, and the schedule of probes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from osp.config import AlertConfig, MonitorConfig
from osp.monitor.alerts import Alert, Alerts, mechanism
from osp.monitor.monitor import _site_of, next_probe
from osp.monitor.probe import ProbeText, Reading

KEY = "monitor/kurtosis/layer_03/attn_in"


def alerts(**rule: Any) -> Alerts:
    return Alerts(MonitorConfig(alerts={"kurtosis": {"all": AlertConfig(**rule)}}))


def raised(machine: Alerts, values: list[tuple[int, float]], key: str = KEY) -> list[tuple[int, str]]:
    return [(step, alert.rule) for step, value in values for alert in machine.update(step, {key: value})]


def test_alert_is_raised_once_until_it_clears() -> None:
    """An alert at 100 clears below 80: a value that hovers around the threshold raises one alert."""
    values = [(1, 99.0), (2, 101.0), (3, 150.0), (4, 95.0), (5, 120.0), (6, 79.0), (7, 99.0), (8, 101.0)]
    assert raised(alerts(above=100.0), values) == [(2, "above"), (8, "above")]


def test_growth_is_measured_from_half_of_the_steps() -> None:
    values = [(1, 8.0), (2, 8.0), (4, 8.0), (8, 20.0), (16, 41.0), (32, 130.0)]
    # at 8: 20 against 4 x 8 at step 4; at 16: 41 against 4 x 20 at step 8; at 32: 130 against 4 x 41; none
    assert raised(alerts(growth=4.0), values) == []
    assert raised(alerts(growth=3.0), values) == [(32, "growth")]
    assert raised(alerts(growth=2.0), values) == [(8, "growth")]  # and stays so: 41 > 2 x 20, 130 > 2 x 41


def test_growth_below_the_floor_raises_no_alert() -> None:
    values = [(1, 0.001), (2, 0.1), (4, 4.0), (8, 9.0), (16, 21.0)]
    assert raised(alerts(growth=2.0, floor=5.0), values) == [(16, "growth")]  # 21 > 2 x 9
    assert raised(alerts(growth=2.0, floor=20.0), values) == []


def test_alert_names_rule_metric_value_and_threshold() -> None:
    (alert,) = alerts(above=100.0).update(5, {KEY: 250.0})
    assert (alert.rule, alert.key, alert.value, alert.threshold) == ("above", KEY, 250.0, 100.0)
    assert alert.place == "layer_03/attn_in"
    assert alert.message == "outlier alert: kurtosis/layer_03/attn_in is 250 after step 5, above 100"


def test_untrained_model_breaks_no_rule() -> None:
    assert raised(alerts(above=100.0), [(0, 500.0), (1, 500.0)]) == [(1, "above")]


def test_rule_of_a_site_overrides_the_rule_of_all() -> None:
    rules: Any = {"kurtosis": {"all": AlertConfig(above=10.0), "down_proj_in": AlertConfig(above=50.0)}}
    machine = Alerts(MonitorConfig(alerts=rules))
    values = {f"monitor/kurtosis/layer_00/{site}": 20.0 for site in ("attn_in", "down_proj_in")}
    values |= {"monitor/kurtosis/embed_out": 11.0}
    assert {alert.place for alert in machine.update(1, values)} == {"layer_00/attn_in", "embed_out"}


def test_aggregates_and_statistics_without_a_rule_raise_no_alert() -> None:
    """Aggregates over sites would repeat the alerts of the sites."""
    values = {f"monitor/kurtosis/{name}": 1e6 for name in ("max", "mean", "osp_script")}
    values |= {"monitor/rms/embed_out": 1e6, "train/loss": 1e6, "monitor/seconds": 1e6, KEY: float("nan")}
    assert alerts(above=100.0).update(1, values) == []


def test_whole_model_and_layers_have_rules() -> None:
    machine = Alerts(MonitorConfig())
    raised_alerts = machine.update(1, {"monitor/R_L": 50.0, "monitor/attn_logit_max/layer_01": 500.0})
    assert [(alert.key, alert.place) for alert in raised_alerts] == [
        ("monitor/R_L", ""),
        ("monitor/attn_logit_max/layer_01", "layer_01"),
    ]


def test_replayed_alerts_are_not_raised_again() -> None:
    lines = [{"step": s, "tokens": 0, KEY: v} for s, v in ((1, 8.0), (2, 120.0), (3, 130.0))]
    machine = alerts(above=100.0, growth=2.0)
    machine.replay([{"step": 1, "tokens": 0, "train/loss": None}, *lines])
    assert machine.update(4, {KEY: 140.0}) == []
    straight = alerts(above=100.0, growth=2.0)
    for line in [*lines, {"step": 4, KEY: 140.0}]:
        straight.update(int(line["step"]), {KEY: line[KEY]})
    after = [(5, 300.0), (8, 70.0), (9, 110.0), (16, 900.0)]
    assert raised(machine, after) == raised(straight, after) != []


# --- cadence ------------------------------------------------------------------------------------------------------


def simulated(*, cost: float, step_seconds: float, total: int, max_cost: float = 0.01) -> tuple[list[int], list[float]]:
    """Return the steps of the probes with monitor.every=auto, and the share of the training time spent after each."""
    step, spent, steps, shares = 0, 0.0, [], []
    while step < total:
        spent += cost
        steps.append(step)
        shares.append(spent / (step * step_seconds) if step else 0.0)
        wait = (spent + cost) / max_cost - step * step_seconds
        step = next_probe(step, wait=wait, step_seconds=step_seconds if step else 0.0, interval=max(1, total // 500))
    return steps, shares


@pytest.mark.parametrize("cost", [0.2, 1.0, 5.0])
def test_auto_starts_at_powers_of_two_and_settles_below_max_cost(cost: float) -> None:
    steps, shares = simulated(cost=cost, step_seconds=1.0, total=100_000)
    assert steps[:8] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert {2**i for i in range(10)} <= set(steps)
    late = [share for step, share in zip(steps, shares, strict=True) if step > 2000 * cost]
    assert max(late) <= 0.01 + 1e-9
    assert late[-1] > 0.008 or len(steps) > 450, "the budget is there to be used"


def test_auto_with_a_cheap_probe_is_limited_by_its_interval() -> None:
    steps, shares = simulated(cost=0.001, step_seconds=1.0, total=100_000)
    assert len(steps) < 550
    assert shares[-1] < 0.001


def test_auto_stays_at_powers_of_two_without_a_measured_time() -> None:
    waits = [next_probe(step, wait=1800.0, step_seconds=0.0, interval=1) for step in (0, 100)]
    assert waits == [1, 128]


CONSTANT = {"top_channel_constancy": 0.984, "top_channel_share": 0.3721, "top_channel_gain": 3.58}
VARYING = {"top_channel_constancy": 0.413, "top_channel_gain": 1.0}


@pytest.mark.parametrize(
    ("statistics", "others", "words"),
    [
        ({}, {}, "is constant (98%), holds 37% of the energy, and its gain is 3.6 times the median"),
        ({"top_channel_gain": 412.3}, {},
         "is constant (98%), holds 37% of the energy, and its gain is 412 times the median"),
        ({"top_channel_gain": 0.97}, {},
         "is constant (98%), holds 37% of the energy, and its gain is 1.0 times the median"),
        ({"top_channel_gain": 1.0}, {}, "is constant (98%) and holds 37% of the energy"),
        ({"top_channel_gain": None}, {}, "is constant (98%) and holds 37% of the energy"),
        ({"top_channel_share": 1.0}, {},
         "is constant (98%), holds 100% of the energy, and its gain is 3.6 times the median"),
        (VARYING, {}, "varies between tokens (its mean is 41% of its RMS) and holds 37% of the energy"),
        (VARYING | {"top_channel_share": 0.0068}, {},
         "varies between tokens (its mean is 41% of its RMS) and holds 0.68% of the energy"),
        (VARYING, {"spike": 0.83},
         "has 83% of its energy at one token (position 5 of sequence 2) and holds 37% of the energy"),
        (VARYING, {"spike": 0.83, "channel": 3},
         "has 83% of its energy at one token and holds 37% of the energy; the largest value is in channel 3"),
    ],
)  # fmt: skip
def test_mechanism_says_only_what_is_true(statistics: dict[str, Any], others: dict[str, Any], words: str) -> None:
    numbers = {key: value for key, value in (CONSTANT | statistics).items() if value is not None}
    place = {"channel": 41, "top_channel": 41, "row": 2, "position": 5, "spike": 0.001}
    site: Any = SimpleNamespace(statistics=numbers, **(place | others))
    assert mechanism("layer_01/attn_in", site) == f"channel 41 of layer_01/attn_in {words}"


def test_channel_with_a_fifth_of_the_energy_breaks_a_default_rule() -> None:
    """Muon with RMSNorm reaches 37%, the outlier-safe recipe at most 6%; the residual stream has no rule."""
    sites = ("layer_01/attn_in", "layer_01/mlp_in", "final_norm_out", "layer_01/block_out", "embed_out")
    for share, expected in ((0.06, []), (0.11, []), (0.21, list(sites[:3])), (0.37, list(sites[:3]))):
        metrics = {f"monitor/top_channel_share/{site}": share for site in sites}
        assert [alert.place for alert in Alerts(MonitorConfig()).update(8, metrics)] == expected


def test_alert_about_a_layer_names_the_site_that_is_unusual_for_its_kind() -> None:
    """The input of down_proj has the highest kurtosis in every model."""
    sites: Any = {
        name: SimpleNamespace(statistics={"kurtosis": kurtosis})
        for name, kurtosis in (("layer_00/attn_in", 12.0), ("layer_00/down_proj_in", 90.0), ("layer_01/attn_in", 50.0))
    }
    alert = Alert("above", "monitor/attn_logit_max/layer_00", 150.0, 100.0, 8)
    assert _site_of(alert, Reading({}, sites, ProbeText(torch.zeros(1, 2)))) == "layer_00/attn_in"
