"""A request whose id already has the result of another task: an estimate, or a task of another application."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.guests import make_guest
from tests.support.system.scheduler import Scheduler
from tests.support.system.systems import System

FOREIGN: tuple[Any, ...] = (None, 5, "text", [1], {"a": 1}, {"error": None}, {"status": "succeeded"})


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    directory = fresh("xfs")
    make_guest(directory / "a")
    return directory


@pytest.mark.parametrize("result", FOREIGN, ids=repr)
def test_a_fork_under_the_id_of_another_task_fails_once(
    system: System, scheduler: Scheduler, directory: Path, result: Any
) -> None:
    fork_id = f"foreign-{FOREIGN.index(result)}"
    record = {"status": "SUCCESS", "result": result, "traceback": None, "children": [], "task_id": fork_id}
    scheduler.redis.set(f"celery-task-meta-{fork_id}", json.dumps(record | {"date_done": None}), ex=600)

    scheduler.send({"source": str(directory / "a"), "destination": str(directory / "b")}, fork_id)
    wait_until(lambda: scheduler.results.final.fork(fork_id) is not None, "the result")
    scheduler.wait_quiet()

    found = scheduler.results.final.fork(fork_id)
    assert found is not None
    assert found["error"] is not None
    assert "a task of this id ended as SUCCESS before" in found["error"]["message"]
    assert system.worker.output().count(f"[{fork_id}] received") <= 1
    assert scheduler.results.states.get(fork_id)["result"] == result  # a final state never changes
    system.assert_left_nothing_in(directory)
