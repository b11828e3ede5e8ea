"""The keys of `scripts/convert.py` and `scripts/export.py`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from osp.config import Weights
from osp.quant.spec import QuantSpec
from osp.schema import Device, Int, Threads


@dataclass(frozen=True)
class ConvertConfig:
    path: str = ""  # a run, a checkpoint or the folder of a Hugging Face Llama
    weights: Weights = "trained"  # of a run; averaged: their running average, see the table `average` of a training
    out: str = ""  # the folder to write
    text: str = "held_out"  # text that both models are compared on, as in `texts` of scripts/evaluate.py
    device: Device = "auto"  # auto: CUDA if there is a GPU
    debug: bool = False  # show tracebacks of user errors
    to: str = ""  # the new norm, a name in osp.convert.change_norm.CONVERTIBLE


@dataclass(frozen=True)
class ExportConfig:
    path: str = ""  # a run or a checkpoint
    weights: Weights = "trained"  # averaged: their running average, see the table `average` of a training
    out: str = ""  # the folder to write; format=gguf: the file
    format: Literal["hf", "compressed-tensors", "gguf"] = "hf"  # what is written
    # compressed-tensors: W4A16, W4A16_G32, W8A8, NVFP4, NVFP4A16, MXFP4, MXFP4A16; gguf: q4_0, q8_0, bf16, f32
    scheme: str | None = None
    # How weights are rounded: method, w_clip, act_order, damping, calibration, calibration_tokens, seed
    quant: QuantSpec = field(default_factory=QuantSpec)
    text: str = "held_out"  # text that the certificate measures, as in `texts` of scripts/evaluate.py
    device: Device = "auto"  # auto: CUDA if there is a GPU
    threads: Threads | None = None  # CPU threads; None: all cores
    debug: bool = False  # show tracebacks of user errors
    # Of the stored weights; None: fp32. Only for format=hf, the other formats have the dtypes of their schemes.
    dtype: Literal["fp32", "bf16"] | None = None
    # Zero channels fill the FFN up to a multiple of it; None: what the format needs, 1: none are added.
    ffn_multiple: Annotated[Int, Field(ge=1, le=4096)] | None = None
