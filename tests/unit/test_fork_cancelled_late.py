"""A fork whose cancellation is requested while its end waits for the last chunk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fakeredis

from tasks.context import Context
from tasks.copier.roots import Roots
from tasks.copier.staging.staging import Staging
from tasks.fork.finish import run_finish
from tasks.fork.start import run_fork
from tasks.store import keys
from tasks.store.results import Results
from tests.support.engine.forks import CHUNKED
from tests.support.guests import make_guest


class _Redis(fakeredis.FakeRedis):
    """Requests a cancellation immediately after the first check for one."""

    cancels: str | None = None

    def exists(self, *names: Any) -> Any:
        answer = super().exists(*names)
        if self.cancels in names:
            self.set(str(self.cancels), "1", ex=60)
        return answer


def test_a_fork_that_a_chunk_stopped_for_a_later_cancellation_is_cancelled(tmp_path: Path) -> None:
    # Given a fork in chunks
    redis, sent = _Redis(), list[str]()
    results = Results(redis, 3600, lambda job_id: f"celery-task-meta-{job_id}")
    context = Context(
        Roots((str(tmp_path),)), CHUNKED, results, lambda task, kwargs, task_id: sent.append(task), "forkvm"
    )
    request = {"source": str(make_guest(tmp_path / "a")), "destination": str(tmp_path / "b"), "reflink": "never"}
    assert run_fork(context, "f", request, 0.0) is None
    assert len(sent) > 1

    # When one of them sees the cancellation after the finish has looked for it
    redis.cancels = keys.CANCEL.of("f")
    parent_fd = os.open(tmp_path, os.O_RDONLY)
    with Staging.attach(parent_fd, "f", wait=0) as staging:
        assert staging is not None
        staging.stop()
    os.close(parent_fd)
    result = run_finish(context, "f", str(tmp_path / "b"))

    # Then
    assert result is not None
    assert (result["status"], [path.name for path in tmp_path.iterdir()]) == ("cancelled", ["a"])
