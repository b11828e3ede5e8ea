"""The keys of `scripts/convert.py` and `scripts/export.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ConvertConfig:
    path: str = ""  # a run, a checkpoint or the folder of a Hugging Face Llama
    out: str = ""  # the folder to write
    text: str = "held_out"  # text that both models are compared on, as in `texts` of scripts/evaluate.py
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is a GPU
    debug: bool = False  # show tracebacks of user errors
    to: str = ""  # the new norm, a name in osp.convert.change_norm.CONVERTIBLE


@dataclass(frozen=True)
class ExportConfig:
    path: str = ""  # a run or a checkpoint
    out: str = ""  # the folder to write
    text: str = "held_out"  # text that both models are compared on, as in `texts` of scripts/evaluate.py
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is a GPU
    debug: bool = False  # show tracebacks of user errors
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights in the files
    max_shard_size: str = "5GB"  # upper bound of a weight file
