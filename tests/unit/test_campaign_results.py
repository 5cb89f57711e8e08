"""The data of a campaign in Redis; with fakeredis, since no message goes through it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import fakeredis
import pytest

from tasks.campaign.ending import end_without_plan
from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.campaign.spec import MOST_FAILURES, Aims, CampaignSpec, campaign_result
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import Clock, failed, succeeded
from tasks.copier.report import Report
from tasks.store.campaign.results import CampaignResults
from tasks.store.keys import OPEN_SECONDS
from tasks.store.results import Results

EXPIRES = 3600


@pytest.fixture
def redis() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis() as client:
        yield client
        for key in client.scan_iter():
            assert 0 < client.ttl(key) <= OPEN_SECONDS, f"{key!r} has no TTL"


@pytest.fixture
def campaign(redis: fakeredis.FakeRedis) -> CampaignResults:
    return CampaignResults(Results(redis, EXPIRES, lambda fork_id: f"celery-task-meta-{fork_id}"), "c")


def spec_of(count: int) -> CampaignSpec:
    return CampaignSpec(campaign_id="c", source="/a", aims=Aims(count=count))


def outcomes(
    first: int, count: int, code: Code | None = None, *, path: str = "/b", names: tuple[str, ...] = ("x", "y")
) -> list[Outcome]:
    """The outcomes of `count` forks from the index `first` on, each with entries of these names; "" ends a page."""
    made = []
    for index in range(first, first + count):
        fork = spec_of(0).fork(index, f"{path}-{index}", 1.0)
        report = Report()
        for name in names:
            if not name:
                report.close()
                continue
            report.add(
                {
                    "path": name,
                    "type": "file",
                    "method": "copy",
                    "bytes": 5,
                    "copied_bytes": 3,
                    "seconds": 0.0,
                    "reason": None,
                    "error": None,
                }
            )
        clock = Clock(1.0)
        error = None if code is None else ForkError(code, "why", fork.destination)
        result = failed(fork, error, report.totals, 1, clock) if error else succeeded(fork, report.totals, 1, clock)
        made.append(Outcome(result, report.close()))
    return made


def test_an_outcome_is_stored_as_celerys_state_and_as_the_forks_result(
    redis: fakeredis.FakeRedis, campaign: CampaignResults
) -> None:
    good, bad, ended = outcomes(0, 1), outcomes(1, 1, Code.NO_SPACE), outcomes(2, 1, Code.CANCELLED)

    campaign.store_outcomes(0, good + bad + ended)

    states = [json.loads(redis.get(f"celery-task-meta-c.{n}") or b"") for n in (1, 2, 3)]
    assert [state["status"] for state in states] == ["SUCCESS", "FAILURE", "REVOKED"]
    assert states[0]["result"] == good[0].result
    assert states[1]["result"]["exc_message"] == ["no_space: /b-1: why"]
    assert [campaign.results.final.fork(f"c.{n}") for n in (1, 2, 3)] == [one[0].result for one in (good, bad, ended)]
    assert [file["path"] for file in campaign.results.pages.files("c.2")] == ["x", "y"]


def test_a_batch_that_is_stored_repeatedly_counts_once(campaign: CampaignResults) -> None:
    assert not campaign.has_outcomes(8)

    for _ in range(3):
        campaign.store_outcomes(8, outcomes(8, 4) + outcomes(12, 2, Code.NO_SPACE))

    assert campaign.has_outcomes(8)
    assert not campaign.has_outcomes(9)
    assert campaign.sums()["forks.succeeded"] == 4
    assert campaign.sums()["forks.failed"] == 2
    assert campaign.sums()["files.total"] == 12
    assert campaign.sums()["bytes.copied"] == 36
    assert len(campaign.failures()) == 2


def test_results_of_several_pages_are_read_back_in_order(campaign: CampaignResults) -> None:
    long = [str(n) for n in range(12)]
    names = tuple(part for name in long for part in (name, ""))

    campaign.store_outcomes(0, [*outcomes(0, 1), *outcomes(1, 1, names=names), *outcomes(2, 1, names=names[:4])])

    found = [[file["path"] for file in campaign.results.pages.files(f"c.{n}")] for n in (1, 2, 3)]
    assert found == [["x", "y"], long, long[:2]]


def test_results_of_forks_are_read_in_order_across_pages(campaign: CampaignResults) -> None:
    for first in range(1100, -1, -100):
        campaign.store_outcomes(first, outcomes(first, 100))

    assert [fork["fork_id"] for fork in campaign.forks(1, 1200)] == [f"c.{n}" for n in range(1, 1201)]
    assert [fork["fork_id"] for fork in campaign.forks(501, 2)] == ["c.501", "c.502"]


def test_forks_that_have_not_ended_are_omitted(campaign: CampaignResults) -> None:
    campaign.store_outcomes(3, outcomes(3, 2))
    campaign.store_outcomes(700, outcomes(700, 1))

    assert [fork["fork_id"] for fork in campaign.forks(1, 1200)] == ["c.4", "c.5", "c.701"]


def test_failures_are_the_first_in_the_order_of_the_forks_and_limited_in_bytes(campaign: CampaignResults) -> None:
    for first in (180, 60, 240, 0, 120):  # in the order in which the batches of several children may end
        campaign.store_outcomes(first, outcomes(first, 60, Code.NO_SPACE, path="/" + "x" * 4000 + "\udcff" * 80))

    failures = campaign.failures()
    result = campaign_result(spec_of(300), campaign.sums(), failures)

    assert len(failures) == MOST_FAILURES
    assert [failure["fork_id"] for failure in failures] == [f"c.{n}" for n in range(1, 101)]
    assert 0 < len(result["failures"]) <= MOST_FAILURES
    assert len(json.dumps(result)) < 1 << 20
    assert result["forks"] == {"total": 300, "succeeded": 0, "failed": 300, "cancelled": 0}


def test_failures_that_are_stored_together_leave_room_for_those_between_them(campaign: CampaignResults) -> None:
    campaign.store_outcomes(0, outcomes(0, 1, Code.IO_ERROR) + outcomes(9, 1, Code.IO_ERROR))
    campaign.store_outcomes(4, outcomes(4, 2, Code.NO_SPACE))
    campaign.store_outcomes(1, outcomes(1, 3, Code.NO_SPACE))

    assert [failure["fork_id"] for failure in campaign.failures()] == [f"c.{n}" for n in (1, 2, 3, 4, 5, 6, 10)]


def test_batches_are_done_once_their_outcomes_are_stored(campaign: CampaignResults) -> None:
    campaign.store_outcomes(128, outcomes(128, 64))
    campaign.store_outcomes(192, outcomes(192, 64))

    assert campaign.end_batch(128, [128, 192])
    assert campaign.is_batch_done(128)
    assert not campaign.is_batch_done(0)


@pytest.mark.parametrize("lost", [128, 192])
def test_a_batch_is_not_done_if_redis_has_lost_the_outcomes_of_one_of_its_runs(
    campaign: CampaignResults, lost: int
) -> None:
    for first in {128, 192} - {lost}:
        campaign.store_outcomes(first, outcomes(first, 64))

    assert not campaign.end_batch(128, [128, 192])
    assert not campaign.is_batch_done(128)


def test_progress_is_published_until_the_campaign_has_ended(
    redis: fakeredis.FakeRedis, campaign: CampaignResults
) -> None:
    campaign.store_outcomes(0, outcomes(0, 3) + outcomes(3, 1, Code.NO_SPACE))

    campaign.publish_progress(spec_of(10), campaign.sums(), planned_at=1.0)
    state = campaign.results.states.get("c")
    redis.set("celery-task-meta-c", json.dumps({"status": "SUCCESS", "result": None}), ex=EXPIRES)
    campaign.publish_progress(spec_of(10), campaign.sums(), planned_at=1.0)

    assert state["status"] == "PROGRESS"
    progress = state["result"]
    assert (progress["forks_done"], progress["forks_total"], progress["forks_failed"]) == (4, 10, 1)
    assert progress["eta_seconds"] > 0
    assert campaign.results.states.get("c")["status"] == "SUCCESS"


def test_the_first_reason_to_end_early_is_kept(campaign: CampaignResults) -> None:
    assert campaign.reason_to_end("/a") is None

    campaign.end_early(ForkError(Code.CANCELLED, "the deadline passed", "/a"))
    campaign.end_early(ForkError(Code.CANCELLED, "another", "/a"))

    error = campaign.reason_to_end("/a")
    assert error is not None
    assert error.message == "the deadline passed"


def test_a_clients_cancel_is_a_reason_to_end_early(campaign: CampaignResults) -> None:
    campaign.results.cancellations.request("c")

    error = campaign.reason_to_end("/a")
    assert error is not None
    assert (error.code, error.path) == (Code.CANCELLED, "/a")


def test_the_final_result_is_stored(campaign: CampaignResults) -> None:
    result = campaign_result(spec_of(3), {"forks.succeeded": 3}, [])

    campaign.store_campaign_result(result)

    assert campaign.result() == result
    assert result["status"] == "succeeded"


def test_each_fork_has_a_result_if_a_batch_is_stored_while_the_campaign_ends_without_its_staging(
    campaign: CampaignResults,
) -> None:
    """The batch is made in a staging that another process has moved away."""

    class Late(CampaignResults):
        def without_result(self, indexes: range, spec: CampaignSpec) -> list[int]:
            found = super().without_result(indexes, spec)
            campaign.store_outcomes(2, outcomes(2, 2))
            return found

    campaign.store_outcomes(0, outcomes(0, 2))
    ending = Late(campaign.results, campaign.campaign_id)

    result = end_without_plan(ending, spec_of(6), [f"/b-{n}" for n in range(6)], ForkError(Code.IO_ERROR, "why", "/a"))

    ends = [campaign.results.final.fork(f"c.{n}") for n in range(1, 7)]
    assert [end["status"] if end else None for end in ends] == ["succeeded"] * 2 + ["failed"] * 4
    assert (result["forks"]["succeeded"], result["forks"]["failed"]) == (2, 4)
