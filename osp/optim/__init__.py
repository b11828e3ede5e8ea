"""Optimizers as pure mathematics plus layout: torch only, no DeepSpeed and no model."""

from osp.optim.groups import Trainable, build_groups, describe_groups, groups_of
from osp.optim.muon import COEFFICIENTS, newton_schulz, newton_schulz_dtype
from osp.optim.optimizer import PartitionedOptimizer
from osp.optim.rules import RULES, UpdateRule, WholeRule
from osp.optim.schedule import build_schedule

__all__ = [
    "COEFFICIENTS",
    "RULES",
    "PartitionedOptimizer",
    "Trainable",
    "UpdateRule",
    "WholeRule",
    "build_groups",
    "build_schedule",
    "describe_groups",
    "groups_of",
    "newton_schulz",
    "newton_schulz_dtype",
]
