"""Whether the source was changed after its entries were cloned."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tasks.copier.errors import Code, ForkError, from_source
from tasks.copier.plan import Plan
from tasks.copier.selection import Selection
from tasks.copier.walk import Block, Kind, Walk, join
from tasks.copier.work import Work, changed

#: Forks of more files are not looked through once more at the end, which costs 2 us a file. Nothing torn can come of
#: that: each file was compared with the walk when it was cloned, so the fork is the source as the walk saw it.
MOST_FILES = 10_000


def refuse_changes(work: Work, plan: Plan, touched: Iterable[str]) -> None:
    """Raise ForkError source_changed when the source is not what the walk saw; `touched` are directories whose times
    have moved since."""
    if plan.entries <= MOST_FILES:
        for block in work.blocks(plan.top.dev):
            _refuse_changed_files(work, block)
    _refuse_changed_directories(work, plan, set(touched))


def _refuse_changed_files(work: Work, block: Block) -> None:
    fd = work.open_source(block.path)
    path = ""
    try:
        for entry in block.entries:
            path = join(work.ends.source, join(block.path, entry.name))
            if not entry.is_still(os.stat(entry.name, dir_fd=fd, follow_symlinks=False)):
                raise changed(path)
    except OSError as error:
        raise from_source(error, "looking at it once more", path) from None
    finally:
        os.close(fd)


def _refuse_changed_directories(work: Work, plan: Plan, touched: set[str]) -> None:
    """List the touched directories again, and compare by name and inode.

    A directory's times alone prove nothing: what is left out (a socket, a half-written compression) comes and goes
    in the directory of a running guest.
    """
    if not touched:
        return
    before: dict[str, set[tuple[str, int]]] = {path: set() for path in touched}
    for closing in (False, True):
        for block in work.blocks(plan.top.dev, closing=closing):
            if block.path in touched:
                before[block.path] |= {(e.name, e.ino) for e in block.entries if e.kind != Kind.SKIP}
    selection = Selection(work.options.skip, work.options.exclude)
    walk = Walk(work.ends.source_fd, work.ends.source, selection, hardlinks=False, checkpoint=_go_on)
    for path in sorted(touched):
        try:
            now = {(e.name, e.ino) for block in walk.read(path) for e in block.entries if e.kind != Kind.SKIP}
        except ForkError as error:
            if error.code is Code.UNSUPPORTED_FILE_TYPE:  # a FIFO that was not there before
                raise changed(error.path) from None
            raise
        if now != before[path]:
            raise changed(join(work.ends.source, path))


def _go_on() -> None:
    """No look-up on the way: the lists are short."""
