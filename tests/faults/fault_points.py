"""The moments of a fork at which a fault may strike, and how a test arms them; `tests.faults.armed_worker` does it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

#: In the order of a fork. The result is kept at `settled`, but the staging stands and nothing is acknowledged.
MOMENTS = (
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
    "settled",
)
#: The one moment that only a small fork has; those of chunks it has not.
INLINE = "inline copy"
#: At these the fork is published, and no other process may make it again.
PUBLISHED = ("after the rename", "settled")

#: To itself: SIGSTOP once, SIGKILL once, SIGKILL each time.
Action = Literal["stop", "kill", "poison"]


class Moments:
    """Arms moments of forks, and tells which processes came to them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(exist_ok=True)

    def arm(self, fork_id: str, moment: str, action: Action) -> None:
        """Have whoever comes to this moment of this fork strike itself."""
        new = self._directory / f"new-{fork_id}"
        new.write_text(action)
        new.rename(self._directory / f"{fork_id}@{moment}")

    def disarm(self, fork_id: str, moment: str) -> None:
        (self._directory / f"{fork_id}@{moment}").unlink(missing_ok=True)

    def reached(self, fork_id: str, moment: str) -> list[int]:
        """The pids of those who came to it."""
        prefix = f"{fork_id}@{moment}="
        return [int(name.removeprefix(prefix)) for name in os.listdir(self._directory) if name.startswith(prefix)]


def directory_of(broker_url: str) -> Path:
    """Where the moments of a worker lie: beside the socket of its Redis."""
    return Path(broker_url.partition("://")[2]).parent / "moments"
