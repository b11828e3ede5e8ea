"""`scripts/compare.py`: the rows of OSP's tables 2 and 4 (arXiv 2506.19697) for given models."""

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from osp.config import COMPARISONS, MonitorConfig
from osp.distributed import is_main
from osp.errors import UserError
from osp.evaluation.config import CompareConfig
from osp.evaluation.evaluate import Measurement, check_out, open_subject, store_record
from osp.evaluation.language_model import LanguageModel, find_model
from osp.monitor.probe import ProbeText, probe
from osp.quant.apply import quantized
from osp.quant.spec import QuantSpec, check_spec
from osp.run.evaluations import Comparison, ComparisonRecord, Score, format_short
from osp.run.folder import environment
from osp.tables import render_text

logger = logging.getLogger(__name__)

COLUMNS = ("16-16-16", "4-8-16", "4-8-8", "4-4-16", "4-4-4")  # W-A-KV of table 2; the last of table 4
METHODS = {"RTN": "", "+ FFN Had": "+Had", "+ GPTQ": "+GPTQ", "+ QuaRot": "+QuaRot"}  # row of table 4 -> of table 2
ACCURACIES = ("acc", "exact_match")  # of tasks with choices, and with generated answers
KURTOSIS_TOKENS = 16_384  # of the text, at most


def compare(config: CompareConfig) -> ComparisonRecord:
    """Return the tables of every model, each also kept in its run unless `out` is set. Collective."""
    if not config.paths:
        raise UserError("name the models to compare: python scripts/compare.py RUN RUN ...")
    if not config.quant.is_identity:
        config = dataclasses.replace(config, quant=config.quant.at("16-16-16"))
    check_out(config)
    for path in config.paths:
        find_model(Path(path))
    machine, comparisons = environment(), []
    origin = {"config": dataclasses.asdict(config), "commit": machine.pop("git"), "environment": machine}
    for path in config.paths:
        subject = open_subject(path, config)
        comparisons.append(compare_one(subject, config))
        if config.out is None:
            record = ComparisonRecord(step=comparisons[-1].step, models=(comparisons[-1],), **origin)
            store_record(record, None, subject.run, f"{COMPARISONS}/step_{subject.step or 0:08d}")
    step = comparisons[0].step if len(comparisons) == 1 else None
    return ComparisonRecord(step=step, models=tuple(comparisons), **origin)


def compare_one(subject: LanguageModel, config: CompareConfig) -> Comparison:
    """Return both tables of one model; a quantization that several cells share is measured once."""
    measurement, progress = Measurement(subject, config), config.progress and is_main()
    named = method_specs(config.quant)
    rows = named if config.methods == "all" else ("", "+Had")
    cells = {(row, bits): named[row].at(bits) for row in rows for bits in COLUMNS}
    methods = {}
    if config.methods != "none":
        methods = {method: named[row].at(COLUMNS[-1]) for method, row in METHODS.items()}
        if config.spinquant:
            methods["+ SpinQuant"] = dataclasses.replace(methods["+ QuaRot"], rotation="spinquant")
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
    possible = [words for words in wanted if words not in scores]
    sha256, what, kurtosis = subject.sha256(), "", script_kurtosis(measurement)
    for words in tqdm(possible, desc=subject.name, unit="cell", disable=not progress):
        calibration = measurement.calibration(wanted[words])
        with quantized(subject.model, wanted[words], calibration=calibration, progress=progress):
            results = measurement.results()
        perplexities = [result.value for result in results if result.metric == "perplexity"]
        accuracies = [result.value for result in results if result.metric in ACCURACIES]
        accuracy = statistics.fmean(accuracies) if accuracies else None
        scores[words] = Score(perplexities[0] if perplexities else None, accuracy)
        what = what or ", ".join(dict.fromkeys(result.what for result in results))
    return Comparison(
        subject.name,
        sha256,
        kurtosis=kurtosis,
        what=what,
        bits={row: {bits: scores[str(cells[row, bits])] for bits in COLUMNS} for row in rows},
        methods={method: scores[str(spec)] for method, spec in methods.items()},
        specs={spec.hash: str(spec) for spec in specs},
        hashes={f"{bits} {row}".strip(): spec.hash for (row, bits), spec in cells.items()}
        | {method: spec.hash for method, spec in methods.items()},
        texts={text.name: text.sha256 for text in measurement.texts},
        step=subject.step or 0,
    )


def method_specs(spec: QuantSpec) -> dict[str, QuantSpec]:
    """Return row of table 2 -> `spec` with one more method than in the row before, as in the authors' scripts."""
    hadamard = dataclasses.replace(spec, ffn_hadamard=True)
    gptq = dataclasses.replace(hadamard, method="gptq")
    return {"": spec, "+Had": hadamard, "+GPTQ": gptq, "+QuaRot": dataclasses.replace(gptq, rotation="quarot")}


def script_kurtosis(measurement: Measurement) -> float | None:
    """Return the excess kurtosis of the residual stream as the paper's script measures it, None without a text.

    The script reads each of the first tokens of the first text by itself (`osp.monitor.statistics`).
    """
    if not measurement.texts:
        return None
    tokens = measurement.texts[0].tokens[: min(KURTOSIS_TOKENS, measurement.config.max_tokens or KURTOSIS_TOKENS)]
    length = min(measurement.seq_len, len(tokens))
    rows = ProbeText(tokens[: len(tokens) // length * length].view(-1, length))
    reading = probe(measurement.subject.model, rows, MonitorConfig(sites=(), statistics=("osp_script",)))
    return reading.metrics["monitor/kurtosis/osp_script"]


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Return table 2, then table 4, and below them what the numbers are."""
    names = [c.name for c in comparisons]
    return render_text(
        Path(__file__).with_name("compare.md"),
        comparisons=comparisons,
        names=[f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)],
        columns=COLUMNS,
        has_tasks=any(score.accuracy is not None for c in comparisons for score in c.methods.values()),
        short=format_short,
    )
