"""`scripts/compare.py`: the rows of OSP's tables 2 and 4 (arXiv 2506.19697) for given models."""

import collections
import dataclasses
import logging
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from osp.config import COMPARISONS, MonitorConfig
from osp.distributed import is_main
from osp.errors import UserError
from osp.evaluation.config import COLUMNS, FORMAT_COLUMNS, VARIANTS, CompareConfig
from osp.evaluation.evaluate import Measurement, check_out, open_subject, store_record
from osp.evaluation.language_model import LanguageModel, find_model
from osp.evaluation.perplexity import Text
from osp.monitor.probe import ProbeText, probe
from osp.quant.apply import quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec, check_spec
from osp.run.evaluations import Comparison, ComparisonRecord, Result, Score, format_short, label
from osp.run.folder import environment
from osp.tables import render_text

logger = logging.getLogger(__name__)

METHODS = {"RTN": "", "+ FFN Had": "+Had", "+ GPTQ": "+GPTQ", "+ QuaRot": "+QuaRot"}  # row of table 4 -> of table 2
ACCURACIES = ("acc_norm", "acc", "exact_match")  # a task counts with the first that it has


def compare(config: CompareConfig) -> ComparisonRecord:
    """Return the tables of every model, each also kept in its run unless `out` is set. Collective."""
    if not config.paths:
        raise UserError("name the models to compare: python scripts/compare.py RUN RUN ...")
    if not config.quant.is_identity:
        config = dataclasses.replace(config, quant=config.quant.at("16-16-16"))
    for column in config.columns:
        column_spec(column, config.quant)  # before any model is loaded
    check_out(config.out)
    for path in config.paths:
        find_model(Path(path), config.weights)
    machine, comparisons = environment(), []
    origin = {"config": dataclasses.asdict(config), "commit": machine.pop("git"), "environment": machine}
    for path in config.paths:
        subject = open_subject(path, config)
        check_out(config.out, subject.run)
        for comparison in compare_one(subject, config):
            models = (*([] if config.out is None else comparisons), comparison)
            record = ComparisonRecord(step=comparison.step, models=models, **origin)
            name = f"{COMPARISONS}/{label(f'step_{comparison.step:08d}', comparison.weights, '_')}"
            store_record(record, config.out, subject.run, name, finished=False)
        comparisons.append(comparison)
        if config.out is None:
            store_record(record, None, subject.run, name)
    step = comparisons[0].step if len(comparisons) == 1 else None
    return ComparisonRecord(step=step, models=tuple(comparisons), **origin)


def compare_one(subject: LanguageModel, config: CompareConfig) -> Iterator[Comparison]:
    """Yield both tables of one model after each measurement, the complete ones last.

    A quantization that several cells share is measured once.
    """
    measurement, progress = Measurement(subject, config), config.progress and is_main()
    named = method_specs(config.quant)
    rows = [*named] if config.methods == "all" else ["", "+Had"]
    rows = rows if set(config.columns) & set(COLUMNS) else [""]
    cells = {("", column): spec for column, spec in measurable_specs(measurement, config).items()}
    cells |= {(row, bits): named[row].at(bits) for row in rows[1:] for bits in config.columns if bits in COLUMNS}
    methods = {}
    if config.methods != "none":
        methods = {method: named[row].at(COLUMNS[-1]) for method, row in METHODS.items()}
    specs = [*cells.values(), *methods.values()]
    wanted = {str(spec): spec for spec in specs}
    scores: dict[str, Score] = {}
    for words, spec in wanted.items():
        check_spec(dataclasses.replace(spec, rotation="none"), subject.model.config)
        try:
            check_spec(spec, subject.model.config)
        except UserError as error:  # the model cannot be rotated
            logger.warning("%s: cells left out, %s", subject.name, error)
            scores[words] = Score(None, None)
    if len(scores) == len(wanted):
        check_spec(specs[0], subject.model.config)  # raises the reason
    calibrations = {words: measurement.calibration(spec) for words, spec in wanted.items() if words not in scores}
    sha256, kurtosis, kurtosis_text, what = subject.sha256(), *script_kurtosis(measurement, config), ""
    for words, calibration in tqdm(calibrations.items(), desc=subject.name, unit="cell", disable=not progress):
        with quantized(subject.model, wanted[words], calibration=calibration, progress=progress):
            results = [result for part in measurement.results() for result in part]
        scores[words] = score(results, measurement.texts)
        what = what or ", ".join(dict.fromkeys(result.what for result in results))
        if subject.run is None and config.out is None:  # no file keeps it
            logger.info("%s, %s: %s", subject.name, words, scores[words])
        shown = collections.defaultdict(lambda: Score(None, None), scores)
        yield Comparison(
            subject.name,
            sha256,
            kurtosis=kurtosis,
            kurtosis_text=kurtosis_text,
            what=what,
            bits={row: {name: shown[str(spec)] for (of, name), spec in cells.items() if of == row} for row in rows},
            methods={method: shown[str(spec)] for method, spec in methods.items()},
            specs={spec.hash: str(spec) for spec in specs},
            hashes={f"{bits} {row}".strip(): spec.hash for (row, bits), spec in cells.items()}
            | {method: spec.hash for method, spec in methods.items()},
            texts={text.name: text.sha256 for text in measurement.texts},
            step=subject.step or 0,
            weights=subject.weights,
        )


def score(results: Sequence[Result], texts: Sequence[Text] = ()) -> Score:
    """Return the perplexities of the texts, and the mean accuracy of all tasks, where both parts of ARC are one.

    A task with several filters counts with the first in its file, and a group of tasks that has a score itself counts
    as one task.
    """
    perplexities = [result.value for result in results if result.metric == "perplexity"]
    grouped = {result.what for result in results if result.part_of is not None}
    tasks: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for result in results:
        metric = result.metric.split(",")[0]
        if metric in ACCURACIES and result.what not in grouped:
            tasks[result.what].setdefault(metric, result.value)
    benchmarks: dict[str, list[float]] = collections.defaultdict(list)
    for what, values in tasks.items():
        metric = min(values, key=ACCURACIES.index)
        benchmarks[re.sub("arc_(easy|challenge)", "arc", what)].append(values[metric])
    means = [statistics.fmean(values) for values in benchmarks.values()]
    accuracy, by_text = statistics.fmean(means) if means else None, zip(texts, perplexities, strict=False)
    return Score(next(iter(perplexities), None), accuracy, {text.name: value for text, value in by_text})


def method_specs(spec: QuantSpec) -> dict[str, QuantSpec]:
    """Return row of table 2 -> `spec` with one more method than in the row before, as in the authors' scripts."""
    hadamard = dataclasses.replace(spec, ffn_hadamard=True)
    gptq = dataclasses.replace(hadamard, method="gptq")
    return {"": spec, "+Had": hadamard, "+GPTQ": gptq, "+QuaRot": dataclasses.replace(gptq, rotation="quarot")}


def column_spec(column: str, quant: QuantSpec) -> QuantSpec:
    """Return the quantization of a column, made from `quant`; a deployed format takes its calibration only."""
    if column not in FORMAT_COLUMNS:
        bits, changes = VARIANTS.get(column, (column, {}))
        return dataclasses.replace(quant, **changes).at(bits)
    spec = DEPLOYED[FORMAT_COLUMNS[column]]
    tokens = min(spec.calibration_tokens, quant.calibration_tokens)
    given = {"calibration": quant.calibration, "calibration_tokens": tokens, "seed": quant.seed}
    return dataclasses.replace(spec, **given) if spec.needs_calibration else spec


def measurable_specs(measurement: Measurement, config: CompareConfig) -> dict[str, QuantSpec]:
    """Return column -> quantization; of the default columns leave out formats that the model cannot have, and warn."""
    subject, specs = measurement.subject, {column: column_spec(column, config.quant) for column in config.columns}
    for column in [column for column in FORMAT_COLUMNS if column in specs]:
        try:
            check_spec(specs[column], subject.model.config)
            measurement.calibration(specs[column])
        except UserError as error:
            if config.columns != CompareConfig.columns:
                raise UserError(f"columns={column}: {subject.name}: {error}") from error
            level = logging.WARNING if is_main() else logging.DEBUG
            logger.log(level, "%s: the column %s is left out, %s", subject.name, column, error)
            del specs[column]
    return specs


def script_kurtosis(measurement: Measurement, config: CompareConfig) -> tuple[float | None, str]:
    """Return the excess kurtosis of the residual stream as the paper's script measures it, and the text it is for.

    The script reads each of the first tokens of the first text by itself (`osp.monitor.statistics`). None and no text
    without a text.
    """
    if not measurement.texts:
        return None, ""
    text = measurement.texts[0]
    tokens = text.tokens[: min(config.kurtosis_tokens, config.max_tokens or config.kurtosis_tokens)]
    length = min(measurement.seq_len, len(tokens))
    rows = ProbeText(tokens[: len(tokens) // length * length].view(-1, length))
    reading = probe(measurement.subject.model, rows, MonitorConfig(sites=(), statistics=("osp_script",)))
    name = f"the first {rows.tokens.numel():,} tokens of {text.name}"
    return reading.metrics["monitor/kurtosis/osp_script"], name


def markdown(comparisons: Sequence[Comparison], columns: Sequence[str] = CompareConfig.columns) -> str:
    """Return table 2, then table 4, for one text after another, and below them what the numbers are."""
    names = [c.name for c in comparisons]
    return render_text(
        Path(__file__).with_name("compare.md"),
        comparisons=comparisons,
        names=[f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)],
        texts=list(dict.fromkeys(text for c in comparisons for text in c.texts)) or [""],
        columns=columns,
        noted=[column for column in columns if column not in COLUMNS],
        has_tasks=any(score.accuracy is not None for c in comparisons for score in c.methods.values()),
        short=format_short,
    )
