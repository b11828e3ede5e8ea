"""Watch outliers form: statistics of activations, the probe that measures them, alerts, and forensics."""

from osp.monitor.inspect import inspect
from osp.monitor.monitor import Monitor
from osp.monitor.probe import Reading, Rows, probe

__all__ = ["Monitor", "Reading", "Rows", "inspect", "probe"]
