"""The growth of a channel over the probes of a run, and the step since which it is large. Needs no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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
