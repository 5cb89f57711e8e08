"""The trees of one batch: clones of one source, built side by side.

Each directory of the source is read once, and each of its files opened once, for all trees. A tree that fails is
removed at once, and the others go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Concatenate, NamedTuple, ParamSpec

from tasks.copier.changes import refuse_changes
from tasks.copier.clone import Cloner, Place
from tasks.copier.close import complete_directories, complete_directory, link_and_skip, refuse_unbalanced
from tasks.copier.ends import Ends
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.kernel import trees
from tasks.copier.plan import Plan
from tasks.copier.progress import Ticker
from tasks.copier.report import FileResult, Report, failed
from tasks.copier.snapshot import snapshot_tree
from tasks.copier.spec import ForkSpec
from tasks.copier.staging import SNAPSHOT, Staging
from tasks.copier.walk import Block, Entry, Kind, join
from tasks.copier.work import Work, on_this_host

P = ParamSpec("P")


@dataclass(eq=False)
class Tree:
    """One fork in the making. `index` is its place in the campaign, `name` the tree's in the destination's parent."""

    index: int
    spec: ForkSpec
    name: str
    work: Work
    report: Report = field(default_factory=Report)
    is_subvolume: bool = False


class Failure(NamedTuple):
    """Why a fork was given up, and what had been done of it."""

    spec: ForkSpec
    error: ForkError
    report: Report


@dataclass
class Trees:
    """The trees of one batch. `opened` closes their descriptors."""

    #: Where the manifests lie, and where the trees belong to.
    source: Staging
    staging: Staging
    ends: Ends
    plan: Plan
    cloner: Cloner
    ticker: Ticker
    opened: ExitStack
    #: Begin with the last file: who clones the same file as another process waits for it on the source's inode.
    backwards: bool
    #: Those that are still to be filled, and those that are.
    alive: list[Tree] = field(default_factory=list)
    complete: list[Tree] = field(default_factory=list)
    failures: dict[int, Failure] = field(default_factory=dict)

    def make(self, index: int, spec: ForkSpec, name: str) -> None:
        """Make the top directory of one fork's tree, open to nobody else."""
        source_fd, parent_fd = self.ends.source_fd, self.ends.parent_fd
        ends = Ends(spec.source, spec.destination, source_fd, parent_fd, os.path.basename(spec.destination))
        try:
            ends.refuse_existing()
            tree_fd = self.staging.make_named_tree(name)
        except ForkError as error:
            self.failures[index] = Failure(spec, error, Report())
            return
        except OSError as error:
            cause = from_oserror(error, "making the staging directory", spec.destination)
            self.failures[index] = Failure(spec, cause, Report())
            return
        self.opened.callback(os.close, tree_fd)
        devices = os.fstat(source_fd).st_dev, os.fstat(tree_fd).st_dev
        self.alive.append(Tree(index, spec, name, Work(ends, self.source, spec.options, tree_fd, *devices)))

    def fail(self, tree: Tree, error: ForkError) -> None:
        """Give one tree up, and remove it."""
        (self.alive if tree in self.alive else self.complete).remove(tree)
        self.failures[tree.index] = Failure(tree.spec, error, tree.report)
        with suppress(OSError):  # what cannot be removed now goes with the campaign's staging
            trees.remove(self.ends.parent_fd, tree.name)

    def fail_all(self, error: ForkError) -> None:
        """Give all trees up."""
        for tree in [*self.alive, *self.complete]:
            self.fail(tree, error)

    def each(self, step: Callable[Concatenate[Tree, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Do one step of every tree. Raises ForkError cancelled; any other error is the one tree's own."""
        for tree in list(self.alive):
            try:
                step(tree, *args, **kwargs)
            except ForkError as error:
                if error.code is Code.CANCELLED:
                    raise
                self.fail(tree, error)


def build(made: Trees) -> None:
    """Fill all trees, up to what is to be published. A failure is the trees' own; raises ForkError cancelled."""
    try:
        _make_directories(made)
        _clone_files(made)
        _close(made)
    except ForkError as error:  # of the source: no tree can be completed
        if error.code is Code.CANCELLED:
            raise
        for tree in list(made.alive):
            made.fail(tree, error)
    made.complete += made.alive
    made.alive = []


def snapshot_trees(made: Trees) -> None:
    """Make trees finished snapshots of the source, as far as that is possible; see `snapshot`."""

    def snapshot(tree: Tree) -> None:
        report = snapshot_tree(tree.work, made.staging, tree.name, made.ticker, f"{SNAPSHOT}{tree.name}")
        if report is not None:
            tree_fd = made.staging.open_named_tree(tree.name)
            made.opened.callback(os.close, tree_fd)
            made.alive.remove(tree)
            made.complete.append(
                replace(tree, report=report, work=replace(tree.work, tree_fd=tree_fd), is_subvolume=True)
            )

    made.each(snapshot)


def _blocks(made: Trees, *, closing: bool = False, backwards: bool = False) -> Iterable[Block]:
    """The manifest's blocks, as long as there is a tree to take them."""
    if made.alive:
        yield from made.alive[0].work.blocks(made.plan.top.dev, closing=closing, backwards=backwards)


def _make_directories(made: Trees) -> None:
    for block in _blocks(made, closing=True):
        names = [entry.name for entry in block.entries if entry.kind == Kind.DIRECTORY]
        if names:
            made.each(_make_directories_in, block.path, names)


def _make_directories_in(tree: Tree, path: str, names: list[str]) -> None:
    tree.work.make_directories(path, names)


def _clone_files(made: Trees) -> None:
    for block in _blocks(made, backwards=made.backwards):
        with ExitStack() as opened:
            places = _open_places(made, block.path, opened)
            for entry in reversed(block.entries) if made.backwards else block.entries:
                _clone_entry(made, places, entry)


def _open_places(made: Trees, path: str, opened: ExitStack) -> dict[Tree, Place]:
    """One directory of the source, and its counterpart in each tree, all open."""
    if not made.alive:
        return {}
    src_fd = made.alive[0].work.open_source(path)
    opened.callback(os.close, src_fd)
    places: dict[Tree, Place] = {}

    def open_one(tree: Tree) -> None:
        work = tree.work
        dst_fd = work.open_tree(path)
        opened.callback(os.close, dst_fd)
        places[tree] = Place(src_fd, dst_fd, work.tree_dev, path, work.ends.source, work.ends.destination)

    made.each(open_one)
    return places


def _clone_entry(made: Trees, places: dict[Tree, Place], entry: Entry) -> None:
    """Clone one file or symlink into every tree, and add its results."""
    if not made.alive:
        return
    results: dict[Tree, FileResult] = {}
    first = places[made.alive[0]]
    try:
        if entry.kind == Kind.SYMLINK:
            _clone_into_each(made, places, entry, results, made.cloner.entry)
        else:
            _clone_file(made, places, entry, results)
    except ForkError as error:
        if error.code is not Code.CANCELLED:
            for tree in made.alive:
                tree.report.add(failed(join(first.path, entry.name), entry, error))
        raise
    for tree in made.alive:
        tree.report.add(results[tree])


def _clone_file(made: Trees, places: dict[Tree, Place], entry: Entry, results: dict[Tree, FileResult]) -> None:
    """Clone one file, which is opened once, and compared with the walk once all clones are made."""
    cloner, first = made.cloner, places[made.alive[0]]
    src_fd = cloner.open_source(first, entry)
    try:
        _clone_into_each(made, places, entry, results, partial(cloner.file_from, src_fd, check=False))
        cloner.check_source(first, entry, src_fd)
    finally:
        os.close(src_fd)


def _clone_into_each(
    made: Trees,
    places: dict[Tree, Place],
    entry: Entry,
    results: dict[Tree, FileResult],
    clone: Callable[[Place, Entry], FileResult],
) -> None:
    ticker = made.ticker

    def clone_into(tree: Tree) -> None:
        try:
            result = results[tree] = clone(places[tree], entry)
        except ForkError as error:
            if error.code is not Code.CANCELLED:
                tree.report.add(failed(join(places[tree].path, entry.name), entry, error))
            raise
        ticker(1, result["bytes"] - result["copied_bytes"])

    made.each(clone_into)


def _close(made: Trees) -> None:
    """Hard links, the directories' metadata, a last look at the source, the books: see `close`."""
    plan, cloner, ticker = made.plan, made.cloner, made.ticker
    touched: list[str] = []
    for block in _blocks(made, closing=True):
        made.each(_link_and_skip, block, ticker)
    for block in _blocks(made, closing=True, backwards=True):
        made.each(_complete_directories, block, cloner, touched, ticker)
    if not made.alive:
        return
    work = made.alive[0].work
    top = on_this_host(plan.top, plan.top.dev, work.source_dev)
    made.each(lambda tree: complete_directory(tree.work, "", top, cloner, touched))
    made.each(lambda tree: refuse_unbalanced(tree.work, plan, tree.report.totals.total))
    if made.alive:
        refuse_changes(work, plan, touched)


def _link_and_skip(tree: Tree, block: Block, ticker: Ticker) -> None:
    link_and_skip(tree.work, block, tree.report, ticker)


def _complete_directories(tree: Tree, block: Block, cloner: Cloner, touched: list[str], ticker: Ticker) -> None:
    complete_directories(tree.work, block, cloner, tree.report, touched, ticker)
