"""The question that decides a plan: can the source be reflinked to its destination? Its largest files are asked."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Thread

from tasks.copier.clone.file import Cloner, ReflinkRefused
from tasks.copier.errors import ForkError
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.reflink import Answer, meaning
from tasks.copier.progress import Ticker
from tasks.copier.report import FileResult, Report, failed
from tasks.copier.source.walk import Entry
from tasks.copier.staging.workspace import Workspace

#: Two files with at least so many bytes of data are worth a thread; what has less is reflinked as soon as that starts.
_LARGE_BYTES = 64 << 20

#: A file's path below the source, and its entry.
File = tuple[str, Entry]


@dataclass(frozen=True)
class Probed:
    """What the filesystems said when the largest files were to be reflinked."""

    #: The files that were.
    cloned: tuple[str, ...]
    #: Files that refused for themselves.
    refused: frozenset[str] = frozenset()

    @property
    def can_reflink(self) -> bool:
        """Whether the source can be reflinked."""
        return bool(self.cloned)


class _Beside(Thread):
    """Reflinks one file while the caller does another: the kernel is all that works on it."""

    def __init__(self, work: Workspace, file: File) -> None:
        super().__init__()
        self.file = file
        self._work = work
        self._outcome: FileResult | ReflinkRefused | ForkError | None = None
        #: A cloner of its own: it keeps what it learns, and threads share none of that.
        self.cloner = Cloner(work.options, {}, lambda count: None)

    def run(self) -> None:
        """Reflink it."""
        try:
            self._outcome = _clone(self._work, self.cloner, self.file)
        except (ReflinkRefused, ForkError) as error:
            self._outcome = error

    def result(self) -> FileResult:
        """Wait for what came of it. Raises ReflinkRefused, and ForkError."""
        self.join()
        if self._outcome is None:
            raise AssertionError("its thread met an error in this program")
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def probe(work: Workspace, cloner: Cloner, largest: list[File], ticker: Ticker, report: Report) -> Probed:
    """Reflink the largest file; its answer is the plan's. What was cloned goes into `report`.

    A file may refuse for itself (NOCOW on btrfs); then the next largest is asked. Raises ForkError.
    """
    if work.options.reflink == "never":
        return Probed(())
    cloned: list[str] = []
    refused: set[str] = set()
    beside = _begin_second(work, largest)
    try:
        for file in largest:
            path, entry = file
            second = beside if beside is not None and file is beside.file else None
            if cloned and second is None:
                break
            try:
                result = second.result() if second is not None else _clone(work, cloner, file)
            except ReflinkRefused as refusal:
                if meaning(refusal.refusal.errno) is Answer.PAIR_CANNOT and cloner.reflinker.refused:
                    break
                refused.add(path)
                continue
            except ForkError as error:
                report.add(failed(path, entry, error))
                raise
            report.add(result)
            report.totals.move_losses_from((cloner if second is None else second.cloner).metadata.losses)
            ticker(1, entry.size)
            cloned.append(path)
    finally:
        if beside is not None:
            beside.join()
    return Probed(tuple(cloned), frozenset(refused))


def _clone(work: Workspace, cloner: Cloner, file: File) -> FileResult:
    path, entry = file
    with work.place(path.rpartition("/")[0]) as place:
        return cloner.file(place, entry, may_copy=False)


def _begin_second(work: Workspace, largest: list[File]) -> _Beside | None:
    """Begin with the second largest file at once, where two reflinks side by side take less time than one by one.

    XFS works on one file's extents one after the other, each a transaction of its own. Not so btrfs: its trees' locks
    make two at once slower.
    """
    pair = largest[:2]
    if len(pair) < 2 or any(entry.data < _LARGE_BYTES or entry.dev != work.source_dev for _, entry in pair):
        return None
    if work.tree_dev != work.source_dev or syscalls.filesystem_type(work.tree_fd) != syscalls.XFS:
        return None
    beside = _Beside(work, pair[1])
    try:
        beside.start()
    except RuntimeError:  # the system has no thread to spare: one after the other, then
        return None
    return beside
