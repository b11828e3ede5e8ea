"""The keys of `scripts/convert.py` and `scripts/export.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class _Paths:
    """Keys of both scripts."""

    path: str = ""  # a run or a checkpoint; for convert also the folder of a Hugging Face Llama
    out: str = ""  # the folder to write
    text: str = "held_out"  # name of the text that both models are compared on; see osp.evaluation.texts
    device: Literal["auto", "cpu", "cuda"] = "auto"
    debug: bool = False


@dataclass(frozen=True)
class ConvertConfig(_Paths):
    """Keys of `scripts/convert.py`."""

    to: str = ""  # a name of osp.convert.change_norm.CONVERTIBLE


@dataclass(frozen=True)
class ExportConfig(_Paths):
    """Keys of `scripts/export.py`."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    max_shard_size: str = "5GB"
