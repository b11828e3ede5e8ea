"""Check that two models compute the same function, and record the measurements in `certificate.json`.

Export and conversion compare the trained model with the one they write on the same random tokens. They change neither
the logits nor the inputs of o_proj and down_proj, which lie between a reader of the residual stream and a writer. The
first of these activations that differs tells where two models diverge.
"""

import copy
import dataclasses
import functools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.errors import UserError, as_user_error
from osp.evaluation.language_model import LanguageModel, model_sha256
from osp.evaluation.perplexity import Text, perplexity
from osp.files import read_json
from osp.model.sites import hook_site, site_names
from osp.model.transformer import Transformer
from osp.run.folder import environment
from osp.schema import build
from osp.tables import text_table

FILE_NAME = "certificate.json"
# Largest error, relative to the largest logit or activation.
FP64_TOLERANCE = 1e-9  # arithmetic and weights in fp64
FP32_TOLERANCE = 1e-5  # arithmetic or weights in fp32
# Largest error of the perplexity, relative to it, by the dtype of the stored weights. bf16 rounds each weight by 2^-9.
PERPLEXITY_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
COMPARED_TOKENS = 16_384  # of the text, at most
COMPARED_SEQUENCES = (2, 64)  # sequences and tokens per sequence that activations and logits are compared on

Observed = dict[str, Tensor]  # activations by site, and the logits


@dataclass(frozen=True)
class Certified:
    """One of the two models."""

    path: str
    sha256: str  # of its weights
    norm: str
    hidden_size: int


@dataclass(frozen=True)
class Difference:
    """Distance of two models in one arithmetic."""

    max_delta_logit: float
    relative: float  # to the largest logit
    parts_at: str | None  # the first site that differs by more than the tolerance; None: no site does


@dataclass(frozen=True)
class Perplexities:
    """Perplexity of the same text before and after a change."""

    text: str
    text_sha256: str
    tokens: int
    before: float
    after: float


@dataclass(frozen=True)
class Certificate:
    """The measurements of a conversion; the keys of `certificate.json`."""

    before: Certified
    after: Certified
    steps: tuple[str, ...]  # what the conversion did, in words
    largest_logit: float
    fp64: Difference  # weights as converted
    stored: Difference  # weights rounded to fp32, arithmetic fp64
    bf16: Difference  # weights rounded to fp32, arithmetic bf16
    bf16_rounding: float  # largest difference between the unconverted model's logits in bf16 and in fp64
    perplexity: Perplexities
    tolerance: dict[str, float]
    versions: dict[str, Any]
    earlier: dict[str, Any] | None = None  # the certificate of `before` if that was converted as well

    def __str__(self) -> str:
        table = [["arithmetic", "max |delta logit|", "of the largest", "first site that differs"]]
        rows = {"fp64": self.fp64, "fp64, weights as stored": self.stored, "bf16, weights as stored": self.bf16}
        for name, row in rows.items():
            table.append([name, f"{row.max_delta_logit:.1e}", f"{row.relative:.1e}", row.parts_at or "none"])
        table.append(["bf16 rounding, for scale", f"{self.bf16_rounding:.1e}", "", ""])
        text = self.perplexity
        return (
            f"{self.before.path}: {self.before.norm} of {self.before.hidden_size} channels -> {self.after.norm} of "
            f"{self.after.hidden_size}: {', '.join(self.steps)}\n{text_table(table)}\n"
            f"perplexity of {text.tokens} tokens of {text.text}: {text.before:.5f} -> {text.after:.5f}"
        )


@torch.no_grad()
def observe_function(model: Transformer, dtype: torch.dtype = torch.float32) -> Observed:
    """Return what no conversion changes, fp64 on the CPU, computed in `dtype` from the same random tokens each time.

    Keys in the order of the forward pass: `layer_00/o_proj_in`, `layer_00/down_proj_in`, ..., `logits`.
    """
    if dtype == torch.float64:
        model = copy.deepcopy(model).double()
    sequences, length = COMPARED_SEQUENCES
    size = (sequences, min(length, model.config.max_position_embeddings))
    ids = torch.randint(0, model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in site_names(len(model.layers), ("o_proj_in", "down_proj_in")):
            stack.callback(hook_site(model, name, functools.partial(seen.__setitem__, name)).remove)
        stack.callback(setattr, model, "compute_dtype", model.compute_dtype)
        model.compute_dtype = dtype
        logits = model(ids.to(next(model.parameters()).device)).logits
    return {name: x.double().cpu() for name, x in {**seen, "logits": logits}.items()}


def measure_difference(expected: Observed, observed: Observed, limits: dict[str, float]) -> Difference:
    """Return the difference of the logits, and the first site that differs by more than its limit."""
    # an FFN that was padded has more channels
    channels = {name: observed[name][..., : value.shape[-1]] for name, value in expected.items()}
    deltas = {name: (channels[name] - value).abs().max().item() for name, value in expected.items()}
    above = (name for name in expected if not deltas[name] <= limits[name])  # true for nan as well
    return Difference(deltas["logits"], deltas["logits"] / expected["logits"].abs().max().item(), next(above, None))


def check_same_function(what: str, expected: Observed, observed: Observed, limit: float = FP32_TOLERANCE) -> Difference:
    """Return the difference; raise `UserError` with `what` changed if it is above `limit` of the largest logit."""
    limits = {name: limit * value.abs().max().item() for name, value in expected.items()}
    difference = measure_difference(expected, observed, limits)
    if not difference.relative <= limit:  # true for nan as well
        raise UserError(
            f"{what} changes the logits by {difference.relative:.1e} of the largest, above {limit:g}, first in "
            f"{difference.parts_at or 'the logits'}; not written"
        )
    return difference


def compared_perplexity(model: Transformer, text: Text, window: int) -> float:
    """Return the perplexity of the first `COMPARED_TOKENS` tokens of `text`."""
    return perplexity(model, text, seq_len=window, max_tokens=COMPARED_TOKENS).perplexity


def check_same_perplexity(text: Text, before: float, after: float, *, dtype: str = "fp32") -> Perplexities:
    """Return both; raise `UserError` if rounding to `dtype` does not explain the difference."""
    if not abs(after - before) <= PERPLEXITY_TOLERANCE[dtype] * before:
        raise UserError(f"perplexity of {text.name} is {before:.5f} before and {after:.5f} after; not written")
    return Perplexities(text.name, text.sha256, min(len(text.tokens), COMPARED_TOKENS), before, after)


def certify(
    subject: LanguageModel, exact: Transformer, stored: Transformer, text: Text, *, steps: list[str], path: Path
) -> Certificate:
    """Compare the model of `subject` with its conversion; raise `UserError` if they differ by more than rounding.

    Three comparisons: fp64 with the weights as converted (`exact`); fp64 with the weights as `stored` in fp32; and
    bf16, measured against the bf16 error of the unconverted model. path: where the converted model will be.
    """
    model, earlier = subject.model, read_certificate(subject)
    what = f"converting {model.config.norm.name} to {stored.config.norm.name}"
    # an earlier conversion has rounded its zero mean to fp32, and this one makes it exact
    limit = FP32_TOLERANCE if earlier else FP64_TOLERANCE
    reference, in_bf16 = observe_function(model, torch.float64), observe_function(model, torch.bfloat16)
    fp64 = check_same_function(what, reference, observe_function(exact, torch.float64), limit)
    in_fp32 = check_same_function(f"{what}, stored in fp32,", reference, observe_function(stored, torch.float64))
    rounding = {name: (in_bf16[name] - value).abs().max().item() for name, value in reference.items()}
    # if rounding is the only error, models whose bf16 differs from fp64 by e each differ by 2 e at most
    limits = {name: 2 * error for name, error in rounding.items()}
    perplexities = (compared_perplexity(side, text, subject.window) for side in (model, stored))
    before, after = (
        Certified(str(folder), model_sha256(side), side.config.norm.name, side.config.hidden_size)
        for side, folder in ((model, subject.folder), (stored, path))
    )
    return Certificate(
        before=before,
        after=after,
        steps=tuple(steps),
        largest_logit=reference["logits"].abs().max().item(),
        fp64=fp64,
        stored=in_fp32,
        bf16=measure_difference(in_bf16, observe_function(stored, torch.bfloat16), limits),
        bf16_rounding=rounding["logits"],
        perplexity=check_same_perplexity(text, *perplexities),
        tolerance={"fp64": limit, "stored": FP32_TOLERANCE, "perplexity": PERPLEXITY_TOLERANCE["fp32"]},
        versions=environment(),
        earlier=dataclasses.asdict(earlier) if earlier else None,
    )


def read_certificate(subject: LanguageModel) -> Certificate | None:
    """Return the certificate of a converted model, None for others. Raises `UserError` if it is missing or wrong."""
    if subject.conversion is None:
        return None
    assert subject.run is not None
    path = subject.run / FILE_NAME
    convert_again = "convert the model again with scripts/convert.py"
    if not path.exists():
        raise UserError(f"{subject.run}: a converted model without its {FILE_NAME}; {convert_again}")
    with as_user_error(f"{path}: not a certificate (", UserError, after=f"); {convert_again}"):
        certificate = build(Certificate, read_json(path))
    if certificate.after.sha256 != subject.sha256():
        raise UserError(f"{path}: belongs to other weights than {subject.folder}; {convert_again}")
    return certificate
