"""Callbacks of a job: link, link_error, chains and chords, whichever task ends the job."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from celery import chord, group, signature
from celery.exceptions import ChordError, TaskRevokedError

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.guests import make_guest
from tests.support.system.messages import Recorder, deliver
from tests.support.system.queued_campaigns import make_source, request_of
from tests.support.system.scheduler import QUEUE, Scheduler
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import System, send, stopped_in_the_middle

#: A queue of the client; no worker consumes it, so each test sees the messages that were sent.
OWN = "notices"
CALL_SECONDS = 20.0


@pytest.fixture(autouse=True)
def _own_queue(scheduler: Scheduler) -> Iterator[None]:
    yield
    scheduler.redis.delete(OWN, "celery")


def _note(scheduler: Scheduler, word: str, queue: str | None = OWN, **options: Any) -> Any:
    return signature(f"client.{word}", app=scheduler.app, queue=queue, **options)


def _job(scheduler: Scheduler, size: str, directory: Path, job_id: str) -> Any:
    """A signature of a job of the given size, whose source is made at first use."""
    files = 60 if size == "chunks" else 5  # see SMALL_LIMITS
    source = directory / f"{size}-source"
    if not source.exists():
        make_source(source, files)
    request: dict[str, Any] = {"source": str(source), "destination": str(directory / job_id)}
    if size == "campaign":
        request = request_of(source, directory, 3) | {"labels": {"id": job_id}}
    task = "forkvm.campaign" if size == "campaign" else "forkvm.fork"
    return signature(task, kwargs={"request": request}, app=scheduler.app, queue=QUEUE, task_id=job_id)


def _sent(scheduler: Scheduler, queue: str = OWN) -> list[tuple[str, Any]]:
    """The tasks in a queue of the client, sorted by name, each with its first argument."""
    messages = [json.loads(raw) for raw in scheduler.redis.lrange(queue, 0, -1)]
    bodies = [json.loads(base64.b64decode(message["body"])) for message in messages]
    return sorted(
        ((message["headers"]["task"], body[0][0]) for message, body in zip(messages, bodies, strict=True)),
        key=lambda pair: str(pair[0]),
    )


def _names(scheduler: Scheduler, queue: str = OWN) -> list[str]:
    return [name for name, _ in _sent(scheduler, queue)]


@pytest.mark.parametrize("size", ["inline", "chunks", "campaign"])
def test_link_chain_and_chord_follow_a_job_of_any_size(scheduler: Scheduler, fresh: Fresh, size: str) -> None:
    directory = fresh("xfs")
    jobs = iter([_job(scheduler, size, directory, f"{size}-{word}") for word in ("link", "chain", "chord")])
    if size == "campaign":  # three into one directory would collide
        for job, workdir in zip(jobs_list := list(jobs), ("x", "y", "z"), strict=True):
            (directory / workdir).mkdir()
            job.kwargs["request"]["destinations"]["template"] = f"{directory}/{workdir}/vm-{{n:04}}"
        jobs = iter(jobs_list)

    linked = next(jobs).apply_async(link=_note(scheduler, "link"), link_error=_note(scheduler, "error"))
    chained = (next(jobs) | _note(scheduler, "chain")).apply_async()
    chord([next(jobs)])(_note(scheduler, "chord"))

    wait_until(lambda: len(dict(_sent(scheduler))) == 3, "the callbacks")
    scheduler.wait_quiet()
    sent = dict(_sent(scheduler))
    assert sorted(sent) == ["client.chain", "client.chord", "client.link"]
    assert sent["client.link"] == linked.get(timeout=CALL_SECONDS)
    assert sent["client.chain"] == chained.parent.get(timeout=CALL_SECONDS)
    assert [part["status"] for part in sent["client.chord"]] == ["succeeded"]


@pytest.mark.parametrize("size", ["inline", "chunks"])
def test_failed_fork_has_its_errbacks_called_and_fails_its_chain_and_chord(
    scheduler: Scheduler, fresh: Fresh, size: str
) -> None:
    directory = fresh("xfs")
    jobs = [_job(scheduler, size, directory, f"{size}-bad-{n}") for n in range(4)]
    for job in jobs:
        (directory / job.options["task_id"]).mkdir()  # destination_exists

    jobs[0].apply_async(link=_note(scheduler, "link"), link_error=_note(scheduler, "error"))
    last = (jobs[1] | _note(scheduler, "chain")).apply_async()
    body = chord([jobs[2], jobs[3]])(_note(scheduler, "chord"))

    wait_until(lambda: bool(_sent(scheduler)), "the errback")
    with pytest.raises(Exception, match="destination_exists"):
        last.get(timeout=CALL_SECONDS)
    wait_until(lambda: body.state == "FAILURE", "the end of the chord")
    assert isinstance(body.result, ChordError)
    scheduler.wait_quiet()
    assert _sent(scheduler) == [("client.error", f"{size}-bad-0")]


def test_cancelled_fork_sends_no_callback_and_its_chain_and_chord_end(scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    jobs = [_job(scheduler, "chunks", directory, f"cancelled-{n}") for n in range(3)]
    for job in jobs:
        scheduler.results.cancellations.request(job.options["task_id"])

    notes = {"link": _note(scheduler, "link"), "link_error": _note(scheduler, "error")}
    last = (jobs[0].set(**notes) | _note(scheduler, "chain")).apply_async()
    body = chord([jobs[1], jobs[2]])(_note(scheduler, "chord"))

    with pytest.raises(TaskRevokedError):
        last.get(timeout=CALL_SECONDS)
    wait_until(lambda: body.state == "FAILURE", "the end of the chord")
    assert isinstance(body.result, ChordError)
    scheduler.wait_quiet()
    assert _sent(scheduler) == []


@pytest.mark.parametrize("size", ["inline", "chunks", "campaign"])
def test_messages_delivered_again_after_the_end_send_no_callback_twice(
    system: System, scheduler: Scheduler, fresh: Fresh, size: str
) -> None:
    job = _job(scheduler, size, fresh("xfs"), f"again-{size}")
    with Recorder(system.server) as recorder:
        job.apply_async(link=[_note(scheduler, "one"), _note(scheduler, "two")])
        wait_until(lambda: len(_sent(scheduler)) >= 2, "the callbacks")
        scheduler.wait_quiet()
        # At least once: two batches that end at the same moment may both have sent the task that ends the campaign.
        sent = _names(scheduler)

        deliver(system.server, *recorder.messages)
        job.apply_async(link=[_note(scheduler, "one"), _note(scheduler, "two")])
        scheduler.wait_quiet()

    assert set(sent) == {"client.one", "client.two"}
    assert _names(scheduler) == sent


def test_callback_lost_between_result_and_sending_is_sent_by_the_next_delivery(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    job = _job(scheduler, "chunks", fresh("xfs"), "lost")
    with Recorder(system.server) as recorder:
        job.apply_async(link=_note(scheduler, "link"))
        wait_until(lambda: bool(_sent(scheduler)), "the callback")
        scheduler.wait_quiet()
    first = json.loads(scheduler.redis.lindex(OWN, 0) or b"")["headers"]["id"]
    # The state after a process is killed once it has stored the result: nothing sent, nothing recorded as sent.
    scheduler.redis.delete("forkvm:lost:canvas", OWN)

    deliver(system.server, *recorder.of_task("forkvm.fork"))

    wait_until(lambda: bool(_sent(scheduler)), "the callback")
    scheduler.wait_quiet()
    assert _names(scheduler) == ["client.link"]
    assert json.loads(scheduler.redis.lindex(OWN, 0) or b"")["headers"]["id"] == first


def test_a_task_that_ends_a_job_waits_while_another_one_sends_its_callbacks(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    """Two chunks that are done at the same moment both send the task that ends their fork."""
    sending, canvas = "forkvm:two:sending", "forkvm:two:canvas"
    request = {"source": str(large_source), "destination": str(workdir / "b")}
    fork = signature("forkvm.fork", kwargs={"request": request}, app=scheduler.app, queue=QUEUE, task_id="two")
    sent = fork.apply_async(link=_note(scheduler, "link"))
    with stopped_in_the_middle(system.worker, StagingView(workdir, "two")):
        scheduler.redis.set(sending, "1", ex=60)
    assert sent.get(timeout=CALL_SECONDS)["status"] == "succeeded"

    # When it has tried some times, and the other one has sent them
    tries = _sets(scheduler)
    wait_until(lambda: _sets(scheduler) > tries + 10, "a task that tries to send the callbacks")
    (digest,) = cast("list[bytes]", scheduler.redis.hkeys(canvas))
    scheduler.redis.hset(canvas, digest, "")
    scheduler.redis.delete(sending)

    scheduler.wait_quiet()
    assert _sent(scheduler) == []


def _sets(scheduler: Scheduler) -> int:
    """How often SET was called."""
    return int(scheduler.redis.info("commandstats")["cmdstat_set"]["calls"])


def test_fork_whose_processes_are_killed_sends_its_callback_once(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    request = {"source": str(large_source), "destination": str(workdir / "b")}
    fork = signature("forkvm.fork", kwargs={"request": request}, app=scheduler.app, queue=QUEUE, task_id="killed")
    chord([fork.set(link=_note(scheduler, "link"))])(_note(scheduler, "chord"))
    with stopped_in_the_middle(system.worker, StagingView(workdir, "killed")) as children:
        send(children, signal.SIGKILL)

    wait_until(lambda: len(_sent(scheduler)) == 2, "the callbacks", 60)
    scheduler.wait_quiet()
    assert _names(scheduler) == ["client.chord", "client.link"]
    assert scheduler.results.states.get("killed")["status"] == "SUCCESS"
    system.assert_left_nothing_in(workdir)


def test_callback_that_cannot_be_sent_changes_no_state_and_blocks_no_other(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    scheduler.redis.hset("no-queue", "a", "b")  # LPUSH fails with WRONGTYPE
    scheduler.redis.expire("no-queue", 600)
    job = _job(scheduler, "chunks", fresh("xfs"), "unsent")

    sent = job.apply_async(link=[_note(scheduler, "never", "no-queue"), _note(scheduler, "link")])

    assert sent.get(timeout=CALL_SECONDS)["status"] == "succeeded"
    wait_until(lambda: bool(_sent(scheduler)), "the other callback")
    scheduler.wait_quiet()
    assert (_names(scheduler), sent.state) == (["client.link"], "SUCCESS")
    system.worker.wait_for_output("the callback 'client.never' of 'unsent' could not be sent")


def test_task_without_a_queue_goes_to_celerys_default_and_a_fork_to_the_domain(
    scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    request = {"source": str(directory / "a"), "destination": str(directory / "c")}
    then = signature("forkvm.fork", kwargs={"request": request}, immutable=True, app=scheduler.app, task_id="second")
    several = group([_note(scheduler, "one", None), _note(scheduler, "two", None)])

    (_job(scheduler, "chunks", directory, "first") | then | several).apply_async()

    wait_until(lambda: len(_sent(scheduler, "celery")) == 2, "the group")
    assert _names(scheduler, "celery") == ["client.one", "client.two"]
    assert scheduler.results.states.get("second")["status"] == "SUCCESS"
    assert (directory / "c").exists()


#: Signatures that would use the worker's own tasks or queues.
FORGED: dict[str, Callable[[], dict[str, Any]]] = {
    "an inner task": lambda: {"task": "forkvm.finish", "options": {"queue": OWN}},
    "an inner queue": lambda: {"task": "client.x", "options": {"queue": "forkvm#finish"}},
    "a key of a fork": lambda: {"task": "client.x", "options": {"queue": "forkvm:other:claim"}},
    "another exchange": lambda: {"task": "client.x", "options": {"exchange": "celery.pidbox"}},
    "another serializer": lambda: {"task": "client.x", "options": {"queue": OWN, "serializer": "pickle"}},
    "a task of a group": lambda: {
        "task": "celery.group",
        "subtask_type": "group",
        "kwargs": {"tasks": [{"task": "forkvm.chunk"}]},
    },
    "a link of a link": lambda: {"task": "client.x", "options": {"link": [{"task": "forkvm.bury"}]}},
    "no name": lambda: {"task": ["forkvm.fork"]},
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_signature_is_refused_and_the_client_gets_the_error(
    scheduler: Scheduler, fresh: Fresh, case: str
) -> None:
    directory, fork_id = fresh("xfs"), f"forged-{case}"
    make_guest(directory / "a")
    request = {"source": str(directory / "a"), "destination": str(directory / "b")}
    sent = scheduler.app.send_task(
        "forkvm.fork", kwargs={"request": request}, task_id=fork_id, queue=QUEUE, link=cast(Any, [FORGED[case]()])
    )

    message, result = scheduler.wait_failed(sent)

    assert message.startswith("invalid_request")
    assert "options" in message
    assert (result["source"], (directory / "b").exists()) == (str(directory / "a"), False)
    scheduler.wait_quiet()
    assert _sent(scheduler) == []
