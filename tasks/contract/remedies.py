"""What to do for each error code: for the reports of the command line, and docs/scheduler.md."""

from __future__ import annotations

from typing import Literal, NamedTuple

from tasks.copier.errors import Code

#: Who can do something about it.
Side = Literal["client", "operator"]


class Remedy(NamedTuple):
    """What to do for an error code."""

    side: Side
    #: Whether the same request may succeed later, under a new id, with nothing changed by a person.
    may_pass: bool
    text: str


REMEDIES: dict[Code, Remedy] = {
    Code.INVALID_REQUEST: Remedy("client", False, "Correct the field that the message names."),
    Code.SOURCE_NOT_FOUND: Remedy("client", False, "Check the path, and that the worker's host has it."),
    Code.SOURCE_NOT_DIRECTORY: Remedy("client", False, "Name a directory as the source."),
    Code.OUTSIDE_ROOTS: Remedy(
        "operator", False, "Use a path within the worker's FORKVM_ROOTS, or add the directory to them."
    ),
    Code.DESTINATION_EXISTS: Remedy(
        "client", False, "Choose another destination, or remove this one. It was not touched."
    ),
    Code.DESTINATION_INSIDE_SOURCE: Remedy("client", False, "Choose a destination outside of the source."),
    Code.UNSUPPORTED_FILE_TYPE: Remedy("client", False, "Leave the FIFO or device out with `skip`."),
    Code.PERMISSION_DENIED: Remedy(
        "operator", False, "Allow the worker's user to read the source and write beside the destination."
    ),
    Code.REFLINK_UNSUPPORTED: Remedy(
        "operator", False, "Keep source and destination on one filesystem with reflinks, or use `reflink: auto`."
    ),
    Code.SPARSE_UNSUPPORTED: Remedy("operator", False, "Move the source to a filesystem that reports holes."),
    Code.SOURCE_CHANGED: Remedy(
        "client", True, "Stop the guest or fork a snapshot of it, then send the request again under a new id."
    ),
    Code.COPY_BUDGET_EXCEEDED: Remedy(
        "client", False, "Find out why files are not reflinked (`fallback`), or raise `max_copied_bytes`."
    ),
    Code.SOURCE_IN_USE: Remedy(
        "client", True, "Stop the guest or fork a snapshot of it, then send the request again under a new id."
    ),
    Code.SOURCE_OPEN_UNSUPPORTED: Remedy(
        "operator", False, "Give the worker CAP_LEASE, or send `source_open: allow` and stop the guest yourself."
    ),
    Code.NO_SPACE: Remedy(
        "operator", True, "Free space, inodes or quota of the destination, or memory of Redis; then send it again."
    ),
    Code.IO_ERROR: Remedy("operator", True, "Look up the errno and the kernel's log; forkvm doctor checks the host."),
    Code.VERIFY_FAILED: Remedy("operator", True, "Check the storage and memory of the host: data was read back wrong."),
    Code.WORKER_LOST: Remedy(
        "operator", True, "Look for the OOM killer in the kernel's log; add memory, or lower FORKVM_CONCURRENCY."
    ),
    Code.CANCELLED: Remedy("client", True, "Nothing is wrong: send it again under a new id if it is still wanted."),
}


def remedy_text(code: str) -> str:
    """The text for an error code; empty for a code that this version does not know."""
    remedy = REMEDIES.get(Code(code)) if code in set(Code) else None
    return "" if remedy is None else remedy.text
