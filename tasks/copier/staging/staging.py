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
import logging
import os
import re
import secrets
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
from tasks.copier.staging.journal import Journal
from tasks.copier.staging.parts import Parts
from tasks.copier.staging.proof import NotOurs

log = logging.getLogger(__name__)

_JOURNAL = "journal"
#: One line of the notes: which directory a tree is.
_NOTED_TREE = re.compile(rb"^tree (\.[0-9a-f]{8}) (\d{1,39})$", re.MULTILINE)
#: A snapshot that is to become a tree, in the control directory (of a campaign's trees: with their names behind it).
SNAPSHOT = "snapshot"


class Staging(Parts):
    """The staging of one fork, open."""

    # -- the journal

    def journal(self) -> Journal | None:
        """The journal, or None when the process that made the staging died before it had written one whole.

        Raises NotOurs for the journal of another job.
        """
        try:
            journal = Journal.from_bytes(self.read_file(_JOURNAL))
        except FileNotFoundError:
            return None
        if journal is not None and control_name(journal.job_id) != self.name:
            raise NotOurs(proof.path_of(self.fd), "its journal is another fork's")
        return journal

    def own_journal(self) -> Journal | None:
        """As `journal`, and raises NotOurs too for a copy that somebody made of a control directory."""
        journal = self.journal()
        if journal is not None and journal.control != os.fstat(self.fd).st_ino:
            raise NotOurs(proof.path_of(self.fd), "it is a copy of a staging directory")
        return journal

    def write_journal(self, journal: Journal, *, sync: bool = False) -> None:
        """Replace the journal, in one step; `sync`: and have it on the disk."""
        self.write_file(_JOURNAL, journal.to_bytes(), sync=sync)

    def begin(self, spec: dict[str, Any], earlier: Journal | None) -> Journal:
        """Write the journal of a new attempt; what an earlier one left in the staging goes."""
        if earlier is not None:
            # Counted first: what kills its process here, too, must come to an end.
            self.write_journal(replace(earlier, tries=earlier.tries + 1))
            self.discard_all_of(earlier)
        else:
            self.discard_noted_trees()  # of a journal that was lost
        names = self._known_names()
        self._discard_snapshots(names)
        for name in names:
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
        name = self.tree_name(journal)
        fd = self.make_named_tree(name)
        try:
            self.note_trees({name: trees.identity(fd)})
        except BaseException:
            os.close(fd)
            raise
        return fd

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
        fd = proof.open_directory(self.parent_fd, name)
        try:
            if os.listdir(fd):
                raise self._replaced(name)
            drop_inherited_acls(fd)
            os.fchmod(fd, 0o700)  # without the bits that a set-gid parent adds
        except BaseException:
            os.close(fd)
            raise
        return fd

    def note_trees(self, identities: Mapping[str, int]) -> None:
        """Write down which directories the trees of these names are, before anything is put into them.

        What stands under such a name later and is another one was put there by somebody else.
        """
        lines = [f"tree {name.removeprefix(self.name)} {identity}\n" for name, identity in identities.items()]
        self.note("".join(lines).encode("ascii"))

    def _noted(self) -> dict[str, set[int]]:
        """The identities that were written down of each tree, by its name."""
        noted: dict[str, set[int]] = {}
        for attempt, identity in _NOTED_TREE.findall(self.notes()):
            noted.setdefault(self.name + attempt.decode("ascii"), set()).add(int(identity))
        return noted

    def _replaced(self, name: str) -> NotOurs:
        return NotOurs(proof.path_of(self.parent_fd, name), "it is not the directory that this fork was made in")

    def exchange_tree(self, snapshot: str, name: str) -> None:
        """Put the finished `snapshot` of the control directory into the place of the empty tree `name`.

        It was made there, since nobody else can reach it there. Raises FileNotFoundError when the tree was taken over
        (there is no moment without one), and NotOurs when somebody put another directory in its place.
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
        """Remove the snapshots that did not come to be a tree, and take them from the `names` of the directory."""
        for name in [name for name in names if name.startswith(SNAPSHOT)]:
            trees.remove(self.fd, name)
            names.remove(name)

    def open_tree(self, journal: Journal) -> int:
        """Open the tree; the caller closes the descriptor. Raises FileNotFoundError, and NotOurs for another one."""
        name = self.tree_name(journal)
        fd = proof.open_plain_directory(self.parent_fd, name)
        if trees.identity(fd) not in {journal.tree, *self._noted().get(name, ())}:
            os.close(fd)
            raise self._replaced(name)
        return fd

    def publish(self, journal: Journal, destination: str, *, sync: bool) -> None:
        """Rename the tree to `destination` (a name in the same parent); `sync`: and have that on the disk.

        Raises FileExistsError, FileNotFoundError, NotOurs, OSError; then nothing of ours stands at `destination`.
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
        """Rename the tree of this name and identity to `destination`, and nothing else. Raises as `publish` does.

        A user who may write in the parent can put another directory in the tree's place, also between two calls: so
        what was renamed is looked at once more, and put back if it is not the tree. Where that look fails, the one
        before the rename decides: the fork is published, and must not be reported as failed.
        """
        standing = trees.identity_of(self.parent_fd, tree)
        if identity is not None and standing not in (identity, None):
            raise self._replaced(tree)
        syscalls.rename_noreplace(self.parent_fd, tree, self.parent_fd, destination)
        published = standing
        with suppress(OSError):
            published = trees.identity_of(self.parent_fd, destination)
        if identity is not None and published not in (identity, None):  # None: moved or removed since
            with suppress(OSError):
                syscalls.rename_noreplace(self.parent_fd, destination, self.parent_fd, tree)
            raise self._replaced(tree)

    def is_published(self, journal: Journal, destination: str) -> bool:
        """Whether what stands at `destination` is the tree whose identity the journal recorded."""
        return journal.tree is not None and trees.identity_of(self.parent_fd, destination) == journal.tree

    def discard_tree(self, journal: Journal) -> None:
        """Remove the attempt's tree, if it stands."""
        self.discard_named_tree(self.tree_name(journal), journal.tree)

    def discard_all_of(self, journal: Journal) -> None:
        """Remove all trees of an earlier attempt, which may have been a campaign's."""
        if journal.is_campaign:
            self.discard_trees()
        else:
            self.discard_tree(journal)

    def discard_noted_trees(self) -> None:
        """Remove all trees that were written down, for a control directory whose journal does not name them."""
        for name, identities in self._noted().items():
            self._discard(name, identities, None)

    def discard_named_tree(self, name: str, identity: int | None = None, *, made_as: str | None = None) -> None:
        """Remove the tree of this name if it is the directory of this identity, or the one that was written down.

        `made_as` is the name that it had when it was made. What somebody else put in its place stays.
        """
        self._discard(name, self._noted().get(made_as or name, set()), identity)

    def _discard(self, name: str, noted: set[int], identity: int | None) -> None:
        standing = trees.identity_of(self.parent_fd, name)
        if standing is None:
            return
        unknown = not noted and identity is None  # made by an earlier version, which noted nothing
        if standing in noted or standing == identity or (unknown and proof.is_private(self.parent_fd, name)):
            trees.remove(self.parent_fd, name)
            return
        try:
            os.rmdir(name, dir_fd=self.parent_fd)  # made by a process that died before it wrote down which it is
        except OSError:
            log.warning("%r is left as it is: %s", name, self._replaced(name))

    def discard_trees(self) -> None:
        """Remove all trees that belong to this control directory; a campaign has many.

        All that can be removed are, also where one cannot. Raises OSError: the first one met.
        """
        noted = self._noted()
        noted_at_all = set().union(*noted.values())
        journal = self.journal()
        identity = journal.tree if journal is not None else None
        errors: list[OSError] = []
        for name in os.listdir(self.parent_fd):
            if name.startswith(f"{self.name}.") and STAGING_NAME.fullmatch(name):
                try:
                    # A process that renames a tree to remove it can die in between: the tree has another name then.
                    known = noted.get(name) or noted_at_all & {trees.identity_of(self.parent_fd, name)}
                    self._discard(name, known, identity)
                except OSError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def remove(self) -> None:
        """Remove the control directory, the last step of every fork. The tree must be gone or published.

        One that is gone, or that another process has in its place, is no error. Raises NotOurs when it holds what no
        control directory does, and OSError.
        """
        if self.retired is None:
            if not self.is_current():
                return
            names = self._known_names()
            self._discard_snapshots(names)
            if self.clear(names):
                return
        away = self.retire()
        if away is not None:
            self._remove_as(away)

    def remove_taken(self, name: str) -> None:
        """As `remove`, of a control directory that was taken from its holder by a rename to `name`."""
        self._known_names()
        self._remove_as(name)

    def _remove_as(self, name: str) -> None:
        standing = trees.identity_of(self.parent_fd, name)
        if standing is not None and standing == os.fstat(self.fd).st_ino:
            trees.remove(self.parent_fd, name)

    def _known_names(self) -> list[str]:
        """The names in the directory. Raises NotOurs when one is not of staging: somebody moved a directory here."""
        names = os.listdir(self.fd)
        for name in names:
            if not is_known(name):
                raise NotOurs(proof.path_of(self.fd), f"it holds {name!r}, which is not of forkvm")
        return names
