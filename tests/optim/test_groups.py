from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import nn

from osp.config import OptimizerConfig
from osp.errors import UserError
from osp.optim.groups import build_groups, describe_groups
from tests.optim.reference import Model

CONFIG = OptimizerConfig(lr=1e-3, adam_lr=2e-3, weight_decay=0.1)


def test_groups_are_role_and_shape_and_cover_every_parameter_once() -> None:
    model = Model()
    groups = build_groups(model, CONFIG)
    keys = [(g["role"], g["rule"], tuple(sorted(set(g["shapes"])))) for g in groups]
    assert sorted(keys) == [
        ("embedding", "adamw", ((11, 8),)),
        ("gain", "normalized", ((1,),)),
        ("gain", "normalized", ((8,),)),
        ("head", "adamw", ((11, 8),)),
        ("matrix", "muon", ((5, 7),)),
        ("matrix", "muon", ((8, 8),)),
        ("matrix", "muon", ((8, 24),)),
        ("matrix", "muon", ((24, 8),)),
    ]
    named = dict(model.named_parameters())
    listed = [(n, p) for g in groups for n, p in zip(g["names"], g["params"], strict=True)]
    assert len(listed) == len(named)
    assert all(named[n] is p for n, p in listed)
    assert {g["base_lr"] for g in groups if g["rule"] == "adamw"} == {2e-3}
    assert {g["base_lr"] for g in groups if g["rule"] != "adamw"} == {1e-3}


def test_adamw_learning_rate_defaults_to_lr() -> None:
    groups = build_groups(Model(), replace(CONFIG, adam_lr=None))
    assert {g["base_lr"] for g in groups} == {1e-3}


@pytest.mark.parametrize("rule", ["normalized", "adamw"])
def test_decay_of_gains_is_apart_from_other_roles(rule: str) -> None:
    config = replace(CONFIG, rules=CONFIG.rules | {"gain": rule})
    for given, expected in ((None, 0.1), (0.0, 0.0), (0.3, 0.3)):
        groups = build_groups(Model(), replace(config, gain_decay=given))
        assert {g["weight_decay"] for g in groups if g["role"] == "gain"} == {expected}
        assert {g["weight_decay"] for g in groups if g["role"] != "gain"} == {0.1}


def test_roles_choose_rules() -> None:
    model = Model()
    everything = dict.fromkeys(CONFIG.rules, "adamw")
    groups = build_groups(model, replace(CONFIG, rules=everything))
    assert {g["role"]: len(g["names"]) for g in groups} == {"embedding": 1, "matrix": 13, "gain": 10, "head": 1}
    muon_all = CONFIG.rules | {"embedding": "muon", "head": "muon"}
    groups = build_groups(model, replace(CONFIG, rules=muon_all))
    assert {g["rule"] for g in groups if g["role"] in ("embedding", "head")} == {"muon"}


def test_parameter_without_role_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    roles = model.parameter_roles()
    del roles["up.weight"]
    monkeypatch.setattr(model, "parameter_roles", lambda: roles)
    with pytest.raises(UserError, match=r"'up.weight' has role None and so is in no group"):
        build_groups(model, CONFIG)


def test_unknown_role_and_unknown_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, roles = Model(), Model().parameter_roles()
    monkeypatch.setattr(model, "parameter_roles", lambda: roles | {"up.weight": "matrices"})
    with pytest.raises(UserError, match=r"'up.weight' has role 'matrices'.*choose from \['matrix'"):
        build_groups(model, CONFIG)
    monkeypatch.setattr(model, "parameter_roles", lambda: roles | {"nope": "matrix"})
    with pytest.raises(UserError, match=r"gives a role to 'nope'"):
        build_groups(model, CONFIG)


def test_tied_parameter_is_in_the_group_of_its_name_and_cannot_have_two_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    model, roles = Model(), Model().parameter_roles()
    model.head.weight = cast(nn.Parameter, model.embedding.weight)
    groups = {group["role"]: group["names"] for group in build_groups(model, CONFIG)}
    assert groups["embedding"] == ["embedding.weight"]
    assert "head" not in groups
    monkeypatch.setattr(model, "parameter_roles", lambda: roles)
    with pytest.raises(UserError, match=r"'head.weight' is in two groups: it is also 'embedding.weight'"):
        build_groups(model, CONFIG)


def test_unknown_and_unsuitable_rules_are_refused() -> None:
    with pytest.raises(UserError, match=r"rules.matrix='sgd': unknown rule; choose from adamw, muon, normalized"):
        build_groups(Model(), replace(CONFIG, rules=CONFIG.rules | {"matrix": "sgd"}))
    with pytest.raises(UserError, match=r"rules.gain=muon: the rule needs 2-D parameters, 'blocks.0.gain.weight' is"):
        build_groups(Model(), replace(CONFIG, rules=CONFIG.rules | {"gain": "muon"}))
    with pytest.raises(UserError, match=r"optimizer.rules.gain=None: unknown rule"):
        build_groups(Model(), replace(CONFIG, rules={"matrix": "muon", "embedding": "adamw"}))
    with pytest.raises(UserError, match=r"optimizer.ns_coefficients='x': choose from"):
        build_groups(Model(), replace(CONFIG, ns_coefficients="x"))


def test_table_has_a_line_per_group() -> None:
    groups = build_groups(Model(), CONFIG)
    lines = describe_groups(groups).splitlines()
    assert lines[0].split()[:4] == ["group", "count", "shape", "rule"]
    assert len(lines) == 2 + len(groups)
    (square,) = [line.split() for line in lines if " 8x8 " in line]
    assert square[:5] == ["matrix", "5", "8x8", "muon", "0.001"]
    assert square[-1] == "0.1"


def test_matrices_with_heads_have_separate_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, per_head = Model().parameter_heads(), replace(CONFIG, per_head=True)
    groups = build_groups(Model(), per_head)
    assert {name: group["heads"] for group in groups for name in group["names"] if group["heads"]} == heads
    assert all(len({heads.get(name) for name in group["names"]}) == 1 for group in groups if group["rule"] == "muon")
    assert "8x24 in 3 heads" in describe_groups(groups)
    assert not any(group["heads"] for group in build_groups(Model(), CONFIG))
    with pytest.raises(
        UserError, match=r"per_head=true does nothing with optimizer.rules.matrix=adamw, which does not"
    ):
        build_groups(Model(), replace(per_head, rules=CONFIG.rules | {"matrix": "adamw"}))
    monkeypatch.setattr(Model, "parameter_heads", lambda _: {})
    assert not any(group["heads"] for group in build_groups(Model(), per_head))


def test_groups_do_not_depend_on_parameter_values() -> None:
    meta = Model().to("meta")
    assert describe_groups(build_groups(meta, CONFIG)) == describe_groups(build_groups(Model(), CONFIG))
    assert torch.device("meta") == meta.up.weight.device
