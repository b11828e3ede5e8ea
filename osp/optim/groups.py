"""Parameter groups from roles: parameters of one group share a flat tensor, an update rule and a weight decay."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from osp.config import OptimizerConfig
from osp.errors import UserError
from osp.model_config import ROLES, Heads
from osp.optim.rules import RULES, Group, WholeRule
from osp.tables import text_table


class Trainable(Protocol):
    """What an optimizer needs of a model: its parameters, their roles, and the heads of its attention matrices."""

    def parameter_roles(self) -> Mapping[str, str]: ...
    def parameter_heads(self) -> Mapping[str, Heads]: ...
    def named_parameters(self, *, remove_duplicate: bool) -> Iterator[tuple[str, nn.Parameter]]: ...


def build_groups(model: Trainable, config: OptimizerConfig) -> list[Group]:
    """Return the groups for `PartitionedOptimizer`: one per role and shape, or one per role for elementwise rules.

    A group holds `role`, `rule` (its name), `update_rule` (its `UpdateRule`), `heads`, `base_lr`, `weight_decay`, in
    one order `names`, `shapes` and `params`. `UserError` if a parameter is not in one group or a rule misfits.
    """
    named, roles = list(model.named_parameters(remove_duplicate=False)), model.parameter_roles()
    heads = model.parameter_heads() if config.per_head else {}
    if unknown := sorted(set(roles) - {name for name, _ in named}):
        raise UserError(f"the model gives a role to {unknown[0]!r}, which is not one of its parameters")
    matrix_rule = config.rules.get("matrix")
    if config.per_head and matrix_rule in RULES and not RULES[matrix_rule].TAKES_HEADS:
        raise UserError(
            f"optimizer.per_head=true does nothing with optimizer.rules.matrix={matrix_rule}, which does not split "
            "matrices into heads; set optimizer.per_head=false or take optimizer=muon"
        )
    groups: dict[tuple[Any, ...], Group] = {}
    seen: dict[int, str] = {}
    for name, parameter in named:
        role = roles.get(name)
        if id(parameter) in seen and role is None:  # tied: it has one name with a role
            continue
        if id(parameter) in seen:
            raise UserError(f"parameter {name!r} is in two groups: it is also {seen[id(parameter)]!r}")
        seen[id(parameter)] = name
        if role not in ROLES:
            raise UserError(f"parameter {name!r} has role {role!r} and so is in no group; choose from {list(ROLES)}")
        rule = config.rules.get(role)
        if rule not in RULES:
            raise UserError(f"optimizer.rules.{role}={rule!r}: unknown rule; choose from {', '.join(sorted(RULES))}")
        kind, shape = RULES[rule], parameter.shape
        if kind.NDIM not in (None, len(shape)):
            raise UserError(
                f"optimizer.rules.{role}={rule}: the rule needs {kind.NDIM}-D parameters, {name!r} is {tuple(shape)}"
            )
        split = heads.get(name) if kind.TAKES_HEADS else None
        key = (role, shape, split) if issubclass(kind, WholeRule) else (role,)
        if key not in groups:
            update_rule = kind(config)
            groups[key] = {"role": role, "rule": rule, "update_rule": update_rule, "heads": split}
            decay = config.gain_decay if role == "gain" and config.gain_decay is not None else config.weight_decay
            groups[key] |= {"base_lr": update_rule.base_lr, "weight_decay": decay}
            groups[key] |= {"names": [], "shapes": [], "params": []}
        groups[key]["names"].append(name)
        groups[key]["shapes"].append(shape)
        groups[key]["params"].append(parameter)
    return list(groups.values())


def describe_groups(groups: Sequence[Group]) -> str:
    """Return the table printed at start: one line per group."""
    table = [("group", "count", "shape", "rule", "learning rate", "update RMS / learning rate", "weight decay")]
    for group in groups:
        shapes = sorted(set(group["shapes"]))
        text = ", ".join("x".join(map(str, shape)) for shape in shapes[:3]) + (" ..." if len(shapes) > 3 else "")
        if group["heads"]:
            text += f" in {group['heads'].count} heads"
        lr, decay = f"{group['base_lr']:g}", f"{group['weight_decay']:g}"
        rms = group["update_rule"].UPDATE_RMS
        table.append((group["role"], str(len(group["shapes"])), text, group["rule"], lr, rms, decay))
    return text_table(table)
