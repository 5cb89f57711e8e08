"""A description of a directory tree, with which two trees, or one tree at two times, can be compared."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.extents import data_extents

#: Content is compared in blocks of this many bytes, and blocks of zeros are skipped: a hole and written zeros are the
#: same content, and a sparse file of terabytes is read quickly.
_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """All properties of an entry that a clone must preserve. Two clones are equal when their entries are equal."""

    kind: str  #: "file", "directory", "symlink", "socket", "fifo", "block" or "char"
    mode: int  #: permission bits, with set-uid, set-gid and sticky
    uid: int
    gid: int
    size: int | None  #: None for directories: their size depends on the filesystem
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...]  #: with ACLs (system.posix_acl_*), sorted by name
    target: bytes | None  #: of a symlink
    sha256: str | None  #: of a regular file's content
    links: tuple[bytes, ...]  #: all paths in the tree with this inode, if it has several


def snapshot(root: str | bytes | os.PathLike[str]) -> dict[bytes, Entry]:
    """Every entry below `root` by its relative path, and `root` itself as b"."."""
    top = os.fsencode(root)
    statuses = dict(_walk(top))
    links: dict[tuple[int, int], list[bytes]] = {}
    for path, status in sorted(statuses.items()):
        if not stat.S_ISDIR(status.st_mode):
            links.setdefault((status.st_dev, status.st_ino), []).append(path)
    return {
        path: _entry(os.path.join(top, path), status, links.get((status.st_dev, status.st_ino), []))
        for path, status in sorted(statuses.items())
    }


def content_sha256(path: str | bytes | os.PathLike[str]) -> str:
    """A digest that is equal for files of equal content, wherever their holes are."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(str(os.fstat(file.fileno()).st_size).encode())
        done = 0
        for start, end in data_extents(path):
            position = max(done, start // _BLOCK * _BLOCK)
            while position < end:
                block = os.pread(file.fileno(), _BLOCK, position)
                if not block:  # truncated in the meantime: the size is already in the digest
                    break
                if block != _ZEROS[: len(block)]:
                    digest.update(b"@%d:" % position)
                    digest.update(block)
                position += len(block)
            done = position
    return digest.hexdigest()


def _walk(top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    yield b".", os.lstat(top)
    pending = [b""]
    while pending:
        directory = pending.pop()
        with os.scandir(os.path.join(top, directory)) as entries:
            for entry in entries:
                path = os.path.join(directory, entry.name)
                yield path, entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)


def _entry(path: bytes, status: os.stat_result, links: list[bytes]) -> Entry:
    kind = _kind(status.st_mode)
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=None if kind == "directory" else status.st_size,
        mtime_ns=status.st_mtime_ns,
        xattrs=_xattrs(path),
        target=os.readlink(path) if kind == "symlink" else None,
        sha256=content_sha256(path) if kind == "file" else None,
        links=tuple(links) if len(links) > 1 else (),
    )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symlink",
        stat.S_IFSOCK: "socket",
        stat.S_IFIFO: "fifo",
        stat.S_IFBLK: "block",
        stat.S_IFCHR: "char",
    }
    return kinds[stat.S_IFMT(mode)]


def _xattrs(path: bytes) -> tuple[tuple[bytes, bytes], ...]:
    names = os.listxattr(path, follow_symlinks=False)
    return tuple(sorted((os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)) for name in names))
