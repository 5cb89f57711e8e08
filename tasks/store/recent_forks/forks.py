"""Writes notes about forks that succeeded, and finds a fork at its destination by them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.copier import validation
from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.errors import ForkError
from tasks.copier.fork_spec import ForkResult, ForkSpec, result_of
from tasks.copier.kernel import syscalls, trees
from tasks.copier.roots import Roots
from tasks.store.recent_forks.files import Note, NoteFiles
from tasks.store.recent_forks.record import NotedFork, Record

Pages = dict[str, list[bytes]]
#: The key in `Pages` of a fork without parts.
ALL_PAGES = "all"
#: The most bytes of FileResults in a note about one fork.
_MOST_PAGES = 1 << 16


class RecentFork(NamedTuple):
    """The result of a fork that succeeded, and its FileResults by part, if they were few enough to be noted."""

    result: ForkResult
    pages: Pages


@dataclass(frozen=True)
class RecentForks:
    """The notes of this host about forks that succeeded. A campaign's forks are noted under its id, by number."""

    files: NoteFiles = field(default_factory=NoteFiles)

    def note_fork(self, spec: ForkSpec, parent_fd: int, name: str, result: ForkResult, pages: Pages) -> None:
        """Write a note about a fork that has just been published as `name` in `parent_fd`. Never raises OSError."""
        with suppress(OSError):
            fork = _published(parent_fd, name, json.dumps(result), pages if are_few(pages) else {})
            if fork is not None:
                record = Record(digest_of(spec), os.fstat(parent_fd).st_dev, {0: fork})
                self.files.add(spec.fork_id, Note(0, 0, record.to_text()))

    def note_run(self, roots: Roots, campaign_id: str, digest: str, outcomes: Iterable[Outcome]) -> None:
        """Write a note about the forks of a campaign that have just been published, all in one parent."""
        succeeded = [outcome for outcome in outcomes if outcome.result["error"] is None]
        if not succeeded:
            return
        with suppress(OSError, ForkError):
            with roots.open_parent(succeeded[0].result["destination"]) as parent:
                found = {
                    number_of(outcome.result): _published(
                        parent.fd,
                        os.path.basename(outcome.result["destination"]),
                        outcome.as_json,
                        {ALL_PAGES: outcome.pages} if outcome.pages else {},
                    )
                    for outcome in succeeded
                }
                forks = {number: fork for number, fork in found.items() if fork is not None}
                record = Record(digest, os.fstat(parent.fd).st_dev, forks)
            if forks:
                self.files.add(campaign_id, Note(min(forks), max(forks), record.to_text()))

    def find(self, roots: Roots, spec: ForkSpec) -> RecentFork | None:
        """The fork of this request that succeeded, if its directory is still at the destination; else None."""
        return self.find_run(roots, spec.fork_id, digest_of(spec), {0: spec}).get(0)

    def find_run(self, roots: Roots, job_id: str, digest: str, specs: Mapping[int, ForkSpec]) -> dict[int, RecentFork]:
        """As `find`, for some forks of a campaign, by number. `digest`: of the campaign's request."""
        found: dict[int, RecentFork] = {}
        if not specs:
            return found
        with ExitStack() as opened:
            destinations = _Destinations(roots, opened)
            for record in self._records(job_id, digest, min(specs), max(specs)):
                for number, fork in record.forks.items():
                    spec = specs.get(number)
                    if spec is None or number in found:
                        continue
                    with suppress(ForkError, OSError):
                        result = result_of(validation.load(fork.result.encode("ascii")), spec)
                        if destinations.hold(spec.destination, record.device, fork):
                            found[number] = RecentFork(result, fork.pages)
        return found

    def _records(self, job_id: str, digest: str, first: int, last: int) -> Iterator[Record]:
        for note in self.files.find(job_id):
            if note.first <= last and first <= note.last:
                with suppress(ForkError):
                    record = Record.from_text(note.data)
                    if record.digest == digest:
                        yield record


class _Destinations:
    """Checks destinations. Keeps the last parent open: the forks of a campaign have one."""

    def __init__(self, roots: Roots, opened: ExitStack) -> None:
        self._roots = roots
        self._opened = opened
        self._parent = ""
        self._fd = -1

    def hold(self, destination: str, device: int, fork: NotedFork) -> bool:
        """Whether the directory that was published is at the destination. Raises ForkError, OSError."""
        parent, name = os.path.split(destination)
        if parent != self._parent:
            self._opened.close()
            self._fd = self._opened.enter_context(self._roots.open_parent(destination)).fd
            self._parent = parent
        return os.fstat(self._fd).st_dev == device and _identity_and_birth(self._fd, name) == (
            fork.identity,
            fork.birth,
        )


def _published(parent_fd: int, name: str, result: str, pages: Pages) -> NotedFork | None:
    """The fork to note; None if the filesystem has no birth times: another directory could get the same inode."""
    try:
        identity, birth = _identity_and_birth(parent_fd, name)
    except FileNotFoundError:  # its client has removed it
        return None
    return NotedFork(identity, birth, result, pages) if birth else None


def _identity_and_birth(parent_fd: int, name: str) -> tuple[int, int]:
    """As `trees.identity_of`, with one system call in nearly all cases. Raises OSError."""
    inode, birth = syscalls.inode_and_birth(parent_fd, name)
    if inode != trees.SUBVOLUME_INODE:
        return inode, birth
    return trees.identity_of(parent_fd, name) or 0, birth


def are_few(pages: Pages) -> bool:
    """Whether these FileResults are few enough to be noted."""
    return sum(len(page) for some in pages.values() for page in some) <= _MOST_PAGES


def digest_of(spec: ForkSpec) -> str:
    """A digest of the request of a fork."""
    return hashlib.sha256(json.dumps(spec.request()).encode("ascii")).hexdigest()


def number_of(result: ForkResult) -> int:
    """The number of a fork in its campaign, from its id."""
    return int(result["fork_id"].rpartition(".")[2])
