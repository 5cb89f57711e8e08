"""Whether the source changed while it was cloned.

A file is compared with the walk after it is cloned; if it is the same, it did not change in between. So if all files
are cloned after the walk, the fork is the source as it was when the walk ended. A file that was cloned during the walk
is compared once more at the end: it may have changed before later entries were walked.

A directory is compared when its clone gets its metadata. Entries that a fork leaves out (a socket, a half-written
compressed file) come and go in the directories of a running guest; that is not a change of the source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from tasks.copier.errors import Code, ForkError, from_source
from tasks.copier.fork.plan import Plan
from tasks.copier.source.manifest import Span
from tasks.copier.source.selection import Selection
from tasks.copier.source.walk import Block, Entry, Kind, Walk, join
from tasks.copier.staging.workspace import Workspace, changed, on_this_host

#: A source of at most this many entries is compared as a whole at the end, so the fork equals the source as it is when
#: the fork is published. This takes about 3 us a file.
MOST_FILES = 10_000

#: Directories in which entries came or went since the walk, by relative path: as they were last seen.
Touched = dict[str, Entry]


def refuse_changes(work: Workspace, plan: Plan, touched: Touched, early: Iterable[Span] = ()) -> None:
    """Raise ForkError source_changed if the source is not what the walk saw.

    `touched` are the directories in which entries came or went so far, `early` the parts of the manifest that were
    cloned during the walk.
    """
    for span in [None] if plan.entries <= MOST_FILES else early:
        for block in work.blocks(plan.top.dev, span=span):
            with work.source_directory(block.path) as src_fd:
                refuse_changed_files(work, block, src_fd)
    if plan.entries <= MOST_FILES:
        _refuse_changed_metadata(work, plan, touched)
    _refuse_changed_entries(work, plan, touched)


def refuse_changed_files(work: Workspace, block: Block, src_fd: int) -> None:
    """Raise ForkError source_changed if a file or symlink of `block` is not what the walk saw.

    `src_fd` is the directory of the block, open.
    """
    name = ""
    try:
        for entry in block.entries:
            name = entry.name
            if not entry.is_still(os.stat(name, dir_fd=src_fd, follow_symlinks=False)):
                raise changed(join(work.ends.source, join(block.path, name)))
    except OSError as error:
        path = join(work.ends.source, join(block.path, name))
        raise from_source(error, "checking it again", path) from None


def directory_now(seen: Entry, now: os.stat_result, source: str) -> Entry:
    """The directory `seen` with the times of its present status `now`; `seen` itself if it is unchanged.

    An entry that comes or goes sets mtime and ctime of its directory to the same time. A new mode, owner, attribute or
    ACL sets only ctime, and utimensat(2) sets an mtime that differs from it (inode_set_ctime_current in the kernel's
    fs/). Raises ForkError source_changed for such a change; `source` is the directory's absolute path.
    """
    if (now.st_dev, now.st_ino) != (seen.dev, seen.ino):
        raise changed(source)
    is_same = (now.st_mode, now.st_uid, now.st_gid) == (seen.mode, seen.uid, seen.gid)
    if is_same and (now.st_mtime_ns, now.st_ctime_ns) == (seen.mtime, seen.ctime):
        return seen
    has_new_entries = seen.mtime != now.st_mtime_ns == now.st_ctime_ns
    if not has_new_entries or not is_same:
        raise ForkError(Code.SOURCE_CHANGED, "its metadata changed while the source was cloned", source)
    return seen._replace(mtime=now.st_mtime_ns, ctime=now.st_ctime_ns)


def _refuse_changed_metadata(work: Workspace, plan: Plan, touched: Touched) -> None:
    """Raise ForkError source_changed if a directory changed after its clone got its metadata."""
    top = on_this_host(plan.top, plan.top.dev, work.source_dev)
    _check_again(touched, "", top, os.fstat(work.ends.source_fd), work.ends.source)
    for block in work.blocks(plan.top.dev, closing=True):
        directories = [entry for entry in block.entries if entry.kind == Kind.DIRECTORY]
        if not directories:
            continue
        source = ""
        with work.source_directory(block.path) as fd:
            try:
                for entry in directories:
                    path = join(block.path, entry.name)
                    source = join(work.ends.source, path)
                    now = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
                    _check_again(touched, path, entry, now, source)
            except OSError as error:
                raise from_source(error, "checking it again", source) from None


def _check_again(touched: Touched, path: str, entry: Entry, now: os.stat_result, source: str) -> None:
    seen = touched.get(path, entry)
    state = directory_now(seen, now, source)
    if state is not seen:
        touched[path] = state


def _refuse_changed_entries(work: Workspace, plan: Plan, touched: Touched) -> None:
    """List the touched directories again and compare names and inodes. Entries that are left out may come and go."""
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
    """Checks nothing: the lists are short."""
