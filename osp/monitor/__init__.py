"""See outliers form: statistics of activations, the probe that takes them, alerts, and what stands behind one."""

from osp.monitor.inspect import inspect
from osp.monitor.monitor import Monitor
from osp.monitor.probe import Reading, Rows, probe

__all__ = ["Monitor", "Reading", "Rows", "inspect", "probe"]
