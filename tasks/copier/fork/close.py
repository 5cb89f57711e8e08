"""Closing a fork: the steps that need the whole tree, and the check that every entry has a FileResult.

These are files that were copied in ranges, hard links, and the metadata of directories.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import ExitStack

from tasks.copier.clone.file import Cloner
from tasks.copier.clone.metadata import doing
from tasks.copier.clone.name_collisions import entry_lost, names_in
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.fork.plan import Chunk, Plan
from tasks.copier.fork.source_changes import Touched, directory_now, refuse_changes
from tasks.copier.metadata_losses import Losses
from tasks.copier.progress import Ticker
from tasks.copier.report import Fallback, FileResult, Method, RangeDone, Report, Totals, file_result, join_ranges
from tasks.copier.source import manifest
from tasks.copier.source.manifest import Span
from tasks.copier.source.walk import Block, Entry, Kind, file_type, join
from tasks.copier.staging.workspace import Workspace, changed, on_this_host

#: How the names begin that FUSE and NFS give to an unlinked file that is open.
_UNLINKED = (".fuse_hidden", ".nfs")
#: The entries that are made before a fork is closed.
_MADE_BEFORE = frozenset({Kind.FILE, Kind.SYMLINK, Kind.DIRECTORY})
#: How often a directory's metadata is applied again because entries come and go in its source.
_TRIES = 5


def close_tree(
    work: Workspace, plan: Plan, reports: Mapping[str, Report], cloner: Cloner, ticker: Ticker, *, replaces: bool
) -> Report:
    """Complete the tree after all chunks are done. Returns the report of closing itself.

    `reports` are those of the chunks, by their numbers, and of `plan`. `replaces`: an earlier closing may have left
    hard links, which are replaced. Raises ForkError, also unless each entry of the manifest has one FileResult.
    """
    ranges = [done for part in reports.values() for done in part.ranges]
    report = Report()
    replaced = [chunk for n, chunk in enumerate(plan.chunks) if reports[str(n)].replaced]
    refuse_lost_entries(work, plan, _directories(work, plan, replaced), _MADE_BEFORE)
    if ranges:
        fallback = next((part.totals.fallback for part in reports.values() if part.totals.fallback is not None), None)
        _complete_ranged_files(work, plan, ranges, cloner, report, fallback, ticker)
    linked_in: set[str] = set()
    for block in work.blocks(plan.top.dev, closing=True):
        if link_and_skip(work, block, report, ticker, replaces=replaces):
            linked_in.add(block.path)
    if replaces:
        refuse_lost_entries(work, plan, linked_in, _MADE_BEFORE | {Kind.HARDLINK})
    touched: Touched = {}
    for block in work.blocks(plan.top.dev, closing=True, backwards=True):
        complete_directories(work, block, cloner, report, touched, ticker)
    # Nobody could prove a tree with its final mode to be staging if this process lost it to another one, which has
    # ended the fork, and then died.
    if not work.staging.is_current():
        raise ForkError(Code.IO_ERROR, "another process took the fork over", work.ends.destination)
    top = on_this_host(plan.top, plan.top.dev, work.source_dev)
    complete_directory(work, "", top, cloner, report.totals, touched)
    early = [chunk.span for n, chunk in enumerate(plan.chunks) if reports[str(n)].during_walk]
    refuse_changes(work, plan, touched, early)
    refuse_unbalanced(work, plan, sum(part.totals.total for part in (*reports.values(), report)))
    return report


def refuse_unbalanced(work: Workspace, plan: Plan, results: int) -> None:
    """Raise ForkError if there is not one FileResult for each entry of the manifest."""
    if results != plan.entries:
        message = f"the source has {plan.entries} entries, and {results} results were recorded"
        raise ForkError(Code.IO_ERROR, message, work.ends.source)


def _complete_ranged_files(
    work: Workspace,
    plan: Plan,
    ranges: list[RangeDone],
    cloner: Cloner,
    report: Report,
    fallback: Fallback | None,
    ticker: Ticker,
) -> None:
    reason = "reflink=never" if work.options.reflink == "never" else None
    if fallback is not None:
        reason = fallback["reason"]
    results = {result["path"]: result for result in join_ranges(ranges, reason)}
    with open(work.staging.manifest(), "rb") as file:
        for offset in sorted({(chunk.offset, chunk.length) for chunk in plan.chunks if chunk.kind == "range"}):
            for block in _read(file.fileno(), Span(*offset), work, plan):
                entry = block.entries[0]
                with work.place(block.path) as place:
                    cloner.complete_ranges(place, entry)
                report.totals.move_losses_from(cloner.metadata.losses)
                report.add(results[join(block.path, entry.name)])
                ticker(1, 0)


def _directories(work: Workspace, plan: Plan, chunks: list[Chunk]) -> set[str]:
    """The directories of the files of some chunks."""
    return {block.path for chunk in chunks for block in work.blocks(plan.top.dev, span=chunk.span)}


def refuse_lost_entries(work: Workspace, plan: Plan, directories: Collection[str], kinds: Set[Kind]) -> None:
    """Raise ForkError if one of the directories lacks an entry of these kinds that the manifest lists.

    A try that replaces entries of an earlier one may replace an entry with another name, if the filesystem takes both
    names for one.
    """
    if not directories:
        return
    names: dict[str, set[str]] = {path: set() for path in directories}
    for closing in (False, True):
        for block in work.blocks(plan.top.dev, closing=closing):
            if block.path in names:
                names[block.path] |= {entry.name for entry in block.entries if entry.kind in kinds}
    for path, wanted in names.items():
        directory = join(work.ends.destination, path)
        with work.place(path) as place:
            try:
                made = set(names_in(place.dst_fd))
                lost = sorted(wanted - made)
                # A filesystem may store a name in another form, and an open file that is unlinked under another name.
                if len(lost) > sum(not name.startswith(_UNLINKED) for name in made - wanted):
                    raise entry_lost(place.src_fd, place.dst_fd, lost, directory)
            except OSError as error:
                raise from_oserror(error, "listing it", directory) from None


def link_and_skip(work: Workspace, block: Block, report: Report, ticker: Ticker, *, replaces: bool = False) -> bool:
    """Make the hard links of one block, and report the entries that are left out. Returns whether links were made.

    `replaces`: see `close_tree`.
    """
    linked = False
    for entry in block.entries:
        if entry.kind == Kind.HARDLINK:
            began = time.perf_counter()
            _link(work, entry.note, block.path, entry.name, replaces=replaces)
            linked = True
            report.add(_result(block.path, entry, "hardlink", time.perf_counter() - began))
            ticker(1, 0)
        elif entry.kind == Kind.SKIP:
            report.add(_result(block.path, entry, "skip", 0.0))
            ticker(1, 0)
    return linked


def _link(work: Workspace, first: str, directory: str, name: str, *, replaces: bool) -> None:
    first_directory, _, first_name = first.rpartition("/")
    with ExitStack() as opened:
        first_fd = work.open_tree(first_directory)
        opened.callback(os.close, first_fd)
        fd = work.open_tree(directory)
        opened.callback(os.close, fd)
        try:
            try:
                os.link(first_name, name, src_dir_fd=first_fd, dst_dir_fd=fd, follow_symlinks=False)
            except FileExistsError:
                if not replaces:
                    raise
                _replace_link(first_name, name, first_fd, fd)
        except FileExistsError:
            raise work.name_taken(directory, name) from None
        except OSError as error:
            path = join(work.ends.destination, join(directory, name))
            raise from_oserror(error, "making a hard link", path) from None


def _replace_link(first_name: str, name: str, first_fd: int, fd: int) -> None:
    """Replace the hard link that an earlier closing left. Raises FileExistsError if it is another entry."""
    try:
        os.unlink(name, dir_fd=fd)
        os.link(first_name, name, src_dir_fd=first_fd, dst_dir_fd=fd, follow_symlinks=False)
    except (IsADirectoryError, FileNotFoundError):  # both names are one to the filesystem
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None


def complete_directories(
    work: Workspace, block: Block, cloner: Cloner, report: Report, touched: Touched, ticker: Ticker
) -> None:
    """Apply the metadata of the directories of one block, after that of all directories below them."""
    for entry in block.entries:
        if entry.kind == Kind.DIRECTORY:
            began = time.perf_counter()
            complete_directory(work, join(block.path, entry.name), entry, cloner, report.totals, touched)
            report.add(_result(block.path, entry, "mkdir", time.perf_counter() - began))
            ticker(1, 0)


def complete_directory(
    work: Workspace, path: str, entry: Entry, cloner: Cloner, totals: Totals, touched: Touched
) -> None:
    """Give one directory the metadata of its source, which the walk saw as `entry`. Raises ForkError.

    If entries came or went in the source's directory since, the clone gets its present times: its attributes are read
    now, and the source never had them together with the earlier times.
    """
    state = touched.get(path, entry)
    try:
        with work.place(path) as place:
            # Checked before anything is applied: a clone never gets an owner and mode that only the manifest states.
            before, state = state, directory_now(state, os.fstat(place.src_fd), join(work.ends.source, path))
            if state is not before:
                touched[path] = state
            for _ in range(_TRIES):
                cloner.metadata.losses = Losses()
                fresh = os.fstat(place.dst_fd)
                cloner.metadata.apply(place.dst_fd, fresh, state, place.src_fd, path.rpartition("/")[0])
                before, state = state, directory_now(state, os.fstat(place.src_fd), join(work.ends.source, path))
                if state is before:
                    totals.move_losses_from(cloner.metadata.losses)
                    return
                touched[path] = state
            raise changed(join(work.ends.source, path))
    except OSError as error:
        raise from_oserror(error, doing(error), join(work.ends.destination, path)) from None


def _result(directory: str, entry: Entry, method: Method, seconds: float) -> FileResult:
    reason = entry.note if method == "skip" else None
    path = join(directory, entry.name)
    return file_result(path, file_type(entry.mode), method, seconds=round(seconds, 6), reason=reason)


def _read(fd: int, span: Span, work: Workspace, plan: Plan) -> Iterator[Block]:
    for block in manifest.read(fd, span):
        yield Block(block.path, [on_this_host(entry, plan.top.dev, work.source_dev) for entry in block.entries])
