"""Guards between the gradient and the update: values that are not finite, and spikes of the loss or gradient norm."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from osp.config import Config
from osp.data.loader import Loader, data_step
from osp.distributed import gather_objects
from osp.files import write_record

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
_LEAST_DEVIATION = 0.01  # of the median: what varies less than that is no spike
_NUM_LARGEST = 8  # gradients named in nonfinite.json


def spike_score(value: float, window: deque[float]) -> float:
    """Return (x - median) / max(1.4826 median(|x_i - median|), 0.01 |median|); 0 until a quarter of `window` is in."""
    if len(window) < max(2, math.ceil((window.maxlen or 0) / 4)):
        return 0.0
    median = statistics.median(window)
    deviation = _MAD_TO_DEVIATION * statistics.median(abs(x - median) for x in window)
    return (value - median) / max(deviation, _LEAST_DEVIATION * abs(median), 1e-12)


class Verdict(NamedTuple):
    """What a guard decides about the update of one step."""

    action: Literal["apply", "skip", "stop"]  # skip: leave the update out and go on; stop: end the run
    kind: str = ""  # of the event: "nonfinite" or "spike"
    message: str = ""


class StepGuard:
    """Examines the loss and the gradient of every step before the optimizer changes anything.

    A value that is not finite follows `train.on_nonfinite`, a spike `spike.action`; `train.max_skips` bounds skips.
    """

    def __init__(self, config: Config, loader: Loader, *, report: Path | None):
        """`report` is the path of nonfinite.json; None on all ranks but the first."""
        self.config, self.loader, self.report = config, loader, report
        self.num_skipped = 0
        self.spikes = {key: deque[float](maxlen=config.spike.window) for key in ("loss", "grad_norm")}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"skipped": self.num_skipped, "spikes": {key: list(window) for key, window in self.spikes.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Checkpoints of older versions may lack either key."""
        self.num_skipped = state.get("skipped", 0)
        for key, values in state.get("spikes", {}).items():
            self.spikes[key] = deque(values, maxlen=self.config.spike.window)

    def examine(self, step: int, metrics: Mapping[str, float], losses: Tensor, norms: dict[str, float]) -> Verdict:
        """Decide whether the update of `step`, counted from 0, is applied. Collective: every rank decides the same.

        `losses` are the sums of this rank's micro batches, `norms` belong to the raw gradients of all parameters.
        """
        values = {key: metrics[f"train/{key}"] for key in ("loss", "grad_norm")}
        if all(map(math.isfinite, values.values())):
            kind, action = "spike", self.config.spike.action
            message = self._describe_spike(step, values) if action != "off" else ""
        else:
            kind, action = "nonfinite", self.config.train.on_nonfinite
            message = self._describe_nonfinite(step, values["loss"], losses, norms)
        if not message or action == "warn":
            return Verdict("apply", kind, message)
        if action == "stop":
            return Verdict("stop", kind, f"{message}; no weight was changed")
        limit = self.config.train.max_skips
        if self.num_skipped == limit:
            reason = f"no weight was changed, and train.max_skips={limit} updates are left out already"
            return Verdict("stop", kind, f"{message}; {reason}")
        self.num_skipped += 1
        return Verdict("skip", kind, f"{message}; this update is left out ({self.num_skipped} of at most {limit})")

    def _describe_nonfinite(self, step: int, loss: float, losses: Tensor, norms: dict[str, float]) -> str:
        """Describe what is not finite, from which sequences, and the largest gradients; write nonfinite.json."""
        size = self.loader.micro_batch_size
        first = self.loader.first_row(step)
        starts = [first + int(index) for index in self.loader.indices[::size]]
        bad = [start for start, value in zip(starts, losses.tolist(), strict=True) if not math.isfinite(value)]
        rows = sorted([start, start + size] for starts in gather_objects(bad) for start in starts)
        order = sorted(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else math.inf, reverse=True)
        largest = {name: norms[name] for name in order[:_NUM_LARGEST]}
        if self.report:
            gradients = {name: str(norm) for name, norm in largest.items()}
            write_record(self.report, {"step": step + 1, "loss": str(loss), "rows": rows, "gradients": gradients})
        what = "the loss is not finite" if rows else f"the gradient is not finite though the loss is {loss:.4f}"
        where = f" in sequences {', '.join(f'{a} to {b - 1}' for a, b in rows)} of the training data" if rows else ""
        gradients = ", ".join(f"{name} {norm:.3g}" for name, norm in list(largest.items())[:3])
        return f"step {step + 1}: {what}{where}; largest gradients: {gradients} (all in nonfinite.json)"

    def _describe_spike(self, step: int, values: dict[str, float]) -> str:
        """Describe the values far above the last steps, and how to leave their sequences out; empty without a spike."""
        spikes = []
        for key, value in values.items():
            window = self.spikes[key]
            if (score := spike_score(value, window)) > self.config.spike.threshold:
                spikes.append(f"{key} {value:.4g} is {score:.1f} deviations above its last {len(window)} steps")
            window.append(value)
        if not spikes:
            return ""
        position = data_step(step, self.config.data.skip_steps) + 1
        remedy = f"its sequences are left out by data.skip_steps=[[{position},{position}]] when resuming from before"
        return f"step {step + 1}: {', '.join(spikes)}; {remedy}"
