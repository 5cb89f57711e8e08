"""The log of a real worker, as a file gets it: JSON lines only, also those of Celery."""

from __future__ import annotations

import json
import signal
from typing import Any

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.guests import make_guest
from tests.support.system import queued_campaigns
from tests.support.system.queued_campaigns import request_of
from tests.support.system.scheduler import QUEUE
from tests.support.system.systems import StartSystem, System, send

#: Empty values count as unset.
DEFAULTS = {"FORKVM_LOG": "", "FORKVM_LOG_LEVEL": ""}


def _lines(system: System) -> list[dict[str, Any]]:
    """All lines of the log. One that is not JSON is an error."""
    lines = [json.loads(line) for line in system.worker.output().splitlines()]
    assert all({"timestamp", "level", "event", "logger"} <= line.keys() for line in lines)
    return lines


def test_each_line_is_json_and_each_fork_has_one(start_system: StartSystem, fresh: Fresh) -> None:
    # Given
    directory = fresh("ext4")
    make_guest(directory / "a")
    system = start_system(DEFAULTS)

    # When
    for n in range(2):
        system.scheduler.fork(directory / "a", directory / f"b-{n}", f"fork-{n}")
    queued_campaigns.send(system.scheduler, request_of(directory / "a", directory, 3), "many").get(timeout=60)
    system.scheduler.redis.lpush(QUEUE, b"[]")
    send(system.worker.children, signal.SIGKILL)
    wait_until(lambda: system.worker.output().count("SIGKILL") == 2, "the loss of the children")
    system.scheduler.fork(directory / "a", directory / "b-2", "fork-2")
    system.scheduler.wait_quiet()
    system.worker.term()
    assert system.worker.wait(timeout=90) == 0

    # Then
    lines = _lines(system)
    ends = [line for line in lines if "outcome" in line]
    assert [(line["fork_id"], line["outcome"]) for line in ends] == [(f"fork-{n}", "succeeded") for n in range(3)]
    assert all(line["files"]["copy"] and line["bytes"]["copy"] for line in ends)
    assert [line["campaign_id"] for line in lines if "campaign_id" in line] == ["many"]
    (fallback,) = (line for line in lines if "not reflinked" in line["event"])
    assert (fallback["fork_id"], fallback["task_id"], fallback["domain"]) == ("fork-0", "fork-0", "")
    events = "\n".join(line["event"] for line in lines)
    assert events.count("files are copied, not reflinked, from ext4 to ext4") == 1
    assert events.count("a message in the queue forkvm was refused") == 1
    assert "Warm shutdown" in events
    assert "received" not in events
