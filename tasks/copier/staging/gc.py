"""Removing the staging that dead processes left, and never that of a live fork.

Other users may write beside the staging, so each entry is judged on its own. Staging that is not proved to be this
worker's own is kept and reported; if one cannot be read or removed, this is reported and the search goes on.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from tasks.copier.errors import ForkError, errno_name, from_oserror
from tasks.copier.kernel import syscalls, trees
from tasks.copier.source.selection import STAGING_NAME
from tasks.copier.staging.control_directory import Held, sign_of_life
from tasks.copier.staging.files import holds_only_staging
from tasks.copier.staging.journal import Journal
from tasks.copier.staging.proof import NotOurs, open_directory
from tasks.copier.staging.shared_filesystems import is_held_elsewhere, remove_dead_markers
from tasks.copier.staging.staging import Staging

#: A control directory without a journal is kept for this many seconds: its planner may be about to write one.
_FRESH_SECONDS = 60.0

#: Why a staging was kept that should be checked again soon.
YOUNG = "a process worked in it not long ago"

#: Whether the queue will still deliver a fork, by its id. None if that cannot be found out.
IsLive = Callable[[str], bool | None]

#: Errors that one bad entry may cause. Others, such as a Redis that does not answer, end the search.
_OF_ONE_ENTRY = (OSError, ForkError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_EXHAUSTED = (RecursionError, MemoryError)


@dataclass(frozen=True)
class Finding:
    """What `collect` found at one path. `fork_id` is empty if no journal names the fork.

    `kept`: it must not be removed, because it is in use or not proved to be the worker's own. `failed`: it could not be
    searched, read or removed.
    """

    path: str
    fork_id: str
    verdict: Literal["removed", "kept", "failed"]
    reason: str


@dataclass(frozen=True)
class _Search:
    """How entries are judged; see `collect`."""

    is_live: IsLive
    silent: float


def collect(directory: str, is_live: IsLive, silent: float = 0.0) -> Iterator[Finding]:
    """Search `directory` and all below it for staging, remove what is dead, and yield each finding.

    The staging of a local fork is dead if no process holds it. That of a queue's fork is dead if also `is_live` returns
    False and nothing was done in it for `silent` seconds, because it may belong to another queue than the one that is
    asked. Raises ForkError if `directory` cannot be opened.
    """
    try:
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise from_oserror(error, "opening the directory", directory) from None
    try:
        pending = [""]
        while pending:
            yield from _search(top, directory, pending.pop(), pending, _Search(is_live, silent))
    finally:
        os.close(top)


def silent_stagings(fd: int, silent: float) -> int:
    """The number of stagings directly in the open directory in which nothing was done for `silent` seconds.

    It takes no lock and asks no queue: `collect` finds out which of them are dead. Staging of other users is not
    counted, because `collect` keeps it. Raises OSError.
    """
    count = 0
    for name in _controls(fd):
        with suppress(OSError):  # removed meanwhile, not readable, or not a directory
            control = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                is_silent = time.time() - sign_of_life(control) / 1000 >= silent
                count += is_silent and os.fstat(control).st_uid == os.geteuid()
            finally:
                os.close(control)
    return count


def count_stagings(fd: int) -> int:
    """The number of stagings directly in the open directory, in use or not. Raises OSError."""
    return len(_controls(fd))


def _controls(fd: int) -> list[str]:
    """The names of control directories in `fd`. A second dot is in the names of trees only. Raises OSError."""
    return [name for name in os.listdir(fd) if STAGING_NAME.fullmatch(name) and "." not in name.removeprefix(".")]


def _search(top: int, directory: str, path: str, pending: list[str], search: _Search) -> Iterator[Finding]:
    """Search one directory below `top`; the directories in it are added to `pending`."""
    full = os.path.join(directory, path)
    try:
        fd = trees.open_below(top, path)
    except (FileNotFoundError, NotADirectoryError):
        return  # removed or replaced meanwhile
    except OSError as error:
        yield Finding(full, "", "failed", f"it was not searched: {_text_of(error)}")
        return
    try:
        try:
            below, stagings = _list(fd)
        except OSError as error:
            yield Finding(full, "", "failed", f"it was not searched: {_text_of(error)}")
            return
        pending += [f"{path}/{name}" if path else name for name in below]
        # Control directories before trees: a tree goes with its control directory.
        for name in sorted(stagings, key=len):
            finding = _judge(fd, name, os.path.join(full, name), search)
            if finding is not None:
                yield finding
        for name in remove_dead_markers(fd):
            yield Finding(os.path.join(full, name), "", "removed", "its worker ended")
    finally:
        os.close(fd)


def _list(fd: int) -> tuple[list[str], list[str]]:
    """The entries of `fd`: (directories to search, names of staging)."""
    below: list[str] = []
    stagings: list[str] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if STAGING_NAME.fullmatch(entry.name):
                stagings.append(entry.name)
            else:
                with suppress(OSError):  # without d_type (readdir(3)), is_dir asks for each entry
                    if entry.is_dir(follow_symlinks=False):
                        below.append(entry.name)
    return below, stagings


def _judge(parent_fd: int, name: str, path: str, search: _Search) -> Finding | None:
    """Judge one entry. An error of it is its finding."""
    try:
        return _visit(parent_fd, name, path, search)
    except FileNotFoundError:
        return None  # removed meanwhile
    except NotOurs as error:
        return Finding(path, "", "kept", error.what)
    except ForkError as error:
        return Finding(path, "", "kept", error.message)
    except OSError as error:
        return Finding(path, "", "failed", f"it was not removed: {_text_of(error)}")
    except (*_OF_ONE_ENTRY, *_EXHAUSTED) as error:
        return Finding(path, "", "kept", f"its content is not from forkvm: {type(error).__name__}")


def _text_of(error: OSError) -> str:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{error.strerror} ({errno_name(error.errno or 0)})"


def _visit(parent_fd: int, name: str, path: str, search: _Search) -> Finding | None:
    control, _, attempt = name.removeprefix(".").partition(".")
    try:
        with Staging.hold(parent_fd, f".{control}", 0, alone=True) as staging:
            if staging is None:
                return _visit_orphan(parent_fd, name, path) if attempt else None
            if not attempt and is_held_elsewhere(staging):
                return Finding(path, "", "kept", "a process that does not share locks with this host works in it")
            return _visit_tree(staging, name, path, attempt) if attempt else _visit_control(staging, path, search)
    except Held:
        return None if attempt else Finding(path, "", "kept", "a process works in it")


def _visit_orphan(parent_fd: int, name: str, path: str) -> Finding:
    """Judge a tree without a control directory, which would prove that the tree is ours.

    It is an incomplete tree of a dead process, or a control directory that was being removed. But a user who may rename
    entries of `parent_fd` could have put any private directory of this user there.
    """
    fd = open_directory(parent_fd, name)
    try:
        if not _is_guarded(parent_fd) and not holds_only_staging(fd):
            return Finding(path, "", "kept", "other users may rename directories here, and no journal proves its owner")
    finally:
        os.close(fd)
    trees.remove(parent_fd, name)
    return Finding(path, "", "removed", "left by an earlier attempt")


def _is_guarded(fd: int) -> bool:
    """Whether only root and this user may rename this user's entries of `fd` (its mode includes its ACL's mask)."""
    status = os.fstat(fd)
    is_open = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return status.st_uid in (0, os.geteuid()) and not is_open


def _visit_tree(staging: Staging, name: str, path: str, attempt: str) -> Finding | None:
    """Judge a tree that may belong to another attempt than the one in its control directory's journal."""
    journal = staging.journal()
    if journal is None or journal.is_campaign or journal.attempt == attempt:
        return None  # it is removed with its control directory
    staging.discard_named_tree(name)
    if trees.identity_of(staging.parent_fd, name) is not None:
        return Finding(path, journal.job_id, "kept", "it is not the directory that its fork was made in")
    return Finding(path, journal.job_id, "removed", "left by an earlier attempt")


def _visit_control(staging: Staging, path: str, search: _Search) -> Finding:
    journal = staging.journal()
    if journal is None:
        if time.time() - syscalls.fstat(staging.fd).st_mtime < _FRESH_SECONDS:
            return Finding(path, "", "kept", "it was made a moment ago")
        staging.discard_trees()
        staging.remove()
        return Finding(path, "", "removed", "its process died before it wrote a journal")
    fork_id = journal.job_id
    if journal.control != syscalls.fstat(staging.fd).st_ino:
        return Finding(path, fork_id, "kept", "it is a copy of a staging directory")
    return _remove_if_dead(staging, journal, path, fork_id, search)


def _remove_if_dead(staging: Staging, journal: Journal, path: str, fork_id: str, search: _Search) -> Finding:
    if journal.spec.get("owner") != "local":
        live = search.is_live(fork_id)
        if live is None:
            return Finding(path, fork_id, "kept", "its queue cannot be asked whether it is still needed")
        if live:
            return Finding(path, fork_id, "kept", "its queue will still deliver it")
        if time.time() - sign_of_life(staging.fd) / 1000 < search.silent:
            return Finding(path, fork_id, "kept", YOUNG)
    staging.discard_trees()
    staging.remove()
    return Finding(path, fork_id, "removed", "its process died")
