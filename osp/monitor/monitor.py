"""The monitor of a run: decide when to probe, write the readings, raise alerts."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from osp.config import Config
from osp.data.loader import Layout, validation_batches
from osp.data.tokenizer import load_tokenizer
from osp.distributed import on_main
from osp.errors import UserError
from osp.files import LineWriter, drop_after
from osp.model.transformer import Transformer
from osp.monitor.alerts import Alert, Alerts, mechanism
from osp.monitor.forensics import Forensics, write_bundle
from osp.monitor.probe import ProbeText, Reading, probe
from osp.run.evaluations import replace_nonfinite
from osp.run.logger import Logger
from osp.run.read import read_metrics, read_probes
from osp.run.verdict import over_usual

PROBES = "probes.jsonl"
FORENSICS = "forensics"
MOST_PROBES = 500  # of a run with monitor.every=auto, about
DENSE_STEPS = 512  # up to here monitor.every=auto probes every power of two, at any cost


class Monitor:
    """Probes of one run on one rank. Collective: all ranks call the same methods at the same steps.

    Only the main rank has a `logger`: it writes, and it decides when the next probe is due and which alerts are raised.
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
        """Prepare the text and the files of a run that starts or continues at `step`.

        gathered_parameters: a context in which weights are whole on every rank (`Engine.gathered_parameters`).
        """
        self.config, self.model, self.folder, self.logger = config, model, folder, logger
        self._gathered, self._total, self._first = gathered_parameters, total_steps, step
        self._spent = 0.0
        self._interval = max(1, total_steps // MOST_PROBES)
        self._next = step + self._interval if step else 0
        if not config.monitor.enabled:
            return
        self.text = held_out_text(shards, config)
        self._alerts = Alerts(config.monitor)
        if logger:
            self._forensics = Forensics(model, config, load_tokenizer(shards / "tokenizer.json"))
            drop_after(folder / PROBES, step)
            self._lines = LineWriter(folder / PROBES)
            self._alerts.replay(read_metrics(folder / "metrics.jsonl", []))
            if self.text.tokens.numel() < config.monitor.tokens // 2:
                logger.say(
                    f"monitor.tokens={config.monitor.tokens}, but the validation split has only "
                    f"{self.text.tokens.numel()} tokens in whole sequences for a probe; raise data.val_fraction"
                )

    def due(self, step: int) -> bool:
        """Return whether to probe the model after `step` steps: at the start (0), at the end, and by monitor.every."""
        every = self.config.monitor.every
        if not self.config.monitor.enabled or (step == self._first and step > 0):
            return False
        if step in (0, self._total):
            return True
        return step >= self._next if every == "auto" else every > 0 and step % every == 0

    def probe(self, step: int, *, tokens: int, train_seconds: float) -> None:
        """Measure the model after `step` and `train_seconds` of training by this process; raise alerts. Collective."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the training step in progress is not part of the probe's time
        began = time.perf_counter()
        reading = probe(self.model, self.text, self.config.monitor)
        alerts = on_main(lambda: self._alerts.update(step, reading.metrics))
        places = [_site_of(alert, reading) for alert in alerts]
        records = self._forensics.site_records(reading) if self.logger else {}
        if any(places):
            with self._gathered():
                if self.logger:
                    now = {"step": step, "tokens": tokens, "sites": records}
                    history = [*read_probes(self.folder / PROBES, []), now]
                    for name in sorted(set(filter(None, places))):
                        raised = [alert for alert, place in zip(alerts, places, strict=True) if place == name]
                        write_bundle(self._forensics.bundle(name, reading, history, raised), self.folder / FORENSICS)
        seconds = time.perf_counter() - began
        self._spent += seconds
        wait = (self._spent + seconds) / self.config.monitor.max_cost - train_seconds
        step_seconds = train_seconds / max(1, step - self._first)
        self._next = on_main(lambda: next_probe(step, wait=wait, step_seconds=step_seconds, interval=self._interval))
        if self.logger:
            cost = self._spent / train_seconds if train_seconds else 0.0
            metrics = {**reading.metrics, "monitor/alerts": float(len(self._alerts.active))}
            metrics |= {"monitor/seconds": seconds, "monitor/cost": cost}
            self.logger.log(metrics, step=step, tokens=tokens)
            self._lines.write(replace_nonfinite({"step": step, "tokens": tokens, "seconds": seconds, "sites": records}))
            for alert, name in zip(alerts, places, strict=True):
                details, where = alert.details(), ""
                if name:
                    site = reading.sites[name]
                    where = f"; {mechanism(name, site)}; see {FORENSICS}/"
                    numbers = {key: v for key, v in site.statistics.items() if key.startswith(("top_channel", "gain"))}
                    details |= replace_nonfinite({"place": name, "top_channel": site.top_channel, **numbers})
                self.logger.event("alert", f"{alert.message}{where}", step=step, tokens=tokens, **details)


def next_probe(step: int, *, wait: float, step_seconds: float, interval: int) -> int:
    """Return the step of the probe after the one at `step`: powers of two at first, then as often as the budget allows.

    Up to `DENSE_STEPS` every power of two is probed. Probes that cost little come at least every `interval` steps from
    the start.

    Args:
        wait: seconds of training after which all probes and one more take `monitor.max_cost` of the training time.
        step_seconds: mean time of a step; 0 without a measurement.
    """
    power = 1 << step.bit_length()
    if not step_seconds:
        return power
    affordable = step + max(interval, math.ceil(wait / step_seconds))
    return min(power, affordable) if step < DENSE_STEPS else affordable


def held_out_text(shards: Path, config: Config) -> ProbeText:
    """Return the first `monitor.tokens` tokens of the validation split in sequences of `train.seq_len`, or fewer."""
    layout, tokens, masked = Layout.of(config), config.monitor.tokens, config.train.document_mask
    if layout.repeat is None:
        layout = layout._replace(seq_len=min(layout.seq_len, tokens))
    batches = list(validation_batches(shards, layout, batch_size=1, max_tokens=tokens, document_ids=masked))
    ids = [batch.document_ids[:, :-1] for batch in batches if batch.document_ids is not None]
    text = ProbeText(torch.cat([batch.tokens[:, :-1] for batch in batches]), torch.cat(ids) if ids else None)
    if text.tokens.numel() < 2:
        raise UserError(f"{shards}: validation split too short to monitor; raise data.val_fraction or set monitor=off")
    return text


def _site_of(alert: Alert, reading: Reading) -> str:
    """Return the site of an alert; for a layer or the whole model, the site with the highest kurtosis for its kind."""
    if alert.place in reading.sites:
        return alert.place
    kurtoses = {n: site.statistics["kurtosis"] for n, site in reading.sites.items() if n.startswith(alert.place)}
    return max(kurtoses, key=lambda name: over_usual(name, kurtoses[name]), default="")
