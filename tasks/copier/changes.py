"""Whether the source was changed after its entries were cloned.

A file that was compared with the walk when it had been cloned was the same from the one moment to the other. So where
all of that came after the walk, the fork is the source as it was when the walk ended, whatever happens to it later.
What was cloned while the walk went on is compared once more: it may have changed before later entries were walked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from tasks.copier.errors import Code, ForkError, from_source
from tasks.copier.manifest import Span
from tasks.copier.plan import Plan
from tasks.copier.selection import Selection
from tasks.copier.walk import Block, Kind, Walk, join
from tasks.copier.work import Work, changed

#: Forks of at most so many entries are compared as a whole once more: they are the source as it is when they are
#: published. That costs some 3 us a file.
MOST_FILES = 10_000


def refuse_changes(work: Work, plan: Plan, touched: Iterable[str], early: Iterable[Span] = ()) -> None:
    """Raise ForkError source_changed when the source is not what the walk saw.

    `touched` are directories whose times have moved since, `early` the parts of the manifest that were cloned while
    the walk went on.
    """
    for span in [None] if plan.entries <= MOST_FILES else early:
        for block in work.blocks(plan.top.dev, span=span):
            refuse_changed_files(work, block)
    _refuse_changed_directories(work, plan, set(touched))


def refuse_changed_files(work: Work, block: Block) -> None:
    """Raise ForkError source_changed when one of the files and symlinks of `block` is not what the walk saw."""
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
