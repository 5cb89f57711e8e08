"""Removing the staging that a dead machine left, and never that of a live fork."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from tasks.copier.control import Held, sign_of_life
from tasks.copier.errors import ForkError, from_oserror
from tasks.copier.journal import Journal
from tasks.copier.kernel import trees
from tasks.copier.selection import STAGING_NAME
from tasks.copier.staging import Staging

#: A control directory without a journal is left alone for so long, in seconds: its planner may be about to write one.
_FRESH_SECONDS = 60.0

#: Why a staging was kept that is to be looked at again soon.
YOUNG = "it was at work not long ago"

#: Whether a fork that a queue owns is still to be done: None where nobody can tell.
IsLive = Callable[[str], bool | None]


@dataclass(frozen=True)
class Finding:
    """What `collect` met at one path. `fork_id` is empty where no journal tells it."""

    path: str
    fork_id: str
    verdict: Literal["removed", "kept"]
    reason: str


def collect(directory: str, is_live: IsLive, silent: float = 0.0) -> Iterator[Finding]:
    """Search `directory` and all below it for staging, remove what is dead, and yield each finding.

    Dead is what no process holds, when its fork was a local one, or when `is_live` denies it and for `silent` seconds
    nothing was done in it: the queue that owns it may be another than the one that is asked. Raises ForkError.
    """
    try:
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise from_oserror(error, "opening it", directory) from None
    try:
        pending = [""]
        while pending:
            path = pending.pop()
            try:
                fd = trees.open_below(top, path)
            except OSError:
                continue  # removed meanwhile, or not ours to read
            try:
                below, stagings = _list(fd)
                pending += [f"{path}/{name}" if path else name for name in below]
                # Control directories before trees: a tree goes with its control directory.
                for name in sorted(stagings, key=len):
                    finding = _visit(fd, name, os.path.join(directory, path, name), is_live, silent)
                    if finding is not None:
                        yield finding
            finally:
                os.close(fd)
    finally:
        os.close(top)


def silent_stagings(fd: int, silent: float) -> int:
    """How many forks have staging right in the open directory in which nothing was done for `silent` seconds.

    A look, which holds and asks nothing: `collect` says which of them are dead. Raises OSError.
    """
    count = 0
    for name in _list(fd)[1]:
        if "." in name.removeprefix("."):
            continue  # a tree
        with suppress(OSError):  # removed meanwhile, or not ours to read
            control = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                count += time.time() - sign_of_life(control) / 1000 >= silent
            finally:
                os.close(control)
    return count


def _list(fd: int) -> tuple[list[str], list[str]]:
    """The directories in `fd`: (those to search, those that are staging)."""
    below: list[str] = []
    stagings: list[str] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                (stagings if STAGING_NAME.fullmatch(entry.name) else below).append(entry.name)
    return below, stagings


def _visit(parent_fd: int, name: str, path: str, is_live: IsLive, silent: float) -> Finding | None:
    control, _, attempt = name.removeprefix(".").partition(".")
    try:
        with Staging.hold(parent_fd, f".{control}", 0, alone=True) as staging:
            if attempt:
                return _visit_tree(parent_fd, name, path, attempt, staging)
            return None if staging is None else _visit_control(staging, path, is_live, silent)
    except Held:
        return None if attempt else Finding(path, "", "kept", "a process is working on it")
    except ForkError as error:  # not proved ours
        return None if attempt else Finding(path, "", "kept", error.message)


def _visit_tree(parent_fd: int, name: str, path: str, attempt: str, staging: Staging | None) -> Finding | None:
    """A tree without its control directory, or of another attempt than the one its control directory names."""
    journal = staging.journal() if staging is not None else None
    if staging is not None and (journal is None or journal.is_campaign or journal.attempt == attempt):
        return None  # a campaign's goes with its control directory
    if not os.access(name, os.F_OK, dir_fd=parent_fd, follow_symlinks=False):
        return None  # it went with its control directory
    trees.remove(parent_fd, name)
    return Finding(path, journal.job_id if journal else "", "removed", "left by an earlier attempt")


def _visit_control(staging: Staging, path: str, is_live: IsLive, silent: float) -> Finding:
    journal = staging.journal()
    if journal is None:
        if time.time() - os.fstat(staging.fd).st_mtime < _FRESH_SECONDS:
            return Finding(path, "", "kept", "it was made a moment ago")
        staging.remove()
        return Finding(path, "", "removed", "its process died before it wrote a journal")
    fork_id = journal.job_id
    if journal.control != os.fstat(staging.fd).st_ino:
        return Finding(path, fork_id, "kept", "it is a copy that someone made of a staging directory")
    return _reap(staging, journal, path, fork_id, is_live, silent)


def _reap(staging: Staging, journal: Journal, path: str, fork_id: str, is_live: IsLive, silent: float) -> Finding:
    if journal.spec["owner"] == "queue":
        live = is_live(fork_id)
        if live is None:
            return Finding(path, fork_id, "kept", "the queue that owns it cannot be asked")
        if live:
            return Finding(path, fork_id, "kept", "the queue has still to deliver it")
        if time.time() - sign_of_life(staging.fd) / 1000 < silent:
            return Finding(path, fork_id, "kept", YOUNG)
    staging.discard_trees()
    staging.remove()
    return Finding(path, fork_id, "removed", "its process died")
