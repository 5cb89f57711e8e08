"""One process that begins with the chunks of a fork while the planner still walks; the queue gets the rest."""

from __future__ import annotations

from tasks.copier.children import Children
from tasks.copier.progress import Ticker
from tasks.copier.work import Work


class Vanguard(Children):
    """A crew of one, which works for as long as the walk takes: when that is over, many processes may have the chunks.

    It holds the staging through its parent's exclusive lock, so nobody else is at work meanwhile.
    """

    def __init__(self, work: Work, ticker: Ticker) -> None:
        super().__init__(work, 1, ticker)

    def walk_ended(self) -> list[int]:
        """Let the chunk in hand be completed, and give back those that are not begun; see `Crew.walk_ended`."""
        if not self.is_at_work:
            return []
        given_back = self._take_back()
        self._wait()
        return sorted(self._taken - given_back)
