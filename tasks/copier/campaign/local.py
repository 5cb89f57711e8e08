"""A campaign in this process and its children, without a broker: the same batches and result as with workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tasks.copier import validation
from tasks.copier.campaign.batch import make_batch
from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.campaign.finish import aborted, end_rest, late, named_destination, remove_annexes
from tasks.copier.campaign.plan import Campaign, campaign_in, find_home, plan_campaign
from tasks.copier.campaign.spec import (
    MOST_FAILURES,
    CampaignProgress,
    CampaignResult,
    CampaignSpec,
    Failure,
    campaign_result,
    failures_of,
    forks_done,
    progress_of,
    sums_of,
)
from tasks.copier.child_processes import ChildProcesses, SharedCounters
from tasks.copier.copy_rate import Pace, unbounded
from tasks.copier.endpoints import Endpoints, open_endpoints
from tasks.copier.errors import Code, ForkError, from_oserror, from_record
from tasks.copier.fork.chunk import MAX_TRIES, worker_lost
from tasks.copier.fork.completion import Superseded
from tasks.copier.progress import Poll, Progress, Ticker
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import LOCK_WAIT, Held
from tasks.copier.staging.staging import Staging

#: Files that hold the outcomes of one run of forks each: the name before the index of its first fork.
_OUTCOMES = "settled-"

#: Called about ten times a second with the progress; raises ForkError to cancel the campaign.
CampaignPoll = Callable[[CampaignProgress], None]


def campaign_here(
    spec: CampaignSpec, paths: list[str], roots: Roots, processes: int, poll: CampaignPoll, pace: Pace = unbounded
) -> CampaignResult:
    """Make a campaign with at most `processes` children. Never raises ForkError: a failure is a result."""
    try:
        home = find_home(roots, paths)
        with (
            open_endpoints(roots, spec.source, home) as ends,
            # Held until the end, by the children too: `gc` removes what no process holds.
            Staging.claim(ends.parent_fd, spec.campaign_id, LOCK_WAIT) as staging,
        ):
            campaign = _plan(ends, staging, spec, paths, poll)
            try:
                error = _make_all(campaign, roots, processes, poll, pace)
            except OSError as fault:
                error = from_oserror(fault, "working in the staging directory", home)
            return _end(campaign, roots, error)
    except Held:
        message = "another process makes a campaign with this id"
        return _not_begun(spec, paths, ForkError(Code.IO_ERROR, message, paths[0]))
    except OSError as error:
        return _not_begun(spec, paths, from_oserror(error, "working in the staging directory", paths[0]))
    except ForkError as error:
        return _not_begun(spec, paths, error)


def _plan(ends: Endpoints, staging: Staging, spec: CampaignSpec, paths: list[str], poll: CampaignPoll) -> Campaign:
    try:
        plan_campaign(ends, staging, spec, paths, Ticker(lambda progress: poll(progress_of(spec, {}, 0.0))))
    except BaseException:
        staging.remove()
        raise
    return _require(campaign_in(staging), ends.destination)


def _make_all(campaign: Campaign, roots: Roots, processes: int, poll: CampaignPoll, pace: Pace) -> ForkError | None:
    """Have children make all batches, and make again what a dead child left.

    Returns the error that ends the rest, if any. Raises OSError. No child runs when this returns or raises.
    """
    spec, staging, home = campaign.spec, campaign.staging, campaign.home
    done, without_progress = 0, 0
    while without_progress < MAX_TRIES:
        pool = _BatchPool(campaign, roots, min(processes, campaign.plan.lanes), pace)
        try:
            codes = pool.make(poll)
        except ForkError as error:
            return error
        _require(campaign_in(staging), home)
        sums, failures = _stored(staging)
        if staging.is_stopped() and failures:
            return from_record(failures[0]["error"])
        if forks_done(sums) == spec.aims.count or spec.is_late():
            return None if forks_done(sums) == spec.aims.count and not sums.get("forks.cancelled") else late(campaign)
        cause = pool.processes.error_in(codes, spec.source, home)
        if cause is not None:
            return cause
        without_progress = without_progress + 1 if forks_done(sums) == done else 0
        done = forks_done(sums)
    return worker_lost(spec.source)


def _end(campaign: Campaign, roots: Roots, error: ForkError | None) -> CampaignResult:
    ledger = _Ending(campaign.staging)
    if error is not None:
        cause = aborted(campaign) if campaign.spec.aims.on_error == "abort" and error.code != Code.CANCELLED else error
        end_rest(campaign, roots, Ticker(_never_stop), ledger, cause)
    sums, failures = _stored(campaign.staging, ledger.stored)
    remove_annexes(campaign, roots)
    with suppress(OSError):  # all forks have ended; `gc` removes what cannot be removed now
        campaign.staging.remove()
    return campaign_result(campaign.spec, sums, failures, planned_at=campaign.planned_at, error=error)


def _not_begun(spec: CampaignSpec, paths: list[str], error: ForkError) -> CampaignResult:
    if error.code is Code.CANCELLED:
        return campaign_result(spec, {"forks.cancelled": len(paths)}, [], error=error)
    named = named_destination(error, paths)
    failures: list[Failure] = [
        {"fork_id": spec.fork_id(index), "destination": path, "error": error.for_fork(named, path).record()}
        for index, path in enumerate(paths[:MOST_FAILURES])
    ]
    return campaign_result(spec, {"forks.failed": len(paths)}, failures, error=error)


def _require(campaign: Campaign | None, home: str) -> Campaign:
    if campaign is None:
        raise ForkError(Code.IO_ERROR, "the staging directory was removed", home)
    return campaign


def _never_stop(progress: Progress) -> None:
    """The end of a campaign cannot be cancelled."""


#: The sums and the first failures of one run of forks, as plain data.
_Run = dict[str, Any]


@dataclass(frozen=True)
class _Files:
    """The ledger of a local campaign: the sums of each run of forks, in a file of the control directory."""

    staging: Staging

    def has_outcomes(self, first: int) -> bool:
        """See `CampaignLedger`."""
        return self.staging.has_file(f"{_OUTCOMES}{first}")

    def store_outcomes(self, first: int, outcomes: list[Outcome]) -> None:
        """See `CampaignLedger`. A second call comes from a process that could not store what it made.

        Another one may have found that, stored it, and forgotten the record of it meanwhile.
        """
        if self.has_outcomes(first):
            return
        self.staging.write_file(f"{_OUTCOMES}{first}", json.dumps(_run_of(outcomes)).encode("ascii"))


@dataclass(frozen=True)
class _Ending(_Files):
    """As `_Files`, but keeps outcomes in memory: the campaign may end because the disk is full."""

    stored: dict[int, _Run] = field(default_factory=dict)

    def has_outcomes(self, first: int) -> bool:
        """See `CampaignLedger`."""
        return first in self.stored or super().has_outcomes(first)

    def store_outcomes(self, first: int, outcomes: list[Outcome]) -> None:
        """See `CampaignLedger`."""
        self.stored[first] = _run_of(outcomes)


def _run_of(outcomes: list[Outcome]) -> _Run:
    results = [outcome.result for outcome in outcomes]
    return {"sums": sums_of(results), "failures": failures_of(results)[:MOST_FAILURES]}


def _stored(staging: Staging, ended: Mapping[int, _Run] = MappingProxyType({})) -> tuple[dict[str, int], list[Failure]]:
    """The outcomes in files and in `ended`: their sums, and the first failures in the order of the forks."""
    numbers = [name.removeprefix(_OUTCOMES) for name in os.listdir(staging.fd) if name.startswith(_OUTCOMES)]
    runs = {int(number): _read_run(staging, number) for number in numbers if number.isascii() and number.isdigit()}
    runs |= ended
    sums: dict[str, int] = {}
    failures: list[Failure] = []
    for _, run in sorted(runs.items()):
        for key, value in run["sums"].items():
            sums[key] = sums.get(key, 0) + value
        failures += run["failures"][: MOST_FAILURES - len(failures)]
    return sums, failures


def _read_run(staging: Staging, number: str) -> _Run:
    with validation.reading("the sums of a batch"):
        data = validation.json_object(validation.load(staging.read_file(f"{_OUTCOMES}{number}")))
        sums = {
            key: validation.integer(value, validation.SUM)
            for key, value in validation.json_object(data["sums"]).items()
        }
        return {"sums": sums, "failures": validation.list_of(data["failures"], _failure_of, MOST_FAILURES)}


def _failure_of(value: Any) -> Failure:
    data = validation.json_object(value)
    return {
        "fork_id": validation.text(data["fork_id"]),
        "destination": validation.text(data["destination"]),
        "error": validation.error_record(data["error"]),
    }


class _BatchPool:
    """Children that share the batches of one campaign: each takes the next one that no process holds.

    If the system has no process left, the parent makes the batches itself.
    """

    def __init__(self, campaign: Campaign, roots: Roots, count: int, pace: Pace) -> None:
        self._campaign, self._roots, self._count, self._pace = campaign, roots, count, pace
        #: Forks done and failed by each child.
        self._counters = SharedCounters(count)
        self.processes = ChildProcesses()
        self._began = time.time()
        self._aborts = campaign.spec.aims.on_error == "abort"

    def make(self, poll: CampaignPoll) -> list[int]:
        """Make batches until none is left or all children have ended. Returns the children's exit codes.

        Raises what `poll` raises, and OSError; no child runs then.
        """
        processes = self.processes
        try:
            processes.start(self._count, self._run_child)
            if not processes:
                self._make_batches(0, self._campaign.staging, lambda progress: poll(self._progress()))
            return processes.wait(lambda: poll(self._progress()))
        except BaseException:
            with suppress(OSError):
                self._campaign.staging.stop()
            processes.reap()
            raise

    def _progress(self) -> CampaignProgress:
        done, failed = self._counters.sums()
        return progress_of(self._campaign.spec, {"forks.succeeded": done - failed, "forks.failed": failed}, self._began)

    def _run_child(self, child: int) -> int:
        """Make batches in a child. Returns its exit code."""
        staging = self._campaign.staging
        # Its own descriptor: processes that share one share the position of listdir in the directory.
        staging.fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=staging.fd)
        with suppress(ForkError):  # the campaign was cancelled, which the parent knows
            self._make_batches(child, staging, lambda progress: None)
        return 0

    def _make_batches(self, child: int, staging: Staging, poll: Poll) -> None:
        campaign = self._campaign
        ledger = _Counting(staging, self._counters, child, self._aborts)

        def poll_until_stopped(progress: Progress) -> None:
            poll(progress)
            if staging.is_stopped():
                raise ForkError(Code.CANCELLED, "the campaign was cancelled", campaign.spec.source)
            if error := late(campaign):
                raise error

        ticker = Ticker(poll_until_stopped, self._pace)
        for first in range(0, campaign.spec.aims.count, campaign.plan.batch):
            if staging.is_stopped() or campaign.spec.is_late():
                return
            ticker.poll()
            with suppress(Superseded):
                try:
                    make_batch(campaign, self._roots, first, ticker, ledger)
                except Held as held:
                    if isinstance(held.__cause__, OSError):  # no child holds it: its outcomes cannot be written
                        raise held.__cause__ from None


@dataclass(frozen=True)
class _Counting(_Files):
    """As `_Files`, and counts for the parent. The first failure ends the campaign if `on_error` is abort."""

    counters: SharedCounters
    child: int
    aborts: bool

    def store_outcomes(self, first: int, outcomes: list[Outcome]) -> None:
        """See `CampaignLedger`."""
        if self.has_outcomes(first):  # they are counted
            return
        super().store_outcomes(first, outcomes)
        failed = sum(outcome.result["status"] == "failed" for outcome in outcomes)
        done_before, failed_before = self.counters.get(self.child)
        self.counters.set(self.child, done_before + len(outcomes), failed_before + failed)
        if failed and self.aborts:
            self.staging.stop()
