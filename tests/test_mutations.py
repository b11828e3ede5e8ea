"""Random mutations of a valid configuration: accepted, or refused in one line; never a traceback, a hang or an
allocation."""

import copy
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osp.config import Config, from_dict, to_dict
from osp.errors import UserError
from osp.model.transformer import flops_per_token, meta_model
from osp.optim.groups import build_groups
from osp.train.engine import zero_settings
from osp.train.resolve import resolve
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import entry

CPU = torch.device("cpu")
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
FEW = settings(max_examples=250, derandomize=True, database=None, deadline=60_000, suppress_health_check=CHECKS)
MANY = settings(max_examples=20_000, database=None, deadline=60_000, suppress_health_check=CHECKS)


def leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every key of a tree, inner nodes included."""
    if not isinstance(tree, dict):
        return []
    return [inner for key, value in tree.items() for inner in [(*path, key), *leaves(value, (*path, key))]]


VALID = to_dict(from_dict({"train": {"steps": 10, "seq_len": 64, "tokens_per_step": 512}, "data": {"source": "text",
                "paths": ["corpus.jsonl"]}, "model": {"hidden_size": 64, "intermediate_size": 96}}))  # fmt: skip
PATHS = leaves(VALID)
GROUPS = [key for key, value in VALID.items() if isinstance(value, dict)]

numbers = st.one_of(
    st.integers(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, 10**12, 10**30, -(10**18), 10**400]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, 5e9, 0.5]),
)
words = st.one_of(
    st.text(max_size=12),
    st.text("0123456789%.e- stoken", max_size=12),
    st.sampled_from(["auto", "None", "null", "true", "5%", "1e9 tokens", "../x", "/", "adamw", "muon", "bhyt", "dyt"]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(words, numbers), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """Return VALID with one to four mutations: a value of any type, a deletion, an unknown key, two groups swapped."""
    tree = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["value", "value", "value", "number", "delete", "unknown", "swap"]))
        *above, last = draw(st.sampled_from(PATHS))
        table = tree
        for key in above:
            table = table.get(key) if isinstance(table, dict) else None
        if kind == "swap":
            a, b = draw(st.sampled_from(GROUPS)), draw(st.sampled_from(GROUPS))
            tree[a], tree[b] = tree.get(b), tree.get(a)
        elif not isinstance(table, dict):
            continue  # removed by an earlier mutation
        elif kind == "delete":
            table.pop(last, None)
        elif kind == "unknown":
            table[draw(words)] = draw(values)
        else:
            table[last] = draw(values if kind == "value" else numbers)
    return tree


def build_shapes(config: Config, *, world_size: int = 2) -> None:
    """Run the part of `osp.train.setup.setup` that needs no process group, disk or text."""
    model = meta_model(config.model)
    build_groups(model, config.optimizer)
    resolved = resolve(config, device=CPU, world_size=world_size)
    config = resolved.config
    if config.train.steps is not None:
        factor = resolved.build_schedule()
        assert all(0 <= factor(step) <= 1 for step in {0, config.train.steps // 2, config.train.steps - 1})
    flops_per_token(config.model, config.train.seq_len)
    json.dumps(zero_settings(config.engine.zero_stage, world_size=world_size, num_parameters=1, device=CPU))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def refused(action: Callable[[], object]) -> bool:
    """Return whether `action` raises a `UserError`, which must be one line. Other exceptions propagate."""
    try:
        action()
    except UserError as error:
        message = str(error)
        assert message
        assert not set(message) & set("\n\r")
        return True
    return False


def check_mutation(tree: dict[str, Any]) -> None:
    refused(lambda: build_shapes(from_dict(tree)))


@FEW
@given(mutated())
def test_mutated_configuration_is_built_or_refused(tree: dict[str, Any]) -> None:
    check_mutation(tree)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(mutated())
def test_many_mutated_configurations_are_built_or_refused(tree: dict[str, Any]) -> None:
    check_mutation(tree)


def test_the_unchanged_configuration_is_built() -> None:
    assert not refused(lambda: build_shapes(from_dict(VALID)))


# --- command lines ------------------------------------------------------------------------------------------------

OVERRIDES = [
    "train.steps=10",
    "norm=bhyt",
    "model=60m",
    "+experiment=osp_1b",
    "data=text",
    "data.paths=[a.jsonl,b/]",
    "optimizer.rules.gain=normalized",
    "optimizer.adam_betas=[0.9,0.95]",
    "schedule.warmup=5%",
    "run.name=${model.hidden_size}",
    "'schedule.decay=5e9 tokens'",
    "~norm.eps",
    "--config-name=train",
]
pieces = st.sampled_from(
    [*"=.,+~[]{}()'\"\\$:@#%-/!* \n\0é", "${", "}", "null", "choice(", "range(", "${oc.env:", "???"]
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Return one to three overrides with characters removed, doubled or replaced."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        text = draw(st.sampled_from(OVERRIDES))
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(text)))
            stop = min(len(text), start + draw(st.integers(0, 4)))
            text = text[:start] + draw(st.one_of(pieces, st.just(""), st.just(text))) + text[stop:]
        lines.append(text)
    return lines


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], None]:
    """Compose and check a command line: it is valid, or gives one line and status 2, or is an option of Hydra."""
    reached: list[dict[str, Any]] = []

    def run(arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        capsys.readouterr()
        try:
            entry.run(lambda composed: reached.append(to_dict(from_dict(composed))))
            return
        except SystemExit as stop:
            code = stop.code
        lines = [line for line in capsys.readouterr().err.split("\n") if line]
        assert code == 0 or (code == 2 and len(lines) == 1 and lines[0].startswith("error: ")), lines

    return run


def test_mutated_command_line_is_composed_or_refused(
    started: Callable[[list[str]], None], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_command_lines(started, tmp_path, monkeypatch, settings(FEW, max_examples=60))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_mutated_command_lines_are_composed_or_refused(
    started: Callable[[list[str]], None], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_command_lines(started, tmp_path, monkeypatch, settings(MANY, max_examples=3000))


def check_command_lines(
    started: Callable[[list[str]], None], folder: Any, monkeypatch: pytest.MonkeyPatch, options: settings
) -> None:
    monkeypatch.chdir(folder)
    options(given(command_lines())(started))()
    assert os.listdir(folder) == []
