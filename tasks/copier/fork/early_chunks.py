"""One child process that clones the first chunks of a fork while its planner still walks the source.

The queue gets the chunks that are left. Only `forkvm` workers use this; a local fork has a `ChildPool`.
"""

from __future__ import annotations

from tasks.copier.fork.child_pool import ChildPool
from tasks.copier.progress import Ticker
from tasks.copier.staging.workspace import Workspace


class EarlyChunks(ChildPool):
    """A pool of one child, which ends with the walk: from then on any process may do a chunk.

    The child works under the exclusive lock of its parent, so no other process works on the fork meanwhile.
    """

    def __init__(self, work: Workspace, ticker: Ticker) -> None:
        super().__init__(work, 1, ticker)

    def finish_early(self) -> list[int]:
        """Wait until the current chunk is done, and give back those that were not started."""
        if not self.is_at_work:
            return []
        given_back = self._take_back()
        self._wait()
        return sorted(self._taken - given_back)
