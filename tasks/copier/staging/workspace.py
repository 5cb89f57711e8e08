"""One attempt at a fork, open in this process: its source and destination, its tree, and the request's options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tasks.copier.clone.file import DirectoryPair
from tasks.copier.clone.name_collisions import name_taken
from tasks.copier.endpoints import Endpoints
from tasks.copier.errors import Code, ForkError, from_oserror, from_source
from tasks.copier.kernel import syscalls, trees
from tasks.copier.options import Options
from tasks.copier.source import manifest
from tasks.copier.source.manifest import Kept, Span
from tasks.copier.source.walk import Block, Entry, join
from tasks.copier.staging.staging import Staging

#: The mode of a directory until the fork is closed.
_PRIVATE = 0o700


@dataclass
class KeptManifests:
    """The manifests of a fork that may be so small that no other process reads them."""

    files: Kept = field(default_factory=Kept)
    closing: Kept = field(default_factory=Kept)
    #: Whether they are on disk, because the source is not that small. Then nothing is kept.
    are_written: bool = False


@dataclass(frozen=True)
class Workspace:
    """One attempt at one fork, open in this process, which holds the staging's lock."""

    ends: Endpoints
    staging: Staging
    options: Options
    tree_fd: int
    #: st_dev of the source directory and of the tree, as this host numbers them.
    source_dev: int
    tree_dev: int
    #: The manifests of a small fork, which is made by this process alone; None if they are on disk.
    kept: KeptManifests | None = None

    @contextmanager
    def place(self, path: str) -> Iterator[DirectoryPair]:
        """Open the directory `path` (relative) of the source and of the tree, or use what is open as the top ("").

        Raises ForkError: source_changed, permission_denied, io_error.
        """
        ends = self.ends
        if not path:
            yield DirectoryPair(ends.source_fd, self.tree_fd, self.tree_dev, path, ends.source, ends.destination)
            return
        with self.source_directory(path) as src_fd:
            dst_fd = self.open_tree(path)
            try:
                yield DirectoryPair(src_fd, dst_fd, self.tree_dev, path, ends.source, ends.destination)
            finally:
                os.close(dst_fd)

    @contextmanager
    def source_directory(self, path: str) -> Iterator[int]:
        """Open one directory of the source, or use what is open as its top (""). Raises ForkError."""
        src_fd = self.open_source(path) if path else self.ends.source_fd
        try:
            yield src_fd
        finally:
            if path:
                os.close(src_fd)

    def open_source(self, path: str) -> int:
        """Open one directory of the source. The caller closes the descriptor. Raises ForkError."""
        if not path:
            return os.dup(self.ends.source_fd)
        try:
            return trees.open_below(self.ends.source_fd, path)
        except OSError as error:
            name = join(self.ends.source, path)
            raise from_source(error, "opening a directory of the source", name) from None

    def open_tree(self, path: str) -> int:
        """Open one directory of the tree. The caller closes the descriptor. Raises ForkError."""
        if not path:
            return os.dup(self.tree_fd)
        try:
            return trees.open_below(self.tree_fd, path)
        except OSError as error:
            name = join(self.ends.destination, path)
            raise from_oserror(error, "opening a directory of the fork", name) from None

    def make_directories(self, path: str, names: list[str]) -> None:
        """Make directories in the directory `path` of the tree, private until the fork is closed.

        Raises ForkError, also if one exists: no earlier try made directories in this tree.
        """
        if not names:
            return
        fd = self.open_tree(path)
        name = ""
        try:
            for name in names:
                os.mkdir(name, _PRIVATE, dir_fd=fd)
            if os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode & _PRIVATE != _PRIVATE:
                for name in names:  # the umask took a permission that this process needs
                    os.chmod(name, _PRIVATE, dir_fd=fd)
        except FileExistsError:
            raise self.name_taken(path, name) from None
        except OSError as error:
            raise from_oserror(error, "making a directory", join(self.ends.destination, path)) from None
        finally:
            os.close(fd)

    def name_taken(self, path: str, name: str) -> ForkError:
        """The error for an entry `name` of the directory `path` that exists already; see `name_collisions`."""
        with self.place(path) as place:
            return name_taken(place.src_fd, place.dst_fd, name, place.destination_of(name))

    def has_manifests(self) -> bool:
        """Whether the manifests are on disk."""
        return self.kept is None or self.kept.are_written

    def blocks(
        self, planned_dev: int, *, closing: bool = False, backwards: bool = False, span: Span | None = None
    ) -> Iterator[Block]:
        """The blocks of the manifest of what chunks clone, or (`closing`) of what closes the fork.

        `planned_dev` is the source's st_dev on the host that walked it. Device numbers are those of this host.
        """
        if self.kept is not None and not self.has_manifests():
            kept = self.kept.closing if closing else self.kept.files
            yield from kept.read(span, backwards=backwards)
            return
        fd = self.staging.manifest(closing=closing)
        try:
            spans = reversed(list(manifest.spans(fd))) if backwards else iter([span or manifest.whole(fd)])
            for span in spans:
                for block in manifest.read(fd, span):
                    if planned_dev == self.source_dev:
                        yield block
                    else:
                        yield Block(block.path, [on_this_host(e, planned_dev, self.source_dev) for e in block.entries])
        finally:
            os.close(fd)


@contextmanager
def open_work(
    ends: Endpoints, staging: Staging, options: Options, tree_fd: int, kept: KeptManifests | None = None
) -> Iterator[Workspace]:
    """The Workspace of an open tree. It owns the descriptor `tree_fd` and closes it.

    `kept`: where the manifests are kept while the fork is small, if no other process is to read them.
    """
    try:
        source_dev, tree_dev = os.fstat(ends.source_fd).st_dev, os.fstat(tree_fd).st_dev
        yield Workspace(ends, staging, options, tree_fd, source_dev, tree_dev, kept)
    finally:
        syscalls.release(tree_fd)


def changed(path: str) -> ForkError:
    """The error for an entry of the source that changed since the walk."""
    return ForkError(Code.SOURCE_CHANGED, "it changed while the source was cloned", path)


def on_this_host(entry: Entry, planned_dev: int, dev: int) -> Entry:
    """`entry` with this host's number of the source's device; hosts may number a shared filesystem differently."""
    return entry._replace(dev=dev) if entry.dev == planned_dev != dev else entry
