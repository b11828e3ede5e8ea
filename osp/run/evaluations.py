"""What `scripts/evaluate.py` and `scripts/compare.py` have left in a run folder, read back. Needs no torch."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from osp.config import COMPARISONS, EVALUATIONS

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """One number: of which step, under which quantization, on what."""

    step: int
    quant: str  # in words
    hash: str  # of the quantization
    what: str  # text or task, and how it was read
    metric: str
    value: float  # infinite where the record has null
    stderr: float | None


@dataclass(frozen=True)
class SiteCost:
    """Nats per token that a site costs when it alone is quantized, and that leaving it alone out saves."""

    site: str
    alone: float  # perplexity
    alone_nats: float  # ln(alone / unquantized)
    left_out: float  # perplexity
    saved_nats: float  # ln(quantized / left_out)


@dataclass(frozen=True)
class Ablation:
    """What each site costs under one quantization."""

    step: int
    quant: str
    hash: str
    text: str
    unquantized: float  # perplexity
    quantized: float
    sites: tuple[SiteCost, ...]


@dataclass(frozen=True)
class Comparison:
    """The rows of one model in the tables of `scripts/compare.py`; a cell is written as the paper does."""

    step: int
    what: str
    kurtosis: float | None
    bits: dict[str, dict[str, str]]  # table 2: "" or "+Had" -> W-A-KV -> cell
    methods: dict[str, str]  # table 4: method -> cell
    specs: dict[str, str]  # hash -> the quantization in words


@dataclass
class Evaluations:
    """All of a run; `comparison` is that of the latest step."""

    results: list[Measured] = field(default_factory=list)
    ablations: list[Ablation] = field(default_factory=list)
    comparison: Comparison | None = None

    def __bool__(self) -> bool:
        return bool(self.results or self.ablations or self.comparison)


def read_evaluations(run: Path, notes: list[str]) -> Evaluations:
    """The records of a run folder, by step; one that cannot be read is said in `notes` and left out."""
    found = Evaluations()
    folder = run / EVALUATIONS
    for results, ablation in _records(folder, _evaluation, notes):
        found.results += results
        found.ablations += [ablation] if ablation else []
    for comparison in _records(folder / COMPARISONS, _comparison, notes):
        found.comparison = comparison
    return found


def _records(folder: Path, parse: Callable[[dict[str, Any]], T], notes: list[str]) -> Iterator[T]:
    for path in sorted(folder.glob("*.json")):  # their names begin with the step
        try:
            yield parse(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            notes.append(f"{path.relative_to(folder.parent)}: not a record of an evaluation; left out")


def _evaluation(record: dict[str, Any]) -> tuple[list[Measured], Ablation | None]:
    about = {
        "step": record["model"]["step"] or 0,
        "quant": str(record["quant"]["text"]),
        "hash": str(record["quant"]["hash"]),
    }
    results = [
        Measured(
            **about, what=str(r["what"]), metric=str(r["metric"]), value=_finite_or_inf(r["value"]), stderr=r["stderr"]
        )
        for r in record["results"]
    ]
    stored = record.get("ablation")
    if not stored:
        return results, None
    clean, quantized = _finite_or_inf(stored["unquantized"]), _finite_or_inf(stored["quantized"])
    sites = []
    for cost in stored["sites"]:
        alone, left_out = _finite_or_inf(cost["alone"]), _finite_or_inf(cost["left_out"])
        sites.append(SiteCost(str(cost["site"]), alone, _nats(alone, clean), left_out, _nats(quantized, left_out)))
    return results, Ablation(
        **about, text=str(stored["text"]), unquantized=clean, quantized=quantized, sites=tuple(sites)
    )


def _comparison(record: dict[str, Any]) -> Comparison:
    (model,) = record["models"]
    return Comparison(
        step=record["step"] or 0,
        what=str(model["what"]),
        kurtosis=model["kurtosis"],
        bits={str(row): {bits: _cell(c) for bits, c in cells.items()} for row, cells in model["bits"].items()},
        methods={str(method): _cell(cell) for method, cell in model["methods"].items()},
        specs={str(key): str(words) for key, words in model["specs"].items()},
    )


def _cell(score: dict[str, Any]) -> str:
    """`31.2/12.41`: accuracy in percent, perplexity; either alone where the other was not measured."""
    accuracy, perplexity = score["accuracy"], score["perplexity"]
    parts = [] if accuracy is None else [f"{100 * accuracy:.1f}"]
    if perplexity is not None:
        parts.append(f"{perplexity:.1e}" if perplexity >= 1e4 else f"{perplexity:.2f}")
    return "/".join(parts)


def _finite_or_inf(value: float | None) -> float:
    return math.inf if value is None else float(value)


def _nats(high: float, low: float) -> float:
    """ln(high / low); nan where both are infinite."""
    return math.nan if math.isinf(high) and math.isinf(low) else math.log(high) - math.log(low)
