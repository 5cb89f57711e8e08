"""Recognizing forks that have ended and whose end Redis has forgotten.

A Redis that is killed forgets its last second (`appendfsync everysec`), and one that is restored from a copy forgets
more. A fork that ended meanwhile is delivered again, and finds its own destination. Nothing of the fork may be left at
or beside the destination, so what proves it to be the fork's is noted in the temporary directory, for minutes: the id,
a digest of the request, the identity of the published directory, and the result. Workers of other hosts do not see it.
"""

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
from tasks.store.ended_files import EndedStore, Note
from tasks.store.ended_record import EndedFork, EndedRecord

Pages = dict[str, list[bytes]]
#: Stands for all parts of a fork that has none.
ALL_PAGES = "all"
#: FileResults of a fork are noted up to so many bytes.
_MOST_PAGES = 1 << 16


class Ended(NamedTuple):
    """How a fork ended, and its FileResults by part, as far as they were noted."""

    result: ForkResult
    pages: Pages


@dataclass(frozen=True)
class EndedForks:
    """What this host's workers noted of forks that ended well. Forks of a campaign go by their numbers in it."""

    store: EndedStore = field(default_factory=EndedStore)

    def note_fork(self, spec: ForkSpec, parent_fd: int, name: str, result: ForkResult, pages: Pages) -> None:
        """Note a fork that has just been published as `name` in `parent_fd`."""
        with suppress(OSError):
            fork = _published(parent_fd, name, json.dumps(result), pages if are_few(pages) else {})
            if fork is not None:
                record = EndedRecord(digest_of(spec), os.fstat(parent_fd).st_dev, {0: fork})
                self.store.add(spec.fork_id, Note(0, 0, record.to_text()))

    def note_run(self, roots: Roots, campaign_id: str, digest: str, outcomes: Iterable[Outcome]) -> None:
        """Note those of a campaign's forks that have just been published. All have one parent."""
        good = [outcome for outcome in outcomes if outcome.result["error"] is None]
        if not good:
            return
        with suppress(OSError, ForkError):
            with roots.open_parent(good[0].result["destination"]) as parent:
                found = {
                    number_of(outcome.result): _published(
                        parent.fd,
                        os.path.basename(outcome.result["destination"]),
                        outcome.as_json,
                        {ALL_PAGES: outcome.pages} if outcome.pages else {},
                    )
                    for outcome in good
                }
                forks = {number: fork for number, fork in found.items() if fork is not None}
                record = EndedRecord(digest, os.fstat(parent.fd).st_dev, forks)
            if forks:
                self.store.add(campaign_id, Note(min(forks), max(forks), record.to_text()))

    def fork(self, roots: Roots, spec: ForkSpec) -> Ended | None:
        """How this very fork ended, if what was published then is at its destination; else None."""
        return self.run(roots, spec.fork_id, digest_of(spec), {0: spec}).get(0)

    def run(self, roots: Roots, job_id: str, digest: str, specs: Mapping[int, ForkSpec]) -> dict[int, Ended]:
        """As `fork`, of some forks of a campaign. `digest`: of its request."""
        ended: dict[int, Ended] = {}
        if not specs:
            return ended
        with ExitStack() as opened:
            place = _Place(roots, opened)
            for record in self._records(job_id, digest, min(specs), max(specs)):
                for number, fork in record.forks.items():
                    spec = specs.get(number)
                    if spec is None or number in ended:
                        continue
                    with suppress(ForkError, OSError):
                        result = result_of(validation.load(fork.result.encode("ascii")), spec)
                        if place.holds(spec.destination, record.device, fork):
                            ended[number] = Ended(result, fork.pages)
        return ended

    def _records(self, job_id: str, digest: str, first: int, last: int) -> Iterator[EndedRecord]:
        for note in self.store.find(job_id):
            if note.first <= last and first <= note.last:
                with suppress(ForkError):
                    record = EndedRecord.from_text(note.data)
                    if record.digest == digest:
                        yield record


class _Place:
    """Looks at destinations; the last parent stays open."""

    def __init__(self, roots: Roots, opened: ExitStack) -> None:
        self._roots = roots
        self._opened = opened
        self._parent = ""
        self._fd = -1

    def holds(self, destination: str, device: int, fork: EndedFork) -> bool:
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


def _published(parent_fd: int, name: str, result: str, pages: Pages) -> EndedFork | None:
    """What to note; None where no time of birth is kept: another directory could have the same inode later."""
    try:
        identity, birth = _identity_and_birth(parent_fd, name)
    except FileNotFoundError:  # its client removed it already
        return None
    return EndedFork(identity, birth, result, pages) if birth else None


def _identity_and_birth(parent_fd: int, name: str) -> tuple[int, int]:
    """As `trees.identity_of`, in one system call in nearly all cases. Raises OSError."""
    inode, birth = syscalls.inode_and_birth(parent_fd, name)
    if inode != trees.SUBVOLUME_INODE:
        return inode, birth
    return trees.identity_of(parent_fd, name) or 0, birth


def are_few(pages: Pages) -> bool:
    """Whether these FileResults are few enough to be noted."""
    return sum(len(page) for some in pages.values() for page in some) <= _MOST_PAGES


def digest_of(spec: ForkSpec) -> str:
    """A digest of the request."""
    return hashlib.sha256(json.dumps(spec.request()).encode("ascii")).hexdigest()


def number_of(result: ForkResult) -> int:
    """The fork's number in its campaign, out of its id."""
    return int(result["fork_id"].rpartition(".")[2])
