"""The subjects by turns, each as undisturbed by what went before as can be."""

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
from benchmarks.filesystems import Filesystem
from benchmarks.same import Differs, check_same
from benchmarks.say import say
from benchmarks.subjects import Run, Subject, SubjectFailed
from tasks.copier.kernel.syscalls import syncfs

#: Of the order of the rounds.
_SEED = 7


def now() -> str:
    """The time, UTC, as figures carry it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Row:
    """What was measured of one case on one filesystem."""

    case: str
    filesystem: str
    reflink: bool
    #: The seconds of each round, by subject.
    seconds: dict[str, list[float]] = field(default_factory=dict)
    #: Why a subject has none.
    failures: dict[str, str] = field(default_factory=dict)
    measured_at: str = field(default_factory=now)

    def median(self, subject: str) -> float | None:
        """Seconds; None for a subject that was not measured."""
        return median(self.seconds[subject]) if self.seconds.get(subject) else None

    def ratio(self, subject: str, to: str) -> float | None:
        """The one's median by the other's."""
        ours, theirs = self.median(subject), self.median(to)
        return ours / theirs if ours is not None and theirs is not None else None


@contextmanager
def built(case: Case, filesystem: Filesystem) -> Iterator[Path]:
    """The case on the filesystem, on its disk, for the time of a with block: the source.

    After an error it stays: the filesystem goes, and it with it.
    """
    source = filesystem.path / case.name
    source.mkdir()
    case.build(source)
    store_result(filesystem)
    yield source
    remove(source)


def run_in_turn(
    case: Case,
    filesystem: Filesystem,
    subjects: Sequence[Subject],
    rounds: int,
    between: Callable[[], None] = lambda: None,
) -> Row:
    """Run each subject once a round. In the first round each copy is compared with its source.

    `between` is called before each run. A subject that fails is left out of the rounds that follow. The order of a
    round is a matter of chance, the same in each benchmark: what a subject leaves behind, such as memory that the
    host takes back, would fall to the same one each time.
    """
    row, dice = Row(case.name, filesystem.name, filesystem.reflink), random.Random(_SEED)
    with built(case, filesystem) as source:
        for number in range(rounds):
            for subject in dice.sample(subjects, len(subjects)):
                if subject.name in row.failures:
                    continue
                try:
                    between()
                    seconds = run_once(subject, filesystem, source, case.files if number == 0 else None).seconds
                    row.seconds.setdefault(subject.name, []).append(seconds)
                except (SubjectFailed, Differs) as error:
                    say(f"{case.name} on {filesystem.name}: {subject.name} FAILED: {error}")
                    row.failures[subject.name] = str(error)
                    row.seconds.pop(subject.name, None)
    return row


def run_once(subject: Subject, filesystem: Filesystem, source: Path, files: int | None = None) -> Run:
    """One run with nothing left to be written before it. With `files`, the copy is compared with its source.

    Raises SubjectFailed, Differs.
    """
    # A directory of the run's own, so that also staging which a failure left goes with it.
    parent = filesystem.path / "copies"
    parent.mkdir()
    try:
        store_result(filesystem)
        run = subject.run(source, parent / "copy")
        if files is not None:
            check_same(source, parent / "copy", files)
        return run
    finally:
        remove(parent)


def store_result(filesystem: Filesystem) -> None:
    """Have everything on the filesystem written to its disk."""
    fd = os.open(filesystem.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        syncfs(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a tree, as fast as it goes."""
    subprocess.run(["rm", "-rf", "--", str(path)], check=True)
