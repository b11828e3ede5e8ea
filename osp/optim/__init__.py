"""Optimizers as pure mathematics plus layout: torch only, no DeepSpeed and no model in here."""

from osp.optim.groups import build_groups, collect_roles, describe_groups
from osp.optim.muon import COEFFICIENTS, newton_schulz, newton_schulz_dtype
from osp.optim.optimizer import PartitionedOptimizer
from osp.optim.schedule import build_schedule
from osp.optim.zero import interval_table

__all__ = [
    "COEFFICIENTS",
    "PartitionedOptimizer",
    "build_groups",
    "build_schedule",
    "collect_roles",
    "describe_groups",
    "interval_table",
    "newton_schulz",
    "newton_schulz_dtype",
]
