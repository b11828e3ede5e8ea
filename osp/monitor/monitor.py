"""The monitor of a run: when to probe, what to write, whom to warn."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from osp.config import Config
from osp.data import load_tokenizer, validation_batches
from osp.distributed import on_main
from osp.errors import UserError
from osp.files import read_lines
from osp.model.transformer import Transformer
from osp.monitor.alerts import Alert, Alerts
from osp.monitor.forensics import bundle, site_record, write_bundle
from osp.monitor.probe import Reading, Rows, probe
from osp.run.logger import Lines, Logger, drop_after

PROBES = "probes.jsonl"
FORENSICS = "forensics"
# with monitor.every=auto:
MOST_PROBES = 500  # of a run, about
DENSE_STEPS = 512  # the first powers of two are probed whatever they cost


class Monitor:
    """Probes of one run on one rank; all ranks call the same methods at the same steps.

        monitor = Monitor(...)
        if monitor.due(step):  # steps taken so far, 0 before the first one
            monitor.probe(step, tokens=..., train_seconds=...)

    Only the main rank has a `logger`: it writes, decides when the next probe is due and which alerts have fired.
    """

    def __init__(
        self,
        config: Config,
        model: Transformer,
        *,
        total_steps: int,
        shards: Path,
        folder: Path,
        logger: Logger | None,
        step: int,
        gathered_parameters: Callable[[], AbstractContextManager[Any]],
    ):
        """`step`: where this process begins to train. gathered_parameters: makes weights whole (`Engine`)."""
        self.config, self.model, self.folder, self.logger = config, model, folder, logger
        self._gathered = gathered_parameters
        self._total = total_steps
        self._first = step
        self._spent = 0.0
        self._interval = max(1, self._total // MOST_PROBES)
        self._next = step + self._interval if step else 0
        if not config.monitor.enabled:
            return
        self.rows = held_out_rows(shards, config)
        self._alerts = Alerts(config.monitor)
        if logger:
            self._tokenizer = load_tokenizer(shards / "tokenizer.json")
            drop_after(folder / PROBES, step)
            self._lines = Lines(folder / PROBES)
            self._alerts.replay(read_lines(folder / "metrics.jsonl"))
            if self.rows.tokens.numel() < config.monitor.tokens // 2:
                logger.say(
                    f"monitor.tokens={config.monitor.tokens}, but the held-out text has only "
                    f"{self.rows.tokens.numel()} in whole rows, which is what a probe reads; raise data.val_fraction"
                )

    def due(self, step: int) -> bool:
        """Whether the model is to be probed after `step` steps: at the start, the end, and as monitor.every says."""
        every = self.config.monitor.every
        if not self.config.monitor.enabled or (step == self._first and step > 0):
            return False
        if step in (0, self._total):
            return True
        return step >= self._next if every == "auto" else every > 0 and step % every == 0

    def probe(self, step: int, *, tokens: int, train_seconds: float) -> None:
        """Measure the model after `step`, write what was seen, and warn. Collective.

        train_seconds: time that this process has trained so far.
        """
        _synchronize()
        began = time.perf_counter()
        reading = probe(self.model, self.rows, self.config.monitor)
        alerts = on_main(lambda: self._alerts.update(step, reading.metrics))
        record = self._record(reading) if self.logger else {}
        sites = sorted({_site_of(alert, reading) for alert in alerts} - {""})
        if sites:
            with self._gathered():
                if self.logger:
                    self._write_bundles(sites, step, reading, record, alerts)
        seconds = time.perf_counter() - began
        self._spent += seconds
        self._next = on_main(lambda: self._next_step(step, seconds, train_seconds))
        if self.logger:
            cost = self._spent / train_seconds if train_seconds else 0.0
            metrics = {**reading.metrics, "monitor/alerts": float(self._alerts.num_active)}
            metrics |= {"monitor/seconds": seconds, "monitor/cost": cost}
            self.logger.log(metrics, step=step, tokens=tokens)
            line = {"step": step, "tokens": tokens, "seconds": seconds, "sites": record}
            self._lines.write(_finite(line))
            self._say(alerts, step, tokens, reading)

    def _record(self, reading: Reading) -> dict[str, Any]:
        return {name: site_record(site, self.rows, self._tokenizer) for name, site in reading.sites.items()}

    def _write_bundles(
        self, sites: list[str], step: int, reading: Reading, record: dict[str, Any], alerts: list[Alert]
    ) -> None:
        history = [*read_lines(self.folder / PROBES), {"step": step, "sites": record}]
        for name in sites:
            about = [_details(alert) for alert in alerts if _site_of(alert, reading) == name]
            contents = bundle(
                name,
                reading.sites[name],
                step=step,
                rows=self.rows,
                tokenizer=self._tokenizer,
                history=history,
                model=self.model,
                config=self.config,
                alerts=about,
            )
            write_bundle(contents, self.folder / FORENSICS)

    def _say(self, alerts: list[Alert], step: int, tokens: int, reading: Reading) -> None:
        assert self.logger is not None
        for alert in alerts:
            name = _site_of(alert, reading)
            where = f"; channel {reading.sites[name].channel} of {name}, see {FORENSICS}/" if name else ""
            details = _details(alert)
            self.logger.event("alert", f"{details.pop('message')}{where}", step=step, tokens=tokens, **details)

    def _next_step(self, step: int, seconds: float, train_seconds: float) -> int:
        return next_probe(
            step,
            seconds=seconds,
            spent=self._spent,
            train_seconds=train_seconds,
            steps=step - self._first,
            interval=self._interval,
            max_cost=self.config.monitor.max_cost,
        )


def next_probe(
    step: int,
    *,
    seconds: float,
    spent: float,
    train_seconds: float,
    steps: int,
    interval: int,
    max_cost: float,
) -> int:
    """The step of the probe after that of `step`: a power of two at first, then whenever the budget allows.

    Up to `DENSE_STEPS` every power of two is probed. From there on a probe waits until all of them together, itself
    included, take no more than `max_cost` of the training time, and at least `interval` steps. Where probes are cheap
    they come as often from the start. seconds: what one probe costs; spent: what all have cost; steps: those that took
    `train_seconds`.
    """
    power = 1 << step.bit_length()
    if not steps or not train_seconds:  # nothing to go by yet
        return power
    affordable = (spent + seconds) / max_cost  # training time by which one more probe is within the budget
    wait = math.ceil((affordable - train_seconds) / (train_seconds / steps))
    affordable_step = step + max(interval, wait)
    return min(power, affordable_step) if step < DENSE_STEPS else affordable_step


def held_out_rows(shards: Path, config: Config) -> Rows:
    """The first `monitor.tokens` tokens of the held-out text in rows of `train.seq_len`; shorter rows if it is less."""
    seq_len = min(config.train.seq_len, config.monitor.tokens)
    batches = list(
        validation_batches(
            shards,
            seq_len=seq_len,
            batch_size=1,
            max_tokens=config.monitor.tokens,
            document_ids=config.train.document_mask,
        )
    )
    ids = [batch.document_ids[:, :-1] for batch in batches if batch.document_ids is not None]
    rows = Rows(torch.cat([batch.tokens[:, :-1] for batch in batches]), torch.cat(ids) if ids else None)
    if rows.tokens.numel() < 2:
        raise UserError(f"{shards} has too little held-out text to monitor; raise data.val_fraction or set monitor=off")
    return rows


def _site_of(alert: Alert, reading: Reading) -> str:
    """The measured site that an alert is about; of a layer or the whole model, the one with the largest peak to RMS."""
    if alert.place in reading.sites:
        return alert.place
    within = {name: site.statistics for name, site in reading.sites.items() if name.startswith(alert.place)}
    return max(within, key=lambda name: within[name]["max_abs"] / (within[name]["rms"] or math.inf), default="")


def _details(alert: Alert) -> dict[str, Any]:
    """What an alert's line of events.jsonl holds beside the step."""
    layer, _, site = alert.place.rpartition("/")
    if alert.place.startswith("layer_") and not layer:
        layer, site = site, ""
    return {
        "message": alert.message,
        "rule": alert.rule,
        "key": alert.key,
        "site": site or None,
        "layer": int(layer.removeprefix("layer_")) if layer else None,
        "value": alert.value,
        "threshold": alert.threshold,
    }


def _finite(value: Any) -> Any:
    """`value` with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _synchronize() -> None:
    """Wait for the training step, so that its time is not taken for the probe's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
