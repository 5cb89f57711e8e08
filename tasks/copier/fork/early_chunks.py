"""One process that begins with the chunks of a fork while the planner still walks; the queue gets the rest."""

from __future__ import annotations

from tasks.copier.fork.child_pool import ChildPool
from tasks.copier.progress import Ticker
from tasks.copier.staging.workspace import Workspace


class EarlyChunks(ChildPool):
    """A crew of one, which works for as long as the walk takes: when that is over, many processes may have the chunks.

    It holds the staging through its parent's exclusive lock, so nobody else is at work meanwhile.
    """

    def __init__(self, work: Workspace, ticker: Ticker) -> None:
        super().__init__(work, 1, ticker)

    def walk_ended(self) -> list[int]:
        """Let the chunk in hand be completed, and give back those that are not begun; see `Crew.walk_ended`."""
        if not self.is_at_work:
            return []
        given_back = self._take_back()
        self._wait()
        return sorted(self._taken - given_back)
