"""Durations in bins of a logarithmic scale: 1, 2, 5, 10 … of a unit."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import NamedTuple

#: The lower edges of the bins, in seconds: from 10 µs to 10,000 s.
_EDGES = [base * 10.0**power for power in range(-5, 4) for base in (1, 2, 5)] + [1e4]


class Bin(NamedTuple):
    """So many durations of at least `low` and less than `high` seconds. The first bin also has all shorter ones."""

    low: float
    high: float
    items: int


class Durations:
    """Counts durations."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[min(max(bisect_right(_EDGES, seconds) - 1, 0), len(_EDGES) - 2)] += 1

    def bins(self) -> list[Bin]:
        """The bins from the first to the last that has a duration."""
        if not self._counts:
            return []
        used = range(min(self._counts), max(self._counts) + 1)
        return [Bin(_EDGES[n], _EDGES[n + 1], self._counts[n]) for n in used]


def span(seconds: float) -> str:
    """A duration with a unit: 20 µs, 1.5 ms, 12 s, 3.5 min."""
    for unit, length in (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0)):
        if seconds < 1000 * length and (unit != "s" or seconds < 120):
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"
