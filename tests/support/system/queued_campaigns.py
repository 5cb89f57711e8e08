"""Campaigns as a scheduler sends them, and checks that apply to each ended campaign."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from celery.result import AsyncResult

from tasks.copier.campaign.spec import CampaignResult
from tasks.copier.fork_spec import ForkResult
from tasks.store.campaign.results import CampaignResults
from tests.support.system.result_checks import check_file_results, check_fork_result
from tests.support.system.scheduler import QUEUE, Scheduler
from tests.support.tree import snapshot

#: One fork of this many is compared byte by byte, and its FileResults are checked.
_SAMPLE = 25


def make_source(path: Path, files: int = 12) -> Path:
    """A small source of many files: a fork of it takes about a millisecond."""
    (path / "layers").mkdir(parents=True)
    for n in range(files):
        (path / "layers" / f"block-{n}").write_bytes(b"%d" % n * 500)
    (path / "state").symlink_to("layers/block-0")
    return path


def request_of(source: Path, workdir: Path, count: int, **fields: Any) -> dict[str, Any]:
    """A CampaignRequest for `count` forks below `workdir`."""
    return {"source": str(source), "destinations": {"template": f"{workdir}/vm-{{n:04}}", "count": count}, **fields}


def paths_of(workdir: Path, count: int) -> list[Path]:
    """The destinations that `request_of` names."""
    return [workdir / f"vm-{n:04}" for n in range(1, count + 1)]


def send(scheduler: Scheduler, request: object, campaign_id: str, queue: str = QUEUE) -> AsyncResult[Any]:
    """As any Celery client sends it."""
    return scheduler.app.send_task("forkvm.campaign", kwargs={"request": request}, task_id=campaign_id, queue=queue)


def forks_of(scheduler: Scheduler, campaign_id: str, count: int, start: int = 1) -> list[ForkResult]:
    """The results of the forks that have ended so far, in order."""
    return list(CampaignResults(scheduler.results, campaign_id).forks(start, count))


def done(scheduler: Scheduler, campaign_id: str) -> int:
    """The number of forks that have ended."""
    sums = CampaignResults(scheduler.results, campaign_id).sums()
    return sum(value for name, value in sums.items() if name.startswith("forks."))


def result_of(scheduler: Scheduler, campaign_id: str) -> CampaignResult:
    """The final result, whatever its status."""
    result = scheduler.results.final.get(campaign_id)
    assert result is not None, f"{campaign_id} has no result"
    return cast(CampaignResult, result)


def assert_results_are_consistent(
    scheduler: Scheduler, result: CampaignResult, paths: Sequence[Path]
) -> list[ForkResult]:
    """Each fork has exactly one result, and the campaign's totals are their sums. Returns the forks' results."""
    campaign_id = result["campaign_id"]
    forks = forks_of(scheduler, campaign_id, len(paths))
    assert [fork["fork_id"] for fork in forks] == [f"{campaign_id}.{n}" for n in range(1, len(paths) + 1)]
    assert [fork["destination"] for fork in forks] == [str(path) for path in paths]
    states = scheduler.redis.mget([f"celery-task-meta-{fork['fork_id']}" for fork in forks])
    assert all(states)
    for name in ("succeeded", "failed", "cancelled"):
        assert result["forks"][name] == sum(fork["status"] == name for fork in forks)
    assert result["forks"]["total"] == len(paths)
    for group in ("files", "bytes"):
        for name, value in result[group].items():
            assert value == sum(fork[group][name] for fork in forks)
    for fork in forks[::_SAMPLE]:
        check_fork_result(fork)
        check_file_results(fork, scheduler.files(fork["fork_id"]))
    return forks


def assert_all_are_whole(scheduler: Scheduler, result: CampaignResult, source: Path, paths: Sequence[Path]) -> None:
    """Every fork succeeded once, and equals the source."""
    assert (result["status"], result["error"], result["failures"]) == ("succeeded", None, [])
    assert_results_are_consistent(scheduler, result, paths)
    names = sorted(os.listdir(source / "layers"))
    assert all(sorted(os.listdir(path / "layers")) == names for path in paths)
    whole = snapshot(source)
    for path in paths[::_SAMPLE]:
        assert snapshot(path) == whole


def published_forks(workdir: Path) -> list[str]:
    """The names of the published forks."""
    return sorted(name for name in os.listdir(workdir) if name.startswith("vm-"))
