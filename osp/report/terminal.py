"""A run in the terminal: progress, curves, the worst sites and what happened last, drawn by rich."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from osp.errors import UserError
from osp.report.charts import worst
from osp.run.read import Run, Series, read_run

BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = {  # metric: its name here, and how its value is written
    "train/loss": ("training loss", "{:.4f}"),
    "val/loss": ("validation loss", "{:.4f}"),
    "val/bits_per_byte": ("bits per byte", "{:.4f}"),
    "train/grad_norm": ("gradient norm", "{:.3g}"),
    "train/tokens_per_second": ("tokens per second", "{:,.0f}"),
    "monitor/kurtosis/max": ("largest kurtosis", "{:.4g}"),
    "monitor/max_abs/max": ("largest |x|", "{:.4g}"),
    "monitor/R_L": ("4-bit error", "{:.4f}"),
}
USAGE = "usage: python scripts/watch.py RUN [every=SECONDS] [--once]; RUN is a folder such as runs/osp"
WORST = 8  # sites in the table
EVENTS = 5
STYLES = {"alert": "bold red", "nonfinite": "bold red", "spike": "yellow", "skipped": "yellow", "stopped": "yellow"}


def watch(folder: Path, *, every: float, once: bool, console: Console) -> None:
    """Show the run in `folder` until it is complete or the user interrupts; with `once`, print it and return.

    Raises `UserError` if there is nothing to show.
    """
    if once or not console.is_terminal:
        console.print(view(read_run(folder)))
        return
    run = read_run(folder)
    try:
        with Live(view(run), console=console, screen=True, auto_refresh=False) as live:
            while run.state != "complete":
                began = time.monotonic()
                run = read_run(folder)
                live.update(view(run), refresh=True)
                # a long run takes a while to read: never spend more than a fifth of the time on it
                time.sleep(max(every, 4 * (time.monotonic() - began)))
    except KeyboardInterrupt:
        pass
    console.print(view(run))


def view(run: Run) -> RenderableType:
    """What is shown of a run."""
    parts: list[RenderableType] = [_progress(run), _curves(run), _sites(run)]
    if run.events:
        parts.append(_events(run))
    parts += [Text(f"{run.folder}: {note}", style="yellow") for note in run.notes]
    return Panel(Group(*parts), title=Text(run.name, "bold"), subtitle=Text(str(run.folder)), expand=True)


def seconds_left(run: Run) -> float:
    """Remaining steps times the median step time of the last 50; nan if there is no length or no time."""
    series = run.series.get("train/step_seconds")
    if series is None or run.total_steps is None:
        return math.nan
    return (run.total_steps - run.step) * float(np.nanmedian(series.values[-50:]))


@dataclass(frozen=True)
class Spark:
    """A sparkline as wide as its place in the table."""

    series: Series

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self.series, options.max_width), style="cyan", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


def sparkline(series: Series, width: int) -> str:
    """The curve in `width` characters: each shows the value furthest from the curve's median in its stretch."""
    values = series.values[np.isfinite(series.values)]
    if not len(values):
        return ""
    stretches = [s for s in np.array_split(values, min(width, len(values))) if len(s)]
    middle = np.median(values)
    shown = np.array([s[np.argmax(np.abs(s - middle))] for s in stretches])
    if shown.min() > 0 and shown.max() > 30 * shown.min():
        shown = np.log(shown)
    span = float(np.ptp(shown)) or 1.0
    return "".join(BLOCKS[int((v - shown.min()) / span * (len(BLOCKS) - 1) + 0.5)] for v in shown)


def _progress(run: Run) -> RenderableType:
    total, left = run.total_steps, seconds_left(run)
    words = f"{run.state}, step {run.step:,}" + (f" of {total:,}" if total else "") + f", {run.tokens:,} tokens"
    if run.state == "running" and math.isfinite(left):
        words += f", {_duration(left)} left"
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=False, ratio=3)
    grid.add_column(ratio=2)
    grid.add_row(words, ProgressBar(total=total or max(run.step, 1), completed=run.step))
    return grid


def _curves(run: Run) -> RenderableType:
    table = Table(box=None, expand=True, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1)
    for key, (name, form) in CURVES.items():
        if key in run.series:
            last = run.series[key].last
            table.add_row(name, form.format(last) if math.isfinite(last) else "not finite", Spark(run.series[key]))
    if "val/loss" not in run.series:
        table.add_row(Text("no validation yet (eval.every)", style="dim"), "", "")
    return table


def _sites(run: Run) -> RenderableType:
    """The sites with the largest kurtosis, or with the largest values where kurtosis was not measured."""
    stat = "kurtosis" if worst(run, "kurtosis")[0] else "max_abs"
    last = {
        name.split("/", 2)[2]: series.last
        for name, series in run.series.items()
        if name.startswith(f"monitor/{stat}/") and not name.endswith(("/max", "/mean", "/osp_script"))
    }
    ranked: Sequence[str] = sorted((s for s in last if math.isfinite(last[s])), key=lambda s: -last[s])[:WORST]
    if not ranked:
        return Text("not probed: set monitor=light or monitor=full to see outliers form", style="dim")
    table = Table(box=None, expand=True, pad_edge=False, title="worst sites", title_justify="left")
    table.add_column("site", no_wrap=True)
    table.add_column("kurtosis", justify="right")
    table.add_column("largest |x|", justify="right")
    table.add_column("channel", justify="right")
    table.add_column("over the probes", ratio=1)
    sites = run.probes[-1]["sites"] if run.probes else {}
    for name in ranked:
        kurtosis, largest = run.series.get(f"monitor/kurtosis/{name}"), run.series.get(f"monitor/max_abs/{name}")
        table.add_row(
            name,
            f"{kurtosis.last:.4g}" if kurtosis else "",
            f"{largest.last:.4g}" if largest else "",
            str(sites[name]["channels"][0][0]) if name in sites else "",
            Spark(run.series[f"monitor/{stat}/{name}"]),
        )
    return table


def _events(run: Run) -> RenderableType:
    table = Table(box=None, expand=True, show_header=False, pad_edge=False, title="events", title_justify="left")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for event in run.events[-EVENTS:]:
        kind = str(event.get("kind", ""))
        table.add_row(f"{event['step']:,}", Text(kind, STYLES.get(kind, "")), Text(str(event.get("message", ""))))
    return table


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"


def parse(arguments: Sequence[str]) -> tuple[Path, float, bool]:
    """(run folder, seconds between refreshes, once) of a command line; `UserError` says how it is written."""
    once = "--once" in arguments
    every = [a.removeprefix("every=") for a in arguments if a.startswith("every=")]
    rest = [a for a in arguments if a != "--once" and not a.startswith("every=")]
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError(USAGE)
    try:
        seconds = float(every[-1]) if every else 2.0
    except ValueError as error:
        raise UserError(f"every={every[-1]}: must be a number of seconds") from error
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"every={every[-1]}: must be a number of seconds above 0")
    return Path(rest[0]), seconds, once
