"""Records of `scripts/evaluate.py` and `scripts/compare.py`: their dataclasses, written and read here. Needs no torch.

A record is one JSON file below `evaluation/` of a run, or the file that `out=` names. JSON has no infinity: a number
that is not finite is stored as null and read back as infinity.
"""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter

from osp.config import COMPARISONS, EVALUATIONS, Weights
from osp.errors import UserError
from osp.files import read_json, write_out

T = TypeVar("T")
# a number that was not finite when it was written
Number = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]
Perplexity = Annotated[Number, Field(gt=0)]


@dataclass(frozen=True)
class Result:
    """One number of an evaluation."""

    what: str  # text or task, and how it was read: `wikitext2[len=2048,overlap=0,bos=no]`
    metric: str
    value: Number
    stderr: float | None = None
    truncated: int = 0  # contexts of a task that were too long for the model
    part_of: str | None = None  # the group of tasks whose score includes this one


@dataclass(frozen=True)
class SiteCost:
    """Perplexity with only this site quantized, and with every site but this one."""

    site: str
    alone: Perplexity
    left_out: Perplexity


@dataclass(frozen=True)
class SiteAblation:
    """The cost of each quantized site on one text, and the error R_L of the hidden states (see `osp.quant.apply`)."""

    text: str
    unquantized: Perplexity
    quantized: Perplexity
    sites: tuple[SiteCost, ...]
    layer_errors: tuple[Number, ...] = ()
    last_error: Number = math.nan

    def cost_alone(self, site: SiteCost) -> float:
        """Return the nats per token that quantizing only `site` costs; nan if both perplexities are infinite."""
        return math.log(site.alone) - math.log(self.unquantized)

    def saving_left_out(self, site: SiteCost) -> float:
        """Return the nats per token that leaving out `site` saves; nan if both perplexities are infinite."""
        return math.log(self.quantized) - math.log(site.left_out)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The record of `scripts/evaluate.py`: the results of one model and everything they depend on."""

    model: dict[str, Any]  # name, path, sha256, step
    weights: Weights = "trained"  # that were read
    quant: dict[str, Any]  # the fields of QuantSpec, and its text, hash and bits
    texts: list[dict[str, Any]] = field(default_factory=list)  # name, sha256, tokens
    tasks: list[dict[str, Any]] = field(default_factory=list)  # name, sha256, num_fewshot
    config: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    commit: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    results: tuple[Result, ...]
    ablation: SiteAblation | None = None

    @property
    def step(self) -> int:
        return self.model["step"] or 0

    @property
    def name(self) -> str:
        """The file name: step and weights, quantization, and a hash of what was measured: one for each evaluation."""
        measured = [[result.what, result.metric] for result in self.results]
        subject = [measured, self.texts, self.tasks, bool(self.ablation)]
        digest = hashlib.sha256(json.dumps(subject).encode()).hexdigest()[:8]
        return f"{label(f'step_{self.step:08d}', self.weights, '_')}-{self.quant['hash']}-{digest}"


@dataclass(frozen=True)
class Score:
    """One cell of a comparison: perplexity of the first text and mean accuracy of all tasks; None: not measured."""

    perplexity: Annotated[float, Field(gt=0)] | None
    accuracy: float | None
    perplexities: dict[str, Number] = field(default_factory=dict)  # name of every text -> perplexity

    def __str__(self) -> str:
        """Return accuracy in percent / perplexity, as the paper writes it: `31.2/12.41`."""
        accuracy = [] if self.accuracy is None else [f"{100 * self.accuracy:.1f}"]
        perplexity = [] if self.perplexity is None else [format_short(self.perplexity)]
        return "/".join(accuracy + perplexity) or "-"


@dataclass(frozen=True)
class Comparison:
    """The tables of one model in the record of `scripts/compare.py`."""

    name: str
    sha256: str
    kurtosis: float | None  # excess kurtosis of the residual stream, by the paper's script
    what: str  # the text and tasks of every cell
    bits: dict[str, dict[str, Score]]  # table 2: "", "+Had", "+GPTQ", "+QuaRot" -> column -> score
    methods: dict[str, Score]  # table 4: method -> score
    specs: dict[str, str]  # hash -> the quantization in words
    hashes: dict[str, str] = field(default_factory=dict)  # column, "4-4-4 +Had", method -> hash of its quantization
    texts: dict[str, str] = field(default_factory=dict)  # name -> SHA-256
    step: int = 0  # of the checkpoint
    kurtosis_text: str = ""  # of the kurtosis: `the first 16,384 tokens of wikitext2`
    weights: Weights = "trained"


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """The record of `scripts/compare.py`: the tables of one or more models and everything they depend on."""

    step: int | None = None  # of the checkpoint, in the record that is kept in a run
    config: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    models: tuple[Comparison, ...]


def label(name: str, weights: Weights, joint: str = ", ") -> str:
    """Return `NAME`, or `NAME, averaged`: a run, row or file about these weights."""
    return name if weights == "trained" else f"{name}{joint}{weights}"


def write_evaluation(path: Path, record: Evaluation | ComparisonRecord) -> None:
    """Write `record` as JSON; raise `UserError` if the file cannot be written."""
    write_out(path, json.dumps(replace_nonfinite(dataclasses.asdict(record)), indent=1) + "\n")


def read_evaluations(run: Path, notes: list[str]) -> tuple[list[Evaluation], dict[Weights, Comparison]]:
    """Return the evaluations of a run folder by step, and the newest comparison of its trained and averaged weights.

    A file that is not a record is named in `notes` and left out.
    """
    evaluations, comparisons, folder = [], dict[Weights, Comparison](), run / EVALUATIONS
    for path in [*sorted(folder.glob("*.json")), *sorted((folder / COMPARISONS).glob("*.json"))]:  # by step
        try:
            if path.parent == folder:
                evaluations.append(read_evaluation(path))
            else:
                (comparison,) = read_comparison(path).models
                comparisons[comparison.weights] = comparison
        except ValueError:  # among them a `UserError`
            notes.append(f"{path.parent.name}/{path.name}: not a record of an evaluation; left out")
    return evaluations, comparisons


def read_evaluation(path: Path) -> Evaluation:
    """Return the record of `scripts/evaluate.py` at `path`, or raise `UserError`."""
    record = _read(path, Evaluation, "evaluate")
    step, quant = record.model.get("step", ""), record.quant.get("text")  # an older record may lack anything else
    if not (step is None or (type(step) is int and 0 <= step < 2**53)) or not isinstance(quant, str):
        raise UserError(f"{path}: not a record of scripts/evaluate.py; remove it")
    results = [  # a perplexity overflows; the score of a task is not a number
        replace(result, value=math.nan)
        if result.value == math.inf and not re.search("perplexity|byte", result.metric)
        else result
        for result in record.results
    ]
    return replace(record, results=tuple(results))


def read_comparison(path: Path) -> ComparisonRecord:
    """Return the record of `scripts/compare.py` at `path`, or raise `UserError`."""
    record = _read(path, ComparisonRecord, "compare")
    models = tuple(replace(model, step=model.step or record.step or 0) for model in record.models)
    return replace(record, models=models)


def _read(path: Path, kind: type[T], script: str) -> T:
    """Return the record at `path`. Keys that are not fields are left out: records of other versions have them."""
    try:
        return TypeAdapter(kind).validate_python(read_json(path))
    except ValueError as error:  # among them a `UserError`
        raise UserError(f"{path}: not a record of scripts/{script}.py; remove it") from error


def replace_nonfinite(value: Any) -> Any:
    """Return `value` as JSON reads it back, with None in place of numbers that JSON cannot hold."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def format_short(value: float) -> str:
    """Return a perplexity or kurtosis for a table: 11.40, 934.30, 1.2e+04."""
    return f"{value:.1e}" if value >= 1e4 else f"{value:.2f}"
