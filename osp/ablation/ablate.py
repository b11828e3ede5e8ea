"""Run an ablation: train, measure, and write the page, the table and the numbers."""

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from osp.ablation.ablation_page import ablation_page
from osp.ablation.config import AblationConfig, check_ablation
from osp.ablation.execute import Execution, slots
from osp.ablation.runs import Compose, Planned, plan
from osp.ablation.table import Results, as_json, collect, contents
from osp.errors import RunError, StoppedError, UserError
from osp.files import write_text
from osp.model.transformer import count_parameters
from osp.run.folder import environment
from osp.tables import render_markdown

log = logging.getLogger(__name__)


def ablate(config: AblationConfig, compose: Compose, *, scripts: Path, command: Sequence[str]) -> Results:
    """Train and measure the runs of `config` that are missing, and write ablation.html, ablation.md and ablation.json.

    The files are also written if runs failed or the ablation is stopped; they then name the missing runs.

    Args:
        compose: returns the configuration that scripts/train.py would train with these overrides.
        scripts: the folder of train.py and compare.py.
        command: the command line, for the page.

    Raises:
        RunError: a run failed; the others have ended.
        StoppedError: a signal asked to stop; the runs have saved.
    """
    check_ablation(config)
    runs = plan(config, compose)
    try:
        Path(config.dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"dir={config.dir}: cannot write there: {error.strerror}") from error
    execution = Execution(config, runs, scripts=scripts)
    places, total = slots(config, execution.runs), sum(run.num_tokens for run in execution.runs)
    threads = f"{places[0].threads} thread{'s' * (places[0].threads > 1)} per process"
    log.info(
        f"{len(execution.runs)} runs of {total / len(execution.runs):,.0f} tokens in {config.dir}, {len(places)} at a "
        f"time, {f'GPUs {[slot.gpus for slot in places]}' if places[0].gpus else threads}"
    )
    try:
        execution()
    except StoppedError:
        write(runs, execution, command)
        raise
    results = write(runs, execution, command)
    if execution.failures:
        label, why = next(iter(execution.failures.items()))
        raise RunError(
            f"{len(execution.failures)} of {len(execution.runs)} runs failed, {label}: {why}; the page says what is "
            "missing, the same command tries them again"
        )
    return results


def write(runs: list[Planned], execution: Execution, command: Sequence[str]) -> Results:
    """Write ablation.html, ablation.md and ablation.json to the folder of the ablation."""
    newest = {run.label: execution.record(run) for run in execution.runs if execution.trained(run)}
    records = {label: record for label, record in newest.items() if record is not None}
    results = collect(runs, records, execution.failures, about=about_lines(runs, command))
    folder, template = Path(execution.config.dir), Path(__file__).with_name("ablation.md")
    write_text(folder / "ablation.json", json.dumps(as_json(results), indent=1) + "\n")
    write_text(folder / "ablation.md", render_markdown(template, **contents(results, execution.config)))
    write_text(folder / "ablation.html", ablation_page(results, execution.config))
    return results


def about_lines(runs: list[Planned], command: Sequence[str]) -> list[str]:
    """Return lines on the model, the data, the machine, the command and the rows."""
    config, machine, num_tokens = runs[0].config, environment(), runs[0].num_tokens
    model, train = config.model, config.train
    return [
        f"ours: {count_parameters(model)['total'] / 1e6:.1f} M parameters ({model.num_hidden_layers} layers of "
        f"{model.hidden_size}, {model.norm.name} in the first row), {num_tokens:,} tokens in steps of "
        f"{train.tokens_per_step:,}, sequences of {train.seq_len}",
        f"data: {' '.join([config.data.source, *config.data.paths])}",
        f"machine: {machine['cpus']} cores, torch {machine['torch']}, Python {machine['python']}",
        f"command: python {shlex.join(command)}",
        *(f"row {row.name}: {' '.join(row.overrides)}" for row in dict.fromkeys(run.row for run in runs)),
    ]
