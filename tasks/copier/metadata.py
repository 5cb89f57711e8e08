"""Giving a clone the source's owner, mode, extended attributes, ACLs and times, as `cp -a` does.

Order matters: chown clears set-uid bits and capabilities, so it comes first; a new ACL changes the group bits, so
the mode follows it; everything touches ctime, and writing touches mtime, so the times come last.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable

from tasks.copier.options import Preserve
from tasks.copier.walk import Entry

_PERMISSIONS = 0o7777
_SET_ID = stat.S_ISUID | stat.S_ISGID
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")
#: XFS shows root the same ACLs a second time, under the names it stores them by (attr's /etc/xattr.conf skips them).
XFS_ACLS = ("trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT")
#: Attributes that only a privileged caller may set, or that only some filesystems know: left out where refused.
_MAY_BE_REFUSED = frozenset({errno.EPERM, errno.EACCES})
_NOT_KNOWN_HERE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


class Metadata:
    """Applies what `preserve` names. All descriptors are of fresh entries that nobody else can reach yet."""

    def __init__(self, preserve: Iterable[Preserve]) -> None:
        kept = frozenset(preserve)
        self.ownership = "ownership" in kept
        self.mode = "mode" in kept
        self.timestamps = "timestamps" in kept
        self.xattrs = "xattrs" in kept
        self._umask = 0 if self.mode else _current_umask()
        #: The names of the attributes of open source files, by their descriptors.
        self._names: dict[int, tuple[Entry, list[str]]] = {}

    def apply(self, fd: int, fresh: os.stat_result, entry: Entry, src_fd: int) -> None:
        """Give the file or directory `fd`, whose status is `fresh`, the metadata of `entry`, open as `src_fd`.

        Calls the kernel only for what differs from `fresh`. Raises OSError.
        """
        owned = fresh.st_uid == entry.uid and fresh.st_gid == entry.gid
        chowned = self.ownership and not owned
        if chowned:
            owned = _chown(fd, entry.uid, entry.gid)
        changed = chowned | (self.xattrs and self._copy_xattrs(src_fd, fd, self._names_of(entry, src_fd), follow=True))
        mode = self.final_mode(entry.mode, owned=owned)
        if changed or stat.S_IMODE(fresh.st_mode) != mode:
            os.fchmod(fd, mode)
        if self.timestamps:
            os.utime(fd, ns=(entry.atime, entry.mtime))

    def apply_to_symlink(self, dir_fd: int, entry: Entry, src_dir_fd: int) -> None:
        """Give the symlink `entry.name` of `dir_fd` the owner, attributes and times of that in `src_dir_fd`."""
        name = entry.name
        if self.ownership:
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if status.st_uid != entry.uid or status.st_gid != entry.gid:
                _chown_symlink(dir_fd, name, entry.uid, entry.gid)
        if self.xattrs:
            # No *at call reaches a symlink's attributes; the magic link of the directory is race-free.
            source, target = f"/proc/self/fd/{src_dir_fd}/{name}", f"/proc/self/fd/{dir_fd}/{name}"
            self._copy_xattrs(source, target, _xattr_names(source, follow=False), follow=False)
        if self.timestamps:
            os.utime(name, ns=(entry.atime, entry.mtime), dir_fd=dir_fd, follow_symlinks=False)

    def final_mode(self, mode: int, *, owned: bool) -> int:
        """The permission bits that a clone of `mode` gets.

        Set-id bits go only with the owner they were meant for. Without `mode` in preserve: as `cp` without -p.
        """
        if not self.mode:
            return mode & 0o777 & ~self._umask
        return mode & _PERMISSIONS & ~(0 if owned else _SET_ID)

    def _names_of(self, entry: Entry, src_fd: int) -> list[str]:
        """The names of the extended attributes of `entry`, which several clones may ask for while it is open.

        Whoever changes them changes the entry's ctime, which is compared when the clones are made.
        """
        known = self._names.get(src_fd)
        if known is None or known[0] is not entry:
            known = self._names[src_fd] = entry, _xattr_names(src_fd, follow=True)
        return known[1]

    def _copy_xattrs(self, source: int | str, target: int | str, names: list[str], *, follow: bool) -> bool:
        """Copy the extended attributes of these names; whether there were any."""
        for name in names:
            if name in XFS_ACLS or (name in _ACLS and not self.mode):
                continue
            try:
                value = os.getxattr(source, name, follow_symlinks=follow)
                os.setxattr(target, name, value, follow_symlinks=follow)
            except OSError as error:
                if not (error.errno in _NOT_KNOWN_HERE or (_is_privileged(name) and error.errno in _MAY_BE_REFUSED)):
                    raise
        return bool(names)


def _xattr_names(source: int | str, *, follow: bool) -> list[str]:
    try:
        return os.listxattr(source, follow_symlinks=follow)
    except OSError as error:
        if error.errno in _NOT_KNOWN_HERE:
            return []
        raise


def _is_privileged(name: str) -> bool:
    return not name.startswith(("user.", *_ACLS))


def drop_inherited_acls(fd: int) -> None:
    """Take from a fresh directory the ACLs that its parent's default ACL gave it, so that its entries get none."""
    try:
        names = os.listxattr(fd)
    except OSError as error:
        if error.errno in _NOT_KNOWN_HERE:
            return
        raise
    for name in names:
        if name in _ACLS:
            os.removexattr(fd, name)


def _chown(fd: int, uid: int, gid: int) -> bool:
    """Set owner and group; False where an ordinary user may not set both (the group alone is tried, as cp does)."""
    try:
        os.fchown(fd, uid, gid)
    except PermissionError:
        try:
            os.fchown(fd, -1, gid)
        except PermissionError:
            return False
        return os.fstat(fd).st_uid == uid
    return True


def _chown_symlink(dir_fd: int, name: str, uid: int, gid: int) -> None:
    for owner in (uid, -1):
        try:
            os.chown(name, owner, gid, dir_fd=dir_fd, follow_symlinks=False)
            return
        except PermissionError:
            continue


def _current_umask() -> int:
    """This process's umask, without setting it (proc(5), status)."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
