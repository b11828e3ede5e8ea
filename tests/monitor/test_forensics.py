"""How a channel grew, since when, and which weights write a channel."""

from typing import Any

import pytest

from osp.monitor.forensics import behind
from osp.run.read import growth, since
from tests.monitor import workers


def probes(*largest: dict[int, float]) -> list[dict[str, Any]]:
    """Return probes after 0, 10, 20, ... steps with these largest channels of a site; {}: the site was not measured."""
    return [
        {
            "step": 10 * i,
            "sites": {"embed_out": {"channels": [[c, v] for c, v in channels.items()]}} if channels else {},
        }
        for i, channels in enumerate(largest)
    ]


def test_growth_is_the_largest_value_of_the_channel_by_probe() -> None:
    history = probes({3: 1.0, 4: 0.5}, {}, {4: 2.0, 3: 1.5}, {4: 9.0})
    assert growth(history, "embed_out", 4) == [(0, 0.5), (20, 2.0), (30, 9.0)]
    assert growth(history, "embed_out", 3) == [(0, 1.0), (20, 1.5), (30, None)]
    assert growth(history, "final_norm_out", 3) == []


@pytest.mark.parametrize(
    ("grown", "step"),
    [
        ([(0, 1.0), (10, 5.0), (20, 9.0), (30, 8.0)], 10),
        ([(0, 5.0), (10, 3.0), (20, 9.0), (30, 8.0)], 20),  # it was smaller in between
        ([(0, 5.0), (10, None), (20, 8.0)], 20),
        ([(0, 8.0)], 0),
        ([(0, 8.0), (10, None)], None),
        ([], None),
    ],
)
def test_since_is_when_the_channel_reached_half_of_its_size(grown: Any, step: int | None) -> None:
    assert since(grown) == step


STREAM = ["embed_tokens.weight", "layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("kind", "layer", "expected"),
    [
        ("embed_out", None, STREAM[:1]),
        ("attn_in", 0, ["layers.0.input_layernorm.weight", *STREAM[:1]]),
        ("mlp_in", 0, ["layers.0.post_attention_layernorm.weight", *STREAM[:2]]),
        ("block_out", 0, STREAM),
        ("attn_in", 1, ["layers.1.input_layernorm.weight", *STREAM]),
        ("q", 1, ["layers.1.self_attn.q_proj.weight"]),
        ("down_proj_in", 1, ["layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight"]),
    ],
)
def test_weights_that_write_a_channel_come_before_the_site(kind: str, layer: int | None, expected: list[str]) -> None:
    assert {w["parameter"] for w in behind(kind, layer, 5, workers.small_model())} == set(expected)


def test_query_channel_includes_its_rotary_partner_and_value_heads_are_shared() -> None:
    model = workers.small_model()  # heads of 8: pairs are (i, i + 4)
    assert [w["index"] for w in behind("q", 0, 13, model)] == [13, 9]
    assert [w["index"] for w in behind("k", 0, 9, model)] == [9, 13]
    assert [w["index"] for w in behind("o_proj_in", 0, 8 * 3 + 2, model)] == [8 * 1 + 2]


def test_ratio_is_the_norm_of_a_row_over_the_median_norm() -> None:
    model = workers.planted("down_proj_in")
    gate = behind("down_proj_in", 1, 21, model)[0]
    norms = model.get_parameter("layers.1.mlp.gate_proj.weight").detach().norm(dim=1)
    assert gate["norm"] == pytest.approx(float(norms[21]))
    assert gate["ratio"] == pytest.approx(float(norms[21] / norms.median()))
