"""What one run measures, and the filesystems that it makes for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import filesystems
from benchmarks.cases import Case
from benchmarks.filesystems import Filesystem, Unavailable
from benchmarks.log import log


@dataclass(frozen=True)
class Plan:
    """What to measure, and where."""

    #: Kinds of filesystems.
    kinds: Sequence[str]
    cases: Sequence[Case]
    #: Names of the other programs besides cp.
    peers: Sequence[str]
    rounds: int
    #: Measure in this directory; None to make filesystems.
    directory: Path | None
    #: Holds the images of filesystems.
    images: Path


@contextmanager
def open_filesystem(
    plan: Plan, kind: str, cases: Sequence[Case], root: Path
) -> Iterator[tuple[Filesystem, Sequence[Case]]]:
    """A filesystem of this kind, or the given directory, with the cases that fit on it.

    Raises Unavailable.
    """
    room = filesystems.room_for(kind, plan.images)
    fitting = [case for case in cases if case.room <= room]
    for case in cases:
        if case not in fitting:
            log(f"{case.name} needs {case.room >> 30} GiB on {kind}, {max(0, room) >> 30} GiB are free: not measured")
    if not fitting:
        raise Unavailable("not enough free space for any case")
    if plan.directory is not None:
        with filesystems.given(root) as filesystem:
            yield filesystem, fitting
    else:
        with filesystems.made(kind, max(case.room for case in fitting), root, plan.images) as filesystem:
            yield filesystem, fitting
