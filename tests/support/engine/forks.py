"""Forks made without Celery and Redis, and checks that apply to each of them."""

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
from tasks.copier.progress import Cancellation, Poll, Progress, Ticker
from tasks.copier.report import FileResult, unpack_pages
from tasks.copier.roots import Roots
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import open_work
from tests.support.tree import Entry, snapshot

MIB = 1 << 20

INLINE = Limits()
#: Splits even a small guest directory into many chunks, and its large files into ranges if they must be copied.
CHUNKED = Limits(inline_files=0, inline_bytes=0, chunk_files=3, chunk_bytes=MIB)
WAYS: Mapping[str, Limits] = {"inline": INLINE, "chunked": CHUNKED}


def never_stop(progress: Progress) -> None:
    """A poll callback that never stops the work."""


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
    poll: Poll = never_stop,
    **options: Any,
) -> ForkResult:
    """Make one fork with child processes; it may succeed or fail."""
    spec = spec_of(source, destination, fork_id, **options)
    return fork_here(spec, Roots(tuple(map(os.fspath, roots))), limits, processes, poll)


def forked(source: Path, destination: Path, **arguments: Any) -> ForkResult:
    """Make one fork, which must succeed and leave nothing beside its destination. `arguments` as for `fork`."""
    result = fork(source, destination, **arguments)
    assert result["status"] == "succeeded", result["error"]
    assert result["error"] is None
    assert leftovers(destination.parent) == []
    return result


def refused(source: Path | str, destination: Path | str, **arguments: Any) -> ErrorRecord:
    """Make one fork, which must fail and leave its destination as it was; returns the error. `arguments`: of `fork`."""
    path = Path(destination)
    before = _status_of(path)
    result = fork(source, destination, **arguments)
    assert result["status"] == "failed", "it succeeded"
    assert result["error"] is not None
    assert _status_of(path) == before
    assert leftovers(path.parent) == []
    return result["error"]


def leftovers(directory: Path) -> list[str]:
    """The names of staging directories in `directory`; empty if it is not a directory."""
    try:
        return sorted(name for name in os.listdir(directory) if name.startswith(".forkvm"))
    except OSError:
        return []


def _status_of(path: Path) -> tuple[int, int, int] | None:
    """Inode, mode and ctime of `path`, or None if there is nothing."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mode, status.st_ctime_ns


@dataclass
class Ledger:
    """Stores a fork's result and all its FileResults in memory, where a worker stores them in Redis."""

    pages: dict[str, list[bytes]] = field(default_factory=dict)
    stored: list[ForkResult] = field(default_factory=list)
    cancellation: Cancellation = Cancellation.NOT_REQUESTED

    def keep_pages(self, pages_by_part: dict[str, list[bytes]], *, replace_all: bool = False) -> Cancellation:
        # A part may be stored again; each time it contains everything that was done of it.
        self.pages = dict(pages_by_part) if replace_all else self.pages | pages_by_part
        return self.cancellation

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        self.pages = {"0": pages}
        return self.cancellation

    def lost_parts(self, parts: Iterable[str]) -> list[str]:
        return [part for part in parts if part not in self.pages]

    def store_result(self, result: ForkResult) -> None:
        self.stored.append(result)

    @property
    def result(self) -> ForkResult:
        (result,) = self.stored
        return result

    @property
    def all_files(self) -> list[FileResult]:
        """Every FileResult, in the order in which they were stored."""
        return [result for pages in self.pages.values() for result in unpack_pages(pages)]

    @property
    def files(self) -> dict[str, FileResult]:
        """The FileResults by path; no path may occur twice."""
        results = self.all_files
        by_path = {result["path"]: result for result in results}
        assert len(by_path) == len(results)
        return by_path


def fork_with_ledger(
    source: Path,
    destination: Path,
    *,
    fork_id: str = "fork-1",
    limits: Limits = INLINE,
    earlier: Mapping[str, list[bytes]] | None = None,
    ended: bool = False,
    **options: Any,
) -> Ledger:
    """Make one fork in this process, chunk after chunk as a single worker would, and return the ledger.

    `earlier`: the pages that an earlier attempt stored. `ended`: cancellation was requested.
    """
    spec = spec_of(source, destination, fork_id, **options)
    ledger, ticker = Ledger(dict(earlier or {}), cancellation=Cancellation.of(ended)), Ticker(never_stop)
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, fork_id, wait=0) as staging,
    ):
        outcome = start(ends, staging, spec, limits, ticker, ledger)
        if isinstance(outcome, Plan):
            journal = staging.journal()
            assert journal is not None
            with open_work(ends, staging, spec.options, staging.open_tree(journal)) as work:
                for number in range(len(outcome.chunks)):
                    report = run_held_chunk(work, outcome, outcome.chunks[number], number, ticker)
                    assert report is not None
                    ledger.keep_pages({str(number): report.close()})
            assert finish(ends, staging, ticker, ledger) is not None
    return ledger


def without(entries: Mapping[bytes, Entry], left_out: Iterable[bytes]) -> dict[bytes, Entry]:
    """A snapshot without some entries and everything below them."""
    gone = tuple(left_out)
    kept = {
        path: entry
        for path, entry in entries.items()
        if not any(path == name or path.startswith(name + b"/") for name in gone)
    }
    # A hard link whose other names are not in the fork is a plain file there.
    return {path: replace(entry, links=_links(entry, kept), xattrs=_xattrs(entry)) for path, entry in kept.items()}


def _links(entry: Entry, kept: Mapping[bytes, Entry]) -> tuple[bytes, ...]:
    links = tuple(path for path in entry.links if path in kept)
    return links if len(links) > 1 else ()


def _xattrs(entry: Entry) -> tuple[tuple[bytes, bytes], ...]:
    """Without the second names under which XFS, and no other filesystem, shows ACLs to root."""
    return tuple(pair for pair in entry.xattrs if not pair[0].startswith(b"trusted.SGI_ACL_"))


def assert_alike(source: Path, destination: Path, left_out: Iterable[bytes] = ()) -> None:
    """The fork has exactly the entries of the source except `left_out`, each with the same content and metadata."""
    ours, theirs = without(snapshot(source), left_out), without(snapshot(destination), ())
    differing_names = ours.keys() ^ theirs.keys()
    assert not differing_names, f"only on one side: {sorted(differing_names)}"
    differing = {path: (ours[path], theirs[path]) for path in ours if ours[path] != theirs[path]}
    assert not differing, differing


@dataclass(frozen=True, kw_only=True)
class Times:
    """When an entry was last read (files only, since reading a directory changes its atime), written and changed."""

    atime: int | None
    mtime: int
    ctime: int


def times(root: Path) -> dict[bytes, Times]:
    """The times of all entries below `root`, and of itself as b"."."""
    return {path: _times(status) for path, status in statuses(root)}


def statuses(root: Path) -> Iterator[tuple[bytes, os.stat_result]]:
    """Every entry below `root` with its status, and itself as b"."; the status is taken before the entry is read."""
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
