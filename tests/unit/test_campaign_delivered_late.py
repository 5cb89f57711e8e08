"""A campaign's own message that comes while the campaign is being concluded changes nothing of its result."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import fakeredis

from tasks.campaign import run_campaign
from tasks.campaign_request import campaign_of
from tasks.campaign_results import CampaignResults
from tasks.context import Context
from tasks.copier.campaign import campaign_result
from tasks.copier.options import Limits
from tasks.copier.roots import Roots
from tasks.copier.staging import Staging
from tasks.results import Results
from tests.fixtures.processes import wait_until


def test_a_delivery_that_waited_for_the_conclusion_gives_its_result_and_makes_nothing(tmp_path: Path) -> None:
    # Given a campaign that another process is about to conclude
    (tmp_path / "source").mkdir()
    request = {"source": str(tmp_path / "source"), "destinations": [str(tmp_path / "a"), str(tmp_path / "b")]}
    redis = fakeredis.FakeRedis()
    results = Results(redis, 3600, lambda job_id: f"celery-task-meta-{job_id}")
    sent: list[str] = []
    context = Context(
        Roots((str(tmp_path),)), Limits(), results, lambda task, kwargs, task_id: sent.append(task), "forkvm"
    )
    spec, _ = campaign_of(request, "c", owner="queue")
    concluded = campaign_result(spec, {"forks.cancelled": 2}, [])
    answers: list[object] = []
    late = threading.Thread(target=lambda: answers.append(run_campaign(context, "c", request, 0.0)))
    parent_fd = os.open(tmp_path, os.O_RDONLY)

    # When its own message comes before that is done
    with Staging.claim(parent_fd, "c", wait=0) as staging:
        late.start()
        wait_until(lambda: results.claim_of("c") is not None, "the delivery")
        CampaignResults(results, "c").settle_campaign(concluded)
        staging.remove()
    late.join()

    # Then
    assert answers == [concluded]
    assert results.final("c") == concluded
    assert sent == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    os.close(parent_fd)
