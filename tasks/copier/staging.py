"""Staging: where a fork is built, beside its destination, until one rename publishes it.

Two directories stand in the destination's parent while a fork is made, so that they are on its filesystem, its
subvolume and its quota, and need no right that the destination itself does not need:

    .forkvm-<key>             the control directory: lock, journal, manifest, reports; mode 0700
    .forkvm-<key>.<attempt>   the tree that becomes the destination; mode 0700 until it is published

`key` is made from the fork's id, so every delivery of the same request meets the same control directory.

**The fence.** Whoever writes into the tree holds the lock file: shared for a chunk, exclusive for the planner and for
the one who publishes or gives up. The journal's phase is read and changed under it. So nobody writes into a tree that
was published: to publish is to hold the lock alone, and a late chunk finds the control directory gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from tasks.copier.attributes import drop_inherited_acls
from tasks.copier.control import DIRECTORY, FILE, LOCK, Control
from tasks.copier.journal import Journal
from tasks.copier.kernel import syscalls, trees
from tasks.copier.report import Report
from tasks.copier.selection import STAGING_NAME

_JOURNAL = "journal"
_MANIFEST = "manifest"
_CLOSING = "closing"
_STOP = "stop"
#: A snapshot that is to become a tree, in the control directory (of a campaign's trees: with their names behind it).
SNAPSHOT = "snapshot"


class Staging(Control):
    """The staging of one fork, open."""

    # -- the journal

    def journal(self) -> Journal | None:
        """The journal, or None when whoever made the staging died before writing one."""
        try:
            return Journal.from_bytes(self.read_file(_JOURNAL))
        except FileNotFoundError:
            return None

    def write_journal(self, journal: Journal, *, sync: bool = False) -> None:
        """Replace the journal, in one step; `sync`: and have it on the disk."""
        self.write_file(_JOURNAL, journal.to_bytes(), sync=sync)

    def begin(self, spec: dict[str, Any], earlier: Journal | None) -> Journal:
        """Write the journal of a new attempt; what an earlier one left in the staging goes."""
        if earlier is not None:
            # Counted first: what kills its process here, too, must come to an end.
            self.write_journal(replace(earlier, tries=earlier.tries + 1))
            self.discard_tree(earlier)
        self._discard_snapshots()
        for name in os.listdir(self.fd):
            if name not in (LOCK, _JOURNAL):
                os.unlink(name, dir_fd=self.fd)
        journal = Journal(
            spec=spec,
            control=os.fstat(self.fd).st_ino,
            attempt=secrets.token_hex(4),
            tries=earlier.tries + 1 if earlier else 1,
        )
        self.write_journal(journal)
        return journal

    # -- the tree

    def tree_name(self, journal: Journal) -> str:
        """The name of the attempt's tree in the destination's parent."""
        return f"{self.name}.{journal.attempt}"

    def make_tree(self, journal: Journal) -> int:
        """Make the tree's top directory, open to nobody else; the caller closes the descriptor.

        Raises FileNotFoundError when the fork was taken over meanwhile.
        """
        return self.make_named_tree(self.tree_name(journal))

    def new_tree_name(self) -> str:
        """A name for one of the trees of a campaign, which no other tree has."""
        return f"{self.name}.{secrets.token_hex(4)}"

    def make_named_tree(self, name: str) -> int:
        """As `make_tree`, for a tree that `new_tree_name` named."""
        os.mkdir(name, 0o700, dir_fd=self.parent_fd)
        if not self.is_current():
            with suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=self.parent_fd)
            raise FileNotFoundError(errno.ENOENT, "the fork was taken over", self.name)
        fd = os.open(name, DIRECTORY, dir_fd=self.parent_fd)
        drop_inherited_acls(fd)
        os.fchmod(fd, 0o700)  # a set-gid parent hands its bit down
        return fd

    def exchange_tree(self, snapshot: str, name: str) -> None:
        """Put the finished `snapshot` of the control directory into the place of the empty tree `name`.

        It was made there, since nobody else gets there. Raises FileNotFoundError when the tree was taken over: there
        is no moment without one.
        """
        syscalls.rename_exchange(self.fd, snapshot, self.parent_fd, name)
        os.rmdir(snapshot, dir_fd=self.fd)

    def _discard_snapshots(self) -> None:
        """Remove the snapshots that did not come to be a tree."""
        for name in os.listdir(self.fd):
            if name.startswith(SNAPSHOT):
                trees.remove(self.fd, name)

    def open_tree(self, journal: Journal) -> int:
        """Open the tree; the caller closes the descriptor. Raises FileNotFoundError."""
        return self.open_named_tree(self.tree_name(journal))

    def open_named_tree(self, name: str) -> int:
        """As `open_tree`, for a tree that `new_tree_name` named."""
        return os.open(name, DIRECTORY, dir_fd=self.parent_fd)

    def publish(self, journal: Journal, destination: str, *, sync: bool) -> None:
        """Rename the tree to `destination` (a name in the same parent); `sync`: and have that on the disk.

        Raises FileExistsError, FileNotFoundError, OSError; then nothing of ours stands at `destination`.
        """
        tree = self.tree_name(journal)
        syscalls.rename_noreplace(self.parent_fd, tree, self.parent_fd, destination)
        if sync:
            try:
                os.fsync(self.parent_fd)
            except OSError:
                syscalls.rename_noreplace(self.parent_fd, destination, self.parent_fd, tree)
                raise

    def is_published(self, journal: Journal, destination: str) -> bool:
        """Whether what stands at `destination` is the tree whose identity the journal recorded."""
        return journal.tree is not None and trees.identity_of(self.parent_fd, destination) == journal.tree

    def discard_tree(self, journal: Journal) -> None:
        """Remove the attempt's tree, if it stands."""
        trees.remove(self.parent_fd, self.tree_name(journal))

    def discard_trees(self) -> None:
        """Remove all trees that belong to this control directory; a campaign has many."""
        for name in os.listdir(self.parent_fd):
            if name.startswith(f"{self.name}.") and STAGING_NAME.fullmatch(name):
                trees.remove(self.parent_fd, name)

    def remove(self) -> None:
        """Remove the control directory, the last step of every fork. The tree must be gone or published.

        One that is gone, or that another process has in its place, is no error. Raises OSError.
        """
        if self.retired is None:
            if not self.is_current():
                return
            self._discard_snapshots()
            if self.clear():
                return
        away = self.retire()
        if away is not None:
            trees.remove(self.parent_fd, away)

    # -- the manifest

    def manifest(self, *, closing: bool = False) -> int:
        """Open the manifest of what chunks clone, or of what closes the fork; the caller closes the descriptor."""
        return os.open(_CLOSING if closing else _MANIFEST, FILE, 0o600, dir_fd=self.fd)

    # -- chunks

    @contextmanager
    def hold_chunk(self, number: int) -> Iterator[int | None]:
        """Hold chunk `number` alone: yields how often it was begun, this time included, or None if another has it.

        Two who worked on one chunk at once would replace each other's files, and one of them could die half-way
        through a file that the other had already reported as done.
        """
        name = f"chunk-{number}"
        try:
            fd, is_new = os.open(name, FILE | os.O_EXCL, 0o600, dir_fd=self.fd), True
        except FileExistsError:
            fd, is_new = os.open(name, FILE, 0o600, dir_fd=self.fd), False
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # A power loss may leave the file without its count: what was begun is never taken for new.
            begun = 1 if is_new else 1 + int(os.pread(fd, 16, 0) or b"1")
            os.pwrite(fd, b"%d" % begun, 0)
            yield begun
        finally:
            os.close(fd)

    def chunk_lock(self, number: int) -> int | None:
        """Inode of the lock of chunk `number`: who finds another one than before has lost the chunk. None: gone."""
        try:
            return os.stat(f"chunk-{number}", dir_fd=self.fd, follow_symlinks=False).st_ino
        except FileNotFoundError:
            return None

    def seize_chunk(self, number: int) -> None:
        """Take the lock of chunk `number` from whoever holds it, by a new one in its place that has the same count."""
        with suppress(FileNotFoundError):
            self.write_file(f"chunk-{number}", self.read_file(f"chunk-{number}"))

    def begun_chunks(self) -> set[int]:
        """The numbers of all chunks that were begun and not forgotten."""
        names = [name.partition("-") for name in os.listdir(self.fd)]
        return {int(number) for kind, _, number in names if kind == "chunk" and number.isdigit()}

    def forget_chunk(self, number: int) -> None:
        """Remove the lock of chunk `number`, which is done."""
        with suppress(FileNotFoundError):
            os.unlink(f"chunk-{number}", dir_fd=self.fd)

    def write_report(self, part: str, report: Report) -> None:
        """Record that a part (a chunk's number, or `plan`) is done, and what it did."""
        self.write_file(f"report-{part}", report.to_bytes())

    def has_report(self, part: str) -> bool:
        """Whether a part is done. Raises OSError."""
        return self.has_file(f"report-{part}")

    def report(self, part: str) -> Report:
        """What a part did. Raises FileNotFoundError when it is not done."""
        return Report.from_bytes(self.read_file(f"report-{part}"))

    # -- stopping early

    @classmethod
    def stop_from_outside(cls, parent_fd: int, fork_id: str) -> None:
        """As `stop`, by someone who does not hold the staging: who wants to hold it alone must first have it idle."""
        with cls.peek(parent_fd, fork_id) as staging, suppress(FileNotFoundError):  # removed meanwhile
            if staging is not None:
                staging.stop()

    def stop(self) -> None:
        """Tell the chunks of this fork that their work is no longer wanted."""
        os.close(os.open(_STOP, FILE, 0o600, dir_fd=self.fd))

    def is_stopped(self) -> bool:
        """Whether someone called `stop`. Raises OSError."""
        return self.has_file(_STOP)
