"""Log a run: one dict of floats per event to `metrics.jsonl` (always), a progress bar, and W&B.

Only rank 0 has a logger. W&B is optional. An error there is reported once; neither that nor a full disk stops training.
"""

import logging
import os
import re
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from osp.config import Config, LoggerConfig, WandbMode, to_dict
from osp.errors import UserError, as_user_error
from osp.files import LineWriter, drop_after, printable, write_text
from osp.run.evaluations import replace_nonfinite
from osp.run.metrics import build_workspace, layer_grids

log = logging.getLogger(__name__)

SECONDS_TO_FINISH = 20.0  # for W&B to send the rest when a run ends


class Logger:
    """Write metrics and events of a run to its folder, to W&B and to the terminal."""

    def __init__(self, folder: Path, config: Config, *, step: int, total_steps: int, mode: WandbMode | None = None):
        """Begin the files of `folder`, or continue them at `step` without later metrics. mode: of `check_wandb`."""
        self._config = config.logger
        metrics = folder / "metrics.jsonl"
        drop_after(metrics, step)
        self._metrics, self._events = LineWriter(metrics), LineWriter(folder / "events.jsonl")
        look: dict[str, Any] = {"desc": config.run.name, "unit": "step", "dynamic_ncols": True, "smoothing": 0.05}
        look |= {"disable": not config.logger.progress, "mininterval": 0.5 if sys.stderr.isatty() else 10.0}
        self._bar = tqdm(total=total_steps, initial=step, **look)
        self._wandb = WandB(folder, config, mode=mode or config.logger.wandb, resumed=step > 0)

    def log(self, metrics: dict[str, float], *, step: int, tokens: int) -> None:
        """Append the metrics after `step` and `tokens` to metrics.jsonl and send them to W&B. NaN becomes null."""
        line = {"step": step, "tokens": tokens, **metrics}
        self._metrics.write(replace_nonfinite(line))
        self._wandb.log(line)

    def event(self, kind: str, message: str, *, step: int, tokens: int, **details: Any) -> None:
        """Append an event after `step` to events.jsonl, where it stays, and print it; an `alert` also goes to W&B."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        event = {"time": time, "step": step, "tokens": tokens, "kind": kind, "message": message, **details}
        self._events.write(event)
        self.say(message)
        if kind == "alert":
            self._wandb.alert(message)

    def advance(self, *, loss: float, tokens_per_second: float) -> None:
        """Advance the progress bar by one step."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tok/s", refresh=False)
        self._bar.update()

    def end_progress(self) -> None:
        """Close the progress bar, so that later messages appear below it."""
        self._bar.close()

    def say(self, message: str) -> None:
        """Print `message` above the progress bar."""
        if self._config.progress:
            tqdm.write(printable(message), file=sys.stderr)
        else:
            log.info(message)

    def close(self, *, exit_code: int = 0) -> None:
        self._bar.close()
        self._metrics.close()
        self._events.close()
        self._wandb.close(exit_code)


class WandB:
    """A W&B run, or a no-op. Its id is stored in the run folder, so that a resumed run continues the same W&B run."""

    def __init__(self, folder: Path, config: Config, *, mode: WandbMode, resumed: bool):
        self._run: Any = None
        options = config.logger
        if mode == "disabled":
            return
        with self._guard():
            import wandb

            run_id = (resumed and wandb_run_id(folder)) or secrets.token_hex(4)
            about = {"project": options.project, "entity": options.entity, "name": config.run.name, "id": run_id}
            about |= {"dir": str(folder), "resume": "allow", "mode": mode}
            settings = wandb.Settings(silent=True, console="off", init_timeout=60)
            self._run = wandb.init(**about, config=to_dict(config), settings=settings)
            write_text(folder / "wandb_run_id", run_id + "\n")
            for kind in ("train", "val", "quant", "checkpoint", "monitor", "heatmap"):
                self._run.define_metric(f"{kind}/*", step_metric="step")
            if mode == "online" and not resumed:
                _add_panels(self._run)

    def log(self, metrics: dict[str, float]) -> None:
        if self._run is not None:
            with self._guard():
                import wandb

                grids = {name: (np.array(v), np.arange(len(v) + 1)) for name, v in layer_grids(metrics).items()}
                self._run.log(metrics | {name: wandb.Histogram(np_histogram=grid) for name, grid in grids.items()})

    def alert(self, message: str) -> None:
        if self._run is not None:
            with self._guard():
                self._run.alert(title=message.split(":")[0], text=message, level="WARN")

    def close(self, exit_code: int) -> None:
        """End the W&B run. Data that an unreachable server does not take is left to `wandb sync`."""
        run = self._run
        if run is None:
            return

        def finish() -> None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:  # see _guard
                log.warning("W&B: %s: %s", type(error).__name__, error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(SECONDS_TO_FINISH)  # W&B itself would wait without end
        if thread.is_alive():
            late = f"W&B has not taken everything within {SECONDS_TO_FINISH:.0f} s"
            log.warning("%s; `wandb sync %s` sends it later", late, Path(run.dir).parent)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Switch W&B off with one warning at any error inside this context."""
        try:
            yield
        except Exception as error:  # errors of W&B, the network or the file system
            log.warning("W&B is off from here on, training goes on: %s: %s", type(error).__name__, error)
            self._run = None


def wandb_run_id(folder: Path) -> str | None:
    """Return the id of the W&B run that belongs to a run folder; None without one, or if the file is damaged."""
    try:
        text = (folder / "wandb_run_id").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[\w-]{1,128}", text, re.ASCII) else None


def _add_panels(run: Any) -> None:
    """Create the workspace of a project with its first run. Failing that, the run is logged without it."""
    import wandb

    try:
        if len(wandb.Api().runs(f"{run.entity}/{run.project}", per_page=2)) <= 1:
            log.info("W&B panels: %s", build_workspace(run.entity, run.project).save().url)
    except Exception as error:  # the package may be missing, the network down, the key without that right
        log.info("no W&B panels (%s); make them with scripts/panels.py %s/%s", error, run.entity, run.project)


def check_wandb(config: LoggerConfig) -> WandbMode:
    """Return `config.wandb`, offline if W&B does not answer; W&B's variables disable it, the command line overrides."""
    switched_off = os.environ.get("WANDB_MODE") == "disabled" or os.environ.get("WANDB_DISABLED") in ("true", "1")
    if switched_off and not any(argument.startswith("logger.wandb=") for argument in sys.argv):
        return "disabled"
    if config.wandb != "online":
        return config.wandb
    with as_user_error("logger.wandb=online but wandb is not installed; pip install wandb (", ImportError, after=")"):
        import wandb
    try:
        has_key = wandb.login(prompt=False)
    except wandb.Error as error:  # unreachable, or the key is refused: training matters more
        log.warning("W&B does not answer (%s); this run is logged offline, `wandb sync` sends it later", error)
        return "offline"
    if not has_key:
        raise UserError("logger.wandb=online but there is no W&B key; run `wandb login` or use logger.wandb=offline")
    return config.wandb
