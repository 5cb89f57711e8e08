"""The points of a fork at which a test may stop or kill its process. `tests.faults.armed_worker` carries it out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

#: How the point of a small fork begins that a fork in chunks has too: its end is stored in another way.
SMALL = "small, "
#: In the order of a fork. At "result stored" the staging still exists and the message is not yet acknowledged.
FAULT_POINTS = (
    "begin uncounted",
    "no tree",
    "plan",
    "inline copy",
    "first chunk",
    "middle",
    "last chunk",
    "finish uncounted",
    "finish",
    "before the rename",
    "after the rename",
    "result stored",
    f"{SMALL}after the rename",
)
#: The only point of a small fork that a fork in chunks does not have.
INLINE = "inline copy"
#: At these the fork is already published, and no other process may publish it again.
PUBLISHED = ("after the rename", "result stored", f"{SMALL}after the rename")

#: What a process does at an armed point: stop once, be killed once, or be killed each time.
Action = Literal["stop", "kill", "poison"]


class FaultPoints:
    """Arms points of forks, and reports which processes reached them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(exist_ok=True)

    def arm(self, fork_id: str, point: str, action: Action) -> None:
        """Have the next process of this fork that reaches `point` stop or kill itself."""
        new = self._directory / f"new-{fork_id}"
        new.write_text(action)
        new.rename(self._directory / _name(fork_id, point))

    def disarm(self, fork_id: str, point: str) -> None:
        (self._directory / _name(fork_id, point)).unlink(missing_ok=True)

    def reached(self, fork_id: str, point: str) -> list[int]:
        """The pids of the processes that reached it."""
        prefix = f"{_name(fork_id, point)}="
        return [int(name.removeprefix(prefix)) for name in os.listdir(self._directory) if name.startswith(prefix)]


def _name(fork_id: str, point: str) -> str:
    return f"{fork_id}@{point.removeprefix(SMALL)}"


def directory_of(broker_url: str) -> Path:
    """Where a worker keeps its armed points: beside the socket of its Redis."""
    return Path(broker_url.partition("://")[2]).parent / "fault_points"
