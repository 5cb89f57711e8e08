"""A message of a campaign that is delivered while the campaign is being ended does not change its result."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from tasks.campaign.batch import run_batch
from tasks.campaign.finish import run_finish_campaign
from tasks.campaign.start import run_campaign
from tasks.context import Context
from tasks.contract.campaign_request import campaign_of
from tasks.copier.campaign.spec import CampaignResult, campaign_result
from tasks.copier.options import Limits
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import LOCK_WAIT
from tasks.copier.staging.staging import Staging
from tasks.delivery.outcome import RetryLater
from tasks.store.campaign.results import CampaignResults
from tasks.store.results import Results
from tests.fixtures.processes import wait_until


@dataclass
class Campaign:
    """A campaign of two forks, its results, and the tasks that were sent for it."""

    path: Path
    request: dict[str, Any]
    context: Context
    sent: list[str]

    @property
    def results(self) -> Results:
        return self.context.results

    def deliver(self) -> CampaignResult | None:
        return run_campaign(self.context, "c", self.request, 0.0)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    (tmp_path / "source").mkdir()
    request = {"source": str(tmp_path / "source"), "destinations": [str(tmp_path / "a"), str(tmp_path / "b")]}
    results = Results(fakeredis.FakeRedis(), 3600, lambda job_id: f"celery-task-meta-{job_id}")
    sent: list[str] = []
    roots = Roots((str(tmp_path),))
    context = Context(roots, Limits(), results, lambda task, kwargs, task_id: sent.append(task), "forkvm")
    return Campaign(tmp_path, request, context, sent)


def test_a_delivery_that_waits_for_the_end_returns_its_result_and_makes_nothing(campaign: Campaign) -> None:
    # Given a campaign that another process is about to conclude
    spec, _ = campaign_of(campaign.request, "c", owner="queue")
    concluded = campaign_result(spec, {"forks.cancelled": 2}, [])
    answers: list[object] = []
    late = threading.Thread(target=lambda: answers.append(campaign.deliver()))
    parent_fd = os.open(campaign.path, os.O_RDONLY)

    # When its own message is delivered before that is done
    with Staging.claim(parent_fd, "c", wait=0) as staging:
        late.start()
        wait_until(lambda: campaign.results.claims.get("c") is not None, "the delivery")
        CampaignResults(campaign.results, "c").store_campaign_result(concluded)
        staging.remove()
    late.join()

    # Then
    assert answers == [concluded]
    assert campaign.results.final.get("c") == concluded
    assert campaign.sent == []
    assert campaign.left() == ["source"]
    os.close(parent_fd)


def test_a_second_delivery_sends_batches_again_while_one_is_made(campaign: Campaign) -> None:
    """It used to wait for the process that makes the batch, and to remove the plan when that process was paused."""
    # Given
    campaign.deliver()
    sent = [*campaign.sent]
    parent_fd = os.open(campaign.path, os.O_RDONLY)

    # When
    with Staging.attach(parent_fd, "c", wait=0) as batch:
        answer = campaign.deliver()

        # Then
        assert batch is not None
        assert batch.is_current()
    assert answer is None
    assert campaign.sent == 2 * sent != []
    os.close(parent_fd)


def test_a_second_delivery_of_a_cancelled_campaign_waits_for_the_result_of_the_first(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a cancelled campaign whose forks have results, but not yet the campaign itself
    campaign.results.cancellations.request("c")
    before_result, resume = threading.Event(), threading.Event()
    store_outcomes = CampaignResults.store_campaign_result

    def store_after_pause(self: CampaignResults, result: CampaignResult) -> None:
        before_result.set()
        resume.wait()
        store_outcomes(self, result)

    redelivered: list[object] = []

    def deliver_again() -> None:
        try:
            redelivered.append(campaign.deliver())
        except RetryLater:
            redelivered.append("again")

    monkeypatch.setattr(CampaignResults, "store_campaign_result", store_after_pause)
    answers: list[CampaignResult | None] = []
    first = threading.Thread(target=lambda: answers.append(campaign.deliver()), daemon=True)
    first.start()
    before_result.wait()

    # When it is delivered again
    again = threading.Thread(target=deliver_again, daemon=True)
    again.start()
    again.join(LOCK_WAIT + 5)
    resume.set()
    first.join()

    # Then
    assert redelivered == ["again"]
    assert answers[0] is not None
    assert answers[0]["status"] == "cancelled"
    assert campaign.deliver() == answers[0]
    assert campaign.left() == ["source"]


@pytest.mark.parametrize("again", ["campaign", "conclude"])
def test_staging_left_after_the_result_is_removed_by_the_next_delivery(campaign: Campaign, again: str) -> None:
    # Given a cancelled campaign with a result, and staging that a later delivery left when it was killed
    campaign.results.cancellations.request("c")
    result = campaign.deliver()
    parent_fd = os.open(campaign.path, os.O_RDONLY)
    with Staging.claim(parent_fd, "c", wait=0) as staging:
        os.close(staging.make_named_tree(staging.new_tree_name()))
    os.close(parent_fd)

    # When
    redelivered = (
        campaign.deliver()
        if again == "campaign"
        else run_finish_campaign(campaign.context, "c", str(campaign.path / "a"))
    )

    # Then
    assert redelivered == result
    assert campaign.left() == ["source"]


def test_a_campaign_whose_refusal_was_interrupted_ends_with_the_same_error(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a campaign that was refused for its source, by a process that was killed before it had stored the whole
    # result
    campaign.request["source"] = str(campaign.path / "missing")
    with monkeypatch.context() as patch:
        patch.setattr(CampaignResults, "store_campaign_result", _kill)
        with pytest.raises(Killed):
            campaign.deliver()
    (campaign.path / "missing").mkdir()

    # When
    result = campaign.deliver()

    # Then
    assert result is not None
    assert result["status"] == "failed"
    assert result["error"] is not None
    assert result["error"]["code"] == "source_not_found"
    assert result["forks"]["failed"] == 2
    assert campaign.left() == ["missing", "source"]


def test_a_batch_whose_outcomes_redis_loses_before_it_is_recorded_is_made_again(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a Redis that is killed after it has answered, and forgets its last second
    campaign.deliver()
    end_batch, deliveries = CampaignResults.end_batch, list[str]()

    def forget_then_end(self: CampaignResults, first: int, runs: list[int]) -> bool:
        if not deliveries:
            self.delete_outcomes()
        return end_batch(self, first, runs)

    monkeypatch.setattr(CampaignResults, "end_batch", forget_then_end)
    home = str(campaign.path / "a")

    # When
    with pytest.raises(RetryLater):
        run_batch(campaign.context, "c", home, 0)
    deliveries.append("again")
    for at in (0, 1):
        run_batch(campaign.context, "c", home, at)

    # Then
    result = run_finish_campaign(campaign.context, "c", home)
    assert result is not None
    assert result["forks"]["total"] == 2
    assert campaign.left() == ["a", "b", "source"]


class Killed(BaseException):
    """Simulates a process that is killed."""


def _kill(self: CampaignResults, result: CampaignResult) -> None:
    raise Killed
