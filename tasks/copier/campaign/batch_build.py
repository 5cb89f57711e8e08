"""Filling the trees of one batch together: each file of the source is opened once for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from tasks.copier.campaign.batch_trees import Tree, Trees
from tasks.copier.clone.file import Cloner, DirectoryPair
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.close import complete_directories, complete_directory, link_and_skip, refuse_unbalanced
from tasks.copier.fork.source_changes import Touched, refuse_changes
from tasks.copier.progress import Ticker
from tasks.copier.report import FileResult, failed
from tasks.copier.source.walk import Block, Entry, Kind, join
from tasks.copier.staging.workspace import on_this_host

#: Most open files of the source at once.
OPEN_FILES = 16


def build(made: Trees) -> None:
    """Fill and close all trees. A failure ends one tree, or all if it is of the source. Raises ForkError cancelled."""
    try:
        _make_directories(made)
        _clone_files(made)
        _close(made)
    except ForkError as error:  # an error of the source: no tree can be completed
        if error.code is Code.CANCELLED:
            raise
        for tree in list(made.alive):
            made.fail(tree, error)
    made.complete += made.alive
    made.alive = []


def _blocks(made: Trees, *, closing: bool = False, backwards: bool = False) -> Iterable[Block]:
    """The blocks of the manifest, if a tree is left to fill."""
    if made.alive:
        yield from made.alive[0].work.blocks(made.plan.top.dev, closing=closing, backwards=backwards)


def _make_directories(made: Trees) -> None:
    for block in _blocks(made, closing=True):
        names = [entry.name for entry in block.entries if entry.kind == Kind.DIRECTORY]
        if names:
            made.each(_make_directories_in, block.path, names)


def _make_directories_in(tree: Tree, path: str, names: list[str]) -> None:
    tree.work.make_directories(path, names)


class _Source(NamedTuple):
    """One file of the source, open for all trees as `fd`, or a symlink, without `fd`."""

    entry: Entry
    fd: int | None


class _Directory(NamedTuple):
    """Some entries of one directory; `place` has only the source's directory open."""

    place: DirectoryPair
    sources: list[_Source]


def _clone_files(made: Trees) -> None:
    """Clone all files and symlinks, some of them at a time, which are open meanwhile.

    All of these are cloned into one tree before the next tree: new entries of a directory are then adjacent in the
    filesystem's own trees, and two processes that have met at the lock of one file go on with different files.
    """
    for window in _windows(_blocks(made)):
        if not made.alive:
            return
        with ExitStack() as opened:
            _clone_window(made, window, opened)


def _windows(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """The entries of all blocks, at most `OPEN_FILES` at a time."""
    window: list[Block] = []
    room = OPEN_FILES
    for block in blocks:
        at = 0
        while at < len(block.entries):
            some = block.entries[at : at + room]
            window.append(Block(block.path, some))
            at, room = at + len(some), room - len(some)
            if not room:
                yield window
                window, room = [], OPEN_FILES
    if window:
        yield window


def _clone_window(made: Trees, window: list[Block], opened: ExitStack) -> None:
    """Clone some entries into every tree, and then compare each file with the walk."""
    results: dict[Tree, list[FileResult]] = {tree: [] for tree in made.alive}
    try:
        directories = [_open_directory(made, block, results, opened) for block in window]
        made.each(_clone_into, directories, results, made.cloner, made.ticker)
        _check_sources(made, directories, results)
    finally:
        for tree, reached in results.items():
            for result in reached:
                tree.report.add(result)


def _open_directory(made: Trees, block: Block, results: dict[Tree, list[FileResult]], opened: ExitStack) -> _Directory:
    """Open one directory of the source and its files. Raises ForkError, which every tree's result of the entry has."""
    cloner, work = made.cloner, made.alive[0].work
    src_fd = work.open_source(block.path)
    opened.callback(os.close, src_fd)
    place = DirectoryPair(src_fd, -1, work.tree_dev, block.path, work.ends.source, work.ends.destination)
    sources: list[_Source] = []
    for entry in block.entries:
        if entry.kind == Kind.SYMLINK:
            sources.append(_Source(entry, None))
            continue
        try:
            fd = cloner.open_source(place, entry)
            opened.callback(cloner.close_source, fd)
            cloner.check_source(place, entry, fd)  # before a clone gets the owner and mode of `entry`
        except ForkError as error:
            for reached in results.values():
                reached.append(failed(join(block.path, entry.name), entry, error))
            raise
        sources.append(_Source(entry, fd))
    return _Directory(place, sources)


def _clone_into(
    tree: Tree,
    directories: list[_Directory],
    results: dict[Tree, list[FileResult]],
    cloner: Cloner,
    ticker: Ticker,
) -> None:
    """Clone the sources into one tree. Raises ForkError."""
    work, reached = tree.work, results[tree]
    cloner.use_budget(tree.budget)
    for directory in directories:
        path = directory.place.path
        dst_fd = work.open_tree(path)
        try:
            place = replace(directory.place, dst_fd=dst_fd, destination=work.ends.destination)
            for entry, fd in directory.sources:
                try:
                    if fd is None:
                        result = cloner.entry(place, entry)
                    else:
                        result = cloner.file_from(fd, place, entry, check=False)
                except ForkError as error:
                    if error.code is not Code.CANCELLED:
                        reached.append(failed(join(path, entry.name), entry, error))
                    raise
                reached.append(result)
                ticker(1, result["bytes"] - result["copied_bytes"])
        finally:
            tree.report.totals.move_losses_from(cloner.metadata.losses)
            os.close(dst_fd)


def _check_sources(made: Trees, directories: list[_Directory], results: dict[Tree, list[FileResult]]) -> None:
    """Compare each file with the walk. Raises ForkError, which every tree's result of the entry has."""
    number = 0
    for place, sources in directories:
        for entry, fd in sources:
            try:
                if fd is not None:
                    made.cloner.check_source(place, entry, fd)
            except ForkError as error:
                for tree in made.alive:
                    results[tree][number] = failed(join(place.path, entry.name), entry, error)
                raise
            number += 1


def _close(made: Trees) -> None:
    """Close all trees: hard links, metadata of directories, the last comparison of the source; see `fork.close`."""
    plan, cloner, ticker = made.plan, made.cloner, made.ticker
    touched: Touched = {}
    for block in _blocks(made, closing=True):
        made.each(_link_and_skip, block, ticker)
    for block in _blocks(made, closing=True, backwards=True):
        made.each(_complete_directories, block, cloner, touched, ticker)
    if not made.alive:
        return
    work = made.alive[0].work
    top = on_this_host(plan.top, plan.top.dev, work.source_dev)
    made.each(lambda tree: complete_directory(tree.work, "", top, cloner, tree.report.totals, touched))
    made.each(lambda tree: refuse_unbalanced(tree.work, plan, tree.report.totals.total))
    if made.alive:
        refuse_changes(work, plan, touched)


def _link_and_skip(tree: Tree, block: Block, ticker: Ticker) -> None:
    link_and_skip(tree.work, block, tree.report, ticker)


def _complete_directories(tree: Tree, block: Block, cloner: Cloner, touched: Touched, ticker: Ticker) -> None:
    complete_directories(tree.work, block, cloner, tree.report, touched, ticker)
