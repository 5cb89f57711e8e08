"""The targets: ratios of medians in the same run, on two cores."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.contenders.programs import CP, ENGINE, LIMIT, QUEUE
from benchmarks.rounds import Row

#: The engine by the bare loop, in every case.
_LIMIT_RATIO = 1.35
#: Milliseconds that a fork through Redis may take longer than cp for a small reflinked guest.
_EXTRA_MILLISECONDS = 6.0

#: (filesystem, case) → largest ratio to cp of the engine, and of forks through Redis.
_RATIOS: dict[tuple[str, str], tuple[float, float | None]] = {
    ("xfs", "tree"): (0.80, 1.0),
    ("btrfs", "tree"): (1.0, 1.2),
    ("xfs", "inst"): (1.1, None),
    ("btrfs", "inst"): (1.1, None),
    ("ext4", "inst"): (0.95, 1.0),
    ("tmpfs", "inst"): (0.95, 1.0),
    ("ext4", "big"): (0.9, 0.95),
}
#: On these the targets above are for reflinks.
_REFLINKS = ("xfs", "btrfs")


@dataclass(frozen=True)
class Target:
    """A figure and its target."""

    #: The contender and the one that it is compared with.
    contender: str
    against: str
    #: "ratio" or "ms".
    unit: str
    value: float
    most: float | None

    @property
    def met(self) -> bool | None:
        return None if self.most is None else self.value <= self.most


def targets(row: Row) -> list[Target]:
    """The figures of a row that can have targets: engine and Redis by cp, engine by limit."""
    meant = row.reflink == (row.filesystem in _REFLINKS)
    engine, queue = _RATIOS.get((row.filesystem, row.case), (None, None)) if meant else (None, None)
    found = [
        _ratio(row, ENGINE, CP, engine),
        _extra(row) if engine is not None and queue is None else _ratio(row, QUEUE, CP, queue),
        _ratio(row, ENGINE, LIMIT, _LIMIT_RATIO),
    ]
    return [target for target in found if target is not None]


def _ratio(row: Row, contender: str, against: str, most: float | None) -> Target | None:
    value = row.ratio(contender, against)
    return None if value is None else Target(contender, against, "ratio", value, most)


def _extra(row: Row) -> Target | None:
    ours, theirs = row.median(QUEUE), row.median(CP)
    if ours is None or theirs is None:
        return None
    return Target(QUEUE, CP, "ms", (ours - theirs) * 1e3, _EXTRA_MILLISECONDS)
