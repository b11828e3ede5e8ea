"""The tables of docs/monitoring.md are those of the code: sites, statistics, presets and alerts."""

from typing import get_args

import pytest
import torch

from osp.config import MonitorConfig, Site, Statistic
from osp.model.sites import SITES, hook_site, layer_name
from osp.model.transformer import Transformer
from osp.model_config import ModelConfig
from osp.run.verdict import LEVELS, LIMITS, USUAL
from tests.documents import read_page, tables

PAGE = read_page("docs/monitoring.md")


def table(first_title: str) -> list[list[str]]:
    """Return the cells of each row of the table whose first column has this title."""
    (rows,) = tables(PAGE, first_title)
    return [list(row.values()) for row in rows]


def test_table_of_sites_equals_the_map() -> None:
    documented = {cells[0].strip("`"): cells[1] for cells in table("site")}
    modules = {
        name: (f"`{site.module}`" if site.module else "the block")
        + (", output" if site.argument is None else f", input {site.argument}")
        for name, site in SITES.items()
    }
    assert documented == modules


def test_shapes_of_the_sites_are_those_of_a_forward_pass() -> None:
    sizes = {"D": 24, "F": 40, "HK": 4 * 8, "GK": 2 * 8}
    config = ModelConfig(
        vocab_size=16,
        hidden_size=sizes["D"],
        intermediate_size=sizes["F"],
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = Transformer(config)
    model.init_weights(0)
    seen: dict[str, int] = {}
    for kind, site in SITES.items():
        name = f"{layer_name(0)}/{kind}" if site.in_block else kind
        hook_site(model, name, lambda x, kind=kind: seen.__setitem__(kind, x[0].flatten(1).shape[1]))
    model(torch.zeros(1, 3, dtype=torch.long))
    documented = {cells[0].strip("`"): sizes[cells[2].removeprefix("(T,").removesuffix(")")] for cells in table("site")}
    assert documented == seen


@pytest.mark.parametrize(
    ("title", "names", "light"),
    [("site", get_args(Site), MonitorConfig().sites), ("statistic", get_args(Statistic), MonitorConfig().statistics)],
)
def test_tables_list_all_names_and_those_of_monitor_light(title: str, names: tuple[str], light: tuple[str]) -> None:
    column = 3 if title == "site" else 2
    rows = {cells[0].strip("`"): cells[column] for cells in table(title)}
    rows = {name: cell for name, cell in rows.items() if cell != "quantized only"}
    assert sorted(rows) == sorted(names)
    assert {name for name, cell in rows.items() if cell == "yes"} == set(light)


def test_table_of_alerts_has_the_default_rules() -> None:
    documented = {}
    for statistic, site, *limits in table("rule of"):
        numbers = [float(limit) if limit else None for limit in limits]
        documented[statistic.strip("`"), site.strip("`")] = numbers
    rules = {
        (statistic, site): [rule.above, rule.growth, rule.floor if rule.growth else None]
        for statistic, sites in MonitorConfig().alerts.items()
        for site, rule in sites.items()
    }
    assert documented == rules


def test_verdict_has_the_levels_and_bounds_of_the_code() -> None:
    limits = {mark: limit.split()[-1] for mark, limit, _ in table("mark") if limit.startswith("below")}
    assert limits == {about["mark"]: f"{about['below']:g}" for about in LEVELS.values() if about.get("below", 9) < 9}
    normal, _, outlier = (limit for _, limit, _ in table("judgement"))
    assert f"{USUAL['block_out']:g} for the residual stream, {USUAL['down_proj_in']:g} for `down_proj_in`" in normal
    assert outlier.endswith(f", {LIMITS['block_out']:g}, or {LIMITS['down_proj_in']:g} for `down_proj_in`")
