"""Staging: where a fork is built, beside its destination, until one rename publishes it.

While a fork is made, its destination's parent holds two more directories. There they are on the destination's
filesystem, subvolume and quota, and need no permission that the destination does not need:

    .forkvm-<key>             the control directory: lock, journal, manifest, reports; mode 0700
    .forkvm-<key>.<attempt>   the tree that becomes the destination; mode 0700 until it is published

`key` is a hash of the fork's id, so every delivery of the same request finds the same control directory.

**The fence.** Every process that writes into the tree holds the lock file: shared for a chunk, exclusive to plan, to
publish or to abandon the fork. The journal is read and written under this lock. So no process writes into a published
tree: publishing needs the lock exclusively, and a late chunk finds that the control directory is gone.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tasks.copier.clone.attributes import drop_inherited_acls
from tasks.copier.kernel import syscalls, trees
from tasks.copier.source.selection import STAGING_NAME
from tasks.copier.staging import proof
from tasks.copier.staging.control_directory import LOCK, control_name
from tasks.copier.staging.files import is_known
from tasks.copier.staging.journal import Journal, Request
from tasks.copier.staging.parts import Parts
from tasks.copier.staging.proof import NotOurs

log = logging.getLogger(__name__)

_JOURNAL = "journal"
#: One line of the notes: the name and the identity of a tree.
_NOTED_TREE = re.compile(rb"^tree (\.[0-9a-f]{8}) (\d{1,39})$", re.MULTILINE)
#: A snapshot in the control directory that is to become a tree. In a campaign, the name of its tree is appended.
SNAPSHOT = "snapshot"


class Staging(Parts):
    """The staging of one fork, open."""

    # -- the journal

    def journal(self) -> Journal | None:
        """The journal, or None if the process that made the staging died before it had written one.

        Raises NotOurs for the journal of another fork or campaign.
        """
        try:
            journal = Journal.from_bytes(self.read_file(_JOURNAL))
        except FileNotFoundError:
            return None
        if journal is not None and control_name(journal.job_id) != self.name:
            raise NotOurs(proof.path_of(self.fd), "its journal belongs to another fork")
        return journal

    def own_journal(self) -> Journal | None:
        """As `journal`, but raises NotOurs also if the control directory is a copy of another one."""
        journal = self.journal()
        if journal is not None and journal.control != syscalls.fstat(self.fd).st_ino:
            raise NotOurs(proof.path_of(self.fd), "it is a copy of a staging directory")
        return journal

    def write_journal(self, journal: Journal, *, sync: bool = False) -> None:
        """Replace the journal atomically; `sync`: and write it to the disk."""
        self.write_file(_JOURNAL, journal.to_bytes(), sync=sync)

    def begin(self, spec: dict[str, Any], earlier: Journal | None) -> Journal:
        """Remove all that earlier attempts left in the staging, and write the journal of a new attempt."""
        if earlier is not None:
            # Counted first: also a fork that kills its process here must end after a few tries.
            self.write_journal(replace(earlier, tries=earlier.tries + 1))
            self.discard_all_of(earlier)
        else:
            self.discard_noted_trees()  # their journal was lost
        names = self._known_names()
        self._discard_snapshots(names)
        for name in names:
            if name not in (LOCK, _JOURNAL):
                os.unlink(name, dir_fd=self.fd)
        journal = Journal(
            spec=Request(spec),
            control=syscalls.fstat(self.fd).st_ino,
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
        """Make the tree's top directory, private to this user. The caller closes the descriptor.

        Raises FileNotFoundError if the fork was taken over meanwhile, NotOurs, and OSError.
        """
        name = self.tree_name(journal)
        fd, status = self._make_tree(name)
        try:
            self.note_trees({name: trees.identity(fd, status)})
        except BaseException:
            os.close(fd)
            raise
        return fd

    def new_tree_name(self) -> str:
        """A new name for one tree of a campaign."""
        return f"{self.name}.{secrets.token_hex(4)}"

    def make_named_tree(self, name: str) -> int:
        """As `make_tree`, for a name from `new_tree_name`. It does not note the tree's identity."""
        fd, _ = self._make_tree(name)
        return fd

    def _make_tree(self, name: str) -> tuple[int, os.stat_result]:
        os.mkdir(name, 0o700, dir_fd=self.parent_fd)
        if not self.is_current():
            with suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=self.parent_fd)
            raise FileNotFoundError(errno.ENOENT, "the fork was taken over", self.name)
        fd, status = proof.open_with_status(self.parent_fd, name)
        try:
            if os.listdir(fd):
                raise self._replaced(name)
            if drop_inherited_acls(fd) or stat.S_IMODE(status.st_mode) != 0o700:
                os.fchmod(fd, 0o700)  # drops the bits that a set-gid parent adds
        except BaseException:
            os.close(fd)
            raise
        return fd, status

    def inherit_group(self, tree_fd: int) -> None:
        """Let what is made in a tree have the group of a set-gid parent, as in the parent itself. Raises OSError."""
        if os.fstat(self.parent_fd).st_mode & stat.S_ISGID:
            os.fchmod(tree_fd, 0o2700)

    def note_trees(self, identities: Mapping[str, int]) -> None:
        """Note the identities of the trees of these names, before anything is put into them.

        If such a name leads to another directory later, another user has put it there.
        """
        lines = [f"tree {name.removeprefix(self.name)} {identity}\n" for name, identity in identities.items()]
        self.note("".join(lines).encode("ascii"))

    def _noted(self) -> dict[str, set[int]]:
        """The noted identities of each tree, by its name."""
        noted: dict[str, set[int]] = {}
        for attempt, identity in _NOTED_TREE.findall(self.notes()):
            noted.setdefault(self.name + attempt.decode("ascii"), set()).add(int(identity))
        return noted

    def _replaced(self, name: str) -> NotOurs:
        return NotOurs(
            proof.path_of(self.parent_fd, name),
            "it is not the directory that this fork was made in",
        )

    def exchange_tree(self, snapshot: str, name: str) -> None:
        """Exchange the finished `snapshot`, which no other user can reach in the control directory, for the empty tree.

        `name` is the tree's name; at no moment is it free. Raises FileNotFoundError if the tree was taken over, and
        NotOurs if another user has put another directory in its place.
        """
        identity = trees.identity_of(self.fd, snapshot)
        if identity is not None:
            self.note_trees({name: identity})
        syscalls.rename_exchange(self.fd, snapshot, self.parent_fd, name)
        try:
            os.rmdir(snapshot, dir_fd=self.fd)  # the empty tree
        except OSError:
            syscalls.rename_exchange(self.fd, snapshot, self.parent_fd, name)
            raise self._replaced(name) from None

    def _discard_snapshots(self, names: list[str]) -> None:
        """Remove the snapshots that became no tree, also from `names`, the directory's listing."""
        for name in [name for name in names if name.startswith(SNAPSHOT)]:
            trees.remove(self.fd, name)
            names.remove(name)

    def open_tree(self, journal: Journal) -> int:
        """Open the tree. The caller closes the descriptor. Raises FileNotFoundError, and NotOurs if it was replaced."""
        name = self.tree_name(journal)
        fd = proof.open_plain_directory(self.parent_fd, name)
        if trees.identity(fd) not in {journal.tree, *self._noted().get(name, ())}:
            os.close(fd)
            raise self._replaced(name)
        return fd

    def publish(self, journal: Journal, destination: str, *, sync: bool) -> None:
        """Rename the tree to `destination` (a name in the same parent); `sync`: and write that to the disk.

        Raises FileExistsError, FileNotFoundError, NotOurs, OSError; then the tree is not at `destination`.
        """
        tree = self.tree_name(journal)
        self.publish_tree(tree, destination, journal.tree)
        if sync:
            try:
                os.fsync(self.parent_fd)
            except OSError:
                syscalls.rename_noreplace(self.parent_fd, destination, self.parent_fd, tree)
                raise

    def publish_tree(self, tree: str, destination: str, identity: int | None) -> None:
        """Rename the tree of this name to `destination` if it has this identity. Raises the errors of `publish`.

        A user who may write in the parent can replace the tree by another directory, also between two system calls. So
        the identity is checked again after the rename, and the rename is undone if it differs. If the second check
        fails, the first one decides: the fork is published and must not be reported as failed.
        """
        found = trees.identity_of(self.parent_fd, tree)
        if identity is not None and found not in (identity, None):
            raise self._replaced(tree)
        syscalls.rename_noreplace(self.parent_fd, tree, self.parent_fd, destination)
        published = found
        with suppress(OSError):
            published = trees.identity_of(self.parent_fd, destination)
        if identity is not None and published not in (identity, None):  # None: moved or removed since
            with suppress(OSError):
                syscalls.rename_noreplace(self.parent_fd, destination, self.parent_fd, tree)
            raise self._replaced(tree)

    def is_published(self, journal: Journal, destination: str) -> bool:
        """Whether `destination` is the tree whose identity is in the journal."""
        return journal.tree is not None and trees.identity_of(self.parent_fd, destination) == journal.tree

    def discard_tree(self, journal: Journal) -> None:
        """Remove the attempt's tree, if there is one."""
        self.discard_named_tree(self.tree_name(journal), journal.tree)

    def discard_all_of(self, journal: Journal) -> None:
        """Remove all trees of an earlier attempt, which may have been a campaign's."""
        if journal.is_campaign:
            self.discard_trees()
        else:
            self.discard_tree(journal)

    def discard_noted_trees(self) -> None:
        """Remove all noted trees, when there is no journal that names them."""
        for name, identities in self._noted().items():
            self._discard(name, identities, None)

    def discard_named_tree(self, name: str, identity: int | None = None, *, made_as: str | None = None) -> None:
        """Remove the tree of this name if it has this identity or a noted one.

        `made_as` is its name when it was made. A directory that another user put in its place stays.
        """
        self._discard(name, self._noted().get(made_as or name, set()), identity)

    def _discard(self, name: str, noted: set[int], identity: int | None) -> None:
        found = trees.identity_of(self.parent_fd, name)
        if found is None:
            return
        unknown = not noted and identity is None  # made by an earlier version, which noted no identities
        if found in noted or found == identity or (unknown and proof.is_private(self.parent_fd, name)):
            trees.remove(self.parent_fd, name)
            return
        try:
            os.rmdir(name, dir_fd=self.parent_fd)  # made by a process that died before it noted the identity
        except OSError:
            log.warning("%r is not removed: %s", name, self._replaced(name))

    def discard_trees(self) -> None:
        """Remove all trees of this control directory; a campaign has many.

        If one cannot be removed, the others are. Raises the first OSError.
        """
        noted = self._noted()
        all_noted = set().union(*noted.values())
        journal = self.journal()
        identity = journal.tree if journal is not None else None
        errors: list[OSError] = []
        for name in os.listdir(self.parent_fd):
            if name.startswith(f"{self.name}.") and STAGING_NAME.fullmatch(name):
                try:
                    # A process that renames a tree to remove it may die in between: the tree has another name then.
                    known = noted.get(name) or all_noted & {trees.identity_of(self.parent_fd, name)}
                    self._discard(name, known, identity)
                except OSError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def remove(self, *, alone: bool = False) -> None:
        """Remove the control directory, the last step of every fork. The tree must be removed or published.

        `alone`: it should hold a lock and a journal only, because `begin` emptied it. If it holds more, that is removed
        too, which takes longer. A control directory that is gone, or replaced by that of another process, is not an
        error. Raises NotOurs if it holds a file that no control directory has, and OSError.
        """
        if self.retired is None:
            if not self.is_current():
                return
            names = [_JOURNAL, LOCK] if alone else self._known_names()
            self._discard_snapshots(names)
            if self.clear(names):
                return
            if alone:
                self._known_names()
        away = self.retire()
        if away is not None:
            self._remove_as(away)

    def remove_taken(self, name: str) -> None:
        """As `remove`, for a control directory that was taken from its holder by a rename to `name`."""
        self._known_names()
        self._remove_as(name)

    def _remove_as(self, name: str) -> None:
        found = trees.identity_of(self.parent_fd, name)
        if found is not None and found == syscalls.fstat(self.fd).st_ino:
            trees.remove(self.parent_fd, name)

    def _known_names(self) -> list[str]:
        """The names in the directory. Raises NotOurs if one is not a name of staging: it is another directory."""
        names = os.listdir(self.fd)
        for name in names:
            if not is_known(name):
                raise NotOurs(proof.path_of(self.fd), f"it holds {name!r}, which is not a file of forkvm")
        return names
