"""Properties of the FileResults of every fork."""

from __future__ import annotations

import os

from tests.support.engine.forks import Ledger
from tests.support.tree import Entry

METHODS = {
    "snapshot": "reflinked",
    "reflink": "reflinked",
    "copy": "copied",
    "hardlink": "hardlinked",
    "symlink": "symlinked",
    "mkdir": "directories",
    "skip": "skipped",
}


def expected_paths(entries: dict[bytes, Entry]) -> set[str]:
    """All entries except the top. Of what is skipped, only the topmost entry."""
    below = {b"logs/console.log"}
    return {os.fsdecode(path) for path in entries if path != b"." and path not in below}


def assert_balanced(ledger: Ledger, entries: dict[bytes, Entry]) -> None:
    files, result = ledger.files, ledger.result
    assert files.keys() == expected_paths(entries)
    counts = dict.fromkeys(METHODS.values(), 0)
    for one in files.values():
        counts[METHODS[one["method"]]] += 1
    assert result["files"] == {"total": len(files), "failed": 0, **counts}
    assert result["bytes"] == {
        "logical": sum(one["bytes"] for one in files.values() if METHODS[one["method"]] in ("reflinked", "copied")),
        "reflinked": sum(one["bytes"] for one in files.values() if METHODS[one["method"]] == "reflinked"),
        "copied": sum(one["copied_bytes"] for one in files.values()),
    }
    assert {one["error"] for one in files.values()} == {None}
