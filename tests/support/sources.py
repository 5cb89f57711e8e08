"""Source directories with every kind of entry and metadata that a fork must carry over."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

from tests.support.engine.forks import MIB
from tests.support.guests import GuestSizes, make_guest, make_sparse_file

ACCESS_ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"
CAPABILITY = "security.capability"

#: <linux/posix_acl_xattr.h>: version, then tag, permissions and id of each entry, little-endian.
_ACL_HEADER = struct.pack("<I", 2)
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
#: <linux/capability.h>: VFS_CAP_REVISION_2 and effective, then permitted and inheritable; here CAP_NET_BIND_SERVICE.
CAPABILITY_TO_BIND = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
#: VFS_CAP_REVISION_3: the same, only for a user namespace whose root is the user 4321.
CAPABILITY_IN_NAMESPACE = struct.pack("<6I", 0x03000001, 1 << 10, 0, 0, 0, 4321)

#: Timestamps rounded to more than 200 ns would be noticed: no filesystem here does that.
OLD_NS = 1_234_567_890_123_456_789

#: The largest size of a file on XFS, in bytes, rounded down to blocks.
HUGE = 2**63 - 4096


def acl(owner: int, group: int, other: int, *, users: Iterable[tuple[int, int]] = ()) -> bytes:
    """An ACL in the format of the kernel's attribute; `users` are (uid, permissions)."""
    entries = [(_USER_OBJ, owner, _NO_ID), *((_USER, mode, uid) for uid, mode in sorted(users))]
    entries += [(_GROUP_OBJ, group, _NO_ID), (_GROUP, 5, 1234), (_MASK, 7, _NO_ID), (_OTHER, other, _NO_ID)]
    return _ACL_HEADER + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def age(path: Path, *, mtime: int = OLD_NS) -> None:
    """Set the times of the entry at `path`, also of a symlink. atime is after mtime, so relatime does not update it."""
    os.utime(path, ns=(mtime + 86_400_000_000_001, mtime), follow_symlinks=False)


def make_images(directory: Path) -> None:
    """Files with holes at every position, and sizes that are not a multiple of a block."""
    make_sparse_file(directory / "scattered.raw", 16 * MIB + 4321, 3 * MIB, seed=1)
    make_sparse_file(directory / "all-hole.raw", 64 * MIB + 1, 0)
    make_sparse_file(directory / "no-hole.raw", 2 * MIB + 7, 4 * MIB, seed=2)
    (directory / "empty").touch()
    (directory / "one-byte").write_bytes(b"1")
    for name, size, at in (("hole-first", 5 * MIB + 3, 5 * MIB), ("hole-last", 5 * MIB + 3, 0)):
        with (directory / name).open("wb") as file:
            os.pwrite(file.fileno(), b"data", at)
            os.truncate(file.fileno(), size)


def make_names(directory: Path) -> None:
    """Names that are hard to preserve: not UTF-8, of 255 bytes, with every unusual character."""
    for name in (
        b"not-utf8-\xff\xfe",
        b"n" * 255,
        b" ",
        b"line\nbreak",
        b'quote"\\',
        b"-rf",
        b"\xf0\x9f\x90\xa7",
        b"\x01",
    ):
        Path(os.fsdecode(os.path.join(os.fsencode(directory), name))).write_bytes(name)


def make_links(directory: Path) -> None:
    """Hard links within and across directories, of files and of a symlink; symlinks of every kind."""
    (directory / "a").mkdir()
    (directory / "b" / "c").mkdir(parents=True)
    (directory / "a" / "first").write_bytes(b"three names")
    os.link(directory / "a" / "first", directory / "a" / "second")
    os.link(directory / "a" / "first", directory / "b" / "c" / "third")
    (directory / "relative").symlink_to("a/first")
    (directory / "dangling").symlink_to("no/such/place")
    (directory / "absolute").symlink_to("/etc/hostname")
    (directory / "to-directory").symlink_to("b")
    (directory / "loop").symlink_to("loop")
    os.symlink(b"target-\xff" + b"x" * 900, os.fsencode(directory / "long"))
    os.link(directory / "dangling", directory / "b" / "dangling-too", follow_symlinks=False)


def make_metadata(directory: Path) -> None:
    """Modes, owners, attributes, ACLs, capabilities and times. As root only."""
    for mode in (0o000, 0o400, 0o755, 0o4755, 0o2755, 0o6711, 0o1644, 0o777):
        path = directory / f"mode-{mode:o}"
        path.write_bytes(b"x")
        path.chmod(mode)
    for mode in (0o000, 0o555, 0o700, 0o2775, 0o1777, 0o3770):
        path = directory / f"directory-{mode:o}"
        path.mkdir()
        (path / "file").write_bytes(b"x")
        path.chmod(mode)
    owned = directory / "set-uid-of-another"
    owned.write_bytes(b"x")
    os.chown(owned, 1234, 5678)
    owned.chmod(0o6755)
    (directory / "link-of-another").symlink_to("nowhere")
    os.chown(directory / "link-of-another", 1234, 5678, follow_symlinks=False)
    attributed = directory / "attributed"
    attributed.write_bytes(b"x")
    os.setxattr(attributed, "user.origin", b"bytes\0and\xff more")
    os.setxattr(attributed, "user.empty", b"")
    os.setxattr(attributed, "trusted.snapshot", b"7")
    os.setxattr(attributed, ACCESS_ACL, acl(6, 4, 0, users=[(1234, 6), (4321, 4)]))
    capable = directory / "capable"
    capable.write_bytes(b"x")
    os.chown(capable, 1234, 5678)
    os.setxattr(capable, CAPABILITY, CAPABILITY_TO_BIND)
    inheriting = directory / "inheriting"
    inheriting.mkdir()
    os.setxattr(inheriting, DEFAULT_ACL, acl(7, 5, 0, users=[(4321, 7)]))
    os.setxattr(inheriting, ACCESS_ACL, acl(7, 5, 1, users=[(1234, 7)]))
    os.setxattr(inheriting, "user.kind", b"directory")
    (inheriting / "child").write_bytes(b"has an ACL of its parent")
    (inheriting / "plain").write_bytes(b"has none")
    os.removexattr(inheriting / "plain", ACCESS_ACL)
    (inheriting / "below").mkdir()


def make_everything(directory: Path) -> Path:
    """All of the above, a guest's files, an empty directory, a deep one; all times are old."""
    make_guest(directory, GuestSizes(overlay=16 * MIB, overlay_data=2 * MIB, memory=8 * MIB, memory_data=3 * MIB))
    for name, make in (("images", make_images), ("names", make_names), ("links", make_links), ("meta", make_metadata)):
        (directory / name).mkdir()
        make(directory / name)
    (directory / "void").mkdir()
    (directory / "/".join(f"level-{n}" for n in range(30))).mkdir(parents=True)
    for parent, directories, files in os.walk(directory, topdown=False):
        for n, name in enumerate(directories + files):
            age(Path(parent, name), mtime=OLD_NS + n * 1_000_000_001)
    directory.chmod(0o2751)
    age(directory)
    return directory


def make_huge_files(path: Path) -> Path:
    """A directory of three files without data, whose sizes exceed 63 bits together."""
    path.mkdir()
    for n in range(3):
        (path / f"disk-{n}").touch()
        os.truncate(path / f"disk-{n}", HUGE)
    return path
