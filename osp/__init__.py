"""Outlier-Safe Pre-Training in PyTorch: language models that never grow activation outliers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osp.checkpoint import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """`osp.load_model`, imported when it is asked for: configuration checks need no torch."""
    if name == "load_model":
        from osp.checkpoint import load_model

        return load_model
    raise AttributeError(f"module 'osp' has no attribute {name!r}")
