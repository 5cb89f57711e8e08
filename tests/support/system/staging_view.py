"""A fork's staging, read from the destination's parent without the program's own code."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.copier.staging.control_directory import control_name


class StagingView:
    """Reads one fork's staging, which may disappear at any moment."""

    def __init__(self, parent: Path, fork_id: str) -> None:
        self.control = parent / control_name(fork_id)

    def journal(self) -> dict[str, Any]:
        """The journal; empty if there is none."""
        with suppress(FileNotFoundError):
            journal: dict[str, Any] = json.loads((self.control / "journal").read_bytes())
            return journal
        return {}

    @property
    def phase(self) -> str | None:
        phase = self.journal().get("phase")
        return None if phase is None else str(phase)

    @property
    def chunks(self) -> int:
        return len((self.journal().get("plan") or {"chunks": ()})["chunks"])

    def begun(self) -> set[int]:
        """The chunks that a process has started."""
        return self._numbers("chunk-")

    def done(self) -> set[int]:
        """The chunks that are done or failed."""
        return self._numbers("report-")

    def tries(self, chunk: int) -> int:
        """The number of attempts of a chunk."""
        with suppress(FileNotFoundError):
            return int((self.control / f"chunk-{chunk}").read_bytes() or b"0")
        return 0

    def worker_of(self, chunk: int) -> int | None:
        """The pid of the process that makes a chunk now."""
        return _holder(self.control / f"chunk-{chunk}", "WRITE")

    def owner(self) -> int | None:
        """The pid of the process that holds the lock of the whole staging: it plans, clones inline, or finishes."""
        return _holder(self.control / "lock", "WRITE")

    def backdate(self) -> None:
        """Give the staging times of 1970, as if abandoned; except its tree, which already has the times of the fork."""
        for path in (self.control, self.control / "lock"):
            os.utime(path, (86_400, 86_400))

    def is_in_the_middle(self) -> bool:
        """Whether chunks are being made, some are done and some are not."""
        return self.phase == "cloning" and 0 < len(self.done()) < self.chunks and bool(self.begun() - self.done())

    def _numbers(self, prefix: str) -> set[int]:
        with suppress(FileNotFoundError):
            names = [name.removeprefix(prefix) for name in os.listdir(self.control) if name.startswith(prefix)]
            return {int(name) for name in names if name.isdigit()}
        return set()


def leftovers(directory: Path) -> list[str]:
    """All entries of ours below a directory that a fork must not leave when it has ended."""
    return sorted(
        os.path.join(parent, name)
        for parent, directories, files in os.walk(directory)
        for name in (*directories, *files)
        if name.startswith(".forkvm-")
    )


def _holder(path: Path, kind: str) -> int | None:
    """The pid that holds a flock of this kind on a file, from /proc/locks (proc(5))."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "->" not in fields and fields[1] == "FLOCK" and fields[3] == kind and fields[5] == device:
            return int(fields[4])
    return None
