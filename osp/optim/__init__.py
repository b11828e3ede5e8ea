"""Optimizers as pure mathematics plus layout: torch only, no DeepSpeed and no model in here."""

from osp.optim.groups import Trainable, build_groups, collect_roles, describe_groups, groups_of
from osp.optim.muon import COEFFICIENTS, newton_schulz, newton_schulz_dtype
from osp.optim.optimizer import PartitionedOptimizer
from osp.optim.schedule import build_schedule
from osp.optim.zero import interval_table

__all__ = [
    "COEFFICIENTS",
    "PartitionedOptimizer",
    "Trainable",
    "build_groups",
    "build_schedule",
    "collect_roles",
    "describe_groups",
    "groups_of",
    "interval_table",
    "newton_schulz",
    "newton_schulz_dtype",
]
