"""What stands behind a converted model: `certificate.json`, measurements that it computes what the first one did.

Two models are compared on the same tokens. Every conversion leaves the logits unchanged, and in each block what o_proj
and down_proj read, for these lie between a reader of the residual stream and a writer; the first of them that differs
says where two models part. Three times: in fp64 with the weights as the conversion made them, where rounding is all
there may be; in fp64 with the weights as they are stored, in fp32; and in bf16, where the unconverted model's own
distance from fp64 is the measure.
"""

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.config import build
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel, model_sha256
from osp.evaluation.perplexity import Text, perplexity
from osp.model.sites import observe_site, site_names
from osp.model.transformer import Transformer
from osp.run.folder import environment

FILE_NAME = "certificate.json"
# of the largest logit or activation in fp64: with weights as converted, and with weights rounded to fp32
EXACT_TOLERANCE = 1e-9
STORED_TOLERANCE = 1e-5
PERPLEXITY_TOLERANCE = 1e-4  # of the perplexity, in fp32
COMPARED_TOKENS = 16_384  # of the text, at most
COMPARED_ROWS = (2, 64)  # of random tokens that logits are compared on


@dataclass(frozen=True)
class Certified:
    """One of the two models."""

    path: str
    sha256: str  # of its weights
    norm: str
    hidden_size: int


@dataclass(frozen=True)
class Difference:
    """How far two models are apart in one arithmetic."""

    max_delta_logit: float
    relative: float  # to the largest logit
    parts_at: str | None  # the first layer and matrix whose input differs by more than rounding; None: all agree


@dataclass(frozen=True)
class Perplexities:
    text: str
    text_sha256: str
    tokens: int
    before: float
    after: float


@dataclass(frozen=True)
class Certificate:
    before: Certified
    after: Certified
    steps: tuple[str, ...]  # what was done, in words
    largest_logit: float
    fp64: Difference  # weights as converted
    stored: Difference  # weights rounded to fp32, arithmetic fp64
    bf16: Difference  # weights rounded to fp32, arithmetic bf16
    bf16_rounding: float  # largest difference between the unconverted model's logits in bf16 and in fp64
    perplexity: Perplexities
    tolerance: dict[str, float]
    versions: dict[str, Any]
    earlier: dict[str, Any] | None = None  # the certificate of `before`, where that was converted as well

    def __str__(self) -> str:
        """A table."""
        lines = [
            f"{self.before.path}: {self.before.norm} of {self.before.hidden_size} channels -> {self.after.norm} of "
            f"{self.after.hidden_size}: {', '.join(self.steps)}",
            f"{'arithmetic':<28}{'max |delta logit|':>18}{'of the largest':>16}  first layer where they part",
        ]
        rows = (("fp64", self.fp64), ("fp64, weights as stored", self.stored), ("bf16, weights as stored", self.bf16))
        for name, found in rows:
            parts_at = found.parts_at or "none"
            lines.append(f"{name:<28}{found.max_delta_logit:>18.1e}{found.relative:>16.1e}  {parts_at}")
        lines.append(f"{'bf16 rounding, for measure':<28}{self.bf16_rounding:>18.1e}")
        text = self.perplexity
        lines.append(f"perplexity of {text.tokens} tokens of {text.text}: {text.before:.5f} -> {text.after:.5f}")
        return "\n".join(lines)


def certify(
    subject: LanguageModel, exact: Transformer, stored: Transformer, text: Text, *, steps: list[str], path: Path
) -> Certificate:
    """Compare `subject`'s model with the converted one, `exact` in fp64 and `stored` in fp32, which will lie at `path`.

    Raises `UserError` if the conversion is not exact enough.
    """
    model, converted = subject.model, stored.config
    ids = _random_tokens(model)
    reference = _observe(copy.deepcopy(model).double(), ids, torch.float64)
    largest = reference["logits"].abs().max().item()
    # an earlier conversion has rounded its zero mean to fp32, and this one makes it exact
    limit = EXACT_TOLERANCE if subject.conversion is None else STORED_TOLERANCE
    fp64 = _difference(reference, _observe(exact, ids, torch.float64), tolerance=limit)
    in_fp64 = _difference(
        reference, _observe(copy.deepcopy(stored).double(), ids, torch.float64), tolerance=STORED_TOLERANCE
    )
    for what, found, tolerance in (("", fp64, limit), (" as stored in fp32", in_fp64, STORED_TOLERANCE)):
        if not found.relative <= tolerance:  # nan as well
            raise UserError(
                f"the converted model{what} differs by {found.relative:.1e} of the largest logit, above {tolerance:g}, "
                f"first in {found.parts_at or 'the logits'}; not written"
            )
    rounded = _observe(model, ids, torch.bfloat16)
    before, after = _perplexity(model, text), _perplexity(stored, text)
    if not abs(after - before) <= PERPLEXITY_TOLERANCE * before:
        raise UserError(f"perplexity of {text.name} is {before:.5f} before and {after:.5f} after; not written")
    return Certificate(
        before=Certified(str(subject.folder), model_sha256(model), model.config.norm.name, model.config.hidden_size),
        after=Certified(str(path), model_sha256(stored), converted.norm.name, converted.hidden_size),
        steps=tuple(steps),
        largest_logit=largest,
        fp64=fp64,
        stored=in_fp64,
        bf16=_difference_in_bf16(reference, rounded, _observe(stored, ids, torch.bfloat16)),
        bf16_rounding=(rounded["logits"] - reference["logits"]).abs().max().item(),
        perplexity=Perplexities(text.name, text.sha256, min(len(text.tokens), COMPARED_TOKENS), before, after),
        tolerance={"fp64": limit, "stored": STORED_TOLERANCE, "perplexity": PERPLEXITY_TOLERANCE},
        versions=environment(),
        earlier=None if subject.conversion is None else dataclasses.asdict(read_certificate(subject)),
    )


def read_certificate(subject: LanguageModel) -> Certificate:
    """The certificate of a converted model; `UserError` if there is none, or it is that of other weights."""
    assert subject.run is not None
    path = subject.run / FILE_NAME
    convert_again = "convert the model again with scripts/convert.py"
    try:
        certificate = build(Certificate, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{subject.run}: a converted model without its {FILE_NAME}; {convert_again}") from error
    except ValueError as error:  # malformed JSON, or other keys than a certificate's
        raise UserError(f"{path}: not a certificate ({error}); {convert_again}") from error
    if certificate.after.sha256 != subject.sha256():
        raise UserError(f"{path}: is of other weights than those in {subject.folder}; {convert_again}")
    return certificate


def _random_tokens(model: Transformer) -> Tensor:
    rows, length = COMPARED_ROWS
    size = (rows, min(length, model.config.max_position_embeddings))
    return torch.randint(0, model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _observe(model: Transformer, ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What every conversion leaves unchanged, in the order of the forward pass, fp64 on the CPU: `layer_00/o_proj_in`,
    `layer_00/down_proj_in`, ..., `logits`. The arithmetic is that of `dtype`."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name in site_names(len(model.layers), ("o_proj_in", "down_proj_in")):
        keep = lambda x, name=name: seen.update({name: x.double().cpu()})  # noqa: E731
        handles.append(observe_site(model, name, keep))
    before = model.compute_dtype
    model.compute_dtype = dtype
    try:
        logits = model(ids.to(model.embed_tokens.weight.device))
    finally:
        model.compute_dtype = before
        for handle in handles:
            handle.remove()
    return {**seen, "logits": logits.double().cpu()}


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor], *, tolerance: float) -> Difference:
    limits = {name: tolerance * value.abs().max().item() for name, value in expected.items()}
    return _apart(expected, found, limits)


def _difference_in_bf16(
    reference: dict[str, Tensor], expected: dict[str, Tensor], found: dict[str, Tensor]
) -> Difference:
    """Two models whose bf16 differs from fp64 by e each differ by 2 e at most, if rounding is all there is."""
    limits = {name: 2 * (expected[name] - value).abs().max().item() for name, value in reference.items()}
    return _apart(expected, found, limits)


def _apart(expected: dict[str, Tensor], found: dict[str, Tensor], limits: dict[str, float]) -> Difference:
    deltas = {name: (found[name] - value).abs().max().item() for name, value in expected.items()}
    parted = [name for name in expected if not deltas[name] <= limits[name]]
    return Difference(
        max_delta_logit=deltas["logits"],
        relative=deltas["logits"] / expected["logits"].abs().max().item(),
        parts_at=parted[0] if parted else None,
    )


def _perplexity(model: Transformer, text: Text) -> float:
    seq_len = min(2048, model.config.max_position_embeddings)
    return perplexity(model, text, seq_len=seq_len, max_tokens=COMPARED_TOKENS).perplexity
