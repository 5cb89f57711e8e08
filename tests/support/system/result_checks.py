"""Checks of results against the contract: names, types, and that totals are the sums of their parts."""

from __future__ import annotations

import os
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

from tasks.copier.fork_spec import ForkResult
from tasks.copier.report import FileResult

FORK_FIELDS = {
    "fork_id",
    "status",
    "source",
    "destination",
    "subvolume",
    "error",
    "files",
    "bytes",
    "fallback",
    "metadata_lost",
    "metadata_lost_total",
    "chunks",
    "seconds",
    "started_at",
    "finished_at",
    "labels",
}
FILES_FIELDS = {"total", "reflinked", "copied", "hardlinked", "symlinked", "directories", "skipped", "failed"}
BYTES_FIELDS = {"logical", "reflinked", "copied"}
SECONDS_FIELDS = {"queued", "plan", "copy", "publish", "total"}
FILE_FIELDS = {"path", "type", "method", "bytes", "copied_bytes", "seconds", "reason", "error"}
_COUNTER_OF_METHOD = {
    "snapshot": "reflinked",
    "reflink": "reflinked",
    "copy": "copied",
    "hardlink": "hardlinked",
    "symlink": "symlinked",
    "mkdir": "directories",
    "skip": "skipped",
}


def check_fork_result(result: ForkResult) -> None:
    """Every field of the contract is present with its type, and no other field."""
    assert set(result) == FORK_FIELDS
    for name in ("fork_id", "source", "destination"):
        assert isinstance(result[name], str)
    assert type(result["subvolume"]) is bool
    assert result["status"] in ("succeeded", "failed", "cancelled")
    assert (result["error"] is None) == (result["status"] == "succeeded")
    error = result["error"]
    if error is not None:
        assert set(error) == {"code", "message", "path", "errno"}
        assert error["errno"] is None or type(error["errno"]) is int
    assert set(result["files"]) == FILES_FIELDS
    assert set(result["bytes"]) == BYTES_FIELDS
    assert all(isinstance(count, int) for count in (*result["files"].values(), *result["bytes"].values()))
    assert result["fallback"] is None or set(result["fallback"]) == {"reason", "errno", "path"}
    assert all(set(lost) == {"path", "what"} for lost in result["metadata_lost"])
    assert len(result["metadata_lost"]) == min(result["metadata_lost_total"], 100)
    assert type(result["chunks"]) is int
    assert set(result["seconds"]) == SECONDS_FIELDS
    assert all(value >= 0 for value in result["seconds"].values())
    started, finished = (datetime.fromisoformat(result[name]) for name in ("started_at", "finished_at"))
    assert started.tzinfo is not None
    assert started <= finished
    assert abs((finished - started).total_seconds() - result["seconds"]["total"]) < 0.001


def check_file_results(result: ForkResult, files: list[FileResult]) -> None:
    """Each FileResult has its fields, no path occurs twice, and the fork's totals are their sums."""
    for file in files:
        assert set(file) == FILE_FIELDS
        assert isinstance(file["path"], str)
        assert isinstance(file["type"], str)
        assert file["method"] in _COUNTER_OF_METHOD
        assert type(file["bytes"]) is int
        assert type(file["copied_bytes"]) is int
        assert isinstance(file["seconds"], int | float)
        assert file["reason"] is None or isinstance(file["reason"], str)
    paths = [file["path"] for file in files]
    assert len(paths) == len(set(paths))
    good = [file for file in files if file["error"] is None]
    counted = dict.fromkeys(_COUNTER_OF_METHOD.values(), 0)
    for file in good:
        counted[_COUNTER_OF_METHOD[file["method"]]] += 1
    assert result["files"] == {"total": len(files), "failed": len(files) - len(good), **counted}
    assert result["bytes"] == {
        "logical": sum(file["bytes"] for file in good),
        "reflinked": sum(file["bytes"] for file in good if file["method"] in ("reflink", "snapshot")),
        "copied": sum(file["copied_bytes"] for file in good),
    }


def entries_of(source: Path) -> set[str]:
    """Every relative path below a directory, without the entries of a skipped `logs`, which is not walked."""
    paths: set[str] = set()
    for parent, directories, files in os.walk(source):
        here = os.path.relpath(parent, source)
        paths.update(os.path.normpath(os.path.join(here, name)) for name in (*directories, *files))
        if here == ".":
            directories[:] = [name for name in directories if name != "logs"]
    return paths


def identity(root: Path) -> dict[str, tuple[Any, ...]]:
    """Inode, size, mode and both times (in nanoseconds) of every entry, so that any write is noticed.

    Not the blocks: ext4 changes their number when it writes out what was written earlier.
    """
    found = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        found[str(path.relative_to(root))] = (
            kind,
            status.st_ino,
            status.st_mode,
            status.st_nlink,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
    return found
