"""The task id is the idempotency key: all requests under one id are one fork with one result."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.filesystems import Fresh
from tests.support.extents import fiemap
from tests.support.guests import make_guest
from tests.support.system.messages import Message, Recorder, deliver
from tests.support.system.result_checks import check_file_results, identity
from tests.support.system.scheduler import Scheduler, states
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import System, stopped_in_the_middle
from tests.support.tree import snapshot

FINAL = {"SUCCESS", "FAILURE", "REVOKED"}


def _results(records: list[dict[str, Any]], state: str) -> list[Any]:
    """The distinct results that were published with a state."""
    found: list[Any] = []
    for record in records:
        if record["status"] == state and record["result"] not in found:
            found.append(record["result"])
    return found


def _assert_one_end(records: list[dict[str, Any]], state: str) -> None:
    """After a final state there is no other one, and no earlier state."""
    published = states(records)
    final = next(n for n, seen in enumerate(published) if seen in FINAL)
    assert published[final:] == [state]
    assert len(_results(records, state)) == 1


def test_the_same_small_fork_sent_twice_at_once_is_made_once(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    for turn in range(12):
        destination = directory / f"b-{turn}"
        request = {"source": str(directory / "a"), "destination": str(destination)}
        with scheduler.watching(f"twice-{turn}") as records:
            first, second = (scheduler.send(request, f"twice-{turn}") for _ in range(2))
            result = scheduler.wait(first)
            published = identity(destination)
            scheduler.wait_quiet()

        assert scheduler.wait(second) == result == scheduler.results.final.fork(f"twice-{turn}")
        assert identity(destination) == published
        _assert_one_end(records, "SUCCESS")
        check_file_results(result, scheduler.files(f"twice-{turn}"))
    system.assert_left_nothing_in(directory)


def test_the_same_large_fork_sent_three_times_at_once_is_made_once(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    for turn in range(3):
        destination = workdir / f"b-{turn}"
        request = {"source": str(large_source), "destination": str(destination)}
        with scheduler.watching(f"thrice-{turn}") as records:
            sent = [scheduler.send(request, f"thrice-{turn}") for _ in range(3)]
            result = scheduler.wait(sent[0])
            published = identity(destination)
            scheduler.wait_quiet()

        assert all(scheduler.wait(other) == result for other in sent)
        assert identity(destination) == published
        _assert_one_end(records, "SUCCESS")
        check_file_results(result, scheduler.files(f"thrice-{turn}"))
    assert snapshot(workdir / "b-2") == snapshot(large_source)
    system.assert_left_nothing_in(workdir)


def test_the_same_id_sent_after_success_gives_the_first_result_for_any_request(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    # Given
    directory = fresh("xfs")
    make_guest(directory / "a")
    make_guest(directory / "c", seed=1)
    request = {"source": str(directory / "a"), "destination": str(directory / "b")}
    result = scheduler.wait(scheduler.send(request, "used"))
    published = identity(directory / "b")
    files = scheduler.files("used")

    # When
    others: list[object] = [
        request,
        request | {"destination": str(directory / "d")},
        request | {"source": str(directory / "c")},
        request | {"unknown": 1},
        "no request",
    ]
    with scheduler.watching("used") as records:
        for other in others:
            scheduler.send(other, "used")
            scheduler.wait_quiet()
            assert scheduler.app.AsyncResult("used").get(timeout=5) == result

    # Then
    assert set(states(records)) <= {"SUCCESS"}  # Celery stores a success once
    assert scheduler.results.final.fork("used") == result
    assert scheduler.files("used") == files
    assert identity(directory / "b") == published
    assert not (directory / "d").exists()
    system.assert_left_nothing_in(directory)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="the same request"),
        pytest.param({"destination": "{workdir}/other"}, id="another destination"),
        pytest.param({"labels": ["other"]}, id="other labels"),
        pytest.param({"source": "{workdir}/missing"}, id="a source that does not exist"),
        pytest.param({"unknown": 1}, id="an unknown field"),
        pytest.param({"destination": "relative"}, id="a relative destination"),
        pytest.param({"destination": "{workdir}/missing/b"}, id="a destination without a parent"),
    ],
)
def test_another_request_under_the_id_of_a_running_fork_changes_nothing(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path, change: dict[str, Any]
) -> None:
    # Given a half-done fork
    fork_id = f"taken-{'-'.join(change)}-{'-'.join(map(str, change.values()))}"
    request = {"source": str(large_source), "destination": str(workdir / "b"), "labels": ["first"]}
    change = {k: v.format(workdir=workdir) if isinstance(v, str) else v for k, v in change.items()}
    with scheduler.watching(fork_id) as records:
        sent = scheduler.send(request, fork_id)

        # When
        with stopped_in_the_middle(system.worker, StagingView(workdir, fork_id)):
            scheduler.send(request | change, fork_id)

        # Then the first one has its result, and nothing of the other exists
        result = scheduler.wait(sent)
        scheduler.wait_quiet()
    assert (result["status"], result["labels"]) == ("succeeded", ["first"])
    assert result["destination"] == str(workdir / "b")
    assert scheduler.results.final.fork(fork_id) == result
    _assert_one_end(records, "SUCCESS")
    assert [path.name for path in workdir.iterdir()] == ["b"]
    assert snapshot(workdir / "b") == snapshot(large_source)
    check_file_results(result, scheduler.files(fork_id))


def test_first_message_delivered_again_after_success_gives_the_same_result(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    with Recorder(system.server) as recorder:
        result = scheduler.fork(directory / "a", directory / "b", "redelivered")
    published = identity(directory / "b")

    with scheduler.watching("redelivered") as records:
        deliver(system.server, *recorder.messages)
        scheduler.wait_quiet()

    assert [message.task for message in recorder.messages] == ["forkvm.fork"]
    assert set(states(records)) <= {"SUCCESS"}  # Celery stores a success once
    assert scheduler.app.AsyncResult("redelivered").get(timeout=5) == result
    assert identity(directory / "b") == published
    system.assert_left_nothing_in(directory)


def test_first_message_delivered_again_after_success_is_the_same_success_when_the_source_is_gone(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "a")
    with Recorder(system.server) as recorder:
        result = scheduler.fork(source, directory / "b", "redelivered-late")
    source.rename(directory / "elsewhere")
    (directory / "b").rename(directory / "c")

    deliver(system.server, *recorder.messages)
    scheduler.wait_quiet()

    assert scheduler.results.final.fork("redelivered-late") == result
    assert scheduler.app.AsyncResult("redelivered-late").get(timeout=5) == result
    assert not (directory / "b").exists()
    system.assert_left_nothing_in(directory)


def test_first_message_delivered_again_after_a_failure_is_the_same_failure_and_never_running_again(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    # Given a fork that failed because its destination existed, and a destination that is free now
    directory = fresh("xfs")
    make_guest(directory / "a")
    (directory / "b").mkdir()
    request = {"source": str(directory / "a"), "destination": str(directory / "b")}
    with Recorder(system.server) as recorder:
        message, result = scheduler.wait_failed(scheduler.send(request, "failed-once"))
        scheduler.wait_quiet()
    (directory / "b").rmdir()

    # When
    with scheduler.watching("failed-once") as records:
        deliver(system.server, *recorder.messages)
        scheduler.wait_quiet()

    # Then
    assert scheduler.results.final.fork("failed-once") == result
    assert scheduler.wait_failed(scheduler.app.AsyncResult("failed-once")) == (message, result)
    assert not (directory / "b").exists()
    assert states(records) == ["FAILURE"]
    system.assert_left_nothing_in(directory)


def test_every_message_of_a_large_fork_delivered_twice_gives_one_fork_and_one_result(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    request = {"source": str(large_source), "destination": str(workdir / "b")}
    with (
        scheduler.watching("doubled") as records,
        Recorder(system.server, lambda message: deliver(system.server, message)) as recorder,
    ):
        result = scheduler.wait(scheduler.send(request, "doubled"))
        published = identity(workdir / "b")
        scheduler.wait_quiet()

    assert len(recorder.of_task("forkvm.chunk")) >= result["chunks"]
    assert recorder.of_task("forkvm.finish")
    _assert_one_end(records, "SUCCESS")
    assert identity(workdir / "b") == published
    assert snapshot(workdir / "b") == snapshot(large_source)
    check_file_results(result, scheduler.files("doubled"))
    system.assert_left_nothing_in(workdir)


def test_messages_of_a_half_done_fork_redelivered_in_reverse_order_give_one_fork_and_one_result(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    # Given a half-done fork that is paused
    request = {"source": str(large_source), "destination": str(workdir / "b")}
    with Recorder(system.server) as recorder, scheduler.watching("reversed") as records:
        sent = scheduler.send(request, "reversed")
        staging = StagingView(workdir, "reversed")

        def is_sent() -> bool:
            sent_or_done = _chunks_of(recorder.messages) | staging.done()  # the first ones need no message
            return 0 < staging.chunks == len(sent_or_done)

        with stopped_in_the_middle(system.worker, staging, is_sent):
            # When all its messages are delivered again: those of done chunks, of running ones and of waiting ones
            again = list(reversed(recorder.messages))
            deliver(system.server, *again)

        # Then
        result = scheduler.wait(sent)
        scheduler.wait_quiet()
    assert result["chunks"] // 2 < len(_chunks_of(again)) == len(again) - 1
    _assert_one_end(records, "SUCCESS")
    assert snapshot(workdir / "b") == snapshot(large_source)
    check_file_results(result, scheduler.files("reversed"))
    system.assert_left_nothing_in(workdir)


def _chunks_of(messages: list[Message]) -> set[int]:
    ids = [message.task_id for message in messages if message.task == "forkvm.chunk"]
    return {int(task_id.rpartition(".")[2]) for task_id in ids}


def test_late_chunks_and_finishes_write_nothing_into_a_published_fork(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    # Given a published fork, which is the disk of a running machine by now
    with Recorder(system.server) as recorder:
        result = scheduler.fork(large_source, workdir / "b", "late")
        scheduler.wait_quiet()
    with (workdir / "b" / "disk.raw").open("r+b") as disk:
        disk.write(b"the machine runs")
    published, contents = identity(workdir / "b"), snapshot(workdir / "b")
    files = scheduler.files("late")

    # When all its messages are delivered again
    messages: list[Message] = recorder.messages
    assert {message.task for message in messages} == {"forkvm.fork", "forkvm.chunk", "forkvm.finish"}
    for turn in itertools.repeat(messages, 2):
        deliver(system.server, *turn)
        scheduler.wait_quiet()

    # Then no byte, no time and no result of it changes
    assert identity(workdir / "b") == published
    assert snapshot(workdir / "b") == contents
    assert scheduler.results.final.fork("late") == result
    assert scheduler.app.AsyncResult("late").get(timeout=5) == result
    assert scheduler.files("late") == files
    system.assert_left_nothing_in(workdir)


def test_late_chunks_of_a_reflinked_fork_move_no_extent(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "a")
    for n in range(300):
        (source / f"block-{n}").write_bytes(b"%d" % n * 4096)
    with Recorder(system.server) as recorder:
        scheduler.fork(source, directory / "b", "late-reflinks")
        scheduler.wait_quiet()
    published = identity(directory / "b")
    extents = {path: fiemap(path) for path in (directory / "b").rglob("*") if path.is_file()}

    deliver(system.server, *recorder.of_task("forkvm.chunk"))
    scheduler.wait_quiet()

    assert recorder.of_task("forkvm.chunk")
    assert identity(directory / "b") == published
    assert {path: fiemap(path) for path in extents} == extents
    system.assert_left_nothing_in(directory)
