"""Runs the contenders in turn, each with an empty write cache."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.cases import Case
from benchmarks.contenders.programs import Contender, ContenderFailed, Run
from benchmarks.copy_check import CopyDiffers, check_same
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from tasks.copier.kernel.syscalls import syncfs

#: Seed of the order of contenders.
_SEED = 7


def now() -> str:
    """The time in UTC, as it is noted with figures."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Row:
    """The figures of one case on one filesystem."""

    case: str
    filesystem: str
    reflink: bool
    #: The seconds of each round, by contender.
    seconds: dict[str, list[float]] = field(default_factory=dict)
    #: Why a contender failed, by contender.
    failures: dict[str, str] = field(default_factory=dict)
    measured_at: str = field(default_factory=now)

    def median(self, contender: str) -> float | None:
        """Seconds; None if the contender was not measured."""
        return median(self.seconds[contender]) if self.seconds.get(contender) else None

    def ratio(self, contender: str, to: str) -> float | None:
        """The median of `contender` divided by that of `to`; None if either was not measured."""
        ours, theirs = self.median(contender), self.median(to)
        return ours / theirs if ours is not None and theirs is not None else None


@contextmanager
def built(case: Case, filesystem: Filesystem) -> Iterator[Path]:
    """The source of a case on the filesystem, written to disk, for the time of a with block.

    After an error it is not removed, since the filesystem is.
    """
    source = filesystem.path / case.name
    source.mkdir()
    case.build(source)
    sync(filesystem)
    yield source
    remove(source)


def run_in_turn(
    case: Case,
    filesystem: Filesystem,
    contenders: Sequence[Contender],
    rounds: int,
    between: Callable[[], None] = lambda: None,
) -> Row:
    """Run each contender once a round. In the first round each copy is compared with its source.

    `between` is called before each run. A contender that failed does not run again. The order in a round is random,
    with a fixed seed: in a fixed order the after-effects of a contender, such as memory that the host takes back, would
    always disturb the same one.
    """
    row, order = Row(case.name, filesystem.name, filesystem.reflink), random.Random(_SEED)
    with built(case, filesystem) as source:
        for number in range(rounds):
            for contender in order.sample(contenders, len(contenders)):
                if contender.name in row.failures:
                    continue
                try:
                    between()
                    seconds = run_once(contender, filesystem, source, case.files if number == 0 else None).seconds
                    row.seconds.setdefault(contender.name, []).append(seconds)
                except (ContenderFailed, CopyDiffers) as error:
                    log(f"{case.name} on {filesystem.name}: {contender.name} FAILED: {error}")
                    row.failures[contender.name] = str(error)
                    row.seconds.pop(contender.name, None)
    return row


def run_once(contender: Contender, filesystem: Filesystem, source: Path, files: int | None = None) -> Run:
    """One run after a sync. With `files`, the copy is compared with its source.

    Raises ContenderFailed, CopyDiffers.
    """
    # A directory for this run only: staging that a failed run left is removed with it.
    parent = filesystem.path / "copies"
    parent.mkdir()
    try:
        sync(filesystem)
        run = contender.run(source, parent / "copy")
        if files is not None:
            check_same(source, parent / "copy", files)
        return run
    finally:
        remove(parent)


def sync(filesystem: Filesystem) -> None:
    """Write everything on the filesystem to its disk."""
    fd = os.open(filesystem.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        syncfs(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a tree; rm is faster than shutil.rmtree."""
    subprocess.run(["rm", "-rf", "--", str(path)], check=True)
