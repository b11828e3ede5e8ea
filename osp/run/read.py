"""Read a run folder: curves, probes, events, evaluations and configuration. Needs no torch.

Missing or broken parts are named in `Run.notes` and the rest is read. The run may have been killed, may still be
writing, or may never have been validated or probed.
"""

import contextlib
import json
import math
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from osp.config import Config, leaves, to_dict
from osp.errors import UserError
from osp.files import iterate_lines
from osp.run.evaluations import Comparison, Evaluation, read_evaluations
from osp.run.metrics import Site, site_of

QUIET_SECONDS = 600  # without a summary and without new metrics for this long, a run counts as interrupted

# Keys that may change when a run continues: they do not affect the model or what it learns.
FREE: tuple[str, ...] = ("run.", "resume", "debug", "logger.", "monitor.", "eval.", "engine.", "spike.")
FREE += ("checkpoint.every", "checkpoint.keep_", "data.cache_dir", "data.num_workers", "data.skip_steps")
FREE += ("train.micro_batch_size", "train.compile", "train.activation_checkpointing", "train.loss_chunk_tokens")
FREE += ("train.on_nonfinite", "train.max_skips", "train.stop_at")


class Series(NamedTuple):
    """One metric over the run: increasing `steps` (n,) and `values` (n,), nan for numbers that are not finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """The values that are finite."""
        return self.values[np.isfinite(self.values)]

    @property
    def last(self) -> float:
        """The newest finite value, or nan."""
        return float(self.finite[-1]) if len(self.finite) else math.nan


@dataclass
class Run:
    """The content of a run folder. `probes` and `events` are the lines of probes.jsonl and events.jsonl."""

    folder: Path
    name: str
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    summary: dict[str, Any]
    series: dict[str, Series]
    probes: list[dict[str, Any]]
    events: list[dict[str, Any]]
    evaluations: list[Evaluation]
    comparison: Comparison | None  # the newest
    notes: list[str]

    def last(self, key: str) -> float:
        """Return the newest finite value of a metric, or nan."""
        return self.series[key].last if key in self.series else math.nan

    @property
    def step(self) -> int:
        """The last optimizer step with a metric."""
        return max((int(series.steps[-1]) for series in self.series.values()), default=0)

    @property
    def tokens(self) -> int:
        return int(self.series["tokens"].last) if "tokens" in self.series else 0

    @property
    def alerts(self) -> list[int]:
        """The steps of the alerts."""
        return [event["step"] for event in self.events if event.get("kind") == "alert"]

    @property
    def state(self) -> str:
        """`complete`, `running` or `interrupted`."""
        if self.summary:
            return "complete"
        quiet = time.time() - (self.folder / "metrics.jsonl").stat().st_mtime
        return "running" if quiet < QUIET_SECONDS else "interrupted"

    def num_parameters(self) -> int | None:
        """Return the number of parameters by the manifest of a checkpoint, or None before the first checkpoint."""
        for manifest in sorted(self.folder.glob("checkpoints/step_*/manifest.json")):
            with contextlib.suppress(OSError, ValueError, KeyError):
                shapes = json.loads(manifest.read_text(encoding="utf-8"))["shapes"]
                return sum(math.prod(shape) for shape in shapes.values())
        return None

    def sites(self) -> dict[Site, Series]:
        """Return every monitored quantity of a site, a norm or a weight."""
        return {site: series for key, series in self.series.items() if (site := site_of(key))}


def read_run(folder: Path) -> Run:
    """Return the run in `folder`; raise `UserError` if it has no metrics."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder{_runs_near(folder)}")
    notes: list[str] = []
    series = _columns(_json_lines(folder / "metrics.jsonl", notes))
    if not series:
        why = "is empty" if (folder / "metrics.jsonl").exists() else "is missing"
        raise UserError(f"{folder}: metrics.jsonl {why}, nothing to draw{_runs_near(folder)}")
    config = _read(folder / "config.yaml", dict, notes)
    name = str(config.get("run", {}).get("name") or folder.resolve().name)
    starts = [start for start in _read(folder / "environment.json", list, notes) if isinstance(start, dict)]
    summary = _read(folder / "summary.json", dict, notes) if (folder / "summary.json").exists() else {}
    probes, events = _probes(folder / "probes.jsonl", notes), list(_json_lines(folder / "events.jsonl", notes))
    evaluations, comparison = read_evaluations(folder, notes)
    return Run(folder, name, config, starts, summary, series, probes, events, evaluations, comparison, notes)


def _json_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a .jsonl file; `notes` counts the broken lines. A missing file is empty."""
    broken: list[int] = []
    yield from iterate_lines(path, broken)
    if broken:
        numbers = ", ".join(map(str, broken[:5])) + (" ..." if len(broken) > 5 else "")
        notes.append(f"{path.name}: {len(broken)} unreadable line{'s' * (len(broken) > 1)} skipped (line {numbers})")


def _columns(lines: Iterable[dict[str, Any]]) -> dict[str, Series]:
    """Return key -> series. The last line for a step counts: a resumed run took that step again."""
    columns: dict[str, tuple[array, array]] = {}  # a long run has millions of values
    for line in lines:
        step = line["step"]
        for key, value in line.items():
            if key != "step" and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
                steps, values = columns.setdefault(key, (array("q"), array("d")))
                steps.append(step)
                values.append(math.nan if value is None else value)
    series = {}
    for key, (steps, values) in columns.items():
        unique, last = np.unique(np.array(steps)[::-1], return_index=True)
        series[key] = Series(unique, np.array(values)[::-1][last])
    return series


def _probes(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the probes in order of the steps; the last line for a step counts."""
    by_step = {}
    for probe in _json_lines(path, notes):
        sites = probe.get("sites")
        if isinstance(sites, dict):
            by_step[probe["step"]] = {**probe, "sites": {name: s for name, s in sites.items() if _is_site(s)}}
    return [by_step[step] for step in sorted(by_step)]


def _is_site(value: Any) -> bool:
    """Return whether a site of a probe has `channels`, [channel, max|x|] of its largest channels."""
    channels = value.get("channels") if isinstance(value, dict) else None
    if not isinstance(channels, list) or not channels:
        return False
    return all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int) for pair in channels)


def _read(path: Path, kind: type, notes: list[str]) -> Any:
    """Return the content of a YAML or JSON file, or an empty `kind` and a note."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(value, kind):
            return value
        notes.append(f"{path.name}: not the format of a run; left out")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
    except (OSError, ValueError, yaml.YAMLError):
        notes.append(f"{path.name} cannot be read; left out")
    return kind()


def _runs_near(folder: Path) -> str:
    """Return `; runs here: ...`, the run folders below or beside a path that is not a run folder."""
    for place in (folder, folder.parent, Path("runs")):
        if names := sorted(str(path.parent) for path in place.glob("*/metrics.jsonl"))[:6]:
            return f"; runs here: {', '.join(names)}"
    return "; scripts/train.py writes run folders, runs/NAME"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every key that differs and is not `FREE`, sorted by key.

    A missing key has its default: a run may be older than the key.
    """
    defaults = dict(leaves(to_dict(Config())))
    before, after = defaults | dict(leaves(old)), defaults | dict(leaves(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE)
    ]
