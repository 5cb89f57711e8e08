"""Ids of campaigns and their forks, and one id in two domains; every fork of a campaign has a result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh, fresh_directory
from tests.fixtures.processes import RunForkvm, StartWorker, program_environment, wait_until
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
from tests.support.system.scheduler import Scheduler
from tests.support.system.systems import System, spin_until, stopped_when

DOMAIN = "rack-7"


@pytest.fixture(scope="module")
def source(xfs: Path) -> Iterator[Path]:
    with fresh_directory(xfs) as parent:
        yield make_source(parent / "source")


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    return fresh("xfs")


def test_fork_with_the_id_of_a_campaigns_fork_is_dropped_and_named(
    system: System, scheduler: Scheduler, source: Path, workdir: Path, mounts: Path, run_forkvm: RunForkvm
) -> None:
    # Given a campaign that has ended, and one that runs
    send(scheduler, request_of(source, workdir, 3), "over").get(timeout=30)
    long_workdir = workdir / "long"
    long_workdir.mkdir()
    long = send(scheduler, request_of(source, long_workdir, 1500), "long")
    spin_until(lambda: done(scheduler, "long"), "the first forks")

    # When forks and a campaign are sent under the ids of their forks
    request = {"source": str(source), "destination": str(workdir / "other")}
    for fork_id in ("over.2", "long.1500"):
        scheduler.send(request, fork_id)
    send(scheduler, request_of(source, workdir / "long", 5), "over.3")
    environment = program_environment(system.server, mounts)
    refused = run_forkvm("submit", source, workdir / "other", "--id", "over.1", env=environment)

    # Then the ids remain those of the campaigns' forks, and nothing else is made
    assert_all_are_whole(scheduler, long.get(timeout=60), source, paths_of(long_workdir, 1500))
    scheduler.wait_quiet()
    assert_all_are_whole(scheduler, result_of(scheduler, "over"), source, paths_of(workdir, 3))
    assert not (workdir / "other").exists()
    for fork_id, campaign_id in (("over.2", "over"), ("long.1500", "long"), ("over.3", "over")):
        line = f"invalid_request: a request with the id {fork_id!r} was dropped: it is the id of a fork of the campaign"
        system.worker.wait_for_output(f"{line} {campaign_id!r}")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "invalid_request" in refused.stderr
    assert "'over'" in refused.stderr

    # and an id with a number beyond the campaign's forks is free
    assert scheduler.wait(scheduler.send(request, "over.4"))["status"] == "succeeded"
    system.assert_left_nothing_in(workdir)


@pytest.mark.parametrize("first", ["fork", "campaign"])
def test_campaign_whose_fork_would_have_the_id_of_another_job_is_refused(
    first: str, system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    # Given a job whose id has the form of a fork's
    campaign_id = f"second-{first}"
    if first == "fork":
        scheduler.fork(source, workdir / "first", f"{campaign_id}.1200")
    else:
        send(scheduler, request_of(source, workdir / "first", 2), f"{campaign_id}.1200")
    wait_until(lambda: scheduler.results.final.get(f"{campaign_id}.1200") is not None, "the first job")
    before = scheduler.results.final.get(f"{campaign_id}.1200")

    # When
    sent = send(scheduler, request_of(source, workdir, 1300), campaign_id)

    # Then
    with pytest.raises(Exception, match=f"invalid_request: .*{campaign_id}.1200"):
        sent.get(timeout=30)
    scheduler.wait_quiet()
    assert result_of(scheduler, campaign_id)["forks"]["total"] == 0
    assert published_forks(workdir) == []
    assert scheduler.results.final.get(f"{campaign_id}.1200") == before
    assert forks_of(scheduler, campaign_id, 1199) == []


def test_the_same_id_in_a_second_domain_changes_nothing(
    own_scheduler: Scheduler,
    start_worker: StartWorker,
    mounts: Path,
    source: Path,
    workdir: Path,
    run_forkvm: RunForkvm,
) -> None:
    # Given a fork and a campaign that ended in one domain
    scheduler = own_scheduler
    start_worker(mounts)
    other = start_worker(mounts, command="forkvm", args=["--domain", DOMAIN])
    request = {"source": str(source), "destination": str(workdir / "fork")}
    fork = scheduler.wait(scheduler.send(request, "f"))
    campaign = send(scheduler, request_of(source, workdir, 3), "c").get(timeout=30)
    shutil.rmtree(workdir / "fork")

    # When the same requests are sent to another domain
    queue = f"forkvm.{DOMAIN}"
    scheduler.app.send_task("forkvm.fork", kwargs={"request": request}, task_id="f", queue=queue)
    send(scheduler, request_of(source, workdir, 3), "c", queue)
    wait_until(lambda: other.output().count("was dropped") == 2, "two lines in the log")
    environment = program_environment(scheduler.server, mounts)
    refused = run_forkvm("submit", source, workdir / "fork", "--id", "f", "--domain", DOMAIN, env=environment)

    # Then
    assert not (workdir / "fork").exists()
    assert scheduler.results.final.get("f") == fork
    assert result_of(scheduler, "c") == campaign
    for job_id in ("f", "c"):
        assert f"the id {job_id!r} was dropped: a job in the queue 'forkvm' has this id" in other.output()
        assert str(scheduler.app.AsyncResult(job_id).state) == "SUCCESS"
    assert refused.returncode == 2
    assert "'forkvm'" in refused.stderr
    assert "'forkvm.rack-7'" in refused.stderr


def test_cancelling_a_single_fork_of_a_campaign_is_refused_with_a_message(
    system: System, scheduler: Scheduler, source: Path, workdir: Path, mounts: Path, run_forkvm: RunForkvm
) -> None:
    environment = program_environment(system.server, mounts)
    sent = send(scheduler, request_of(source, workdir, 600), "whole")
    running = lambda: 0 < done(scheduler, "whole") < 600  # noqa: E731
    with stopped_when(system.worker, running, "a half-done campaign"):
        refused = run_forkvm("cancel", "whole.600", env=environment)
        status = run_forkvm("status", "whole.600", "--json", env=environment)
        unknown = run_forkvm("cancel", "whole.601", env=environment)

    assert (refused.returncode, refused.stdout) == (1, "")
    assert "it is a fork of the campaign whole; cancel the campaign: forkvm cancel whole" in refused.stderr
    assert (status.returncode, json.loads(status.stdout)["state"]) == (0, "PENDING")
    assert unknown.returncode == 2
    assert "unknown id" in unknown.stderr
    assert_all_are_whole(scheduler, sent.get(timeout=40), source, paths_of(workdir, 600))
    assert run_forkvm("cancel", "whole.600", env=environment).returncode == 1


@pytest.mark.parametrize("lost", ["home", "staging"])
def test_every_fork_has_a_result_when_the_campaigns_directory_is_moved(
    lost: str, system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    # Given a half-done campaign
    campaign_id, home = f"lost-{lost}", workdir / "home"
    home.mkdir()
    running = lambda: 0 < done(scheduler, campaign_id) < 1000  # noqa: E731
    sent = send(scheduler, request_of(source, home, 1000), campaign_id)

    # When its control directory's parent, or its staging alone, is moved away
    with stopped_when(system.worker, running, "a half-done campaign"):
        if lost == "home":
            home.rename(workdir / "elsewhere")
        else:
            (control,) = (path for path in home.glob(".forkvm-*") if "." not in path.name[1:])
            control.rename(workdir / "elsewhere")

    # Then the campaign and every fork of it end
    wait_until(lambda: scheduler.results.final.get(campaign_id) is not None, "the end", 60)
    scheduler.wait_quiet()
    result = result_of(scheduler, campaign_id)
    assert result["status"] == "partial"
    forks = assert_results_are_consistent(scheduler, result, paths_of(home, 1000))
    assert result["forks"]["succeeded"] + result["forks"]["failed"] == 1000
    assert {fork["error"]["code"] for fork in forks if fork["error"]} == {"io_error"}
    assert str(sent.state) == "SUCCESS"
    assert str(scheduler.app.AsyncResult(f"{campaign_id}.1000").state) == "FAILURE"
