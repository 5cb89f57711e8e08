"""Taking a fork from paused processes. They hold the lock, so this works without it, by renames.

The rename of the tree decides. After it, a paused process cannot publish the tree, and writes only into files that
belong to no fork. If there is no tree yet, the rename of the control directory decides: `Staging.make_tree` makes the
tree and then checks its control directory; here the control directory is renamed and then the tree is checked. So at
least one of the two processes sees the other.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tasks.copier.errors import ForkError
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.kernel import syscalls
from tasks.copier.staging.journal import Journal, Phase
from tasks.copier.staging.staging import Staging


@dataclass(frozen=True)
class Taken:
    """A fork that was taken: its journal, if its holder had written one."""

    journal: Journal | None


def take_over(parent_fd: int, fork_id: str, heartbeat: int | None) -> Taken | None:
    """Take a fork from processes that give no sign of life. Returns None if that is not possible.

    `heartbeat` is the last heartbeat that was seen; a process with a newer one keeps the fork. A published fork is not
    taken; see `published`. Raises ForkError and OSError.
    """
    with Staging.peek(parent_fd, fork_id) as staging:
        if (
            staging is None
            or heartbeat not in (staging.heartbeat(), staging.holder_heartbeat())
            or not staging.is_current()
        ):
            return None
        control = _unused_name(staging)
        away: list[str] = []
        try:
            if not _take_tree(staging, away) and _is_publishing(staging):
                return None
            os.rename(staging.name, control, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
        except FileNotFoundError:
            return None
        if not _take_tree(staging, away) and not away and _is_publishing(staging):
            # Its holder resumed, made the tree and published it, all between two lines of this function.
            syscalls.rename_noreplace(parent_fd, control, parent_fd, staging.name)
            return None
        journal = staging.journal()
        if journal is not None:
            for name in away:
                with suppress(OSError):  # it has the name of no attempt: `gc` removes what is left of it
                    staging.discard_named_tree(name, journal.tree, made_as=staging.tree_name(journal))
        with suppress(OSError, ForkError):
            staging.remove_taken(control)
    return Taken(journal)


@contextmanager
def published(parent_fd: int, fork_id: str, destination: str) -> Iterator[Journal | None]:
    """The journal of a fork that is published at `destination` (a name) and still has its staging; else None.

    Its holder died or was paused before it stored the result. No process changes a published fork, so any process may
    store its result. The staging is removed when the context ends.

    Raises ForkError for a staging that is not the worker's own or is damaged, and OSError.
    """
    with Staging.peek(parent_fd, fork_id) as staging:
        journal = staging.own_journal() if staging is not None else None
        if staging is None or journal is None or not _is_published(staging, journal, destination):
            yield None
            return
        if ForkSpec.from_data(journal.spec).options.durability == "sync":
            os.fsync(parent_fd)
        yield journal
        with suppress(OSError, ForkError):  # `gc` removes what is left
            staging.remove()


def _is_published(staging: Staging, journal: Journal, destination: str) -> bool:
    return journal.phase is Phase.PUBLISHING and staging.is_published(journal, destination)


def _take_tree(staging: Staging, away: list[str]) -> bool:
    """Rename the attempt's tree to a name of no attempt, and add that to `away`. Returns whether there was one."""
    journal = staging.journal()
    if journal is None:
        return False
    name = _unused_name(staging)
    parent_fd = staging.parent_fd
    try:
        os.rename(staging.tree_name(journal), name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
    except FileNotFoundError:
        return False
    away.append(name)
    return True


def _is_publishing(staging: Staging) -> bool:
    journal = staging.journal()
    return journal is not None and journal.phase is Phase.PUBLISHING


def _unused_name(staging: Staging) -> str:
    return f"{staging.name}.{secrets.token_hex(4)}"
