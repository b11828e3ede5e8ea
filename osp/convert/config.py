"""The keys of `scripts/convert.py` and `scripts/export.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ConvertConfig:
    path: str = ""  # a run, a checkpoint or the folder of a Hugging Face Llama
    out: str = ""  # the folder to write
    text: str = "held_out"  # name of the text that both models are compared on; see osp.evaluation.texts
    device: Literal["auto", "cpu", "cuda"] = "auto"
    debug: bool = False
    to: str = ""  # a name of osp.convert.change_norm.CONVERTIBLE


@dataclass(frozen=True)
class ExportConfig:
    path: str = ""  # a run or a checkpoint
    out: str = ""
    text: str = "held_out"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    debug: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    max_shard_size: str = "5GB"
