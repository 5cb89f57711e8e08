"""Closing a fork: what needs the whole tree. Files in ranges, hard links, the directories' metadata, the books."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

from tasks.copier import manifest
from tasks.copier.changes import refuse_changes
from tasks.copier.clone import Cloner
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.manifest import Span
from tasks.copier.plan import Plan
from tasks.copier.progress import Ticker
from tasks.copier.report import FileResult, Method, RangeDone, Report, Totals, join_ranges
from tasks.copier.walk import Block, Entry, Kind, file_type, join
from tasks.copier.work import Work, changed, on_this_host


def close_tree(work: Work, plan: Plan, reports: Mapping[str, Report], cloner: Cloner, ticker: Ticker) -> Report:
    """Complete the tree after all chunks are done, whose `reports` are known by their numbers; returns what closing
    did itself.

    Raises ForkError; also when the FileResults of all parts are not one for each entry of the manifest.
    """
    totals, ranges = Totals(), []
    for part in reports.values():
        totals.add(part.totals)
        ranges += part.ranges
    report = Report()
    _complete_ranged_files(work, plan, ranges, cloner, report, totals, ticker)
    for block in work.blocks(plan.top.dev, closing=True):
        link_and_skip(work, block, report, ticker)
    touched: list[str] = []
    for block in work.blocks(plan.top.dev, closing=True, backwards=True):
        complete_directories(work, block, cloner, report, touched, ticker)
    top = on_this_host(plan.top, plan.top.dev, work.source_dev)
    complete_directory(work, "", top, cloner, touched)
    early = [chunk.span for n, chunk in enumerate(plan.chunks) if reports[str(n)].during_walk]
    refuse_changes(work, plan, touched, early)
    refuse_unbalanced(work, plan, totals.total + report.totals.total)
    return report


def refuse_unbalanced(work: Work, plan: Plan, results: int) -> None:
    """Raise ForkError when there is not one FileResult for each entry of the manifest."""
    if results != plan.entries:
        message = f"the books do not balance: {plan.entries} entries, {results} results"
        raise ForkError(Code.IO_ERROR, message, work.ends.source)


def _complete_ranged_files(
    work: Work, plan: Plan, ranges: list[RangeDone], cloner: Cloner, report: Report, totals: Totals, ticker: Ticker
) -> None:
    if not ranges:
        return
    reason = "reflink=never" if work.options.reflink == "never" else None
    if totals.fallback is not None:
        reason = totals.fallback["reason"]
    results = {result["path"]: result for result in join_ranges(ranges, reason)}
    with open(work.staging.manifest(), "rb") as file:
        for offset in sorted({(chunk.offset, chunk.length) for chunk in plan.chunks if chunk.kind == "range"}):
            for block in _read(file.fileno(), Span(*offset), work, plan):
                entry = block.entries[0]
                with work.place(block.path) as place:
                    cloner.complete_ranges(place, entry)
                report.add(results[join(block.path, entry.name)])
                ticker(1, 0)


def link_and_skip(work: Work, block: Block, report: Report, ticker: Ticker) -> None:
    """Make the further names of files that have several, and note what was left out."""
    for entry in block.entries:
        if entry.kind == Kind.HARDLINK:
            began = time.perf_counter()
            _link(work, entry.note, block.path, entry.name)
            report.add(_result(block.path, entry, "hardlink", time.perf_counter() - began))
            ticker(1, 0)
        elif entry.kind == Kind.SKIP:
            report.add(_result(block.path, entry, "skip", 0.0))
            ticker(1, 0)


def _link(work: Work, first: str, directory: str, name: str) -> None:
    first_directory, _, first_name = first.rpartition("/")
    with ExitStack() as opened:
        first_fd = work.open_tree(first_directory)
        opened.callback(os.close, first_fd)
        fd = work.open_tree(directory)
        opened.callback(os.close, fd)
        try:
            try:
                os.link(first_name, name, src_dir_fd=first_fd, dst_dir_fd=fd, follow_symlinks=False)
            except FileExistsError:  # made by a process that died while it closed this fork
                os.unlink(name, dir_fd=fd)
                os.link(first_name, name, src_dir_fd=first_fd, dst_dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            path = join(work.ends.destination, join(directory, name))
            raise from_oserror(error, "making a hard link", path) from None


def complete_directories(
    work: Work, block: Block, cloner: Cloner, report: Report, touched: list[str], ticker: Ticker
) -> None:
    """Give the directories of one block their metadata, after all below them have theirs."""
    for entry in block.entries:
        if entry.kind == Kind.DIRECTORY:
            began = time.perf_counter()
            complete_directory(work, join(block.path, entry.name), entry, cloner, touched)
            report.add(_result(block.path, entry, "mkdir", time.perf_counter() - began))
            ticker(1, 0)


def complete_directory(work: Work, path: str, entry: Entry, cloner: Cloner, touched: list[str]) -> None:
    source = join(work.ends.source, path)
    try:
        with work.place(path) as place:
            now = os.fstat(place.src_fd)
            if (now.st_dev, now.st_ino) != (entry.dev, entry.ino):
                raise changed(source)
            if (now.st_mtime_ns, now.st_ctime_ns) != (entry.mtime, entry.ctime):
                touched.append(path)
            cloner.metadata.apply(place.dst_fd, os.fstat(place.dst_fd), entry, place.src_fd)
    except OSError as error:
        raise from_oserror(error, "setting its metadata", join(work.ends.destination, path)) from None


def _result(directory: str, entry: Entry, method: Method, seconds: float) -> FileResult:
    return {
        "path": join(directory, entry.name),
        "type": file_type(entry.mode),
        "method": method,
        "bytes": 0,
        "copied_bytes": 0,
        "seconds": round(seconds, 6),
        "reason": entry.note if method == "skip" else None,
        "error": None,
    }


def _read(fd: int, span: Span, work: Work, plan: Plan) -> Iterator[Block]:
    for block in manifest.read(fd, span):
        yield Block(block.path, [on_this_host(entry, plan.top.dev, work.source_dev) for entry in block.entries])
