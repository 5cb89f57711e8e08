"""Redis stops, is emptied or is full, with a fork at every point."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from redis.exceptions import OutOfMemoryError

from tasks.copier.campaign.batch import failed_outcome
from tasks.copier.campaign.spec import Aims, CampaignSpec
from tasks.copier.errors import cancelled
from tasks.copier.fork_spec import ForkResult
from tasks.copier.staging.control_directory import control_name
from tasks.store.campaign.results import CampaignResults
from tests.faults.fault_points import INLINE, PUBLISHED, FaultPoints
from tests.faults.paused_forks import (
    CHILDREN,
    Guests,
    PausedFork,
    StartArmedWorker,
    assert_served_and_clean,
    resume,
    start_paused_forks,
)
from tests.fixtures.processes import wait_until
from tests.support.system.scheduler import Scheduler
from tests.support.system.staging_view import StagingView, leftovers
from tests.support.system.systems import send
from tests.support.tree import snapshot


@pytest.mark.parametrize(
    ("kill", "noticed"),
    [
        pytest.param(True, ("Redis does not answer; trying again", 1), id="killed"),
        # The worker retries every 2 s: four times is longer than the visibility timeout.
        pytest.param(False, ("Trying again in 2.00 seconds", 4), id="stopped until all messages are delivered again"),
    ],
)
def test_forks_end_with_their_true_results_after_redis_was_down(
    start_armed_worker: StartArmedWorker,
    fault_points: FaultPoints,
    guests: Guests,
    workdir: Path,
    kill: bool,
    noticed: tuple[str, int],
) -> None:
    # Given
    system = start_armed_worker(CHILDREN)
    paused = start_paused_forks(system, fault_points, guests, workdir)

    # When Redis is down while all forks continue
    system.server.kill() if kill else system.server.stop()
    resume(paused)
    system.worker.wait_for_output(*noticed)
    system.server.start()

    # Then
    for one in paused:
        one.wait_for_success(system.scheduler)
    assert system.worker.running
    assert_served_and_clean(system, guests, workdir)


def test_redis_emptied_during_a_fork_gives_no_false_success_and_its_staging_is_removed(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    # Given forks at every point, whose files have not been modified for a long time
    system = start_armed_worker(CHILDREN)
    paused = start_paused_forks(system, fault_points, guests, workdir)
    for one in paused:
        StagingView(workdir, one.fork_id).backdate()

    # When Redis loses all data and the processes are killed
    system.scheduler.redis.flushall()
    send([one.pid for one in paused], signal.SIGKILL)

    # Then unpublished forks leave nothing, not even staging. A worker may have had a message in memory
    wait_until(lambda: not leftovers(workdir), "the removal of all staging")
    system.scheduler.wait_quiet()
    forgotten = [one for one in paused if system.scheduler.results.final.fork(one.fork_id) is None]
    assert len(forgotten) > len(paused) // 2
    for one in paused:
        if one not in forgotten:
            one.wait_for_success(system.scheduler, emptied=True)
    published = {one.point for one in forgotten if one.destination.exists()}
    assert published == {one.point for one in forgotten} & set(PUBLISHED)

    # and the same ids can be sent again
    for one in forgotten:
        _send_again(system.scheduler, one)
    for one in forgotten:
        if one.point.endswith("after the rename"):  # it was killed before it could record that it had ended
            _assert_destination_exists(system.scheduler, one)
        else:
            one.wait_for_success(system.scheduler, emptied=one.point in PUBLISHED)
    assert_served_and_clean(system, guests, workdir)


def test_redis_emptied_while_forks_continue_gives_no_false_success_and_the_ids_can_be_sent_again(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    system = start_armed_worker(CHILDREN)
    paused = start_paused_forks(system, fault_points, guests, workdir)

    system.scheduler.redis.flushall()
    resume(paused)
    for one in paused:
        _send_again(system.scheduler, one)

    for one in paused:
        result = _wait_for_result(system.scheduler, one)
        assert result["error"] is None, one.point
        assert snapshot(one.destination) == snapshot(one.source)
    assert_served_and_clean(system, guests, workdir)


def test_full_redis_fails_forks_with_a_clear_error_and_they_succeed_when_there_is_room(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    # Given
    system = start_armed_worker(CHILDREN)
    paused = start_paused_forks(system, fault_points, guests, workdir)

    # When there is no room until the processes that must write FileResults have given up
    system.scheduler.redis.config_set("maxmemory", "1mb")
    resume(paused)
    with pytest.raises(OutOfMemoryError):
        system.scheduler.redis.set("more", "x", ex=60)
    writers = [one for one in paused if one.point in ("plan", INLINE)]
    wait_until(lambda: not any(_trees(one) for one in writers), "the removal of the trees whose results were refused")
    assert not [one.point for one in writers if one.destination.exists()]
    system.scheduler.wait_refused(len(paused))
    system.scheduler.redis.config_set("maxmemory", "0")

    # Then each fork ends, either as a success that exists, or as a failure that left nothing
    for one in paused:
        result = _wait_for_result(system.scheduler, one)
        assert result["error"] is not None or one not in writers, f"{one.point}: its results had no room"
        if result["error"] is None:
            one.wait_for_success(system.scheduler)
        else:
            assert result["error"]["code"] == "no_space", result["error"]
            assert not one.destination.exists()
    assert system.worker.running
    assert_served_and_clean(system, guests, workdir)


def test_full_redis_stores_the_outcomes_of_a_batch_completely_or_not_at_all(own_scheduler: Scheduler) -> None:
    redis, campaign = own_scheduler.redis, CampaignResults(own_scheduler.results, "c")
    spec = CampaignSpec(campaign_id="c", source="/a", aims=Aims(count=3))
    outcomes = [failed_outcome(spec.fork(n, f"/b-{n}", 0.0), cancelled("/b")) for n in range(3)]
    redis.config_set("maxmemory", "1")

    with pytest.raises(OutOfMemoryError):
        campaign.store_outcomes(0, outcomes)

    assert redis.dbsize() == 0
    redis.config_set("maxmemory", "0")
    campaign.store_outcomes(0, outcomes)
    assert campaign.sums()["forks.cancelled"] == 3
    assert [fork["fork_id"] for fork in campaign.forks(1, 3)] == ["c.1", "c.2", "c.3"]


def _send_again(scheduler: Scheduler, one: PausedFork) -> None:
    scheduler.send({"source": str(one.source), "destination": str(one.destination)}, one.fork_id)


def _trees(one: PausedFork) -> list[Path]:
    """The trees of the fork while it is made; the control directory is not removed before the result is stored."""
    return list(one.destination.parent.glob(f"{control_name(one.fork_id)}.*"))


def _wait_for_result(scheduler: Scheduler, one: PausedFork) -> ForkResult:
    wait_until(lambda: scheduler.results.final.fork(one.fork_id) is not None, f"the result of {one.point}")
    result = scheduler.results.final.fork(one.fork_id)
    assert result is not None
    return result


def _assert_destination_exists(scheduler: Scheduler, one: PausedFork) -> None:
    result = _wait_for_result(scheduler, one)
    assert result["error"] is not None
    assert result["error"]["code"] == "destination_exists"
    assert snapshot(one.destination) == snapshot(one.source)
