"""Giving a clone the source's owner, mode, extended attributes, ACLs and times, as `cp -a` does.

Order matters: chown clears set-uid bits and capabilities, so it comes first; a new ACL changes the group bits, so
the mode follows it; everything touches ctime, and writing touches mtime, so the times come last.

What the destination cannot hold is passed over where `cp -a` passes it over, and noted in `losses`. Rights are never
wider for it: without its ACL a file gets no more than the ACL gave.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress

from tasks.copier.clone import attributes
from tasks.copier.clone.acl import ACCESS_ACL, ACLS, DEFAULT_ACL, mode_without_acl
from tasks.copier.clone.attributes import XFS_ACLS, XattrError
from tasks.copier.kernel import syscalls
from tasks.copier.metadata_losses import Losses
from tasks.copier.options import Preserve
from tasks.copier.source.walk import Entry, join

#: Where this process finds its own descriptors as paths (proc(5)).
_DESCRIPTORS = "/proc/self/fd"
_PERMISSIONS = 0o7777
_SET_ID = stat.S_ISUID | stat.S_ISGID
_OWNER_READS_AND_WRITES = stat.S_IRUSR | stat.S_IWUSR
#: How a filesystem, or the kernel, says that this owner, mode or time cannot be set. EINVAL: an owner that has no
#: number in this user namespace (user_namespaces(7)).
_REFUSED = frozenset({errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
#: Filesystems that hold what they accept. Others (FUSE, CIFS, FAT) may accept an owner, a mode or a time and drop it.
_FAITHFUL = frozenset(
    {
        syscalls.XFS,
        syscalls.BTRFS,
        syscalls.EXT4,
        syscalls.ZFS,
        syscalls.TMPFS,
        syscalls.RAMFS,
        syscalls.F2FS,
        syscalls.OVERLAYFS,
    }
)
#: A fresh file whose time is a multiple of so many nanoseconds may be on a filesystem that keeps no finer times.
_COARSE = 100
#: Times that every filesystem holds, in nanoseconds: others are cut to what 32 bits of seconds hold.
_FIRST_TIME, _LAST_TIME = 0, (2**31 - 1) * 10**9
#: What `attributes.names_of` answers for a file that has none.
_NO_ATTRIBUTES: tuple[list[str], bool] = ([], True)
_WHAT = {ACCESS_ACL: "acl", DEFAULT_ACL: "default acl"}


class Metadata:
    """Applies what `preserve` names. All descriptors are of fresh entries that nobody else can reach yet."""

    def __init__(self, preserve: Iterable[Preserve]) -> None:
        kept = frozenset(preserve)
        self.ownership = "ownership" in kept
        self.mode = "mode" in kept
        self.timestamps = "timestamps" in kept
        self.xattrs = "xattrs" in kept
        self._keeps_all = self.ownership and self.mode and self.timestamps and self.xattrs
        #: What could not be held since somebody moved the losses from here.
        self.losses = Losses()
        self._umask = 0 if self.mode else _current_umask()
        #: What is known of open source files, by their descriptors: the names of their attributes, and whether these
        #: are all; their access ACLs.
        self._names: dict[int, tuple[Entry, tuple[list[str], bool]]] = {}
        self._acls: dict[int, tuple[Entry, bytes | None]] = {}
        #: Whether the filesystem with this st_dev holds what it accepts.
        self._faithful: dict[int, bool] = {}

    def mode_to_create(self, entry: Entry, src_fd: int, *, ours: bool) -> int:
        """The permission bits that the clone of a file is created with; `ours`: its owner is this process.

        Until owner and ACL are right, nobody but us gets in. We do: a read-only file takes no user.* attributes, and
        no second process to copy a range of it. Raises OSError.
        """
        others = ours and self._acl_of(entry, src_fd) is None
        return entry.mode & (0o777 if others else 0o700) | _OWNER_READS_AND_WRITES

    def apply(self, fd: int, fresh: os.stat_result, entry: Entry, src_fd: int, directory: str) -> None:
        """Give the file or directory `fd`, whose status is `fresh`, the metadata of `entry`, open as `src_fd`.

        `directory` is the relative path of the directory that holds the entry. Calls the kernel only for what differs
        from `fresh`. Raises OSError.
        """
        path = directory, entry.name
        if self._needs_times_only(fresh, entry, src_fd):
            try:
                os.utime(fd, ns=(entry.atime, entry.mtime))
                return
            except OSError:  # the long way says what is lost, or raises
                pass
        owned = fresh.st_uid == entry.uid and fresh.st_gid == entry.gid
        chowned = self.ownership and not owned
        if chowned:
            owned = self._chown(fd, entry, path)
        changed, has_acl = self._apply_attributes(fd, fresh, entry, src_fd, path)
        mode = self.final_mode(entry.mode, owned=owned)
        acl = None if has_acl else self._acl_of(entry, src_fd)
        if acl is not None:
            mode = mode_without_acl(mode, acl)
        has_mode = True
        if chowned or changed or stat.S_IMODE(fresh.st_mode) != mode:
            has_mode = self._chmod(fd, mode, path)
        if self.mode and not owned and entry.mode & _SET_ID:
            self._lose_set_id(entry.mode & _SET_ID, path)
        has_times = self.timestamps and self._set_times(fd, fresh, entry, path)
        if not self._is_faithful(fresh.st_dev, fd):
            now = os.fstat(fd)
            if self.mode and has_mode and stat.S_IMODE(now.st_mode) != mode:
                self._lose(path, "mode")
            self._lose_what_was_dropped(now, entry, path, owned=owned, has_times=has_times)

    def _needs_times_only(self, fresh: os.stat_result, entry: Entry, src_fd: int) -> bool:
        """Whether a fresh clone has all but its times, which its filesystem holds: a file of ours without attributes.

        Most are such files.
        """
        return (
            self._keeps_all
            and fresh.st_mode == entry.mode
            and fresh.st_uid == entry.uid
            and fresh.st_gid == entry.gid
            and fresh.st_mtime_ns % _COARSE != 0
            and _FIRST_TIME <= entry.atime <= _LAST_TIME
            and _FIRST_TIME <= entry.mtime <= _LAST_TIME
            and self._faithful.get(fresh.st_dev, False)
            and self._names_of(entry, src_fd) == _NO_ATTRIBUTES
        )

    def apply_to_symlink(self, dir_fd: int, entry: Entry, src_dir_fd: int, directory: str) -> None:
        """Give the symlink `entry.name` of `dir_fd` the owner, attributes and times of that in `src_dir_fd`.

        `directory` is the relative path of both directories. Raises OSError.
        """
        name, path = entry.name, (directory, entry.name)
        fresh = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        owned = fresh.st_uid == entry.uid and fresh.st_gid == entry.gid
        if self.ownership and not owned:
            owned = self._chown_symlink(dir_fd, entry, path)
        if self.xattrs:
            self._copy_symlink_attributes(dir_fd, name, src_dir_fd, path)
        has_times = self.timestamps
        if has_times:
            try:
                os.utime(name, ns=(entry.atime, entry.mtime), dir_fd=dir_fd, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                has_times = False
                self._lose(path, "timestamps")
        if not (_holds_times(fresh, entry) and self._is_faithful(fresh.st_dev, dir_fd)):
            now = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            self._lose_what_was_dropped(now, entry, path, owned=owned, has_times=has_times)

    def _copy_symlink_attributes(self, dir_fd: int, name: str, src_dir_fd: int, path: _Path) -> None:
        # No *at call reaches a symlink's attributes; the magic link of the directory is race-free.
        source, target = f"{_DESCRIPTORS}/{src_dir_fd}/{name}", f"{_DESCRIPTORS}/{dir_fd}/{name}"
        try:
            names, _ = attributes.names_of(source, follow=False)
        except FileNotFoundError:
            if os.path.exists(_DESCRIPTORS):
                raise
            self._lose(path, "xattrs: without /proc those of a symlink are out of reach")
            return
        for attribute in names:
            # A symlink has no ACL: where they are named, it is for want of a list.
            if attribute not in ACLS and not attributes.copy(source, target, attribute, follow=False):
                self._lose(path, f"xattr {attribute}")

    def final_mode(self, mode: int, *, owned: bool) -> int:
        """The permission bits that a clone of `mode` gets.

        Set-id bits go only with the owner they were meant for. Without `mode` in preserve: as `cp` without -p.
        """
        if not self.mode:
            return mode & 0o777 & ~self._umask
        return mode & _PERMISSIONS & ~(0 if owned else _SET_ID)

    # -- ACLs and other extended attributes

    def _acl_of(self, entry: Entry, src_fd: int) -> bytes | None:
        """The access ACL of the source file, or None: with one, the group bits of its mode are the ACL's mask.

        Costs no call where the attributes are listed anyway and it has none, nor where the mode lets in nobody but
        the owner. Raises OSError.
        """
        if self.xattrs:
            if ACCESS_ACL not in self._names_of(entry, src_fd)[0]:
                return None
        elif not entry.mode & 0o077:
            return None
        known = self._acls.get(src_fd)
        if known is None or known[0] is not entry:
            known = self._acls[src_fd] = entry, attributes.access_acl(src_fd)
        return known[1]

    def _names_of(self, entry: Entry, src_fd: int) -> tuple[list[str], bool]:
        """The names of the extended attributes of `entry`, which several clones may ask for while it is open.

        A process that changes them changes the entry's ctime, which is compared when the clones are made.
        """
        known = self._names.get(src_fd)
        if known is None or known[0] is not entry:
            known = self._names[src_fd] = entry, attributes.names_of(src_fd, follow=True)
        return known[1]

    def _apply_attributes(
        self, fd: int, fresh: os.stat_result, entry: Entry, src_fd: int, path: _Path
    ) -> tuple[bool, bool]:
        """Copy the extended attributes: whether there were any, and whether the access ACL is among them."""
        if not self.xattrs:
            return False, False
        names, complete = self._names_of(entry, src_fd)
        if not complete:
            self._lose(path, "xattrs")
        if names and fresh.st_mode & _OWNER_READS_AND_WRITES != _OWNER_READS_AND_WRITES:
            os.fchmod(fd, _OWNER_READS_AND_WRITES)  # the umask took it: it takes no user.* attributes like this
        has_acl = False
        for name in names:
            if name in XFS_ACLS or (name in ACLS and not self.mode):
                continue
            if not attributes.copy(src_fd, fd, name, follow=True):
                self._lose(path, _WHAT.get(name, f"xattr {name}"))
            elif name == ACCESS_ACL:
                has_acl = True
        return bool(names), has_acl

    # -- owner, mode and times

    def _chown(self, fd: int, entry: Entry, path: _Path) -> bool:
        """Set owner and group; False where both may not be set (the group alone is tried, as cp does)."""
        for uid in (entry.uid, -1):
            try:
                os.fchown(fd, uid, entry.gid)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
            else:
                if uid != -1 or os.fstat(fd).st_uid == entry.uid:
                    return True
                break
        self._lose(path, "ownership")
        return False

    def _chown_symlink(self, dir_fd: int, entry: Entry, path: _Path) -> bool:
        """As `_chown`, of a symlink."""
        for uid in (entry.uid, -1):
            try:
                os.chown(entry.name, uid, entry.gid, dir_fd=dir_fd, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
            else:
                if uid != -1:
                    return True
                break
        status = os.stat(entry.name, dir_fd=dir_fd, follow_symlinks=False)
        owned = (status.st_uid, status.st_gid) == (entry.uid, entry.gid)
        if not owned:
            self._lose(path, "ownership")
        return owned

    def _chmod(self, fd: int, mode: int, path: _Path) -> bool:
        """Set the mode; False where that is refused. Raises OSError where that would leave the entry open to more."""
        try:
            os.fchmod(fd, mode)
        except OSError as error:
            if error.errno not in _REFUSED or stat.S_IMODE(os.fstat(fd).st_mode) & ~mode:
                raise
            self._lose(path, "mode")
            return False
        if mode & _SET_ID:  # chmod(2): without CAP_FSETID and outside the group, set-gid goes without a word
            lost = mode & _SET_ID & ~os.fstat(fd).st_mode
            self._lose_set_id(lost, path)
            return not lost
        return True

    def _lose_set_id(self, bits: int, path: _Path) -> None:
        if bits & stat.S_ISUID:
            self._lose(path, "mode: set-uid")
        if bits & stat.S_ISGID:
            self._lose(path, "mode: set-gid")

    def _set_times(self, fd: int, fresh: os.stat_result, entry: Entry, path: _Path) -> bool:
        """Set the times; False where they are not held."""
        held = True
        try:
            os.utime(fd, ns=(entry.atime, entry.mtime))
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            held = False
        else:
            if not _holds_times(fresh, entry):
                held = _times(os.fstat(fd)) == (entry.atime, entry.mtime)
        if not held:
            self._lose(path, "timestamps")
        return held

    # -- filesystems that accept what they do not hold

    def _lose_what_was_dropped(
        self, now: os.stat_result, entry: Entry, path: _Path, *, owned: bool, has_times: bool
    ) -> None:
        """Note what was set without an error, and is not there `now`."""
        if self.ownership and owned and (now.st_uid, now.st_gid) != (entry.uid, entry.gid):
            self._lose(path, "ownership")
        if has_times and _times(now) != (entry.atime, entry.mtime):
            self._lose(path, "timestamps")

    def _is_faithful(self, dev: int, fd: int) -> bool:
        known = self._faithful.get(dev)
        if known is None:
            known = self._faithful[dev] = syscalls.filesystem_type(fd) in _FAITHFUL
        return known

    def _lose(self, path: _Path, what: str) -> None:
        self.losses.lose(join(*path), what)


#: A directory's relative path and a name in it: joined only where a message needs it.
_Path = tuple[str, str]


def doing(error: OSError) -> str:
    """What failed, for a message, where `apply` or `apply_to_symlink` raised `error`."""
    return f"setting its attribute {error.attribute}" if isinstance(error, XattrError) else "setting its metadata"


def _holds_times(fresh: os.stat_result, entry: Entry) -> bool:
    """Whether a filesystem on which an entry was just made, with the status `fresh`, surely holds the entry's times."""
    return (
        fresh.st_mtime_ns % _COARSE != 0
        and _FIRST_TIME <= entry.atime <= _LAST_TIME
        and _FIRST_TIME <= entry.mtime <= _LAST_TIME
    )


def _times(status: os.stat_result) -> tuple[int, int]:
    return status.st_atime_ns, status.st_mtime_ns


def _current_umask() -> int:
    """This process's umask: from proc(5), status, or, where that is missing, by setting it for a moment."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
