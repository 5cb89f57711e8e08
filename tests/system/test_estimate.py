"""`forkvm.estimate`: an Estimate or an error under its id, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult
from jsonschema import Draft202012Validator

from tasks.contract.schemas import schema
from tests.fixtures.filesystems import Fresh
from tests.support.guests import make_guest
from tests.support.system.scheduler import QUEUE, TIMEOUT, Scheduler


@pytest.fixture
def source(fresh: Fresh) -> Path:
    return make_guest(fresh("ext4") / "a")


def _send(scheduler: Scheduler, source: Path, task_id: str, **fields: Any) -> AsyncResult[Any]:
    request = {"source": str(source), "destination": str(source.parent / "b"), **fields}
    return scheduler.app.send_task("forkvm.estimate", kwargs={"request": request}, task_id=task_id, queue=QUEUE)


def test_an_estimate_is_the_result_of_its_task_and_nothing_is_left(scheduler: Scheduler, source: Path) -> None:
    found = _send(scheduler, source, "estimate-1", max_copied_bytes=0).get(timeout=TIMEOUT)

    assert list(Draft202012Validator(schema("estimate")).iter_errors(found)) == []
    assert (found["method"], found["fits"]) == ("copy", True)
    assert [warning["code"] for warning in found["warnings"]] == ["full_copy", "over_budget"]
    assert os.listdir(source.parent) == ["a"]


def test_a_failed_estimate_has_the_error_code_of_the_fork(scheduler: Scheduler, source: Path) -> None:
    with pytest.raises(Exception, match="source_not_found"):
        _send(scheduler, source.parent / "missing", "estimate-2").get(timeout=TIMEOUT)
    with pytest.raises(Exception, match=r"dry_run: .* forkvm\.estimate"):
        scheduler.fork(source, source.parent / "b", "fork-2", dry_run=True)


def test_an_estimate_under_the_id_of_a_fork_changes_nothing(scheduler: Scheduler, source: Path) -> None:
    result = scheduler.fork(source, source.parent / "b", "fork-3")

    _send(scheduler, source, "fork-3")
    scheduler.wait_quiet()

    assert scheduler.app.AsyncResult("fork-3").get(timeout=TIMEOUT) == result
