"""A campaign from its message to its result, with a real Redis, a real worker, and a client that has only Celery."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.campaign.plan import MOST_IN_BATCH
from tests.fixtures.filesystems import Fresh, fresh_directory
from tests.support.guests import GuestSizes, make_guest
from tests.support.processor import LoadFreeStopwatch
from tests.support.sources import HUGE, make_huge_files
from tests.support.system.messages import Recorder, deliver
from tests.support.system.queued_campaigns import (
    assert_all_are_whole,
    assert_results_are_consistent,
    done,
    forks_of,
    make_source,
    paths_of,
    published_forks,
    request_of,
    result_of,
    send,
)
from tests.support.system.result_checks import FILE_FIELDS, identity
from tests.support.system.scheduler import Scheduler, states
from tests.support.system.systems import System, spin_until, stopped_when

RESULT_FIELDS = {
    "campaign_id",
    "status",
    "source",
    "error",
    "forks",
    "files",
    "bytes",
    "seconds",
    "forks_per_second",
    "failures",
}
PROGRESS_FIELDS = {"forks_done", "forks_total", "forks_failed", "eta_seconds"}
#: Seconds within which a cancelled campaign must have ended after the request.
END_SECONDS = 2.0
#: The number of a campaign's forks that may be made before a single fork starts that is sent while the campaign runs:
#: two batches for each child of the worker.
FAIR = 4 * MOST_IN_BATCH


@pytest.fixture(scope="module")
def source(xfs: Path) -> Iterator[Path]:
    with fresh_directory(xfs) as parent:
        yield make_source(parent / "source")


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    return fresh("xfs")


def make_tiny_source(path: Path) -> Path:
    """A source of one file, for campaigns of very many forks."""
    path.mkdir()
    (path / "state").write_text("paused")
    return path


def test_a_campaign_has_its_result_under_its_id_and_each_fork_under_its_own(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    # When
    with scheduler.watching("whole") as records:
        result = send(scheduler, request_of(source, workdir, 200, labels={"rack": "7"}), "whole").get(timeout=30)
        scheduler.wait_quiet()

    # Then
    assert set(result) == RESULT_FIELDS
    assert_all_are_whole(scheduler, result, source, paths_of(workdir, 200))
    assert result == result_of(scheduler, "whole")
    assert scheduler.app.AsyncResult("whole.200").get(timeout=5) == forks_of(scheduler, "whole", 200)[-1]
    assert scheduler.app.AsyncResult("whole.7").get(timeout=5)["labels"] == {"rack": "7"}
    assert result["bytes"]["copied"] == 0
    assert (states(records)[0], states(records)[-1]) == ("STARTED", "SUCCESS")
    assert set(states(records)) <= {"STARTED", "PROGRESS", "SUCCESS"}
    progress_records = [record["result"] for record in records if record["status"] == "PROGRESS"]
    assert all(set(progress) == PROGRESS_FIELDS for progress in progress_records)
    assert {progress["forks_total"] for progress in progress_records} == {200}
    system.assert_left_nothing_in(workdir)


def test_sparse_files_whose_sizes_exceed_63_bits_together(system: System, scheduler: Scheduler, workdir: Path) -> None:
    """Redis counts up to 2^63 - 1, where the sums of the campaign stay; those of each fork are exact."""
    huge = make_huge_files(workdir / "huge")

    result = send(scheduler, request_of(huge, workdir, 3), "huge").get(timeout=30)

    assert (result["status"], result["bytes"]["logical"]) == ("succeeded", 2**63 - 1)
    assert [fork["bytes"]["logical"] for fork in forks_of(scheduler, "huge", 3)] == [3 * HUGE] * 3
    system.assert_left_nothing_in(workdir)


def test_results_of_forks_can_be_read_in_order_while_the_campaign_runs(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    # Given a half-done campaign that is paused
    sent = send(scheduler, request_of(source, workdir, 400), "running")
    with stopped_when(system.worker, lambda: 0 < done(scheduler, "running") < 400, "a half-done campaign"):
        # When
        forks = forks_of(scheduler, "running", 400)
        files = scheduler.files(forks[-1]["fork_id"])
        state = scheduler.results.states.get("running")

        # Then
        numbers = [int(fork["fork_id"].removeprefix("running.")) for fork in forks]
        assert numbers == sorted(numbers)
        assert 0 < len(numbers) < 400
        assert {fork["status"] for fork in forks} == {"succeeded"}
        assert all(Path(fork["destination"]).is_dir() for fork in forks)
        assert len(files) == forks[-1]["files"]["total"] == 14
        assert set(files[0]) == FILE_FIELDS
        assert state["status"] in ("STARTED", "PROGRESS")
        assert scheduler.results.final.get("running") is None

    assert_all_are_whole(scheduler, sent.get(timeout=30), source, paths_of(workdir, 400))
    system.assert_left_nothing_in(workdir)


def test_a_list_of_destinations_in_several_directories_keeps_its_order(
    system: System, scheduler: Scheduler, fresh: Fresh, source: Path
) -> None:
    workdirs = [fresh("xfs"), fresh("ext4"), fresh("tmpfs")]
    paths = [workdirs[n % 3] / f"vm-{n}" for n in range(60)]

    request = {"source": str(source), "destinations": [str(path) for path in paths]}
    result = send(scheduler, request, "listed").get(timeout=30)

    forks = assert_results_are_consistent(scheduler, result, paths)
    assert result["status"] == "succeeded"
    assert [fork["fallback"] is None for fork in forks] == [n % 3 == 0 for n in range(60)]
    system.assert_left_nothing_in(*workdirs)


def test_the_same_id_sent_at_once_and_afterwards_is_one_campaign(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    # Given
    request, paths = request_of(source, workdir, 150), paths_of(workdir, 150)
    sent = [send(scheduler, request, "same") for _ in range(3)]
    results = [one.get(timeout=30) for one in sent]
    scheduler.wait_quiet()
    published = {path: identity(path) for path in paths[::10]}

    # When
    again = send(scheduler, request, "same").get(timeout=30)
    for other in (request_of(source, workdir / "other", 3), request | {"labels": ["other"]}, {"unknown": 1}, "none"):
        send(scheduler, other, "same")
    scheduler.wait_quiet()

    # Then
    assert all(result == again for result in results)
    assert result_of(scheduler, "same") == again
    assert_all_are_whole(scheduler, again, source, paths)
    assert {path: identity(path) for path in paths[::10]} == published
    assert scheduler.app.AsyncResult("same").get(timeout=5) == again
    system.assert_left_nothing_in(workdir)


def test_another_request_under_the_id_of_a_running_campaign_changes_nothing(
    system: System, scheduler: Scheduler, source: Path, workdir: Path, fresh: Fresh
) -> None:
    elsewhere = fresh("xfs")
    sent = send(scheduler, request_of(source, workdir, 300), "taken")
    with stopped_when(system.worker, lambda: 0 < done(scheduler, "taken") < 300, "a half-done campaign"):
        send(scheduler, request_of(source, elsewhere, 5), "taken")
        send(scheduler, {"source": "relative"}, "taken")

    assert_all_are_whole(scheduler, sent.get(timeout=30), source, paths_of(workdir, 300))
    scheduler.wait_quiet()
    assert list(elsewhere.iterdir()) == []
    assert scheduler.results.states.get("taken")["status"] == "SUCCESS"


def test_every_message_of_a_campaign_delivered_twice_and_again_later_makes_each_fork_once(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    # Given
    paths = paths_of(workdir, 200)
    with Recorder(system.server, lambda message: deliver(system.server, message)) as recorder:
        result = send(scheduler, request_of(source, workdir, 200), "doubled").get(timeout=40)
        scheduler.wait_quiet()
    published = {path: identity(path) for path in paths}

    # When
    for again in (recorder.messages, recorder.messages[::-1]):
        deliver(system.server, *again)
        scheduler.wait_quiet()

    # Then
    assert {message.task for message in recorder.messages} == {"forkvm.campaign", "forkvm.batch", "forkvm.conclude"}
    assert_all_are_whole(scheduler, result, source, paths)
    assert result_of(scheduler, "doubled") == result
    assert scheduler.results.states.get("doubled")["status"] == "SUCCESS"
    assert {path: identity(path) for path in paths} == published
    system.assert_left_nothing_in(workdir)


def test_messages_of_a_half_done_campaign_redelivered_in_reverse_order_make_each_fork_once(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    # Given a half-done campaign that is paused
    paths = paths_of(workdir, 400)
    with Recorder(system.server) as recorder:
        sent = send(scheduler, request_of(source, workdir, 400), "reversed")
        with stopped_when(system.worker, lambda: 0 < done(scheduler, "reversed") < 400, "a half-done campaign"):
            published = {path: identity(path) for path in paths if path.exists()}

            # When all its messages are delivered again: those of done batches, of running ones and of waiting ones
            again = recorder.messages[::-1]
            deliver(system.server, *again)

        result = sent.get(timeout=40)
        scheduler.wait_quiet()

    # Then
    assert published
    assert {message.task for message in again} == {"forkvm.campaign", "forkvm.batch"}
    assert_all_are_whole(scheduler, result, source, paths)
    assert result_of(scheduler, "reversed") == result
    assert {path: identity(path) for path in published} == published
    system.assert_left_nothing_in(workdir)


def test_cancel_in_the_middle_keeps_only_published_forks(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    # Given
    paths = paths_of(workdir, 2000)
    sent = send(scheduler, request_of(source, workdir, 2000), "cancelled")
    spin_until(lambda: done(scheduler, "cancelled"), "the first forks")

    # When
    scheduler.results.cancellations.request("cancelled")
    stopwatch = LoadFreeStopwatch(system.pids)
    result = spin_until(lambda: scheduler.results.final.get("cancelled"), "the end")
    took = stopwatch.seconds()

    # Then
    scheduler.wait_quiet()
    forks = assert_results_are_consistent(scheduler, result_of(scheduler, "cancelled"), paths)
    assert result["status"] == "cancelled"
    assert result["forks"]["succeeded"] > 0
    assert result["forks"]["cancelled"] > 0
    assert published_forks(workdir) == [
        Path(fork["destination"]).name for fork in forks if fork["status"] == "succeeded"
    ]
    assert str(scheduler.app.AsyncResult("cancelled.2000").state) == "REVOKED"
    assert str(sent.state) == "REVOKED"
    system.assert_left_nothing_in(workdir)
    assert took < END_SECONDS


def test_a_campaign_cancelled_before_it_starts_makes_nothing(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    scheduler.results.cancellations.request("early")

    sent = send(scheduler, request_of(source, workdir, 30), "early")

    spin_until(lambda: scheduler.results.final.get("early"), "the end")
    scheduler.wait_quiet()
    assert_results_are_consistent(scheduler, result_of(scheduler, "early"), paths_of(workdir, 30))
    assert result_of(scheduler, "early")["forks"]["cancelled"] == 30
    assert str(sent.state) == "REVOKED"
    assert list(workdir.iterdir()) == []


def test_failed_forks_are_reported_and_the_others_are_made(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    for n in (3, 40, 41):
        (workdir / f"vm-{n:04}").mkdir()

    result = send(scheduler, request_of(source, workdir, 60), "partial").get(timeout=30)

    assert (result["status"], result["error"]) == ("partial", None)
    assert [failure["fork_id"] for failure in result["failures"]] == ["partial.3", "partial.40", "partial.41"]
    assert {failure["error"]["code"] for failure in result["failures"]} == {"destination_exists"}
    assert_results_are_consistent(scheduler, result, paths_of(workdir, 60))
    message, fork = scheduler.wait_failed(scheduler.app.AsyncResult("partial.40"))
    assert message.startswith(f"destination_exists: {workdir}/vm-0040")
    assert fork["status"] == "failed"
    assert published_forks(workdir) == [path.name for path in paths_of(workdir, 60)]


def test_on_error_abort_cancels_forks_that_are_not_started(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    (workdir / "vm-0001").mkdir()

    result = send(scheduler, request_of(source, workdir, 1500, on_error="abort"), "aborted").get(timeout=30)

    assert result["status"] in ("partial", "failed")
    assert result["error"]["code"] == "destination_exists"
    assert result["forks"]["failed"] == 1
    assert result["forks"]["cancelled"] > 0
    assert_results_are_consistent(scheduler, result, paths_of(workdir, 1500))
    assert len(published_forks(workdir)) == result["forks"]["succeeded"] + 1
    system.assert_left_nothing_in(workdir)


def test_a_deadline_cancels_forks_that_are_not_published(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    stopwatch = LoadFreeStopwatch(system.pids)
    sent = send(scheduler, request_of(source, workdir, 1500, deadline=0.4), "late")

    result = spin_until(lambda: scheduler.results.final.get("late"), "the end")
    took = stopwatch.seconds()

    scheduler.wait_quiet()
    assert result["status"] == "cancelled"
    assert "deadline" in result["error"]["message"]
    assert took < 0.4 + END_SECONDS
    assert_results_are_consistent(scheduler, result_of(scheduler, "late"), paths_of(workdir, 1500))
    assert len(published_forks(workdir)) == result["forks"]["succeeded"]
    assert str(sent.state) == "REVOKED"
    system.assert_left_nothing_in(workdir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"unknown": 1}, "unknown", id="an unknown field"),
        pytest.param({"source": "relative"}, "source", id="a relative source"),
        pytest.param({"destinations": []}, "destinations", id="no destinations"),
        pytest.param({"destinations": ["/a", "/a/b"]}, "inside", id="one inside another"),
        pytest.param({"destinations": ["/a", "/a"]}, "twice", id="one twice"),
        pytest.param({"destinations": {"template": "/a/{n.real}", "count": 2}}, "template", id="a hostile template"),
        pytest.param({"max_parallel": 0}, "max_parallel", id="no fork at once"),
        pytest.param({"on_error": "panic"}, "on_error", id="an unknown word"),
        pytest.param({"deadline": -1}, "deadline", id="a deadline before it begins"),
    ],
)
def test_an_invalid_request_fails_with_its_code_before_anything_is_done(
    system: System, scheduler: Scheduler, source: Path, workdir: Path, change: dict[str, Any], message: str
) -> None:
    campaign_id = f"bad-{message}-{len(str(change))}"

    sent = send(scheduler, request_of(source, workdir, 3) | change, campaign_id)

    with pytest.raises(Exception, match=f"^invalid_request: .*{message}"):
        sent.get(timeout=10)
    assert sent.state == "FAILURE"
    result = result_of(scheduler, campaign_id)
    assert (result["status"], result["forks"]["total"]) == ("failed", 0)
    assert list(workdir.iterdir()) == []


def test_an_error_before_the_first_fork_fails_every_fork(system: System, scheduler: Scheduler, workdir: Path) -> None:
    sent = send(scheduler, request_of(workdir / "missing", workdir, 5), "missing")

    with pytest.raises(Exception, match=f"^source_not_found: {workdir}/missing"):
        sent.get(timeout=10)

    scheduler.wait_quiet()
    assert_results_are_consistent(scheduler, result_of(scheduler, "missing"), paths_of(workdir, 5))
    assert result_of(scheduler, "missing")["forks"]["failed"] == 5
    assert scheduler.app.AsyncResult("missing.5").state == "FAILURE"
    assert list(workdir.iterdir()) == []


def test_a_single_fork_starts_soon_while_a_campaign_of_ten_thousand_runs(
    system: System, scheduler: Scheduler, workdir: Path, fresh: Fresh
) -> None:
    """It waits for the batches that are running or already taken. The test uses the median of several forks."""
    # Given
    directory = fresh("xfs")
    make_guest(directory / "a", GuestSizes(overlay=1 << 20, overlay_data=1 << 16, memory=1 << 20, memory_data=1 << 16))
    send(scheduler, request_of(make_tiny_source(directory / "one"), workdir, 10_000), "crowd")
    spin_until(lambda: done(scheduler, "crowd"), "the first forks")

    # When
    waits = []
    for n in range(9):
        sent = datetime.now(UTC)
        result = scheduler.fork(directory / "a", directory / f"b-{n}")
        waits.append((sent, datetime.fromisoformat(result["started_at"])))

    # Then
    assert scheduler.results.final.get("crowd") is None, "the campaign ended before the forks were sent"
    scheduler.results.cancellations.request("crowd")
    spin_until(lambda: scheduler.results.final.get("crowd"), "the end")
    forks = forks_of(scheduler, "crowd", 10_000)
    ends = [datetime.fromisoformat(fork["finished_at"]) for fork in forks if fork["status"] == "succeeded"]
    made_before = [sum(sent < end < started for end in ends) for sent, started in waits]
    assert statistics.median(made_before) <= FAIR, made_before
    system.assert_left_nothing_in(directory, workdir)


def test_two_campaigns_share_the_workers(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    workdirs = {"left": fresh("xfs"), "right": fresh("xfs")}
    source = make_tiny_source(fresh("xfs") / "source")

    # A turn has up to 8 batches, the number that a campaign may have in the queue at once, of up to 128 forks: each
    # campaign has 5 turns. The first may be longer on a busy machine, where the other campaign is planned meanwhile.
    sent = [send(scheduler, request_of(source, workdir, 5_000), name) for name, workdir in workdirs.items()]
    for one in sent:
        assert one.get(timeout=40)["status"] == "succeeded"

    ends = sorted((fork["finished_at"], name) for name in workdirs for fork in forks_of(scheduler, name, 5_000))
    changes = sum(before[1] != after[1] for before, after in pairwise(ends))
    assert changes >= 4, "one was made after the other"
