"""Sets the owner, mode, extended attributes, ACLs and times of a clone, as `cp -a` does.

The order matters. chown clears set-uid bits and capabilities, so it comes first. An ACL changes the group bits, so the
mode comes after it. Writing changes mtime, so the times come last.

Metadata that the destination cannot hold is left out where `cp -a` leaves it out, and added to `losses`. That never
widens permissions: a file without its ACL allows no more than the ACL did.
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

#: The descriptors of this process as paths (proc(5)).
_DESCRIPTORS = "/proc/self/fd"
_PERMISSIONS = 0o7777
_SET_ID = stat.S_ISUID | stat.S_ISGID
_OWNER_READS_AND_WRITES = stat.S_IRUSR | stat.S_IWUSR
#: Errnos that mean that this owner, mode or time cannot be set. EINVAL: the owner has no id in this user namespace
#: (user_namespaces(7)). EOVERFLOW: the owner has no id on this mount (mount_setattr(2), "ID-mapped mounts").
_REFUSED = frozenset({errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EOVERFLOW})
#: Filesystems that keep what they accept. Others (FUSE, CIFS, FAT) may accept an owner, mode or time and drop it.
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
#: If the mtime of a new file is a multiple of this, in nanoseconds, the filesystem may have coarse timestamps.
_COARSE = 100
#: The range of times that every filesystem can hold, in nanoseconds: signed 32-bit seconds.
_FIRST_TIME, _LAST_TIME = 0, (2**31 - 1) * 10**9
#: The result of `attributes.names_of` for a file without attributes.
_NO_ATTRIBUTES: tuple[list[str], bool] = ([], True)
_WHAT = {ACCESS_ACL: "acl", DEFAULT_ACL: "default acl"}


class Metadata:
    """Sets the metadata named in `preserve`. No other process can access the clones yet."""

    def __init__(self, preserve: Iterable[Preserve]) -> None:
        kept = frozenset(preserve)
        self.ownership = "ownership" in kept
        self.mode = "mode" in kept
        self.timestamps = "timestamps" in kept
        self.xattrs = "xattrs" in kept
        self._keeps_all = self.ownership and self.mode and self.timestamps and self.xattrs
        #: Losses that were not moved elsewhere yet.
        self.losses = Losses()
        self._umask = 0 if self.mode else _current_umask()
        #: Cached results for open source files, by descriptor: `attributes.names_of` and the access ACL.
        self._names: dict[int, tuple[Entry, tuple[list[str], bool]]] = {}
        self._acls: dict[int, tuple[Entry, bytes | None]] = {}
        #: st_dev → whether the filesystem is in `_FAITHFUL`.
        self._faithful: dict[int, bool] = {}

    def mode_to_create(self, entry: Entry, src_fd: int, *, ours: bool) -> int:
        """The permission bits with which the clone of a file is created. `ours`: the source is owned by this process.

        Until owner and ACL are set, nobody else may open it. This process must: user.* attributes cannot be set on a
        read-only file, and other processes open it to copy ranges. Raises OSError.
        """
        others = ours and self._acl_of(entry, src_fd) is None
        return entry.mode & (0o777 if others else 0o700) | _OWNER_READS_AND_WRITES

    def apply(self, fd: int, fresh: os.stat_result, entry: Entry, src_fd: int, directory: str) -> None:
        """Set the metadata of `entry` (open as `src_fd`) on the file or directory `fd`, whose status is `fresh`.

        `directory` is the relative path of the parent, for `losses`. Sets only what differs from `fresh`. Raises
        OSError.
        """
        path = directory, entry.name
        if self._needs_times_only(fresh, entry, src_fd):
            try:
                os.utime(fd, ns=(entry.atime, entry.mtime))
                return
            except OSError:  # the steps below find the loss, or raise
                pass
        owned = fresh.st_uid == entry.uid and fresh.st_gid == entry.gid
        chowned = self.ownership and not owned
        if chowned:
            owned = self._chown(fd, entry, path)
        changed, has_acl = self._apply_attributes(fd, fresh, entry, src_fd, path)
        mode = self.final_mode(entry.mode, owned=owned)
        if not self.mode and stat.S_ISDIR(entry.mode):
            mode |= fresh.st_mode & stat.S_ISGID  # inherited; see `Staging.inherit_group`
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
        """Whether only the times of a new clone are to be set. This is true of most files.

        They are owned by this process, have no attributes, and are on a filesystem that keeps what it accepts.
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
        """Set the owner, attributes and times of the symlink `entry.name` of `dir_fd`, from the one in `src_dir_fd`.

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
        # No *at call accesses the attributes of a symlink. The path through the open directory cannot be exchanged.
        source, target = f"{_DESCRIPTORS}/{src_dir_fd}/{name}", f"{_DESCRIPTORS}/{dir_fd}/{name}"
        try:
            names, _ = attributes.names_of(source, follow=False)
        except FileNotFoundError:
            if os.path.exists(_DESCRIPTORS):
                raise
            self._lose(path, "xattrs: those of a symlink cannot be copied without /proc")
            return
        for attribute in names:
            # A symlink has no ACL. `names_of` returns their names when the list is incomplete.
            if attribute not in ACLS and not attributes.copy(source, target, attribute, follow=False):
                self._lose(path, f"xattr {attribute}")

    def final_mode(self, mode: int, *, owned: bool) -> int:
        """The permission bits of the clone of a file with `mode`. `owned`: the clone has the owner of the source.

        Set-id bits are kept only with the same owner. Without `mode` in preserve, as `cp` without -p.
        """
        if not self.mode:
            return mode & 0o777 & ~self._umask
        return mode & _PERMISSIONS & ~(0 if owned else _SET_ID)

    # -- ACLs and other extended attributes

    def _acl_of(self, entry: Entry, src_fd: int) -> bytes | None:
        """The access ACL of the source file, or None. With an ACL, the group bits of the mode are its mask.

        Makes no system call if the list of attributes has no ACL, or if the mode permits only the owner. Raises
        OSError.
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
        """The names of the extended attributes of `entry`, cached for several clones while it is open.

        A change of them changes the ctime of the entry, which is checked after the clones are made.
        """
        known = self._names.get(src_fd)
        if known is None or known[0] is not entry:
            known = self._names[src_fd] = entry, attributes.names_of(src_fd, follow=True)
        return known[1]

    def _apply_attributes(
        self, fd: int, fresh: os.stat_result, entry: Entry, src_fd: int, path: _Path
    ) -> tuple[bool, bool]:
        """Copy the extended attributes. Returns whether there were any, and whether the access ACL was copied."""
        if not self.xattrs:
            return False, False
        names, complete = self._names_of(entry, src_fd)
        if not complete:
            self._lose(path, "xattrs")
        if names and fresh.st_mode & _OWNER_READS_AND_WRITES != _OWNER_READS_AND_WRITES:
            os.fchmod(fd, _OWNER_READS_AND_WRITES)  # the umask removed these bits; user.* attributes need them
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
        """Set owner and group, or else, as cp does, only the group. Returns whether both are set."""
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
        """The same as `_chown`, for a symlink."""
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
        """Set the mode. Returns False if refused; raises OSError if the entry would permit more than `mode`."""
        try:
            os.fchmod(fd, mode)
        except OSError as error:
            if error.errno not in _REFUSED or stat.S_IMODE(os.fstat(fd).st_mode) & ~mode:
                raise
            self._lose(path, "mode")
            return False
        if mode & _SET_ID:  # chmod(2) clears set-gid silently outside the group without CAP_FSETID
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
        """Set the times. Returns False if the filesystem did not keep them."""
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

    # -- filesystems that accept metadata and drop it

    def _lose_what_was_dropped(
        self, now: os.stat_result, entry: Entry, path: _Path, *, owned: bool, has_times: bool
    ) -> None:
        """Add the metadata that was set without an error, but is missing in the status `now`, to the losses."""
        if self.ownership and owned and (now.st_uid, now.st_gid) != (entry.uid, entry.gid):
            self._lose(path, "ownership")
        if has_times and _times(now) != (entry.atime, entry.mtime):
            self._lose(path, "timestamps")

    def _is_faithful(self, dev: int, fd: int) -> bool:
        known = self._faithful.get(dev)
        if known is None:
            known = self._faithful[dev] = syscalls.filesystem_type(fd, dev) in _FAITHFUL
        return known

    def _lose(self, path: _Path, what: str) -> None:
        self.losses.add_loss(join(*path), what)


#: The relative path of a directory and a name in it, joined only when a message needs them.
_Path = tuple[str, str]


def doing(error: OSError) -> str:
    """The beginning of the message for an OSError of `apply` or `apply_to_symlink`."""
    return f"setting the attribute {error.attribute}" if isinstance(error, XattrError) else "setting the metadata"


def _holds_times(fresh: os.stat_result, entry: Entry) -> bool:
    """Whether the filesystem of a new entry with the status `fresh` certainly keeps the times of `entry`."""
    return (
        fresh.st_mtime_ns % _COARSE != 0
        and _FIRST_TIME <= entry.atime <= _LAST_TIME
        and _FIRST_TIME <= entry.mtime <= _LAST_TIME
    )


def _times(status: os.stat_result) -> tuple[int, int]:
    return status.st_atime_ns, status.st_mtime_ns


def _current_umask() -> int:
    """The umask of this process, from /proc/self/status, or, without /proc, by setting it for a moment."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
