"""The header `seen` of a message that returns to its queue; workers of two versions read and write it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

from tasks.delivery.outcome import RetryLater, holder_of


def task_with(seen: list[float] | None) -> Any:
    request = SimpleNamespace() if seen is None else SimpleNamespace(seen=seen)
    return cast(Any, SimpleNamespace(request=request))


def test_a_missing_staging_directory_is_zero_as_in_earlier_versions() -> None:
    heartbeat, since = holder_of(task_with(None), RetryLater(None))

    assert heartbeat == 0
    assert abs(since - time.time()) < 5


def test_the_time_that_an_earlier_version_noted_counts() -> None:
    holder = holder_of(task_with([0, time.time() - 60]), RetryLater(None))

    assert holder.is_stale()
