"""The README.md of an exported model: recipe, curves and evaluations of the run that trained it."""

from pathlib import Path
from typing import Any

from osp.config import EVALUATIONS
from osp.convert.file_certificate import FileCertificate
from osp.convert.same_function import Certificate
from osp.evaluation.language_model import LanguageModel
from osp.model.transformer import count_parameters
from osp.quant.spec import QuantSpec
from osp.run.evaluations import read_evaluation
from osp.run.metrics import METRICS
from osp.run.read import read_metrics
from osp.tables import render_text

FOUR_BITS = QuantSpec().at("4-4-4")  # OSP's round to nearest
CURVE_ROWS = 10
CURVES = (  # keys of metrics.jsonl
    *("val/loss", "val/bits_per_byte", "quant/perplexity/16-16-16", "quant/perplexity/4-4-4"),
    *("monitor/R_L", "monitor/kurtosis/osp_script"),
)


def model_card(
    subject: LanguageModel, exported: FileCertificate, conversion: Certificate | None, four_bits: float | None
) -> str:
    """Return the Markdown of model_card.md about an exported model. four_bits: its perplexity under `FOUR_BITS`."""
    config, run, step = subject.config, subject.run, subject.step or 0
    assert config is not None
    assert run is not None
    rows: dict[int, dict[str, Any]] = {}  # the last value of every metric by step
    for event in read_metrics(run / "metrics.jsonl", []):
        if event["step"] <= step:
            rows.setdefault(event["step"], {}).update(event)
    curves = [row for row in rows.values() if any(row.get(key) is not None for key in CURVES)]
    if len(curves) > CURVE_ROWS:
        curves = [curves[round(i * (len(curves) - 1) / (CURVE_ROWS - 1))] for i in range(CURVE_ROWS)]
    records = [read_evaluation(path) for path in sorted((run / EVALUATIONS).glob("*.json"))]
    return render_text(
        Path(__file__).with_suffix(".md"),
        config=config,
        step=step,
        tokens=rows.get(step, {}).get("tokens", step * config.train.tokens_per_step),
        parameters=count_parameters(config.model)["total"],
        certificate=conversion,
        curves=curves,
        shown={METRICS[key].full_title: key for key in CURVES if any(row.get(key) is not None for row in curves)},
        results=[(record, result) for record in records for result in record.results],
        exported=exported,
        four_bits=four_bits,
        four_bits_spec=FOUR_BITS,
    )
