"""Taking a fork from holders that are paused: they hold the fence's lock, so this is done without it, by renames.

The rename of the tree decides. When it is done, no paused holder can publish the tree any more, and what one writes
goes into files that are nobody's. Where no tree is made yet, the rename of the control directory decides:
`Staging.make_tree` makes the tree and then looks whether its control directory stands, and here it is the other way
round, so one of both sees the other.
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
    """A fork that was taken: its journal, where its holder had written one."""

    journal: Journal | None


def take_over(parent_fd: int, fork_id: str, heartbeat: int | None) -> Taken | None:
    """Take a fork from holders that give no sign of life, or None where that cannot be done.

    `heartbeat` is the last sign of life that was seen; who gave another one since, keeps the fork. A fork that was
    published is not taken; see `published`.
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
            # Its holder woke, made the tree and published it, all of it between two lines of this function.
            syscalls.rename_noreplace(parent_fd, control, parent_fd, staging.name)
            return None
        journal = staging.journal()
        if journal is not None:
            for name in away:
                with suppress(OSError):  # a tree of no attempt: gc removes what is left of it
                    staging.discard_named_tree(name, journal.tree, made_as=staging.tree_name(journal))
        with suppress(OSError, ForkError):
            staging.remove_taken(control)
    return Taken(journal)


@contextmanager
def published(parent_fd: int, fork_id: str, destination: str) -> Iterator[Journal | None]:
    """The journal of a fork that stands at `destination` (a name) although its staging does, too; else None.

    Raises ForkError for staging that is not ours, or damaged.

    Its holder died or was paused before it could tell. From the rename on nobody changes anything of the fork, so
    anyone may tell its result; at the end the staging is removed.
    """
    with Staging.peek(parent_fd, fork_id) as staging:
        journal = staging.own_journal() if staging is not None else None
        if staging is None or journal is None or not _stands(staging, journal, destination):
            yield None
            return
        if ForkSpec.from_data(journal.spec).options.durability == "sync":
            os.fsync(parent_fd)
        yield journal
        with suppress(OSError, ForkError):  # gc removes what is left
            staging.remove()


def _stands(staging: Staging, journal: Journal, destination: str) -> bool:
    return journal.phase is Phase.PUBLISHING and staging.is_published(journal, destination)


def _take_tree(staging: Staging, away: list[str]) -> bool:
    """Give the tree of the attempt a name that no attempt has, which is added to `away`; whether there was one."""
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
