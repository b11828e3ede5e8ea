"""`scripts/evaluate.py`: measure one model on texts and tasks under one quantization."""

import dataclasses
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from osp.config import EVALUATIONS
from osp.device import choose_device, native_bf16, prepare_cpu
from osp.distributed import init_distributed, is_main
from osp.errors import UserError
from osp.evaluation.config import EvaluateConfig, MeasureConfig
from osp.evaluation.harness import PAPER_TEN, HarnessModel, evaluate_local_task, evaluate_named_tasks, require_harness
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.local_tasks import LocalTask, read_task
from osp.evaluation.perplexity import Perplexity, Text, perplexity
from osp.evaluation.texts import HELD_OUT, read_text, training_text
from osp.model.transformer import Transformer
from osp.quant.apply import draw_calibration, propagated_error, quantized
from osp.quant.spec import SITES, QuantSpec, active_sites, check_spec
from osp.run.evaluations import ComparisonRecord, Evaluation, Result, SiteAblation, SiteCost, write_record
from osp.run.folder import environment

# OSP's ten as local files, with their numbers of examples; HellaSwag and MMLU are missing
PAPER_TASKS = dict.fromkeys(("arc_easy", "arc_challenge", "commonsense_qa"), 0) | {"gsm8k": 8}
PAPER_TASKS |= dict.fromkeys(("openbook_qa", "piqa", "siqa"), 0) | {"triviaqa_sm_sub": 5, "winogrande": 0}
LONGEST_WINDOW = 2048  # tokens; the length at which papers measure perplexity
BAR_WIDTH = 40


@dataclass(frozen=True)
class Inputs:
    """The texts and tasks that a model is measured on, read before anything is computed."""

    texts: tuple[Text, ...]
    tasks: tuple[LocalTask, ...]
    seq_len: int


def open_subject(path: str, config: MeasureConfig) -> LanguageModel:
    """Return the model at `path` on the device of this rank, after joining the ranks that a launcher started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        device = init_distributed(config.device)
    else:
        device = choose_device(config.device)
    if device.type == "cpu":
        prepare_cpu(config.threads)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and native_bf16(device))
    return open_model(path, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)


def evaluate(subject: LanguageModel, config: EvaluateConfig) -> Evaluation:
    """Return the results, the ablation if asked for, and all that both depend on. Collective: every rank calls it."""
    spec, machine = config.quant, environment()
    check_spec(spec, subject.model.config)
    prepare_out(config)
    inputs = read_inputs(subject, config)
    if config.ablate and (not inputs.texts or spec.is_identity):
        raise UserError("ablate=true needs a text (texts=[...]) and a quantization (quant=...)")
    calibration = calibration_rows(subject, spec, inputs)
    sha256 = subject.sha256()  # of the weights in the file, before they are quantized
    with quantized(subject.model, spec, calibration=calibration, progress=config.progress and is_main()):
        results = measure_specs(subject, config, inputs)
    return Evaluation(
        model={"name": subject.name, "path": str(subject.folder), "sha256": sha256, "step": subject.step},
        quant={"text": str(spec), "hash": spec.hash, "bits": spec.bits, **dataclasses.asdict(spec)},
        texts=[{"name": text.name, "sha256": text.sha256, "tokens": len(text.tokens)} for text in inputs.texts],
        tasks=[{"name": t.name, "sha256": t.sha256, "num_fewshot": t.num_fewshot} for t in inputs.tasks],
        config={key: value for key, value in dataclasses.asdict(config).items() if key != "quant"},
        device=str(subject.device),
        dtype=str(subject.model.compute_dtype).removeprefix("torch."),
        commit=machine.pop("git"),
        environment=machine,
        results=tuple(results),
        ablation=ablate_sites(subject, config, inputs, calibration) if config.ablate else None,
    )


def read_inputs(subject: LanguageModel, config: MeasureConfig) -> Inputs:
    """Return the texts and tasks of `config`; without any, the held-out split of the run."""
    names = config.texts
    if not (names or config.tasks or config.lm_eval):
        if subject.config is None:
            raise UserError("nothing to measure; name texts=[wikitext2] or files, tasks=[...] or lm_eval=[...]")
        names = (HELD_OUT,)
    for name in config.lm_eval:
        if name == "paper" or name.endswith(".jsonl"):
            raise UserError(f"lm_eval={name}: local files are tasks=[...]; the preset of the harness is paper_ten")
    if config.tasks or config.lm_eval:
        require_harness()
    tasks = tuple(read_task(path, num_fewshot=shots, limit=config.limit) for path, shots in _task_files(config))
    texts = tuple(read_text(name, subject, text_field=config.text_field) for name in names)
    trained = subject.config.train.seq_len if subject.config else subject.model.config.max_position_embeddings
    return Inputs(texts, tasks, seq_len=config.seq_len or min(LONGEST_WINDOW, trained))


def calibration_rows(subject: LanguageModel, spec: QuantSpec, inputs: Inputs) -> Tensor | None:
    """Return the calibration sequences (N, T) for `spec`, None if it needs none; never from a measured text."""
    if not spec.needs_calibration:
        return None
    if spec.calibration == "train":
        tokens = training_text(subject)
    else:
        text = read_text(spec.calibration, subject)
        if any(text.sha256 == measured.sha256 for measured in inputs.texts):
            raise UserError(f"quant.calibration={spec.calibration} is a text that is measured; name another one")
        tokens = text.tokens
    return draw_calibration(tokens, spec, seq_len=inputs.seq_len).to(subject.device)


def measure_specs(subject: LanguageModel, config: MeasureConfig, inputs: Inputs) -> list[Result]:
    """Return the results on all texts and tasks for the model as it is now, quantized or not. Collective."""
    results = []
    for text in inputs.texts:
        measured = text_perplexity(subject, config, inputs, text)
        results.append(Result(measured.name, "perplexity", measured.perplexity))
        results.append(Result(measured.name, "bits per byte", measured.bits_per_byte))
    model = HarnessModel(subject, bos=config.bos, batch_tokens=config.batch_tokens, progress=config.progress)
    for task in inputs.tasks:
        results += evaluate_local_task(model, task)
    if config.lm_eval:
        tasks = {}
        for name in config.lm_eval:
            tasks |= PAPER_TEN if name == "paper_ten" else {name: config.num_fewshot}
        results += evaluate_named_tasks(model, tasks, limit=config.limit, include_path=config.lm_eval_dir)
    return results


def text_perplexity(subject: LanguageModel, config: MeasureConfig, inputs: Inputs, text: Text) -> Perplexity:
    """Return the perplexity of the model as it is now with the settings of `config`. Collective."""
    bos_id = subject.bos_id if config.bos else None
    if config.bos and bos_id is None:
        raise UserError(f"bos=true: {subject.folder} names no BOS token (bos_token_id in its config.json)")
    return perplexity(
        subject.model,
        text,
        seq_len=inputs.seq_len,
        overlap=config.overlap,
        bos_id=bos_id,
        max_tokens=config.max_tokens,
        batch_tokens=config.batch_tokens,
        progress=config.progress,
    )


def ablate_sites(
    subject: LanguageModel, config: EvaluateConfig, inputs: Inputs, calibration: Tensor | None
) -> SiteAblation:
    """Return the perplexity of the first text for each site alone and left out, and R_L on its first windows."""
    spec, text = config.quant, inputs.texts[0]
    active = active_sites(spec, subject.model.config)
    quiet = dataclasses.replace(config, progress=False)

    def at(sites: Collection[str]) -> float:
        with quantized(subject.model, spec, calibration=calibration, sites=sites):
            return text_perplexity(subject, quiet, inputs, text).perplexity

    sites = [site for site in SITES if site in active]
    shown = tqdm(sites, desc="sites", unit="site", leave=False, disable=not (config.progress and is_main()))
    costs = tuple(SiteCost(site, alone=at({site}), left_out=at(active - {site})) for site in shown)
    number = max(1, config.batch_tokens // inputs.seq_len)
    windows = text.tokens[: len(text.tokens) // inputs.seq_len * inputs.seq_len].view(-1, inputs.seq_len)[:number]
    windows = windows if len(windows) else text.tokens[None]
    *layer_errors, last_error = propagated_error(subject.model, spec, windows, calibration=calibration)
    return SiteAblation(text.name, at(()), at(active), costs, tuple(layer_errors), last_error)


def live_perplexity(
    model: Transformer, text: Text, *, seq_len: int, spec: QuantSpec | None = None, batch_tokens: int = 8192
) -> dict[str, float]:
    """Return `quant/perplexity/16-16-16` and the same for `spec` (default: OSP's 4-4-4) on a text during training.

    The weights are the same bits afterwards. Collective: every rank calls it with the whole model, under ZeRO-3 inside
    `gathered_parameters`.
    """
    was_training = model.training
    model.eval()
    try:
        metrics = {}
        for current in (QuantSpec(), spec or QuantSpec().at("4-4-4")):
            with quantized(model, current):
                value = perplexity(model, text, seq_len=seq_len, batch_tokens=batch_tokens).perplexity
            metrics[f"quant/perplexity/{current.bits}"] = value
        return metrics
    finally:
        model.train(was_training)


def prepare_out(config: MeasureConfig) -> None:
    """Make the folder of `out`; raise `UserError` before the work if nothing can be written there."""
    if config.out is None:
        return
    path = Path(config.out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"out={path}: {path.parent} is not a folder; name a JSON file") from error
    except OSError as error:
        raise UserError(f"out={path}: cannot write there: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"out={path}: {'is a folder' if path.is_dir() else 'cannot write there'}; name a JSON file")


def store_record(
    subject: LanguageModel, config: MeasureConfig, record: Evaluation | ComparisonRecord, name: str
) -> Path | None:
    """Write the record on rank 0 where `out` says, or into the run as `name`; return the file, None without either."""
    if config.out is None and subject.run is None:
        return None
    path = Path(config.out) if config.out else Path(subject.run or "") / EVALUATIONS / f"{name}.json"
    if is_main():
        write_record(path, record)
    return path


def results_table(record: Evaluation) -> str:
    """Return one line of text per result below the model and its quantization."""
    names = [f"{result.what} {result.metric}" for result in record.results]
    width = max(map(len, names))
    lines = [
        f"{name:<{width}}  {_number(result.value):>10}"
        + ("" if result.stderr is None else f" ± {_number(result.stderr)}")
        + (f"  ({result.truncated} contexts cut)" if result.truncated else "")
        for name, result in zip(names, record.results, strict=True)
    ]
    return "\n".join([f"{record.model['name']}, {record.quant['text']} [{record.quant['hash']}]", *lines])


def ablation_table(ablation: SiteAblation) -> str:
    """Return text: perplexities by site with a bar for the loss that each site costs alone, and R_L by layer."""
    costs = {site.site: ablation.cost_alone(site) for site in ablation.sites}
    largest = max([1e-9, *filter(math.isfinite, costs.values())])
    lines = [
        f"perplexity of {ablation.text}: {_number(ablation.unquantized)} unquantized, "
        f"{_number(ablation.quantized)} quantized",
        f"{'site':<14}{'alone':>10}{'left out':>10}  nats per token for this site alone",
    ]
    for cost in ablation.sites:
        nats = costs[cost.site]
        share = nats / largest if math.isfinite(nats) else float(nats == math.inf)
        bar = "#" * max(0, round(BAR_WIDTH * share))
        lines.append(f"{cost.site:<14}{_number(cost.alone):>10}{_number(cost.left_out):>10}  {bar} {nats:+.4f}")
    lines.append("R_L, relative error of the residual stream after each block, and of the last norm")
    lines += [f"layer {layer:02d}  {error:.4f}" for layer, error in enumerate(ablation.layer_errors)]
    lines.append(f"last norm {ablation.last_error:.4f}")
    return "\n".join(lines)


def _task_files(config: MeasureConfig) -> list[tuple[Path, int]]:
    """Return (file, number of examples) of each task; `paper` stands for OSP's ten as far as tasks_dir holds them."""
    folder = Path(config.tasks_dir)
    files = []
    for name in config.tasks:
        if name == "paper":
            paths = [(folder / f"{task}.jsonl", shots) for task, shots in PAPER_TASKS.items()]
            present = [(path, shots) for path, shots in paths if path.exists()]
            if not present:
                raise UserError(f"tasks=[paper]: tasks_dir={folder} holds none of {', '.join(PAPER_TASKS)} as .jsonl")
            files += present
        else:
            path = Path(name) if name.endswith(".jsonl") else folder / f"{name}.jsonl"
            files.append((path, config.num_fewshot))
    return files


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"
