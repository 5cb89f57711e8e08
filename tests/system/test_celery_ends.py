"""Celery's own ways to end a task: revoke, terminate, expiry, time limit.

A fork ends as cancelled, or is not affected.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.guests import make_guest
from tests.support.system import queued_campaigns
from tests.support.system.messages import Recorder, deliver
from tests.support.system.queued_campaigns import done, request_of
from tests.support.system.result_checks import check_file_results, check_fork_result
from tests.support.system.scheduler import QUEUE, Scheduler, states
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import System, send, spin_until
from tests.support.tree import snapshot
from worker.runtime.configuration import make_app
from worker.settings import read_settings

#: Seconds for a cancelled fork to end. A busy machine needs tens of seconds to remove its 45,000 entries.
_END_TIMEOUT = 90.0

#: The ways in which Celery's clients end a task, each with the id of the fork.
REVOKED: dict[str, Callable[[Any, str], None]] = {
    "revoke": lambda control, fork_id: control.revoke(fork_id),
    "revoke and terminate": lambda control, fork_id: control.revoke(fork_id, terminate=True, signal="SIGKILL"),
    "terminate": lambda control, fork_id: control.terminate(fork_id),
    "revoke a chunk": lambda control, fork_id: control.revoke([f"{fork_id}.chunk.{n}" for n in range(100)]),
}


def _request(source: Path, destination: Path) -> dict[str, str]:
    return {"source": str(source), "destination": str(destination)}


def _send(scheduler: Scheduler, request: Mapping[str, str], fork_id: str, **options: Any) -> None:
    scheduler.app.send_task("forkvm.fork", kwargs={"request": request}, task_id=fork_id, queue=QUEUE, **options)


def _assert_cancelled(scheduler: Scheduler, fork_id: str, destination: Path, word: str = "") -> None:
    ended = f"the end of {fork_id}"
    wait_until(lambda: scheduler.results.states.get(fork_id)["status"] == "REVOKED", ended, _END_TIMEOUT)
    result = scheduler.results.final.fork(fork_id)
    assert result is not None
    check_fork_result(result)
    assert (result["status"], not destination.exists()) == ("cancelled", True)
    assert word in str(result["error"])
    check_file_results(result, scheduler.files(fork_id))


@pytest.mark.parametrize("way", REVOKED)
def test_running_fork_that_is_revoked_ends_as_cancelled_and_leaves_nothing(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path, way: str
) -> None:
    fork_id, children = way.replace(" ", "-"), system.worker.children
    staging = StagingView(workdir, fork_id)
    with Recorder(system.server) as recorder, scheduler.watching(fork_id) as records:
        _send(scheduler, _request(large_source, workdir / "b"), fork_id)
        spin_until(staging.begun, "the first chunk")

        REVOKED[way](scheduler.app.control, fork_id)

        _assert_cancelled(scheduler, fork_id, workdir / "b")
        scheduler.wait_quiet()
        deliver(system.server, *recorder.messages)
        scheduler.wait_quiet()
    _assert_cancelled(scheduler, fork_id, workdir / "b")
    assert states(records)[-1] == "REVOKED"
    assert states(records).count("REVOKED") == 1
    assert system.worker.children == children
    system.assert_left_nothing_in(workdir)


def test_the_messages_that_end_a_revoked_campaign_send_no_more_of_them(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    (child, *_) = system.worker.children
    with Recorder(system.server) as recorder:
        queued_campaigns.send(scheduler, request_of(directory / "a", directory, 5_000), "many")
        spin_until(lambda: done(scheduler, "many") > 0, "the first forks")
        send([child], signal.SIGSTOP)  # most likely while it holds the campaign: the others try again and again
        try:
            scheduler.app.control.revoke("many")
            wait_until(lambda: scheduler.results.cancellations.is_requested("many"), "the worker to receive it")
            wait_until(lambda: "forkvm.conclude[many] received" in system.worker.output(), "the end of the campaign")
        finally:
            send([child], signal.SIGCONT)

        wait_until(lambda: scheduler.results.states.get("many")["status"] == "REVOKED", "its end", _END_TIMEOUT)
        scheduler.wait_quiet()
        sent = [message for message in recorder.messages if message.task == "forkvm.conclude"]
    assert "forkvm.conclude[many]: cancellation requested" not in system.worker.output()
    assert len(sent) <= 10
    scheduler.wait_quiet()


def test_fork_revoked_before_a_worker_takes_it_is_never_started(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    scheduler.app.control.revoke("early")
    scheduler.app.control.revoke_by_stamped_headers({"team": "gone"})
    wait_until(lambda: scheduler.results.cancellations.is_requested("early"), "the worker to receive it")
    stamps: dict[str, Any] = {"stamped_headers": ["team"], "stamps": {"team": ["gone", "other"]}}

    _send(scheduler, _request(directory / "a", directory / "b"), "early")
    _send(scheduler, _request(directory / "a", directory / "c"), "stamped", headers=stamps)

    _assert_cancelled(scheduler, "early", directory / "b")
    _assert_cancelled(scheduler, "stamped", directory / "c")
    system.assert_left_nothing_in(directory)


def test_revoking_a_fork_that_has_ended_changes_nothing(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    result = scheduler.fork(make_guest(directory / "a"), directory / "b", "ended")

    assert scheduler.app.control.revoke("ended", terminate=True, reply=True, timeout=10, limit=1)
    scheduler.wait_quiet()

    assert scheduler.app.AsyncResult("ended").get(timeout=5) == result
    assert scheduler.results.final.fork("ended") == result


def test_expired_fork_is_cancelled_with_a_result_even_if_it_is_sent_again(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    request = _request(make_guest(directory / "a"), directory / "b")

    _send(scheduler, request, "expired", expires=datetime.now(UTC) - timedelta(hours=1))
    _assert_cancelled(scheduler, "expired", directory / "b", "expired")
    first = scheduler.results.final.fork("expired")
    _send(scheduler, request, "expired")
    scheduler.wait_quiet()

    _assert_cancelled(scheduler, "expired", directory / "b", "expired")
    assert scheduler.results.final.fork("expired") == first
    system.assert_left_nothing_in(directory)


def test_fork_that_expires_after_its_start_continues(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "a")
    request = _request(source, directory / "b")
    # Given a worker that started the fork and was killed
    scheduler.results.claims.take("begun", {"request": request, "destination": request["destination"], "queue": QUEUE})

    _send(scheduler, request, "begun", expires=datetime.now(UTC) - timedelta(hours=1))

    scheduler.wait(scheduler.app.AsyncResult("begun"))
    assert snapshot(directory / "b")[b"overlay.raw"] == snapshot(source)[b"overlay.raw"]


@pytest.mark.parametrize("limit", ["time_limit", "soft_time_limit"])
def test_fork_that_exceeds_its_clients_time_limit_ends_as_cancelled(
    system: System, scheduler: Scheduler, fresh: Fresh, limit: str
) -> None:
    """One task makes it, from directories and symlinks, which takes seconds."""
    directory = fresh("xfs_noreflink")
    for n in range(150):
        (directory / "a" / str(n)).mkdir(parents=True)
        for m in range(300):
            (directory / "a" / str(n) / str(m)).symlink_to("nowhere")

    _send(scheduler, _request(directory / "a", directory / "b"), limit, **{limit: 0.3})

    _assert_cancelled(scheduler, limit, directory / "b")
    system.assert_left_nothing_in(directory)


def test_sigusr1_does_not_affect_children(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    wait_until(lambda: len(system.worker.children) == 2, "the pool after a test that ended a process")
    staging, children = StagingView(workdir, "signalled"), system.worker.children
    _send(scheduler, _request(large_source, workdir / "b"), "signalled")
    spin_until(staging.begun, "the first chunk")

    send(children, signal.SIGUSR1)

    assert scheduler.wait(scheduler.app.AsyncResult("signalled"))["status"] == "succeeded"
    assert system.worker.children == children
    assert snapshot(workdir / "b") == snapshot(large_source)


def test_client_that_ignores_the_result_can_still_read_it(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    _send(scheduler, _request(make_guest(directory / "a"), directory / "b"), "small", ignore_result=True)
    _send(scheduler, _request(large_source, workdir / "b"), "large", ignore_result=True)

    for fork_id in ("small", "large"):
        wait_until(lambda f=fork_id: scheduler.results.states.get(f)["status"] == "SUCCESS", f"the end of {fork_id}")  # type: ignore[misc]
        assert scheduler.results.states.get(fork_id)["result"] == scheduler.results.final.fork(fork_id)


@pytest.mark.parametrize("first", ["SUCCESS", "FAILURE", "REVOKED"])
def test_final_state_is_never_replaced(system: System, scheduler: Scheduler, first: str) -> None:
    backend = make_app(read_settings(broker_url=system.server.broker_url)).backend
    job_id = f"final-{first}"
    backend.store_result(job_id, {}, "STARTED")
    backend.store_result(job_id, ValueError("x") if first != "SUCCESS" else {}, first)
    kept = scheduler.results.states.get(job_id)

    for later in ("STARTED", "PROGRESS", "RETRY", "SUCCESS", "FAILURE", "REVOKED"):
        backend.store_result(job_id, ValueError("y") if later in ("RETRY", "FAILURE", "REVOKED") else {}, later)

    assert kept["status"] == first
    assert scheduler.results.states.get(job_id) == kept


def test_fork_whose_id_celery_has_revoked_is_not_started(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    """Another application's worker replies to a `revoke` too, and stores the state of a task that it does not know."""
    directory = fresh("xfs")
    scheduler.app.backend.store_result("elsewhere", ValueError("revoked"), "REVOKED")

    _send(scheduler, _request(make_guest(directory / "a"), directory / "b"), "elsewhere")

    _assert_cancelled_later(scheduler, "elsewhere", directory / "b")
    system.assert_left_nothing_in(directory)


def _assert_cancelled_later(scheduler: Scheduler, fork_id: str, destination: Path) -> None:
    """As `_assert_cancelled`, but the state may be stored before the result."""
    wait_until(lambda: scheduler.results.final.fork(fork_id) is not None, f"the result of {fork_id}")
    _assert_cancelled(scheduler, fork_id, destination)
