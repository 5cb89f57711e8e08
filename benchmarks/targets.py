"""How fast forkvm is to be: medians on two cores, against a peer in the same run."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.rounds import Row
from benchmarks.subjects import CP, ENGINE, LIMIT, QUEUE

#: The engine against the bare loop, in every case.
_LIMIT_RATIO = 1.35
#: What the way through Redis may add to cp's time on a small reflinked guest, in milliseconds.
_EXTRA_MILLISECONDS = 6.0

#: (filesystem, case) → at most this ratio of the engine alone to cp, and of the way through Redis.
_RATIOS: dict[tuple[str, str], tuple[float, float | None]] = {
    ("xfs", "tree"): (0.80, 1.0),
    ("btrfs", "tree"): (1.0, 1.2),
    ("xfs", "inst"): (1.1, None),
    ("btrfs", "inst"): (1.1, None),
    ("ext4", "inst"): (0.95, 1.0),
    ("tmpfs", "inst"): (0.95, 1.0),
    ("ext4", "big"): (0.9, 0.95),
}
#: Where the targets above are for reflinks.
_REFLINKS = ("xfs", "btrfs")


@dataclass(frozen=True)
class Target:
    """A figure, and what it may be at most; None where none was set."""

    #: Whose figure it is, and against what.
    subject: str
    against: str
    #: A ratio, or milliseconds.
    unit: str
    value: float
    most: float | None

    @property
    def met(self) -> bool | None:
        return None if self.most is None else self.value <= self.most


def targets(row: Row) -> list[Target]:
    """The figures of a row that targets are set for, or might be: engine and Redis against cp, engine against limit."""
    meant = row.reflink == (row.filesystem in _REFLINKS)
    engine, queue = _RATIOS.get((row.filesystem, row.case), (None, None)) if meant else (None, None)
    found = [
        _ratio(row, ENGINE, CP, engine),
        _extra(row) if engine is not None and queue is None else _ratio(row, QUEUE, CP, queue),
        _ratio(row, ENGINE, LIMIT, _LIMIT_RATIO),
    ]
    return [target for target in found if target is not None]


def _ratio(row: Row, subject: str, against: str, most: float | None) -> Target | None:
    value = row.ratio(subject, against)
    return None if value is None else Target(subject, against, "ratio", value, most)


def _extra(row: Row) -> Target | None:
    ours, theirs = row.median(QUEUE), row.median(CP)
    if ours is None or theirs is None:
        return None
    return Target(QUEUE, CP, "ms", (ours - theirs) * 1e3, _EXTRA_MILLISECONDS)
