"""What `scripts/export.py` needs to know of a kind of file: who reads it, what it can hold, how it is written.

To add one, write a subclass of `FileFormat` and enter it in `FORMATS` of osp/convert/export.py.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel
from osp.model.transformer import Transformer
from osp.model_config import ModelConfig
from osp.quant.apply import Quantized
from osp.quant.spec import QuantSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDING = ("method", "w_clip", "act_order", "damping", "calibration", "calibration_tokens", "seed")  # keys of `quant`


class Client(Protocol):
    """A program that has read a file, as the certificate uses it."""

    name: str  # library and version

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V), fp32 on the CPU, of the token ids (B, T), int64 on the CPU; no BOS is added."""
        ...

    def encode(self, text: str) -> list[int] | None:
        """Return the tokens of `text`, None without a tokenizer. No BOS or EOS; names of special tokens are text."""
        ...


@dataclass(frozen=True)
class LlamaSource:
    """What is written."""

    model: Transformer  # a stock Llama (RMSNorm with a gain per channel, FFN padded), fp32; values fit in `dtype`
    subject: LanguageModel  # the trained model with its tokenizer; `model` has other weights
    dtype: torch.dtype  # of the tensors that are not quantized


class FileFormat(ABC):
    """A kind of file. Methods with a scheme get a key of `schemes`, or "" if there are none."""

    name: ClassVar[str]  # value of the key `format`
    schemes: ClassVar[Mapping[str, QuantSpec]] = {}  # value of the key `scheme` -> bits, formats and groups
    dtypes: ClassVar[tuple[str, ...]] = ()  # choices of the key `dtype`, the default first; (): the scheme decides
    suffix: ClassVar[str] = ""  # of the file; "": a folder
    tolerance: ClassVar[float] = 1e-4  # of the perplexity by the client, relative to fake quantization

    @abstractmethod
    def ffn_multiple(self, scheme: str) -> int:
        """Return what the width of the FFN has to be a multiple of; zero channels fill it up."""

    def check(self, config: ModelConfig, tokenizer: Tokenizer, scheme: str) -> None:  # noqa: B027
        """Raise `UserError` if a model of this shape (FFN padded) or tokenizer cannot be written. Called first."""

    def dtype(self, scheme: str) -> torch.dtype:
        """Return what tensors that are not quantized are rounded to, where `dtypes` leaves no choice."""
        return torch.float32

    @abstractmethod
    def write(self, source: LlamaSource, state: Quantized, scheme: str, path: Path) -> None:
        """Write the new file `path`, or into the empty folder `path`; called inside `quantized(source.model, ...)`.

        The weights of the model are rounded already, and `state.grids` has their scales. A full disk is an `OSError`.
        """

    @abstractmethod
    def open(self, path: Path, device: torch.device) -> Client:
        """Return the client that has read the file; `device` is where it computes if it can."""

    def hint(self, path: Path, scheme: str) -> str | None:
        """Return a sentence about what other programs make of the file at `path`."""
        return None

    @abstractmethod
    def above_four_bits(self, path: Path) -> list[str]:
        """Return the names of the tensors with more than 4 bits per weight, scales not counted."""

    def quantization(self, scheme: str, quant: QuantSpec) -> QuantSpec:
        """Return the quantization of a scheme, with the keys of `quant` that say how weights are rounded."""
        if self.schemes and not scheme:
            raise UserError(f"format={self.name}: choose a scheme from {', '.join(self.schemes)}")
        if scheme and scheme not in self.schemes:
            names = {name.lower(): name for name in self.schemes}
            close = difflib.get_close_matches(scheme.lower(), names, n=1)
            hint = f"; did you mean {names[close[0]]}?" if close else ""
            known = ", ".join(self.schemes) or "no schemes; leave scheme out, or choose another format"
            raise UserError(f"scheme={scheme}: format={self.name} has {known}{hint}")
        fixed, values, defaults = self.schemes[scheme] if scheme else QuantSpec(), asdict(quant), asdict(QuantSpec())
        changed = {key: value for key, value in values.items() if value != defaults[key]}
        where = f"format={self.name}{f' with scheme={scheme}' if scheme else ''}"
        if changed and fixed.is_identity:
            raise UserError(f"quant: {where} rounds no weights; leave quant out, or choose another format or scheme")
        if changed and not fixed.number_format("w").has_grid:
            raise UserError(f"quant: {where} rounds weights in one way only; leave quant out")
        for key, value in changed.items():
            # the presets gptq and hadamard set bits and ffn_hadamard as well
            from_preset = key == "ffn_hadamard" or (key in ("w_bits", "a_bits", "kv_bits") and value == 4)
            if key not in ROUNDING and not from_preset and value != getattr(fixed, key):
                raise UserError(
                    f"quant.{key}={str(value).lower()}: fixed by scheme={scheme}; quant says how weights are rounded, "
                    f"{', '.join(ROUNDING)}"
                )
        return replace(fixed, **{key: value for key, value in changed.items() if key in ROUNDING})

    def unquantized_dtype(self, scheme: str, dtype: str | None) -> str:
        """Return the key of `DTYPES` for tensors that are not quantized; dtype: what the user asks for."""
        if dtype is None:
            return self.dtypes[0] if self.dtypes else {kind: key for key, kind in DTYPES.items()}[self.dtype(scheme)]
        if not self.dtypes:
            raise UserError(f"dtype={dtype}: format={self.name} has the dtypes of its scheme; leave dtype out")
        return dtype

    def file_names(self, out: Path) -> tuple[str, ...]:
        """Return the names of the files that export writes beside each other, `out` last; (): `out` is a folder."""
        if self.suffix and out.suffix != self.suffix:
            raise UserError(f"out={out}: format={self.name} writes a file whose name ends in {self.suffix}")
        if not self.suffix and out.suffix == ".gguf":
            raise UserError(f"out={out}: format={self.name} writes a folder; format=gguf writes such a file")
        return (f"{out.stem}.certificate.json", f"{out.stem}.certificate.md", out.name) if self.suffix else ()
