"""Any tree, forked with any limits on any filesystem, is the tree that it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.copier.options import Limits
from tests.fixtures.filesystems import Fresh, Kind, fresh_directory
from tests.support.engine.forks import MIB, assert_alike, fork_with_books, forked, times

KINDS: list[Kind] = ["xfs", "btrfs", "ext4", "tmpfs"]
#: About 10 s for each filesystem.
EXAMPLES = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

_BLOCK = 4096


@dataclass(frozen=True)
class File:
    size: int
    #: (offset, length) of data; the rest is holes.
    runs: tuple[tuple[int, int], ...]
    mode: int
    mtime: int
    xattrs: Mapping[str, bytes]


@dataclass(frozen=True)
class Symlink:
    target: bytes
    mtime: int


@dataclass(frozen=True)
class HardLink:
    #: Which of the files made so far, modulo their number.
    index: int


@dataclass(frozen=True)
class Directory:
    entries: Mapping[bytes, Node] = field(default_factory=dict)
    mode: int = 0o755
    mtime: int = 0
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


Node = File | Symlink | HardLink | Directory

names = (
    st.one_of(
        st.binary(min_size=1, max_size=12),
        st.text(min_size=1, max_size=8).map(str.encode),
        st.binary(min_size=255, max_size=255),
    )
    .map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"-"))
    .filter(lambda name: name not in (b".", b"..", b""))
)
mtimes = st.integers(0, 4_000_000_000 * 10**9)
modes = st.integers(0, 0o7777)
xattrs = st.dictionaries(
    st.sampled_from(["user.a", "user.b", "trusted.c", "user.é"]), st.binary(max_size=100), max_size=2
)


@st.composite
def files(draw: st.DrawFn) -> File:
    size = draw(st.one_of(st.integers(0, 3 * _BLOCK), st.integers(0, 6 * MIB)))
    runs = []
    for _ in range(draw(st.integers(0, 5)) if size else 0):
        start = draw(st.integers(0, size - 1))
        runs.append((start, draw(st.integers(1, min(size - start, 300_000)))))
    return File(size, tuple(runs), draw(modes), draw(mtimes), draw(xattrs))


symlinks = st.builds(Symlink, st.binary(min_size=1, max_size=300).map(lambda data: data.replace(b"\0", b"/")), mtimes)
leaves = st.one_of(files(), files(), symlinks, st.builds(HardLink, st.integers(0, 100)))


def directories(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.builds(Directory, st.dictionaries(names, children, max_size=6), modes, mtimes, xattrs)


trees = directories(st.recursive(leaves, directories, max_leaves=12))
limits_ = st.builds(
    Limits,
    inline_files=st.sampled_from([0, 3, 2000]),
    inline_bytes=st.sampled_from([0, MIB, 64 * MIB]),
    chunk_files=st.integers(1, 8),
    chunk_bytes=st.sampled_from([1, 100_000, MIB, 256 * MIB]),
    max_chunks=st.sampled_from([2, 7, 500]),
)


def make(path: bytes, node: Node, made: list[bytes]) -> None:
    """Make `node` at `path`; `made` are the files and symlinks there are, for hard links."""
    if isinstance(node, Directory):
        os.mkdir(path)
        for name, child in node.entries.items():
            make(os.path.join(path, name), child, made)
        for attribute, value in node.xattrs.items():
            os.setxattr(path, attribute, value)
        os.chmod(path, node.mode)
        os.utime(path, ns=(node.mtime, node.mtime))
    elif isinstance(node, HardLink):
        if made:
            os.link(made[node.index % len(made)], path, follow_symlinks=False)
    elif isinstance(node, Symlink):
        os.symlink(node.target, path)
        os.utime(path, ns=(node.mtime, node.mtime), follow_symlinks=False)
        made.append(path)
    else:
        _make_file(path, node)
        made.append(path)


def _make_file(path: bytes, node: File) -> None:
    with open(path, "wb") as file:
        file.truncate(node.size)
        for number, (start, length) in enumerate(node.runs):
            os.pwrite(file.fileno(), (bytes([number + 1]) * (length // 2) + b"data" * length)[:length], start)
    for attribute, value in node.xattrs.items():
        os.setxattr(path, attribute, value)
    os.chmod(path, node.mode)
    os.utime(path, ns=(node.mtime, node.mtime))


@pytest.fixture(params=KINDS)
def mount(request: pytest.FixtureRequest) -> Path:
    mount: Path = request.getfixturevalue(request.param)
    return mount


@EXAMPLES
@given(tree=trees, limits=limits_, reflink=st.sampled_from(["auto", "auto", "never"]))
def test_any_tree_is_forked_as_it_was(mount: Path, tree: Directory, limits: Limits, reflink: str) -> None:
    with fresh_directory(mount) as directory:
        source = directory / "source"
        make(os.fsencode(source), tree, [])
        before = times(source)

        books = fork_with_books(source, directory / "fork", limits=limits, reflink=reflink, exclude=())

        assert books.result["error"] is None
        assert books.result["files"]["total"] == len(books.files) == len(before) - 1
        assert {path: time for path, time in times(source).items() if path in before} == before
        assert_alike(source, directory / "fork")


@settings(EXAMPLES, max_examples=80)
@given(tree=trees, limits=limits_)
def test_any_tree_is_forked_by_two_children_onto_another_filesystem(
    fresh: Fresh, xfs: Path, ext4: Path, tree: Directory, limits: Limits
) -> None:
    with fresh_directory(xfs) as here, fresh_directory(ext4) as there:
        make(os.fsencode(here / "source"), tree, [])

        forked(here / "source", there / "fork", limits=limits, exclude=())

        assert_alike(here / "source", there / "fork")
