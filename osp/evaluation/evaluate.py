"""`scripts/evaluate.py`: measure one model on texts and tasks under one quantization."""

import dataclasses
import hashlib
import importlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from osp.config import COMPARISONS, EVALUATIONS
from osp.device import choose_device, native_bf16, prepare_cpu
from osp.distributed import init_distributed, is_main
from osp.errors import UserError, as_user_error
from osp.evaluation.config import EvaluateConfig, MeasureConfig
from osp.evaluation.harness import HarnessModel, evaluate_local_task, evaluate_named_tasks, load_named_tasks
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.local_tasks import PAPER_TEN, paper_files, read_task
from osp.evaluation.perplexity import Text, perplexity
from osp.evaluation.texts import HELD_OUT, read_text, read_texts, training_text
from osp.model.transformer import Transformer
from osp.quant.apply import draw_calibration, propagated_error, quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import SITES, QuantSpec, active_sites, check_spec
from osp.run.evaluations import ComparisonRecord, Evaluation, Result, SiteAblation, SiteCost, write_evaluation
from osp.run.folder import environment
from osp.tables import render_text

log = logging.getLogger(__name__)

BAR_WIDTH = 40


def open_subject(path: str, config: MeasureConfig) -> LanguageModel:
    """Return the model at `path` on the device of this rank, after joining the ranks that a launcher started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        device = init_distributed(config.device)
    else:
        device = choose_device(config.device)
    if device.type == "cpu":
        prepare_cpu(config.threads)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and native_bf16(device))
    subject = open_model(path, device=device, weights=config.weights)
    subject.model.compute_dtype = torch.bfloat16 if bf16 else torch.float32
    return subject


class Measurement:
    """The texts and tasks of `config`, read before anything is computed, and the numbers of a model on them."""

    def __init__(self, subject: LanguageModel, config: MeasureConfig):
        """Without texts and tasks in `config`, measure the held-out split of the run."""
        names = config.texts
        if not (names or config.tasks or config.lm_eval):
            if subject.config is None:
                raise UserError("nothing to measure; name texts=[wikitext2] or files, tasks=[...] or lm_eval=[...]")
            names = (HELD_OUT,)
        for name in config.lm_eval:
            if name == "paper" or name.endswith(".jsonl"):
                raise UserError(f"lm_eval={name}: local files are tasks=[...]; the preset of the harness is paper_ten")
        if config.tasks or config.lm_eval:
            missing = "tasks, lm_eval: lm-eval is not installed; pip install -e '.[lm-eval]' ("
            with as_user_error(missing, ImportError, after=")"):
                importlib.import_module("lm_eval")
        if config.lm_eval_dir is not None and not Path(config.lm_eval_dir).is_dir():
            raise UserError(f"lm_eval_dir={config.lm_eval_dir} is not a folder")
        bos = subject.begins_with_bos if config.bos is None else config.bos
        if names and bos and subject.bos_id is None:
            raise UserError(f"bos=true: {subject.folder} names no BOS token (bos_token_id in its config.json)")
        self.subject, self.config, self.bos = subject, config, bos
        files = dict(_task_files(config))
        tasks = {path: read_task(path, num_fewshot=shots, limit=config.limit) for path, shots in files.items()}
        self.texts = read_texts(names, subject, text_field=config.text_field)
        self.named = load_named_tasks(_named_tasks(config), include_path=config.lm_eval_dir) if config.lm_eval else {}
        called = [path.stem for path in files] + [name for loaded in self.named.values() for name in loaded["tasks"]]
        self.tasks = [  # two files of one name are called by their paths
            task if called.count(path.stem) == 1 else dataclasses.replace(task, name=str(path.with_suffix("")))
            for path, task in tasks.items()
        ]
        self.seq_len = config.seq_len or subject.window
        self.windows: dict[str, Any] = {  # arguments of `perplexity`
            "seq_len": self.seq_len,
            "overlap": config.overlap,
            "bos_id": subject.bos_id if bos else None,
            "max_tokens": config.max_tokens,
            "batch_tokens": config.batch_tokens,
        }

    def calibration(self, spec: QuantSpec) -> Tensor | None:
        """Return the calibration sequences for `spec`, see `read_calibration`."""
        return read_calibration(self.subject, spec, measured=self.texts, seq_len=self.seq_len)

    def results(self) -> Iterator[list[Result]]:
        """Yield the results on each text and task for the model as it is now, quantized or not. Collective."""
        config = self.config
        for text in self.texts:
            measured = perplexity(self.subject.model, text, **self.windows, progress=config.progress)
            if not math.isfinite(measured.nats):
                log.warning("%s: the perplexity is not finite, because an activation overflows", measured.name)
            numbers = {"perplexity": measured.perplexity, "bits per byte": measured.bits_per_byte}
            yield [Result(measured.name, metric, value) for metric, value in numbers.items()]
        model = HarnessModel(self.subject, bos=self.bos, batch_tokens=config.batch_tokens, progress=config.progress)
        for task in self.tasks:
            yield evaluate_local_task(model, task)
        for loaded in self.named.values():
            yield from evaluate_named_tasks(model, loaded, limit=config.limit)


def read_calibration(
    subject: LanguageModel, spec: QuantSpec, *, measured: Sequence[Text], seq_len: int
) -> Tensor | None:
    """Return the calibration sequences (N, T) for `spec`, None if it needs none; never from a measured text."""
    if not spec.needs_calibration:
        return None
    if spec.calibration == "train":
        tokens = training_text(subject)
    else:
        text = read_text(spec.calibration, subject)
        if text.sha256 in [other.sha256 for other in measured]:
            raise UserError(f"quant.calibration={spec.calibration} is a text that is measured; name another one")
        tokens = text.tokens if text.row is None else text.tokens.view(-1, text.row)
    return draw_calibration(tokens, spec, seq_len=seq_len).to(subject.device)


def note_training(subject: LanguageModel, spec: QuantSpec) -> None:
    """Log one line if the run was trained for another rounding than `spec`."""
    scheme = subject.config.qat.scheme if subject.config else None
    text = {key: getattr(spec, key) for key in ("calibration", "calibration_tokens", "seed")}
    if scheme and spec.parts and spec != dataclasses.replace(DEPLOYED[f"qat_{scheme}"], **text):
        log.info("%s was trained with qat.scheme=%s: quant=qat_%s has its rounding", subject.name, scheme, scheme)


def evaluate(subject: LanguageModel, config: EvaluateConfig) -> Evaluation:
    """Return the results, the ablation if asked for, and all that both depend on. Collective: every rank calls it."""
    spec, machine, progress = config.quant, environment(), config.progress and is_main()
    check_spec(spec, subject.model.config)
    check_out(config.out, subject.run)
    measurement = Measurement(subject, config)
    if config.ablate and (not measurement.texts or spec.is_identity):
        raise UserError("ablate=true needs a text (texts=[...]) and a quantization (quant=...)")
    note_training(subject, spec)
    calibration = measurement.calibration(spec)
    sha256 = subject.sha256()  # of the weights in the file, before they are quantized
    record = Evaluation(
        model={"name": subject.name, "path": str(subject.folder), "sha256": sha256, "step": subject.step},
        weights=subject.weights,
        quant={"text": str(spec), "hash": spec.hash, "bits": spec.bits, **dataclasses.asdict(spec)},
        texts=[{"name": text.name, "sha256": text.sha256, "tokens": len(text.tokens)} for text in measurement.texts],
        tasks=[{"name": t.name, "sha256": t.sha256, "num_fewshot": t.num_fewshot} for t in measurement.tasks],
        config={key: value for key, value in dataclasses.asdict(config).items() if key != "quant"},
        device=str(subject.device),
        dtype=str(subject.model.compute_dtype).removeprefix("torch."),
        commit=machine.pop("git"),
        environment=machine,
        results=(),
    )
    with quantized(subject.model, spec, calibration=calibration, progress=progress):
        for results in measurement.results():
            record = dataclasses.replace(record, results=(*record.results, *results))
            if store_record(record, config.out, subject.run, finished=False) is None and is_main():
                log.info("\n".join(f"{result.what} {result.metric} {result.value:.4f}" for result in results))
    if not config.ablate:
        return record
    return dataclasses.replace(record, ablation=ablate_sites(measurement, spec, calibration, progress=progress))


def ablate_sites(
    measurement: Measurement, spec: QuantSpec, calibration: Tensor | None, *, progress: bool = False
) -> SiteAblation:
    """Return the perplexity of the first text for each site alone and left out, and R_L on its first windows."""
    model, text = measurement.subject.model, measurement.texts[0]
    length = text.row or measurement.seq_len
    active = active_sites(spec, model.config)

    def at(sites: Collection[str]) -> float:
        with quantized(model, spec, calibration=calibration, sites=sites):
            return perplexity(model, text, **measurement.windows).perplexity

    sites = [site for site in SITES if site in active]
    shown = tqdm(sites, desc="sites", unit="site", leave=False, disable=not progress)
    costs = tuple(SiteCost(site, alone=at({site}), left_out=at(active - {site})) for site in shown)
    windows = text.tokens[: len(text.tokens) // length * length].view(-1, length)
    windows = windows[: max(1, measurement.config.batch_tokens // length)] if len(windows) else text.tokens[None]
    *layer_errors, last_error = propagated_error(model, spec, windows, calibration=calibration)
    return SiteAblation(text.name, at(()), at(active), costs, tuple(layer_errors), last_error)


def live_perplexity(
    model: Transformer,
    text: Text,
    *,
    seq_len: int,
    formats: Mapping[str, tuple[QuantSpec, Tensor | None]] | None = None,
    batch_tokens: int = 8192,
) -> dict[str, float]:
    """Return `quant/perplexity/NAME` on a text during training, for 16-16-16, OSP's 4-4-4 and `formats`.

    The weights are the same bits afterwards. Collective: every rank calls it with the whole model, under ZeRO-3 inside
    `gathered_parameters`. formats: quantizations by name, each with its calibration sequences (N, T).
    """
    was_training = model.training
    model.eval()
    try:
        metrics = {}
        specs = {spec.bits: (spec, None) for spec in (QuantSpec(), QuantSpec().at("4-4-4"))}
        for name, (spec, calibration) in (specs | dict(formats or {})).items():
            with quantized(model, spec, calibration=calibration):
                value = perplexity(model, text, seq_len=seq_len, batch_tokens=batch_tokens).perplexity
            metrics[f"quant/perplexity/{name}"] = value
        return metrics
    finally:
        model.train(was_training)


def check_out(out: str | None, run: Path | None = None) -> None:
    """Make the folder of `out`, or of the records in `run`; raise `UserError` if nothing can be written there."""
    path = Path(out) if out else run and run / EVALUATIONS / COMPARISONS
    if path is None:
        return
    if out and (path.is_dir() or path.parent.is_file()):
        reason = "is a folder" if path.is_dir() else f"{path.parent} is not a folder"
        raise UserError(f"out={path}: {reason}; name a JSON file")
    fix = "" if out else "; name a file elsewhere with out=FILE"
    with as_user_error(f"{'out=' * bool(out)}{path}: cannot write there: ", OSError, after=fix):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def store_record(
    record: Evaluation | ComparisonRecord,
    out: str | None,
    run: Path | None = None,
    name: str = "",
    finished: bool = True,
) -> Path | None:
    """Write the record on rank 0 to `out`, else into `run` as `name`; return the file, None without either.

    A record that is not finished goes to a file beside it, which the finished record of the same command replaces.
    """
    path = Path(out) if out else run and run / EVALUATIONS / f"{name}.json"
    if path and is_main():
        command = json.dumps([record.config, record.quant if isinstance(record, Evaluation) else ""], sort_keys=True)
        incomplete = path.with_name(f"incomplete-{hashlib.sha256(command.encode()).hexdigest()[:12]}.json")
        try:
            write_evaluation(path if finished else incomplete, record)
        except UserError as error:
            if finished:
                raise
            log.warning("%s; the results so far are not kept", error)
        if finished:
            incomplete.unlink(missing_ok=True)
    return path


def results_table(record: Evaluation) -> str:
    """Return the results as text; with an ablation also perplexities by site, a bar for each site's cost, and R_L."""
    costs = [record.ablation.cost_alone(site) for site in record.ablation.sites] if record.ablation else []
    largest = max([1e-9, *filter(math.isfinite, costs)])
    shares = [nats / largest if math.isfinite(nats) else float(nats == math.inf) for nats in costs]
    return render_text(
        Path(__file__).with_name("evaluate.txt"),
        record=record,
        width=max((len(f"{result.what} {result.metric}") for result in record.results), default=0),
        bars=["#" * max(0, round(BAR_WIDTH * share)) for share in shares],
        costs=costs,
        digits=lambda value: f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}",
    )


def _named_tasks(config: MeasureConfig) -> dict[str, int]:
    """Return the number of examples of each name of `lm_eval`; the paper's tasks have the paper's."""
    names = [task for name in config.lm_eval for task in (PAPER_TEN if name == "paper_ten" else [name])]
    return {name: PAPER_TEN[name][0] if name in PAPER_TEN else config.num_fewshot for name in names}


def _task_files(config: MeasureConfig) -> list[tuple[Path, int]]:
    """Return (file, number of examples) of each task; `paper` names the files of OSP's ten that tasks_dir has."""
    folder, files = Path(config.tasks_dir), []
    for name in config.tasks:
        if name == "paper":
            files += paper_files(folder)
        else:
            files.append((Path(name) if name.endswith(".jsonl") else folder / f"{name}.jsonl", config.num_fewshot))
    return files
