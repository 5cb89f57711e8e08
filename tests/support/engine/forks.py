"""Forks as these tests ask for them, and what must hold after each of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import ErrorRecord
from tasks.copier.fork.chunk import run_held_chunk
from tasks.copier.fork.lifecycle import finish, start
from tasks.copier.fork.local import fork_here
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkResult, ForkSpec
from tasks.copier.options import Limits, Options
from tasks.copier.progress import Beat, Cancellation, Progress, Ticker
from tasks.copier.report import FileResult, unpack_pages
from tasks.copier.roots import Roots
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import open_work
from tests.support.tree import Entry, snapshot

MIB = 1 << 20

INLINE = Limits()
#: Cuts even a small guest directory into many chunks, and what must be copied of its large files into ranges.
CHUNKED = Limits(inline_files=0, inline_bytes=0, chunk_files=3, chunk_bytes=MIB)
WAYS: Mapping[str, Limits] = {"inline": INLINE, "chunked": CHUNKED}


def go_on(progress: Progress) -> None:
    """A beat that never stops the work."""


def spec_of(source: Path | str, destination: Path | str, fork_id: str = "fork-1", **options: Any) -> ForkSpec:
    """`options` are the fields of Options."""
    return ForkSpec(
        fork_id=fork_id, source=os.fspath(source), destination=os.fspath(destination), options=Options(**options)
    )


def fork(
    source: Path | str,
    destination: Path | str,
    *,
    fork_id: str = "fork-1",
    roots: Iterable[Path] = (),
    limits: Limits = INLINE,
    processes: int = 2,
    beat: Beat = go_on,
    **options: Any,
) -> ForkResult:
    """One fork, whatever becomes of it."""
    spec = spec_of(source, destination, fork_id, **options)
    return fork_here(spec, Roots(tuple(map(os.fspath, roots))), limits, processes, beat)


def forked(source: Path, destination: Path, **wishes: Any) -> ForkResult:
    """One fork that must succeed and leave nothing beside its destination. `wishes` as for `fork`."""
    result = fork(source, destination, **wishes)
    assert result["status"] == "succeeded", result["error"]
    assert result["error"] is None
    assert leftovers(destination.parent) == []
    return result


def refused(source: Path | str, destination: Path | str, **wishes: Any) -> ErrorRecord:
    """One fork that must fail and change nothing where it was to appear; returns why. `wishes` as for `fork`."""
    place = Path(destination)
    before = _standing(place)
    result = fork(source, destination, **wishes)
    assert result["status"] == "failed", "it succeeded"
    assert result["error"] is not None
    assert _standing(place) == before
    assert leftovers(place.parent) == []
    return result["error"]


def leftovers(directory: Path) -> list[str]:
    """What staging left in `directory`; nothing where that is no directory."""
    try:
        return sorted(name for name in os.listdir(directory) if name.startswith(".forkvm"))
    except OSError:
        return []


def _standing(path: Path) -> tuple[int, int, int] | None:
    """What stands at `path`: its inode, mode and ctime, or None."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mode, status.st_ctime_ns


@dataclass
class Books:
    """A fork's result and all its FileResults. Also the ledger that the engine writes them to."""

    pages: dict[str, list[bytes]] = field(default_factory=dict)
    settled: list[ForkResult] = field(default_factory=list)
    cancellation: Cancellation = Cancellation.NOT_REQUESTED

    def keep_pages(self, parts: dict[str, list[bytes]], *, anew: bool = False) -> Cancellation:
        # A part may be kept again: what it did is told whole each time.
        self.pages = dict(parts) if anew else self.pages | parts
        return self.cancellation

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        self.pages = {"0": pages}
        return self.cancellation

    def store_result(self, result: ForkResult) -> None:
        self.settled.append(result)

    @property
    def result(self) -> ForkResult:
        (result,) = self.settled
        return result

    @property
    def all_files(self) -> list[FileResult]:
        """Every FileResult, in the order in which they came."""
        return [result for pages in self.pages.values() for result in unpack_pages(pages)]

    @property
    def files(self) -> dict[str, FileResult]:
        """The FileResults by path; no path may come twice."""
        results = self.all_files
        by_path = {result["path"]: result for result in results}
        assert len(by_path) == len(results)
        return by_path


def fork_with_books(
    source: Path,
    destination: Path,
    *,
    fork_id: str = "fork-1",
    limits: Limits = INLINE,
    earlier: Mapping[str, list[bytes]] | None = None,
    ended: bool = False,
    **options: Any,
) -> Books:
    """One fork in this process, its chunks one after another as a single worker would do them, with its books.

    `earlier`: pages that an earlier attempt left in them. `ended`: someone has asked for an end of it.
    """
    spec = spec_of(source, destination, fork_id, **options)
    books, ticker = Books(dict(earlier or {}), cancellation=Cancellation.of(ended)), Ticker(go_on)
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, fork_id, wait=0) as staging,
    ):
        outcome = start(ends, staging, spec, limits, ticker, books)
        if isinstance(outcome, Plan):
            journal = staging.journal()
            assert journal is not None
            with open_work(ends, staging, spec.options, staging.open_tree(journal)) as work:
                for number in range(len(outcome.chunks)):
                    report = run_held_chunk(work, outcome, outcome.chunks[number], number, ticker)
                    assert report is not None
                    books.keep_pages({str(number): report.close()})
            assert finish(ends, staging, ticker, books) is not None
    return books


def without(entries: Mapping[bytes, Entry], left_out: Iterable[bytes]) -> dict[bytes, Entry]:
    """A snapshot without some entries and all below them."""
    gone = tuple(left_out)
    kept = {
        path: entry
        for path, entry in entries.items()
        if not any(path == name or path.startswith(name + b"/") for name in gone)
    }
    # A hard link that lost its other names in the fork is a plain file there.
    return {path: replace(entry, links=_links(entry, kept), xattrs=_xattrs(entry)) for path, entry in kept.items()}


def _links(entry: Entry, kept: Mapping[bytes, Entry]) -> tuple[bytes, ...]:
    links = tuple(path for path in entry.links if path in kept)
    return links if len(links) > 1 else ()


def _xattrs(entry: Entry) -> tuple[tuple[bytes, bytes], ...]:
    """Without the second names under which XFS, and no other filesystem, shows ACLs to root."""
    return tuple(pair for pair in entry.xattrs if not pair[0].startswith(b"trusted.SGI_ACL_"))


def assert_alike(source: Path, destination: Path, left_out: Iterable[bytes] = ()) -> None:
    """Entry by entry, the fork is the source without `left_out`."""
    ours, theirs = without(snapshot(source), left_out), without(snapshot(destination), ())
    differing_names = ours.keys() ^ theirs.keys()
    assert not differing_names, f"only on one side: {sorted(differing_names)}"
    differing = {path: (ours[path], theirs[path]) for path in ours if ours[path] != theirs[path]}
    assert not differing, differing


@dataclass(frozen=True, kw_only=True)
class Times:
    """When an entry was last read (files only: this very look is written down in a directory), written and changed."""

    atime: int | None
    mtime: int
    ctime: int


def times(root: Path) -> dict[bytes, Times]:
    """The times of all entries below `root`, and of itself as b"."."""
    return {path: _times(status) for path, status in statuses(root)}


def statuses(root: Path) -> Iterator[tuple[bytes, os.stat_result]]:
    """Every entry below `root` with its status, and itself as b"."; each is looked at before it is read."""
    top = os.fsencode(root)
    yield b".", os.lstat(top)
    pending = [b""]
    while pending:
        directory = pending.pop()
        for name in sorted(os.listdir(os.path.join(top, directory))):
            path = os.path.join(directory, name)
            status = os.lstat(os.path.join(top, path))
            yield path, status
            if _is_directory(status):
                pending.append(path)


def _times(status: os.stat_result) -> Times:
    is_file = status.st_mode & 0o170000 == 0o100000
    return Times(atime=status.st_atime_ns if is_file else None, mtime=status.st_mtime_ns, ctime=status.st_ctime_ns)


def _is_directory(status: os.stat_result) -> bool:
    return status.st_mode & 0o170000 == 0o040000
