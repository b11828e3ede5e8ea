"""Watch outliers form: statistics of activations, the probe that measures them, alerts, and forensics."""

from osp.monitor.inspect import inspect
from osp.monitor.monitor import Monitor
from osp.monitor.probe import ProbeText, Reading, probe

__all__ = ["Monitor", "ProbeText", "Reading", "inspect", "probe"]
