"""Outlier-Safe Pre-Training in PyTorch: language models that never grow activation outliers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osp.model.hf_llama import load_hf
    from osp.run.checkpoint import load_model

__all__ = ["load_hf", "load_model"]
_MODULES = {"load_hf": "osp.model.hf_llama", "load_model": "osp.run.checkpoint"}


def __getattr__(name: str) -> Any:
    """Import `osp.load_model` and `osp.load_hf` on first use: configuration checks need no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'osp' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
