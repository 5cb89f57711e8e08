"""Forks in a separate process under strace, which makes real system calls fail, or kills the process."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.copier.fork_spec import ForkResult
from tasks.copier.kernel import reflink
from tasks.copier.report import FileResult
from tasks.copier.staging.control_directory import control_name
from tests.support.engine.child_processes import ChildEnded
from tests.support.engine.forks import CHUNKED, INLINE, fork, fork_with_ledger
from tests.support.engine.traced_processes import TracedChild

#: The suffix of the tree's name, so that strace can be given its paths before they exist.
_ATTEMPT = "0" * 8
#: Seconds of retries after EAGAIN; the real limits are too long for a test.
_RETRY_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The end of a fork under strace: its result and FileResults, or None if it was killed; and the trace."""

    result: ForkResult | None
    files: dict[str, FileResult]
    trace: list[str]

    def calls(self, words: str) -> int:
        """The number of lines of the trace that contain `words`."""
        return sum(words in line for line in self.trace)

    def durable_steps(self, parent: Path) -> list[str]:
        """The files that a durable fork in `parent` created, synced and renamed, in order."""
        steps = []
        for line in self.trace:
            if "SNAP_CREATE" in line:
                steps.append("snapshot")
            elif "syncfs(" in line:
                steps.append("tree")
            elif "renameat2(" in line:
                steps.append("exchange" if "RENAME_EXCHANGE" in line else "publish")
            elif "fsync(" in line:
                steps.append("parent" if f"<{parent}>" in line else "journal")
        return steps


def in_tree(destination: Path, name: str = "") -> Path:
    """The path of an entry of the fork while it is made."""
    return destination.parent / f"{control_name('fork-1')}.{_ATTEMPT}" / name


def control(destination: Path, name: str = "") -> Path:
    """The path of a file of the fork's control directory."""
    return destination.parent / control_name("fork-1") / name


def trace_fork(
    strace: str,
    source: Path,
    destination: Path,
    *,
    calls: str,
    inject: Iterable[str] = (),
    paths: Iterable[Path] = (),
    chunked: bool = False,
    here: bool = False,
    **options: Any,
) -> Traced:
    """Make one fork and record the system calls `calls`, only those that affect `paths` if any are given.

    `inject` are expressions of strace, such as `ioctl:error=EIO`; they apply to recorded calls only. `here`: by
    `fork_here` with two children (then without FileResults), else as `fork_with_ledger` does it.
    """
    log = destination.parent / "trace"

    def make() -> tuple[ForkResult, dict[str, FileResult]]:
        secrets.token_hex = lambda nbytes=None: _ATTEMPT
        reflink.RETRY_SECONDS = _RETRY_SECONDS
        limits = CHUNKED if chunked else INLINE
        if here:
            return fork(source, destination, limits=limits, **options), {}
        ledger = fork_with_ledger(source, destination, limits=limits, **options)
        return ledger.result, ledger.files

    child = TracedChild(strace, log, make, calls=calls, inject=inject, paths=paths)
    child.begin()
    try:
        result, files = child.result()
    except ChildEnded:
        return Traced(result=None, files={}, trace=child.trace())
    else:
        return Traced(result=result, files=files, trace=child.trace())
    finally:
        log.unlink()
