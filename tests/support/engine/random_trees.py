"""Directory trees that hypothesis generates, and their files on a real filesystem."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from hypothesis import strategies as st

from tests.support.engine.forks import MIB

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
    #: The index of one of the files made so far, modulo their number.
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


def make(path: bytes, node: Node, made: list[bytes]) -> None:
    """Make `node` at `path`; `made` are the files and symlinks made so far, for hard links."""
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
