"""Finding out whether the source can be reflinked to its destination, by reflinking its largest files."""

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

#: Two files of at least this many bytes of data are worth a thread: a smaller one is done before the thread starts.
_LARGE_BYTES = 64 << 20

#: A file's path below the source, and its entry.
File = tuple[str, Entry]


@dataclass(frozen=True)
class Probed:
    """The outcome of reflinking the largest files, by relative paths."""

    #: The files that were reflinked.
    cloned: tuple[str, ...]
    #: Files that cannot be reflinked, although others can.
    refused: frozenset[str] = frozenset()

    @property
    def can_reflink(self) -> bool:
        """Whether the source can be reflinked."""
        return bool(self.cloned)


class _SecondReflink(Thread):
    """Reflinks one file while the caller reflinks another: only the kernel works meanwhile."""

    def __init__(self, work: Workspace, file: File) -> None:
        super().__init__()
        self.file = file
        self._work = work
        self._outcome: FileResult | ReflinkRefused | ForkError | None = None
        #: Its own cloner: a cloner keeps state that threads must not share.
        self.cloner = Cloner(work.options, {}, lambda count: None)

    def run(self) -> None:
        """Reflink the file, and keep the outcome."""
        try:
            self._outcome = _clone(self._work, self.cloner, self.file)
        except (ReflinkRefused, ForkError) as error:
            self._outcome = error

    def result(self) -> FileResult:
        """Wait for the outcome. Raises ReflinkRefused, and ForkError."""
        self.join()
        if self._outcome is None:
            raise AssertionError("the thread that reflinks a file met an error in this program")
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def probe(work: Workspace, cloner: Cloner, largest: list[File], ticker: Ticker, report: Report) -> Probed:
    """Reflink the largest file: if that works, the plan is to reflink. Cloned files are added to `report`.

    A single file may not be reflinkable (NOCOW on btrfs); then the next largest is tried. Raises ForkError.
    """
    if work.options.reflink == "never":
        return Probed(())
    cloned: list[str] = []
    refused: set[str] = set()
    parallel = _begin_second(work, largest)
    try:
        for file in largest:
            path, entry = file
            second = parallel if parallel is not None and file is parallel.file else None
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
        if parallel is not None:
            parallel.join()
    return Probed(tuple(cloned), frozenset(refused))


def _clone(work: Workspace, cloner: Cloner, file: File) -> FileResult:
    path, entry = file
    with work.place(path.rpartition("/")[0]) as place:
        return cloner.file(place, entry, may_copy=False)


def _begin_second(work: Workspace, largest: list[File]) -> _SecondReflink | None:
    """Start to reflink the second largest file if two reflinks in parallel take less time than in sequence.

    XFS reflinks the extents of a file one by one, each in a transaction of its own. On btrfs two reflinks in parallel
    are slower, because of the locks of its trees.
    """
    pair = largest[:2]
    if len(pair) < 2 or any(entry.data < _LARGE_BYTES or entry.dev != work.source_dev for _, entry in pair):
        return None
    if work.tree_dev != work.source_dev or syscalls.filesystem_type(work.tree_fd) != syscalls.XFS:
        return None
    second = _SecondReflink(work, pair[1])
    try:
        second.start()
    except RuntimeError:  # the system has no thread left: one file after the other
        return None
    return second
