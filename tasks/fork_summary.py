"""A fork that has ended, in brief: files and bytes by method, and its line in the log."""

from __future__ import annotations

import logging

from tasks.copier.counted import counted
from tasks.copier.errors import describe
from tasks.copier.fork_spec import ForkResult

log = logging.getLogger(__name__)

#: The methods of the files that a ForkResult counts under these names. `reflinked` is a snapshot's files, too.
_METHODS = {
    "copied": "copy",
    "hardlinked": "hardlink",
    "symlinked": "symlink",
    "directories": "mkdir",
    "skipped": "skip",
}


def files_by_method(result: ForkResult) -> dict[str, int]:
    """The number of entries by the contract's `method`, without zeros."""
    files = result["files"]
    counts = [(method, files[counter]) for counter, method in _METHODS.items()]
    return {method: count for method, count in ((_reflink(result), files["reflinked"]), *counts) if count}


def bytes_by_method(result: ForkResult) -> dict[str, int]:
    """The number of bytes that were shared or copied, by the contract's `method`."""
    return {_reflink(result): result["bytes"]["reflinked"], "copy": result["bytes"]["copied"]}


def _reflink(result: ForkResult) -> str:
    return "snapshot" if result["subvolume"] else "reflink"


def log_end(result: ForkResult, campaign_id: str = "") -> None:
    """Log the end of a fork: a campaign's at the level DEBUG, since there are thousands of them."""
    level = logging.DEBUG if campaign_id else logging.INFO
    if not log.isEnabledFor(level):
        return
    error, seconds = result["error"], result["seconds"]["total"]
    fields = {
        "fork_id": result["fork_id"],
        "outcome": result["status"],
        "seconds": result["seconds"],
        "files": files_by_method(result),
        "bytes": bytes_by_method(result),
        **({"code": error["code"]} if error is not None else {}),
        **({"campaign_id": campaign_id} if campaign_id else {}),
    }
    ends = f"{result['source']!r} -> {result['destination']!r}"  # escaped: names come from guests
    if error is None:
        entries = counted(result["files"]["total"], "entry", "entries")
        copied = counted(result["bytes"]["copied"], "byte")
        line = "fork %s succeeded: %s, %s, %s copied, in %.3f s"
        log.log(level, line, result["fork_id"], ends, entries, copied, seconds, extra=fields)
    else:
        log.log(level, "fork %s %s: %s: %r", result["fork_id"], result["status"], ends, describe(error), extra=fields)
