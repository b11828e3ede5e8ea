"""Read a run folder: curves, probes, events, evaluations and configuration. Needs no torch.

Missing or broken parts are named in `Run.notes` and the rest is read: a line, or a file of one value, is left out if it
lacks the types that readers of a `Run` rely on. The run may have been killed, be writing still, or never have been
validated or probed.
"""

import contextlib
import json
import math
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Required

import numpy as np
import yaml
from pydantic import Field, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import TypedDict

from osp.config import Config, leaves, to_dict
from osp.errors import UserError
from osp.files import iterate_lines, not_a_file, read_json
from osp.run.evaluations import Comparison, Evaluation, read_evaluations
from osp.run.metrics import Site, site_of

QUIET_SECONDS = 600  # without a summary and without new metrics for this long, a run counts as interrupted

# Keys that may change when a run continues: they do not affect the model or what it learns.
FREE: tuple[str, ...] = ("run.", "resume", "debug", "logger.", "monitor.", "eval.", "engine.", "spike.")
FREE += ("checkpoint.every", "checkpoint.keep_", "data.cache_dir", "data.num_workers", "data.skip_steps")
FREE += ("train.micro_batch_size", "train.compile", "train.activation_checkpointing", "train.loss_chunk_tokens")
FREE += ("train.on_nonfinite", "train.max_skips", "train.stop_at", "train.deterministic", "train.attention")

Table = dict[str, Any]
Bits = Annotated[StrictFloat, Field(gt=0, lt=math.inf)]
Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
Channel = tuple[StrictInt, StrictFloat | None]  # and its max|x|
Channels = Annotated[list[Channel], Field(min_length=1)]  # largest first


def _table(**types: Any) -> Any:
    """Return the type of a table in which these keys, where they exist, have these types."""
    return TypedDict("Table", types, total=False)  # pyright: ignore


# What the readers of a `Run` rely on; they take anything elsewhere.
_METRICS = TypeAdapter(dict[str, StrictFloat | None])
_SITE = _table(channels=Required[Channels], top_channel=StrictInt, top_position=StrictInt)
_PROBE = TypeAdapter(_table(sites=Required[dict[str, _SITE]]))
_EVENT = TypeAdapter(_table(kind=StrictStr))
_START = _table(command=list[Any])
_STARTS = TypeAdapter(list[_START])  # pyright: ignore
_SUMMARY = TypeAdapter(_table(gzip_bits_per_byte=Bits | None))
_TRAIN = _table(steps=Count | None, tokens_per_step=Count, seq_len=Count)
_OPTIMIZER = _table(lr=StrictFloat, rules=Table)
_CONFIG = TypeAdapter(_table(run=Table, train=_TRAIN, model=Table, norm=Table, optimizer=_OPTIMIZER))
_MANIFEST = TypeAdapter(_table(shapes=Required[dict[str, list[Count]]]))


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
    comparison: Comparison | None  # the newest of the trained weights
    notes: list[str]
    averaged: Comparison | None = None  # the newest of the averaged weights

    def last(self, key: str) -> float:
        """Return the newest finite value of a metric, or nan."""
        return self.series[key].last if key in self.series else math.nan

    @property
    def step(self) -> int:
        """The last optimizer step with a metric."""
        return max((int(series.steps[-1]) for series in self.series.values()), default=0)

    @property
    def tokens(self) -> int:
        last = self.last("tokens")
        return int(last) if math.isfinite(last) else 0

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
            with contextlib.suppress(ValueError):
                shapes = _MANIFEST.validate_python(read_json(manifest))["shapes"]
                return min(sum(math.prod(shape) for shape in shapes.values()), 2**63)
        return None

    def sites(self) -> dict[Site, Series]:
        """Return every monitored quantity of a site, a norm or a weight."""
        return {site: series for key, series in self.series.items() if (site := site_of(key))}


def read_run(folder: Path) -> Run:
    """Return the run in `folder`; raise `UserError` if it has no metrics."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder{_runs_near(folder)}")
    notes: list[str] = []
    if not (series := _columns(read_metrics(folder / "metrics.jsonl", notes))):
        why = "is empty" if (folder / "metrics.jsonl").exists() else "is missing"
        raise UserError(f"{folder}: metrics.jsonl {why}, nothing to draw{_runs_near(folder)}")
    config = _read(folder / "config.yaml", _CONFIG, notes) or {}
    name = str(config.get("run", {}).get("name") or folder.resolve().name)
    starts = _read(folder / "environment.json", _STARTS, notes) or []
    summary = ((folder / "summary.json").exists() and _read(folder / "summary.json", _SUMMARY, notes)) or {}
    probes, events = read_probes(folder / "probes.jsonl", notes), list(_lines(folder / "events.jsonl", _EVENT, notes))
    evaluations, newest = read_evaluations(folder, notes)
    tables = (evaluations, newest.get("trained"), notes, newest.get("averaged"))
    return Run(folder, name, config, starts, summary, series, probes, events, *tables)


def read_metrics(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl: `step`, and a number or None for every metric."""
    return _lines(path, _METRICS, notes)


def read_probes(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the lines of a probes.jsonl in order of the steps; the last line for a step counts."""
    by_step = {probe["step"]: probe for probe in _lines(path, _PROBE, notes)}
    return [by_step[step] for step in sorted(by_step)]


def _lines(path: Path, adapter: TypeAdapter[Any], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the valid lines of a file; `notes` counts the others. A missing file is empty."""
    broken, invalid = list[int](), list[int]()
    if not_a_file(path):
        notes.append(f"{path.name} is not a file; left out")
    for line in iterate_lines(path, broken):
        try:
            adapter.validate_python(line)
        except ValidationError:
            invalid.append(line["step"])
        else:
            yield line
    if broken:
        numbers = ", ".join(map(str, broken[:5])) + (" ..." if len(broken) > 5 else "")
        notes.append(f"{path.name}: {len(broken)} unreadable line{'s' * (len(broken) > 1)} skipped (line {numbers})")
    if invalid:
        notes.append(f"{path.name}: lines of another format left out: {len(invalid)}, the first of step {invalid[0]}")


def _columns(lines: Iterable[dict[str, Any]]) -> dict[str, Series]:
    """Return key -> series. The last line for a step counts: a resumed run took that step again."""
    columns: dict[str, tuple[array, array]] = {}  # a long run has millions of values
    for line in lines:
        for key, value in line.items():
            if key != "step":
                steps, values = columns.setdefault(key, (array("q"), array("d")))
                steps.append(line["step"])
                values.append(math.nan if value is None or not math.isfinite(value) else value)
    series = {}
    for key, (steps, values) in columns.items():
        unique, last = np.unique(np.array(steps)[::-1], return_index=True)
        series[key] = Series(unique, np.array(values)[::-1][last])
    return series


def _read(path: Path, adapter: TypeAdapter[Any], notes: list[str]) -> Any:
    """Return the value in a YAML or JSON file, or None and a note."""
    try:
        value = read_json(path) if path.suffix == ".json" else read_yaml(path)
        value = from_json(json.dumps(value, default=str))  # no deeper than 200 levels, and keys are text
        adapter.validate_python(value)
    except ValidationError:
        notes.append(f"{path.name}: not the format of a run; left out")
    except (TypeError, ValueError, RecursionError, OSError, yaml.YAMLError):  # also of what is no file
        notes.append(f"{path.name} cannot be read; left out" if path.exists() else f"{path.name} is missing")
    else:
        return value
    return None


def read_yaml(path: Path) -> Any:
    """Return the value in a YAML file; with aliases a few lines can stand for more values than fit into memory."""
    if not_a_file(path):
        raise ValueError("not a file")
    text, depth = path.read_text(encoding="utf-8"), 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 100 or isinstance(event, yaml.AliasEvent):
            raise ValueError("an alias, or nested too deeply")
    return yaml.safe_load(text)


def _runs_near(folder: Path) -> str:
    """Return `; runs here: ...`, the run folders below or beside a path that is not a run folder."""
    for place in (folder, folder.parent, Path("runs")):
        if names := sorted(str(path.parent) for path in place.glob("*/metrics.jsonl"))[:6]:
            return f"; runs here: {', '.join(names)}"
    return "; scripts/train.py writes run folders, runs/NAME"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every key that differs and is not `FREE`; a key that one lacks has its default."""
    defaults = dict(leaves(to_dict(Config())))
    before, after = defaults | dict(leaves(old)), defaults | dict(leaves(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE)
    ]


def growth(history: Iterable[Mapping[str, Any]], name: str, channel: int) -> list[tuple[int, float | None]]:
    """Return (step, max|x| of a channel, None if it was not among the largest) of every probe of the site `name`."""
    return [
        (int(probe["step"]), dict(map(tuple, probe["sites"][name]["channels"])).get(channel))
        for probe in history
        if name in probe["sites"]
    ]


def since(grown: Sequence[tuple[int, float | None]]) -> int | None:
    """Return the step since which a channel has been at least half as large as at the end of its `growth`, or None.

    This is not the step since which it is the largest: which of several large channels is largest depends on the text.
    """
    start, last = None, grown[-1][1] if grown else None
    for step, value in grown:
        holds = last is not None and value is not None and value >= last / 2
        start = (step if start is None else start) if holds else None
    return start
