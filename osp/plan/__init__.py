"""What a training will need, worked out before it starts."""

from osp.plan.plan import Plan, make_plan
from osp.plan.text import describe, to_json

__all__ = ["Plan", "describe", "make_plan", "to_json"]
