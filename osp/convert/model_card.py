"""The README.md of an exported model: recipe, curves and evaluations of the run that trained it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp.config import EVALUATIONS
from osp.convert.same_function import Certificate
from osp.evaluation.language_model import LanguageModel
from osp.files import read_lines
from osp.model.transformer import count_parameters
from osp.quant.spec import QuantSpec
from osp.run.evaluations import Evaluations, read_evaluation
from osp.run.metrics import METRICS
from osp.tables import render_markdown

FOUR_BITS = QuantSpec().at("4-4-4")  # OSP's round to nearest
TRAINED_BY = " trained with `osp` (Outlier-Safe Pre-Training, arXiv 2506.19697)"
CURVE_ROWS = 10
CURVES = (  # keys of metrics.jsonl
    *("val/loss", "val/bits_per_byte", "quant/perplexity/16-16-16", "quant/perplexity/4-4-4"),
    *("monitor/kurtosis/mean", "monitor/kurtosis/osp_script", "monitor/max_abs/max"),
)


@dataclass(frozen=True)
class Exported:
    """The result of an export; the perplexities are of the first tokens of `text`."""

    folder: Path
    dtype: str  # of the stored weights
    text: str
    logit_error: float  # largest difference over largest logit, fp32, before the weights are rounded to `dtype`
    perplexity: float  # of the trained model
    exported_perplexity: float
    quantized_perplexity: float  # of the exported model under `FOUR_BITS`


def model_card(subject: LanguageModel, exported: Exported, certificate: Certificate | None = None) -> str:
    """Return the Markdown about an exported model, laid out by model_card.md.

    Args:
        subject: the model of a run.
        certificate: of the conversion of its norms, if there was one.
    """
    config, run, step = subject.config, subject.run, subject.step or 0
    assert config is not None
    assert run is not None
    events = read_lines(run / "metrics.jsonl")
    data, curves = config.data, _curves(events, step)
    records = [read_evaluation(path) for path in sorted((run / EVALUATIONS).glob("*.json"))]
    return render_markdown(
        Path(__file__).with_suffix(".md"),
        config=config,
        trained_by="" if data.source == "none" else TRAINED_BY,
        step=step,
        tokens=next((e["tokens"] for e in reversed(events) if e["step"] == step), step * config.train.tokens_per_step),
        parameters=count_parameters(config.model)["total"],
        rules=[f"{role} {rule}" for role, rule in config.optimizer.rules.items()],
        sources=[source for source in (data.source, data.dataset, data.subset, *data.paths) if source],
        certificate=certificate,
        curves=curves,
        shown={METRICS[key].full_title: key for key in CURVES if any(row.get(key) is not None for row in curves)},
        results=Evaluations(records).results(),
        exported=exported,
        four_bits=FOUR_BITS,
    )


def _curves(events: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return at most `CURVE_ROWS` evenly spaced measurements up to `step`."""
    steps: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["step"] <= step:
            steps.setdefault(event["step"], {}).update(event)
    rows = [event for event in steps.values() if any(event.get(key) is not None for key in CURVES)]
    if len(rows) > CURVE_ROWS:
        rows = [rows[round(i * (len(rows) - 1) / (CURVE_ROWS - 1))] for i in range(CURVE_ROWS)]
    return rows
