"""Opens the source and the parent of the destination, and nothing outside the roots."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.kernel import syscalls
from tasks.copier.source.selection import MARKER_NAME, STAGING_NAME

#: PATH_MAX of the kernel, including the final NUL. Longer paths cannot be opened.
PATH_MAX = 4096
_NAME_MAX = 255
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: Length of a path of `..` below PATH_MAX. Only a path through symlinks leads to a directory that is so deep.
_LONG_WAY_UP = 3000
_STAGING_REFUSED = "{name} looks like a staging name, which gc may remove; use another name"


class Parent(NamedTuple):
    """The open directory that holds a path, and the path's name in it. As a context manager it closes the directory."""

    fd: int
    name: str

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, *_: object) -> None:
        syscalls.release(self.fd)


@dataclass(frozen=True)
class Roots:
    """The directories within which requests are served. Without any, only file permissions are a limit."""

    paths: tuple[str, ...] = ()

    def open_source(self, path: str, what: str = "source") -> int:
        """Open a directory to read from. Returns its descriptor, which the caller closes.

        `what` is its name in error messages. Raises ForkError: invalid_request (also for a path through staging),
        outside_roots, source_not_found, source_not_directory, permission_denied.
        """
        path = normal_path(path, what)
        try:
            return _outside_staging(self._open(path), path, "source")
        except OSError as error:
            if error.errno == errno.ENOENT:
                message = f"the {what} does not exist"
                raise ForkError(Code.SOURCE_NOT_FOUND, message, path, error.errno) from None
            if error.errno == errno.ENOTDIR:
                message = f"the {what} is not a directory"
                raise ForkError(Code.SOURCE_NOT_DIRECTORY, message, path, error.errno) from None
            raise self._escape_or_fault(error, path) from None

    def open_parent(self, path: str) -> Parent:
        """Open the directory that holds the destination, or will hold it. Use the result in a `with` statement.

        Raises ForkError: invalid_request (also for a parent that does not exist or lies in staging), outside_roots,
        destination_exists (a root itself), permission_denied.
        """
        path = normal_path(path, "destination")
        parent, name = os.path.split(path)
        self._root_of(path)
        if not name or path in self.paths:
            raise ForkError(Code.DESTINATION_EXISTS, "the destination exists; choose another path", path, errno.EEXIST)
        if len(os.fsencode(name)) > _NAME_MAX:
            message = f"the destination's name is longer than {_NAME_MAX} bytes"
            raise ForkError(Code.INVALID_REQUEST, message, path, errno.ENAMETOOLONG)
        try:
            return Parent(_outside_staging(self._open(parent), path, "destination"), name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                message = f"the parent directory of the destination does not exist; create {parent} first"
                raise ForkError(Code.INVALID_REQUEST, message, path, error.errno) from None
            raise self._escape_or_fault(error, path) from None

    def _open(self, path: str) -> int:
        root = self._root_of(path)
        if root is None:
            return os.open(path, _DIRECTORY)
        root_fd = os.open(root, _DIRECTORY)
        below = path[len(root) :].strip("/")
        if not below:
            return root_fd
        try:
            return syscalls.openat2(
                root_fd, below, _DIRECTORY, syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS
            )
        finally:
            os.close(root_fd)

    def _root_of(self, path: str) -> str | None:
        """The innermost root that contains `path`, compared as text; None if there are no roots."""
        if not self.paths:
            return None
        holding = [root for root in self.paths if path == root or path.startswith(root.rstrip("/") + "/")]
        if not holding:
            message = f"the path is outside the roots of this worker ({':'.join(self.paths)})"
            raise ForkError(Code.OUTSIDE_ROOTS, message, path)
        return max(holding, key=len)

    def _escape_or_fault(self, error: OSError, path: str) -> ForkError:
        if error.errno == errno.ELOOP and not self.paths:
            return ForkError(Code.INVALID_REQUEST, "a symlink in the path leads to itself", path, error.errno)
        if error.errno in (errno.EXDEV, errno.ELOOP):
            # RESOLVE_BENEATH fails with EXDEV for every step out of the root, also through an absolute symlink.
            return ForkError(Code.OUTSIDE_ROOTS, "a symlink in the path leads out of the root", path, error.errno)
        if error.errno == errno.ENAMETOOLONG:
            return ForkError(
                Code.INVALID_REQUEST, f"a name in the path is longer than {_NAME_MAX} bytes", path, error.errno
            )
        return from_oserror(error, "opening the directory", path)


def normal_path(path: str, field: str) -> str:
    """`path` without doubled slashes, `.` and a trailing slash. Does not access the filesystem.

    `field` is the name of the path in error messages. Raises ForkError invalid_request for a path that is not absolute,
    contains `..`, cannot be passed to the kernel, or has a component that looks like a staging name: `gc` would remove
    a fork that is published there.
    """

    def refuse(message: str) -> ForkError:
        return ForkError(Code.INVALID_REQUEST, f"{field}: {message}", path)

    if not path.startswith("/"):
        raise refuse("the path is not absolute; begin it with '/'")
    if "\0" in path:
        raise refuse("the path contains a NUL character; remove it")
    if ".." in path.split("/"):
        raise refuse("the path contains '..'; use a path without it")
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise refuse("the path contains a surrogate character that cannot be encoded; remove it") from None
    if length >= PATH_MAX:
        raise refuse(f"the path has {length} bytes; at most {PATH_MAX - 1} are allowed")
    if (name := _staging_name_in(path)) is not None:
        raise refuse(_STAGING_REFUSED.format(name=name))
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _staging_name_in(path: str) -> str | None:
    """The first component of `path` that looks like a staging name, ignoring case: some filesystems ignore it too."""
    folded = path.lower()
    if "/.forkvm-" not in folded:  # a fast test for nearly all paths; a campaign has up to a million
        return None
    parts = ((part, part.lower()) for part in path.split("/"))
    return next((part for part, low in parts if STAGING_NAME.fullmatch(low) or MARKER_NAME.fullmatch(low)), None)


def _outside_staging(fd: int, path: str, field: str) -> int:
    """Return `fd`, opened at `path`. Closes it and raises ForkError invalid_request if a symlink led into staging."""
    try:
        name = _staging_name_in(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:  # without /proc only the text of the path can be checked
        name = None
    if name is None:
        return fd
    os.close(fd)
    raise ForkError(Code.INVALID_REQUEST, f"{field}: {_STAGING_REFUSED.format(name=name)}", path)


def is_inside(fd: int, directory: os.stat_result) -> bool:
    """Whether the open directory `fd` is `directory` or is inside it.

    Follows `..` from the descriptor, so that symlinks and bind mounts in the path make no difference. Raises OSError.
    """
    here, status = "", os.fstat(fd)
    with ExitStack() as opened:
        while not os.path.samestat(status, directory):
            if len(here) >= _LONG_WAY_UP:
                fd, here = os.open(here, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd), ""
                opened.callback(os.close, fd)
            here += "../"
            above = os.stat(here, dir_fd=fd)
            if os.path.samestat(status, above):  # the root of the filesystem is its own parent
                return False
            status = above
        return True
