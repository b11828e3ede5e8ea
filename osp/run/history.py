"""How the largest values of a channel grew over the probes of a run, and since when it has been large.

One definition for the forensics of a training, scripts/inspect_outliers.py and the report, which needs no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def growth(history: Iterable[Mapping[str, Any]], name: str, channel: int) -> list[tuple[int, float | None]]:
    """(step, max|x| of the channel at site `name`) by the lines of a probes.jsonl that measured the site.

    None where the channel was not among the largest of its site.
    """
    return [
        (int(probe["step"]), dict(map(tuple, probe["sites"][name]["channels"])).get(channel))
        for probe in history
        if name in probe["sites"]
    ]


def since(grown: Sequence[tuple[int, float | None]]) -> int | None:
    """The step from whose probe on a channel has been at least half as large as it is at the end of its `growth`.

    Not the step from which it is the largest: of several large channels the text decides which one that is.
    """
    start, last = None, grown[-1][1] if grown else None
    for step, value in grown:
        holds = last is not None and value is not None and value >= last / 2
        start = (step if start is None else start) if holds else None
    return start
