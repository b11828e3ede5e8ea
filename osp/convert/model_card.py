"""The README.md of an exported model: recipe, curves and evaluations of the run that trained it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp.config import EVALUATIONS, Config
from osp.convert.same_function import Certificate
from osp.evaluation.language_model import LanguageModel
from osp.files import read_lines
from osp.model.transformer import count_parameters
from osp.quant.spec import QuantSpec
from osp.run.evaluations import read_evaluation
from osp.tables import markdown_table

FOUR_BITS = QuantSpec().at("4-4-4")  # OSP's round to nearest
TITLE = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model{trained} exported by `osp` as a stock Llama.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
CURVE_ROWS = 10
Events = Sequence[dict[str, Any]]  # of metrics.jsonl
CURVES = {  # heading -> key of metrics.jsonl
    "validation loss": "val/loss",
    "bits per byte": "val/bits_per_byte",
    "perplexity at 16-16-16": "quant/perplexity/16-16-16",
    "at 4-4-4": "quant/perplexity/4-4-4",
    "kurtosis": "monitor/kurtosis/mean",
    "kurtosis (script of OSP)": "monitor/kurtosis/osp_script",
    "largest activation": "monitor/max_abs/max",
}


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
    """Return the Markdown of an exported model.

    Args:
        subject: the model of a run.
        certificate: of the conversion of its norms, if there was one.
    """
    config, run = subject.config, subject.run
    assert config is not None
    assert run is not None
    events = read_lines(run / "metrics.jsonl")
    trained_here = config.data.source != "none"
    trained = " trained with `osp` (Outlier-Safe Pre-Training, arXiv 2506.19697)," if trained_here else ","
    sections = {
        "Recipe": markdown_table(["", ""], _recipe(subject, config, events)) if trained_here else "",
        "Conversion": "" if certificate is None else _conversion(certificate),
        "Curves": _curves(events, subject.step),
        "Evaluation": _evaluations(run),
        "Export": (
            f"Weights are {exported.dtype}. Folding projections and scales moved the logits by "
            f"{exported.logit_error:.1e} of the largest. Perplexity of the first tokens of `{exported.text}`: "
            f"{exported.perplexity:.4f} as trained, {exported.exported_perplexity:.4f} as exported, "
            f"{exported.quantized_perplexity:.4f} fake-quantized to {FOUR_BITS} [{FOUR_BITS.hash}]."
        ),
    }
    title = TITLE.format(name=config.run.name, trained=trained)
    return title + "".join(f"\n## {heading}\n\n{text}\n" for heading, text in sections.items() if text)


def _recipe(subject: LanguageModel, config: Config, events: Events) -> list[list[str]]:
    optimizer, schedule, train, data = config.optimizer, config.schedule, config.train, config.data
    at_end = [event["tokens"] for event in events if event.get("step") == subject.step]
    tokens = at_end[-1] if at_end else (subject.step or 0) * train.tokens_per_step
    source = ", ".join([data.source, *filter(None, [data.dataset, data.subset]), *data.paths])
    rules = ", ".join(f"{role} {rule}" for role, rule in optimizer.rules.items())
    return [
        ["parameters while training", f"{count_parameters(config.model)['total']:,}"],
        ["training tokens", f"{tokens:,} in {subject.step:,} steps of {train.tokens_per_step:,}"],
        ["sequence length", f"{train.seq_len}"],
        ["norm", config.model.norm.name],
        *([["started from", config.checkpoint.init_from]] if config.checkpoint.init_from else []),
        ["embedding projections", "learned, absorbed here" if config.model.embed_proj else "none"],
        ["optimizer", rules],
        ["learning rate", f"{optimizer.lr:g} (AdamW {optimizer.adam_lr or optimizer.lr:g})"],
        ["weight decay", f"{optimizer.weight_decay:g}"],
        ["schedule", f"{schedule.name}, warm-up {schedule.warmup}, decay {schedule.decay}"],
        ["data", source],
        ["seed", f"{train.seed}"],
    ]


def _conversion(certificate: Certificate) -> str:
    perplexity, before, after = certificate.perplexity, certificate.before, certificate.after
    return (
        f"Converted from {before.norm} ({before.hidden_size} channels) to {after.norm} ({after.hidden_size} channels): "
        f"{', '.join(certificate.steps)}. This moved the logits by {certificate.stored.relative:.1e} of the largest, "
        f"and the perplexity of `{perplexity.text}` from {perplexity.before:.5f} to {perplexity.after:.5f}."
    )


def _curves(events: Events, step: int | None) -> str:
    """Return a table of at most `CURVE_ROWS` evenly spaced measurements up to `step`."""
    steps: dict[int, dict[str, Any]] = {}
    for event in events:
        if step is None or event["step"] <= step:
            steps.setdefault(event["step"], {}).update(event)
    rows = [event for event in steps.values() if any(event.get(key) is not None for key in CURVES.values())]
    if len(rows) > CURVE_ROWS:
        rows = [rows[round(i * (len(rows) - 1) / (CURVE_ROWS - 1))] for i in range(CURVE_ROWS)]
    shown = {heading: key for heading, key in CURVES.items() if any(row.get(key) is not None for row in rows)}
    table = []
    for row in rows:
        numbers = [_number(row.get(key)) for key in shown.values()]
        table.append([f"{row['step']:,}", f"{row['tokens']:,}", *numbers])
    return markdown_table(["step", "tokens", *shown], table) if table else ""


def _evaluations(run: Path) -> str:
    """Return a table of the results that `scripts/evaluate.py` stored in the run."""
    rows = []
    for path in sorted((run / EVALUATIONS).glob("*.json")):
        record = read_evaluation(path)
        for result in record.results:
            error = "" if result.stderr is None else f" ± {_number(result.stderr)}"
            value = _number(result.value) + error
            rows.append([f"{record.step:,}", f"{result.what} {result.metric}", record.quant["text"], value])
    return markdown_table(["step", "metric", "W-A-KV", "value"], rows) if rows else ""


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
