"""The keys of `scripts/convert.py` and `scripts/export.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ConvertConfig:
    """Keys of `scripts/convert.py`."""

    path: str = ""  # a run, a checkpoint or the folder of a Hugging Face Llama
    to: str = ""  # a name of osp.convert.change_norm.CONVERTIBLE
    out: str = ""  # the folder to write
    text: str = "held_out"  # name of the text that both models are compared on; see osp.evaluation.texts
    device: Literal["auto", "cpu", "cuda"] = "auto"
    debug: bool = False


@dataclass(frozen=True)
class ExportConfig:
    """Keys of `scripts/export.py`."""

    path: str = ""  # a run or a checkpoint
    out: str = ""  # the folder to write
    dtype: Literal["fp32", "bf16"] = "fp32"
    max_shard_size: str = "5GB"
    text: str = "held_out"  # name of the text that both models are compared on; see osp.evaluation.texts
    device: Literal["auto", "cpu", "cuda"] = "auto"
    debug: bool = False
