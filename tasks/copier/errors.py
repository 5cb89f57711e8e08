"""The error of a fork. It is raised where it is found, with its code, path and errno."""

from __future__ import annotations

import errno
import os
from enum import StrEnum
from typing import TypedDict


class Code(StrEnum):
    """The error codes of the contract. Clients compare these words, so they never change."""

    #: The request is wrong: an unknown field, a wrong type, a path that is not absolute. Correct the request.
    INVALID_REQUEST = "invalid_request"
    #: The source path does not exist.
    SOURCE_NOT_FOUND = "source_not_found"
    #: The source, or a part of its path, is not a directory.
    SOURCE_NOT_DIRECTORY = "source_not_directory"
    #: The path is outside the roots that this worker serves, or a symlink in it leads out of them.
    OUTSIDE_ROOTS = "outside_roots"
    #: The destination exists. It was not changed.
    DESTINATION_EXISTS = "destination_exists"
    #: The destination is inside the source.
    DESTINATION_INSIDE_SOURCE = "destination_inside_source"
    #: The source contains a FIFO or a device.
    UNSUPPORTED_FILE_TYPE = "unsupported_file_type"
    #: The worker's user may not read the source or write the destination.
    PERMISSION_DENIED = "permission_denied"
    #: The request says `reflink: always`, and the filesystem refused a reflink.
    REFLINK_UNSUPPORTED = "reflink_unsupported"
    #: The source's filesystem cannot report holes. A dense copy is never made instead.
    SPARSE_UNSUPPORTED = "sparse_unsupported"
    #: The source was changed, truncated, replaced or removed while it was being cloned.
    SOURCE_CHANGED = "source_changed"
    #: The fork would copy more bytes than the request's `max_copied_bytes`.
    COPY_BUDGET_EXCEEDED = "copy_budget_exceeded"
    #: With `source_open: refuse`: a file of the source is open for writing.
    SOURCE_IN_USE = "source_in_use"
    #: With `source_open: refuse`: whether a file of the source is open for writing cannot be known.
    SOURCE_OPEN_UNSUPPORTED = "source_open_unsupported"
    #: The destination's filesystem or quota is full.
    NO_SPACE = "no_space"
    #: A system call failed, and no fallback exists for it.
    IO_ERROR = "io_error"
    #: The finished clone differs from the source (with `verify: content`).
    VERIFY_FAILED = "verify_failed"
    #: The process that worked on the fork died in every attempt.
    WORKER_LOST = "worker_lost"
    #: The fork or campaign was cancelled on request.
    CANCELLED = "cancelled"


class ErrorRecord(TypedDict):
    """An error in the form of the contract. `errno` is None where no system call failed."""

    code: str
    message: str
    path: str
    errno: int | None


class ForkError(Exception):
    """A fork or one of its files failed: `code`, `message`, `path` and `errno` (None without a system call) say why."""

    def __init__(self, code: Code, message: str, path: str = "", number: int | None = None) -> None:
        super().__init__(code, message, path, number)
        self.code = code
        self.message = message
        self.path = path
        self.errno = number

    def __str__(self) -> str:
        return describe(self.record())

    def for_fork(self, named: str, destination: str) -> ForkError:
        """This error as that of the fork to `destination`, where it names that of a fork beside it: `named`."""
        is_of_named = self.path == named or self.path.startswith(f"{named}/")
        if not is_of_named or os.path.dirname(named) != os.path.dirname(destination):
            return self
        return ForkError(self.code, self.message, destination + self.path[len(named) :], self.errno)

    def record(self) -> ErrorRecord:
        """This error as JSON-ready data."""
        return {"code": self.code.value, "message": self.message, "path": self.path, "errno": self.errno}


#: Errnos that have their own code. All others are io_error.
_CODE_OF_ERRNO = {
    errno.ENOSPC: Code.NO_SPACE,
    errno.EDQUOT: Code.NO_SPACE,
    errno.EACCES: Code.PERMISSION_DENIED,
    errno.EPERM: Code.PERMISSION_DENIED,
}

#: Errnos of opening or reading an entry that was removed or replaced after the walk.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ESTALE})


def errno_name(number: int) -> str:
    """The symbol of an errno, such as EXDEV for 18. ENOTSUP and EOPNOTSUPP are one number."""
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, f"errno {number}")


def describe(record: ErrorRecord) -> str:
    """The error in one line: code, path, message, errno."""
    number = record["errno"]
    name = "" if number is None else f" ({errno_name(number)})"
    return ": ".join(part for part in (record["code"], record["path"], record["message"]) if part) + name


def from_errno(number: int, doing: str, path: str) -> ForkError:
    """The error for a system call on the destination or its staging that failed with the errno `number`.

    `doing` is the beginning of the message, such as "creating the file".
    """
    code = _CODE_OF_ERRNO.get(number, Code.IO_ERROR)
    return ForkError(code, f"{doing}: {os.strerror(number)}", path, number)


def from_oserror(error: OSError, doing: str, path: str) -> ForkError:
    """The same as `from_errno`, for a caught OSError."""
    return from_errno(error.errno or errno.EIO, doing, path)


def from_record(record: ErrorRecord) -> ForkError:
    """The error that `ForkError.record` turned into data."""
    return ForkError(Code(record["code"]), record["message"], record["path"], record["errno"])


def from_source(error: OSError, doing: str, path: str) -> ForkError:
    """The error for a system call on a source entry after the walk. An entry that is missing now is source_changed."""
    if error.errno in _GONE:
        message = f"{doing}: it was removed or replaced while it was being cloned"
        return ForkError(Code.SOURCE_CHANGED, message, path, error.errno)
    return from_oserror(error, doing, path)


def cancelled(path: str) -> ForkError:
    """The error of a fork or campaign that was cancelled."""
    return ForkError(Code.CANCELLED, "cancelled on request", path)
