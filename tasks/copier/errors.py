"""What can go wrong with a fork: one error with a code, a path and an errno, raised where it is known."""

from __future__ import annotations

import errno
import os
from enum import StrEnum
from typing import TypedDict


class Code(StrEnum):
    """The error codes of the contract. Other programs rely on these words."""

    #: The request itself is wrong: a field, a type, a path that is not absolute. Mend the request.
    INVALID_REQUEST = "invalid_request"
    #: Nothing stands at the source path.
    SOURCE_NOT_FOUND = "source_not_found"
    #: The source, or something on the way to it, is no directory.
    SOURCE_NOT_DIRECTORY = "source_not_directory"
    #: The path is not within the roots that this worker serves, or a symlink on it leads out of them.
    OUTSIDE_ROOTS = "outside_roots"
    #: Something stands at the destination. It was left as it is.
    DESTINATION_EXISTS = "destination_exists"
    #: The destination lies inside the source.
    DESTINATION_INSIDE_SOURCE = "destination_inside_source"
    #: The source holds a FIFO or a device.
    UNSUPPORTED_FILE_TYPE = "unsupported_file_type"
    #: The worker's user may not read the source or write the destination.
    PERMISSION_DENIED = "permission_denied"
    #: `reflink: always` was asked, and the filesystem refused.
    REFLINK_UNSUPPORTED = "reflink_unsupported"
    #: The source's filesystem cannot tell data from holes; a dense copy is never made instead.
    SPARSE_UNSUPPORTED = "sparse_unsupported"
    #: The source was changed, truncated, replaced or removed while it was cloned.
    SOURCE_CHANGED = "source_changed"
    #: The destination's filesystem, or a quota on it, is full.
    NO_SPACE = "no_space"
    #: A system call failed in a way that no fallback mends.
    IO_ERROR = "io_error"
    #: The finished clone differs from the source (`verify: content`).
    VERIFY_FAILED = "verify_failed"
    #: The processes that worked on the fork died, each time it was tried.
    WORKER_LOST = "worker_lost"
    #: Someone asked for an end.
    CANCELLED = "cancelled"


class ErrorRecord(TypedDict):
    """An error as the contract carries it; `errno` is the kernel's number, or None where no system call failed."""

    code: str
    message: str
    path: str
    errno: int | None


class ForkError(Exception):
    """A fork, or one file of it, cannot be done: `code`, `message`, `path` (text) and `errno` say why."""

    def __init__(self, code: Code, message: str, path: str = "", number: int | None = None) -> None:
        super().__init__(code, message, path, number)
        self.code = code
        self.message = message
        self.path = path
        self.errno = number

    def __str__(self) -> str:
        return describe(self.record())

    def record(self) -> ErrorRecord:
        """This error as plain data."""
        return {"code": self.code.value, "message": self.message, "path": self.path, "errno": self.errno}


#: Errnos with a code of their own. All others are io_error.
_CODE_OF_ERRNO = {
    errno.ENOSPC: Code.NO_SPACE,
    errno.EDQUOT: Code.NO_SPACE,
    errno.EACCES: Code.PERMISSION_DENIED,
    errno.EPERM: Code.PERMISSION_DENIED,
}

#: What opening or reading an entry gives that the walk saw a moment ago and that is no longer what it was.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ESTALE})


def errno_name(number: int) -> str:
    """EXDEV for 18 and so on. EOPNOTSUPP is said as the kernel says it; Linux has ENOTSUP as the same number."""
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, f"errno {number}")


def describe(record: ErrorRecord) -> str:
    """One line for a person: code, path, what happened, errno."""
    number = record["errno"]
    name = "" if number is None else f" ({errno_name(number)})"
    return ": ".join(part for part in (record["code"], record["path"], record["message"]) if part) + name


def from_errno(number: int, doing: str, path: str) -> ForkError:
    """The error for a system call on our own side (the destination, staging) that failed with `number`."""
    code = _CODE_OF_ERRNO.get(number, Code.IO_ERROR)
    return ForkError(code, f"{doing}: {os.strerror(number)}", path, number)


def from_oserror(error: OSError, doing: str, path: str) -> ForkError:
    """As `from_errno`, for a caught OSError."""
    return from_errno(error.errno or errno.EIO, doing, path)


def from_record(record: ErrorRecord) -> ForkError:
    """The error that `ForkError.record` made plain data of."""
    return ForkError(Code(record["code"]), record["message"], record["path"], record["errno"])


def from_source(error: OSError, doing: str, path: str) -> ForkError:
    """The error for a system call on a source entry that the walk had seen: gone means changed."""
    if error.errno in _GONE:
        return ForkError(Code.SOURCE_CHANGED, f"{doing}: it is no longer what the walk saw", path, error.errno)
    return from_oserror(error, doing, path)


def cancelled(path: str) -> ForkError:
    """The error of a fork or campaign that someone ended."""
    return ForkError(Code.CANCELLED, "someone asked for an end", path)
