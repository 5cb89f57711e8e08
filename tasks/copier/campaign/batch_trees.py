"""The trees of one batch, clones of the same source. If one fails, it is removed at once, and the others go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Concatenate, NamedTuple, ParamSpec

from tasks.copier.clone.file import Cloner
from tasks.copier.clone.sparse_copy import Take
from tasks.copier.endpoints import Endpoints
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.fork.plan import Plan
from tasks.copier.fork.snapshot import snapshot_tree
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.kernel import trees
from tasks.copier.progress import Ticker
from tasks.copier.report import Report
from tasks.copier.space.budget import budget_of, take_all
from tasks.copier.staging.staging import SNAPSHOT, Staging
from tasks.copier.staging.workspace import Workspace

P = ParamSpec("P")


@dataclass(eq=False)
class Tree:
    """The tree of one fork. `index` is the fork's in the campaign, `name` the tree's beside the destination."""

    index: int
    spec: ForkSpec
    name: str
    work: Workspace
    report: Report = field(default_factory=Report)
    is_subvolume: bool = False
    budget: Take = take_all


class Failure(NamedTuple):
    """Why a fork failed, and what had been done of it."""

    spec: ForkSpec
    error: ForkError
    report: Report


@dataclass
class Trees:
    """The trees of one batch. `opened` closes their descriptors."""

    #: The control directory with the manifests, and the one to which the trees belong.
    source: Staging
    staging: Staging
    ends: Endpoints
    plan: Plan
    cloner: Cloner
    ticker: Ticker
    opened: ExitStack
    #: The trees that are still to be filled, and those that are complete.
    alive: list[Tree] = field(default_factory=list)
    complete: list[Tree] = field(default_factory=list)
    failures: dict[int, Failure] = field(default_factory=dict)

    def make(self, index: int, spec: ForkSpec, name: str) -> None:
        """Make the top directory of one fork's tree, private to this user."""
        source_fd, parent_fd = self.ends.source_fd, self.ends.parent_fd
        ends = Endpoints(spec.source, spec.destination, source_fd, parent_fd, os.path.basename(spec.destination))
        try:
            ends.refuse_existing()
            tree_fd = self.staging.make_named_tree(name)
            if "ownership" not in spec.options.preserve:
                self.staging.inherit_group(tree_fd)
        except ForkError as error:
            self.failures[index] = Failure(spec, error, Report())
            return
        except OSError as error:
            cause = from_oserror(error, "making the staging directory", spec.destination)
            self.failures[index] = Failure(spec, cause, Report())
            return
        self.opened.callback(os.close, tree_fd)
        devices = os.fstat(source_fd).st_dev, os.fstat(tree_fd).st_dev
        work = Workspace(ends, self.source, spec.options, tree_fd, *devices)
        self.alive.append(Tree(index, spec, name, work, budget=budget_of(spec.options.max_copied_bytes)))

    def note(self) -> None:
        """Note the identities of the trees, before anything is put into them. Raises OSError."""
        self.staging.note_trees({tree.name: trees.identity(tree.work.tree_fd) for tree in self.alive})

    def fail(self, tree: Tree, error: ForkError) -> None:
        """Record the failure of one tree, and remove it."""
        (self.alive if tree in self.alive else self.complete).remove(tree)
        self.failures[tree.index] = Failure(tree.spec, error, tree.report)
        with suppress(OSError):  # removed with the campaign's staging
            self.staging.discard_named_tree(tree.name)

    def fail_all(self, error: ForkError) -> None:
        """Record the failure of all trees, and remove them."""
        for tree in [*self.alive, *self.complete]:
            self.fail(tree, error.for_fork(self.ends.destination, tree.spec.destination))

    def each(self, step: Callable[Concatenate[Tree, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Do one step for every tree. Raises ForkError cancelled; any other ForkError fails only its tree."""
        for tree in list(self.alive):
            try:
                step(tree, *args, **kwargs)
            except ForkError as error:
                if error.code is Code.CANCELLED:
                    raise
                self.fail(tree, error)


def snapshot_trees(made: Trees) -> None:
    """Replace trees by finished snapshots of the source where possible; see `fork.snapshot`."""

    def snapshot(tree: Tree) -> None:
        snapshot = snapshot_tree(tree.work, made.staging, tree.name, made.ticker, f"{SNAPSHOT}{tree.name}")
        if snapshot is not None:
            made.opened.callback(os.close, snapshot.fd)
            made.alive.remove(tree)
            work = replace(tree.work, tree_fd=snapshot.fd)
            made.complete.append(replace(tree, report=snapshot.report, work=work, is_subvolume=True))

    made.each(snapshot)
