"""Outlier-Safe Pre-Training in PyTorch: language models that never grow activation outliers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osp.model.hf_llama import load_hf
    from osp.run.checkpoint import load_model

__all__ = ["load_hf", "load_model"]


def __getattr__(name: str) -> Any:
    """`osp.load_model` and `osp.load_hf`, imported when asked for: configuration checks need no torch."""
    if name == "load_model":
        from osp.run.checkpoint import load_model

        return load_model
    if name == "load_hf":
        from osp.model.hf_llama import load_hf

        return load_hf
    raise AttributeError(f"module 'osp' has no attribute {name!r}")
