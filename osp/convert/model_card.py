"""The README.md of an exported model: recipe, curves and evaluations of the run that trained it."""

from pathlib import Path
from typing import Any

from osp.config import EVALUATIONS, Config
from osp.convert.same_function import Certificate
from osp.evaluation.language_model import LanguageModel
from osp.files import read_lines
from osp.model.transformer import count_parameters
from osp.run.evaluations import read_evaluation
from osp.tables import markdown_table

CURVE_ROWS = 10
CURVES = {  # heading -> key of metrics.jsonl
    "validation loss": "val/loss",
    "bits per byte": "val/bits_per_byte",
    "perplexity at 16-16-16": "quant/perplexity/16-16-16",
    "at 4-4-4": "quant/perplexity/4-4-4",
    "kurtosis": "monitor/kurtosis/mean",
    "kurtosis (script of OSP)": "monitor/kurtosis/osp_script",
    "largest activation": "monitor/max_abs/max",
}


def model_card(
    subject: LanguageModel,
    run: Path,
    *,
    text: str,
    dtype: str,
    logit_error: float,
    perplexity: float,
    exported_perplexity: float,
    four_bits: tuple[str, str, float],
    certificate: Certificate | None = None,
) -> str:
    """Markdown. text: name of the text that the perplexities are of; the rest: see `osp.convert.hf_export.Exported`.

    four_bits: a quantization in words, its hash, and the exported model's perplexity under it. certificate: of a model
    that was converted.
    """
    config, (words, spec_hash, quantized_perplexity) = subject.config, four_bits
    assert config is not None
    end = [event for event in read_lines(run / "metrics.jsonl") if event.get("step") == subject.step]
    tokens = end[-1]["tokens"] if end else (subject.step or 0) * config.train.tokens_per_step
    trained_here = config.data.source != "none"
    trained = " trained with `osp` (Outlier-Safe Pre-Training, arXiv 2506.19697)," if trained_here else ","
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {config.run.name}\n\nA language model{trained} exported by `osp` as a stock Llama.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```',
    ]
    if trained_here:
        sections.append(f"## Recipe\n\n{markdown_table(['', ''], _recipe(subject, config, tokens=tokens))}")
    if certificate is not None:
        sections.append(_conversion(certificate))
    curves = _curves(run, subject.step)
    if curves:
        sections.append(f"## Curves\n\n{curves}")
    evaluations = _evaluations(run)
    if evaluations:
        sections.append(f"## Evaluation\n\n{evaluations}")
    sections.append(
        f"## Export\n\nWeights are {dtype}. Absorbing projections and scales moved the logits by {logit_error:.1e} "
        f"of the largest. Perplexity of the first tokens of `{text}`: {perplexity:.4f} as trained, "
        f"{exported_perplexity:.4f} as exported, {quantized_perplexity:.4f} fake-quantized to {words} [{spec_hash}]."
    )
    return "\n\n".join(sections) + "\n"


def _recipe(subject: LanguageModel, config: Config, *, tokens: int) -> list[list[str]]:
    optimizer, schedule, train, data = config.optimizer, config.schedule, config.train, config.data
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
    perplexity = certificate.perplexity
    return (
        f"## Conversion\n\nConverted from {certificate.before.norm} ({certificate.before.hidden_size} channels) to "
        f"{certificate.after.norm} ({certificate.after.hidden_size} channels): {', '.join(certificate.steps)}. That "
        f"moved the logits by {certificate.stored.relative:.1e} of the largest, and the perplexity of "
        f"`{perplexity.text}` from {perplexity.before:.5f} to {perplexity.after:.5f}."
    )


def _curves(run: Path, step: int | None) -> str:
    """What was measured on the way to `step`, at most `CURVE_ROWS` of the steps with a validation, evenly chosen."""
    steps: dict[int, dict[str, Any]] = {}
    for event in read_lines(run / "metrics.jsonl"):
        if step is None or event["step"] <= step:
            steps.setdefault(event["step"], {}).update(event)
    rows = [event for event in steps.values() if any(event.get(key) is not None for key in CURVES.values())]
    if len(rows) > CURVE_ROWS:
        rows = [rows[round(i * (len(rows) - 1) / (CURVE_ROWS - 1))] for i in range(CURVE_ROWS)]
    shown = {heading: key for heading, key in CURVES.items() if any(row.get(key) is not None for row in rows)}
    if not shown:
        return ""
    return markdown_table(
        ["step", "tokens", *shown],
        [
            [f"{row['step']:,}", f"{row['tokens']:,}", *(_number(row.get(key)) for key in shown.values())]
            for row in rows
        ],
    )


def _evaluations(run: Path) -> str:
    """The results that `scripts/evaluate.py` has left in the run."""
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
