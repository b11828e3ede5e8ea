"""Parameter groups from roles: which parameters share a flat tensor, and the rule, rate and decay each role gets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from osp.config import ROLES, Heads, OptimizerConfig
from osp.errors import UserError
from osp.optim.muon import COEFFICIENTS
from osp.tables import text_table

Group = dict[str, Any]

# RMS of an update divided by the learning rate, for the table printed at start
_UPDATE_SCALES = {
    "muon": "0.2 (full rank)",  # 0.2 sqrt(max(m, n)) times an orthogonal matrix of RMS 1/sqrt(max(m, n))
    "normalized": "0.2",  # 0.2 sqrt(d) times a unit vector
    "adamw": "<= ~1",
}


def collect_roles(
    named_parameters: Iterable[tuple[str, nn.Parameter]], roles: Mapping[str, str]
) -> list[tuple[str, nn.Parameter, str | None]]:
    """(name, parameter, role) of every parameter; role None where `roles`, from the model, has no entry.

    named_parameters: with `remove_duplicate=False`, so that a tied weight is seen under each of its names.
    """
    named = list(named_parameters)
    if unknown := sorted(set(roles) - {name for name, _ in named}):
        raise UserError(f"the model gives a role to {unknown[0]!r}, which is no parameter of it")
    return [(name, parameter, roles.get(name)) for name, parameter in named]


def build_groups(
    named_roles: Iterable[tuple[str, nn.Parameter, str | None]],
    config: OptimizerConfig,
    heads: Mapping[str, Heads] | None = None,
) -> list[Group]:
    """Parameter groups for `PartitionedOptimizer`: one per role and shape, for the rule adamw one per role.

    heads: of the matrices that `optimizer.per_head` takes head by head, by name; they have groups of their own.
    Raises `UserError` unless every parameter is in exactly one group and its rule fits its shape.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    seen: dict[int, str] = {}
    for name, parameter, role in named_roles:
        if id(parameter) in seen:
            raise UserError(f"parameter {name!r} is in two groups: it is also {seen[id(parameter)]!r}")
        seen[id(parameter)] = name
        if role not in ROLES:
            raise UserError(f"parameter {name!r} has role {role!r} and so is in no group; choose from {list(ROLES)}")
        rule = config.rules.get(role)
        if rule not in _OPTIONS:
            raise UserError(f"optimizer.rules.{role}={rule!r}; choose from {sorted(_OPTIONS)}")
        shape = tuple(parameter.shape)
        expected = {"muon": 2, "normalized": 1}.get(rule, len(shape))
        if len(shape) != expected:
            raise UserError(
                f"optimizer.rules.{role}={rule}: the rule needs {expected}-D parameters, {name!r} is {shape}"
            )
        split = (heads or {}).get(name) if config.per_head and rule == "muon" else None
        key = (role,) if rule == "adamw" else (role, shape, split)
        new: Group = {"role": role, "rule": rule, "heads": split, "names": [], "shapes": [], "params": []}
        group = groups.setdefault(key, {**new, **_OPTIONS[rule](config)})
        group["names"].append(name)
        group["shapes"].append(shape)
        group["params"].append(parameter)
    return list(groups.values())


class Trainable(Protocol):
    """What an optimizer needs of a model: roles of its parameters and heads of its matrices, which make its groups."""

    def parameter_roles(self) -> Mapping[str, str]: ...
    def parameter_heads(self) -> Mapping[str, Heads]: ...
    def named_parameters(self, *, remove_duplicate: bool) -> Iterator[tuple[str, nn.Parameter]]: ...


def groups_of(model: Trainable, config: OptimizerConfig) -> list[Group]:
    """The groups of a whole model; raises what `collect_roles` and `build_groups` raise."""
    named = collect_roles(model.named_parameters(remove_duplicate=False), model.parameter_roles())
    return build_groups(named, config, model.parameter_heads())


def describe_groups(groups: Sequence[Group]) -> str:
    """The table printed at start: one line per group."""
    rows = [("group", "count", "shape", "rule", "learning rate", "update RMS / rate", "decay")]
    for group in groups:
        shapes = sorted(set(group["shapes"]))
        shown = ", ".join("x".join(map(str, shape)) for shape in shapes[:3]) + (" ..." if len(shapes) > 3 else "")
        if group["heads"]:
            shown += f" in {group['heads'].count} heads"
        rate, scale, decay = f"{group['base_lr']:g}", _UPDATE_SCALES[group["rule"]], f"{group['weight_decay']:g}"
        rows.append((group["role"], str(len(group["shapes"])), shown, group["rule"], rate, scale, decay))
    return text_table(rows)


def _muon_options(config: OptimizerConfig) -> Group:
    if config.ns_coefficients not in COEFFICIENTS:
        raise UserError(f"optimizer.ns_coefficients={config.ns_coefficients!r}; choose from {sorted(COEFFICIENTS)}")
    return {
        **_normalized_options(config),
        "ns_steps": config.ns_steps,
        "ns_method": config.ns_method,
        "ns_coefficients": config.ns_coefficients,
        "ns_dtype": config.ns_dtype,
    }


def _normalized_options(config: OptimizerConfig) -> Group:
    return {
        "base_lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
    }


def _adamw_options(config: OptimizerConfig) -> Group:
    return {
        "base_lr": config.lr if config.adam_lr is None else config.adam_lr,
        "weight_decay": config.weight_decay,
        "betas": config.adam_betas,
        "eps": config.adam_eps,
    }


_OPTIONS = {"muon": _muon_options, "normalized": _normalized_options, "adamw": _adamw_options}
