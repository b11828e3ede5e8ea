"""Configurations of `scripts/evaluate.py` and `scripts/compare.py`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from osp.config import Weights
from osp.quant.spec import QuantSpec
from osp.schema import Count, CountOrZero, Device, Int, Threads

COLUMNS = ("16-16-16", "4-8-16", "4-8-8", "4-4-16", "4-4-4")  # W-A-KV of table 2; the last of table 4
# Columns beside table 2, which has no such formats -> name in `osp.quant.deployed`. They fix all but the calibration.
DEPLOYED_COLUMNS = {"W4A16": "w4a16_g128", "NVFP4": "nvfp4", "MXFP4": "mxfp4"}
# The same, and the rounding of a quantization-aware training, which has no clip search
FORMAT_COLUMNS = DEPLOYED_COLUMNS | {"QAT W4A4": "qat_w4a4", "QAT W4A16": "qat_w4a16", "QAT NVFP4": "qat_nvfp4"}
_STATIC = {"static_activations": True, "a_group_size": None, "o_proj_by_head": False}
# Further columns -> bits, and the keys of `quant` that differ.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "4-4-4 +Had": ("4-4-4", {"ffn_hadamard": True}),
    "4-4-4 folded": ("4-4-4", {"fold_gains": True}),
    "static 8-8": ("8-8-16", _STATIC),
    "static 4-4": ("4-4-16", _STATIC),
}


def _column(name: str) -> str:
    if name not in (choices := (*COLUMNS, *VARIANTS, *FORMAT_COLUMNS)):
        raise ValueError(f"must be one of {', '.join(choices)}")
    return name


Column = Annotated[str, AfterValidator(_column)]


@dataclass(frozen=True)
class MeasureConfig:
    """Keys that both scripts have."""

    weights: Weights = "trained"  # of a run; averaged: their running average, see the table `average` of a training
    texts: tuple[str, ...] = ()  # for perplexity: `wikitext2`, `held_out`, run folders, files
    text_field: str = "text"  # the field of a record that holds the document
    # Tokens of a window; None: what the model was trained at, 2048 at most
    seq_len: Annotated[Int, Field(ge=2, le=2**24)] | None = None
    overlap: CountOrZero = 0  # tokens of a window that are context only
    bos: bool | None = None  # put the BOS token before every window and context; None: as in training (data.bos)
    # Tokens to read from the start of each text; None: all
    max_tokens: Annotated[Int, Field(ge=2, le=10**15)] | None = None
    tasks: tuple[str, ...] = ()  # jsonl files, names of files in tasks_dir, or `paper`: OSP's ten as far as present
    tasks_dir: str = "."  # folder of the task files
    num_fewshot: CountOrZero = 0  # examples before each item of a local task
    limit: Count | None = None  # items of each task; None: all
    lm_eval: tuple[str, ...] = ()  # tasks, tags and groups of the lm-evaluation-harness; `paper_ten`: OSP's ten
    lm_eval_dir: str | None = None  # folder of further task files for the harness; they can run code
    batch_tokens: Count = 8192  # tokens that the model reads at a time
    device: Device = "auto"  # auto: CUDA if there is a GPU
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # of matmuls; auto: bf16 if the hardware has it
    threads: Threads | None = None  # CPU threads per rank; None: all cores shared among the ranks of a host
    out: str | None = None  # JSON file; None: in `evaluation` of a run, nowhere for a Hugging Face folder
    progress: bool = True  # show a progress bar
    debug: bool = False  # show tracebacks of user errors


@dataclass(frozen=True)
class EvaluateConfig(MeasureConfig):
    path: str = ""  # a run, a checkpoint or a Hugging Face folder
    quant: QuantSpec = field(default_factory=QuantSpec)  # the quantization
    # Perplexity with only one site quantized, and with one left out, for each site; R_L per layer.
    ablate: bool = False


@dataclass(frozen=True)
class CompareConfig(MeasureConfig):
    paths: tuple[str, ...] = ()  # runs, checkpoints and Hugging Face folders
    quant: QuantSpec = field(default_factory=QuantSpec)  # the rows vary its bits and methods
    # What to measure; there are also `4-4-4 +Had`, `4-4-4 folded`, `static 8-8`, `static 4-4`, `QAT W4A4`, `QAT W4A16`
    # and `QAT NVFP4`
    columns: Annotated[tuple[Column, ...], Field(min_length=1)] = (*COLUMNS, *DEPLOYED_COLUMNS)
    # Where GPTQ and QuaRot are measured: nowhere, at 4-4-4 as in table 4, or at every column of table 2
    methods: Literal["none", "last", "all"] = "last"
    kurtosis_tokens: Count = 16_384  # tokens of the first text for its kurtosis, at most; the paper has 262144 of C4
