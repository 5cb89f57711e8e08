"""A campaign in this process and its children, without a broker: the same batches, the same result."""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tasks.copier.campaigns.batch import make_batch
from tasks.copier.campaigns.batch_record import Outcome
from tasks.copier.campaigns.end import aborted, end_rest, late, remove_annexes
from tasks.copier.campaigns.plan import Campaign, campaign_in, find_home, plan_campaign
from tasks.copier.campaigns.spec import (
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
from tasks.copier.control import Held
from tasks.copier.ends import Ends, open_ends
from tasks.copier.errors import Code, ForkError, from_oserror, from_record
from tasks.copier.fork import Superseded
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.roots import Roots
from tasks.copier.progress import Progress, Ticker
from tasks.copier.staging import Staging

#: Forks done and failed by one child, in memory that the parent reads.
_COUNTERS = struct.Struct("=qq")
#: How often the parent looks at its children.
_LOOK_MILLISECONDS = 100
#: How often children are begun anew for what dead ones left; each batch counts its own tries besides.
_ROUNDS = 8
_SETTLED = "settled-"

#: Called about ten times a second with the progress; raises ForkError to end the campaign.
CampaignBeat = Callable[[CampaignProgress], None]


def campaign_here(
    spec: CampaignSpec, paths: list[str], roots: Roots, processes: int, beat: CampaignBeat
) -> CampaignResult:
    """Make a campaign with at most `processes` children. Never raises ForkError: a failure is a result."""
    try:
        home = find_home(roots, paths)
        with (
            open_ends(roots, spec.source, home) as ends,
            # Held to the end, by the children too: what no process holds, `gc` takes for dead.
            Staging.claim(ends.parent_fd, spec.campaign_id, wait=0) as staging,
        ):
            campaign = _plan(ends, staging, spec, paths, beat)
            error = _make_all(campaign, roots, processes, beat)
            return _end(campaign, roots, error)
    except Held:
        return _refused(spec, paths, ForkError(Code.IO_ERROR, "another process holds its staging", spec.source))
    except OSError as error:
        return _refused(spec, paths, from_oserror(error, "working in the staging directory", paths[0]))
    except ForkError as error:
        return _refused(spec, paths, error)


def _plan(ends: Ends, staging: Staging, spec: CampaignSpec, paths: list[str], beat: CampaignBeat) -> Campaign:
    try:
        plan_campaign(ends, staging, spec, paths, Ticker(lambda progress: beat(progress_of(spec, {}, 0.0))))
    except BaseException:
        staging.remove()
        raise
    return _standing(campaign_in(staging), ends.destination)


def _make_all(campaign: Campaign, roots: Roots, processes: int, beat: CampaignBeat) -> ForkError | None:
    """Have children make all batches; what dead ones left is begun again. Returns why to give up, if so."""
    spec, staging = campaign.spec, campaign.staging
    for _ in range(_ROUNDS):
        crew = _Crew(campaign, roots, min(processes, campaign.plan.lanes))
        try:
            crew.wait(beat)
        except ForkError as error:
            staging.stop()
            crew.reap()
            return error
        _standing(campaign_in(staging), spec.source)
        sums, failures = _settled(staging)
        if staging.is_stopped() and failures:
            return from_record(failures[0]["error"])
        if forks_done(sums) == spec.aims.count or spec.is_late():
            return None if forks_done(sums) == spec.aims.count and not sums.get("forks.cancelled") else late(campaign)
    return ForkError(Code.WORKER_LOST, "the processes that worked on it died each time", spec.source)


def _end(campaign: Campaign, roots: Roots, error: ForkError | None) -> CampaignResult:
    ledger = _Files(campaign.staging)
    if error is not None:
        cause = aborted(campaign) if campaign.spec.aims.on_error == "abort" and error.code != Code.CANCELLED else error
        end_rest(campaign, roots, Ticker(_go_on), ledger, cause)
    sums, failures = _settled(campaign.staging)
    remove_annexes(campaign, roots)
    campaign.staging.remove()
    return campaign_result(campaign.spec, sums, failures, planned_at=campaign.planned_at, error=error)


def _refused(spec: CampaignSpec, paths: list[str], error: ForkError) -> CampaignResult:
    if error.code is Code.CANCELLED:
        return campaign_result(spec, {"forks.cancelled": len(paths)}, [], error=error)
    failures: list[Failure] = [
        {"fork_id": spec.fork_id(index), "destination": path, "error": error.record()}
        for index, path in enumerate(paths[:MOST_FAILURES])
    ]
    return campaign_result(spec, {"forks.failed": len(paths)}, failures, error=error)


def _standing(campaign: Campaign | None, home: str) -> Campaign:
    if campaign is None:
        raise ForkError(Code.IO_ERROR, "the staging directory was removed", home)
    return campaign


def _go_on(progress: Progress) -> None:
    """Nobody ends the end of a campaign."""


@dataclass(frozen=True)
class _Files:
    """The ledger of a local campaign: the sums of each run of forks, in a file of the control directory."""

    staging: Staging

    def is_settled(self, first: int) -> bool:
        """See `CampaignLedger`."""
        return self.staging.has_file(f"{_SETTLED}{first}")

    def settle(self, first: int, outcomes: list[Outcome]) -> None:
        """See `CampaignLedger`."""
        results = [outcome.result for outcome in outcomes]
        data = {"sums": sums_of(results), "failures": failures_of(results)[:MOST_FAILURES]}
        self.staging.write_file(f"{_SETTLED}{first}", json.dumps(data).encode("ascii"))


def _settled(staging: Staging) -> tuple[dict[str, int], list[Failure]]:
    """What all children settled: the sums, and the first failures in the order of the forks."""
    names = [name for name in os.listdir(staging.fd) if name.startswith(_SETTLED) and not name.endswith(".new")]
    sums: dict[str, int] = {}
    failures: list[Failure] = []
    for name in sorted(names, key=lambda name: int(name.removeprefix(_SETTLED))):
        data: dict[str, Any] = json.loads(staging.read_file(name))
        for key, value in data["sums"].items():
            sums[key] = sums.get(key, 0) + value
        failures += data["failures"][: MOST_FAILURES - len(failures)]
    return sums, failures


class _Crew:
    """Child processes that share the batches of one campaign: each takes the next one that nobody holds."""

    def __init__(self, campaign: Campaign, roots: Roots, count: int) -> None:
        self._campaign, self._roots = campaign, roots
        self._counters = mmap.mmap(-1, _COUNTERS.size * count)
        self._began = time.time()
        parent = os.getpid()
        self._pids = {self._spawn(n, parent) for n in range(count)}
        self._count = count

    def wait(self, beat: CampaignBeat) -> None:
        """Wait until all children have ended, whatever their end. Raises ForkError, as `beat` does."""
        poll = select.poll()
        living = {os.pidfd_open(pid): pid for pid in self._pids}
        for fd in living:
            poll.register(fd, select.POLLIN)
        try:
            while living:
                for fd, _ in poll.poll(_LOOK_MILLISECONDS):
                    poll.unregister(fd)
                    os.close(fd)
                    pid = living.pop(fd)
                    os.waitpid(pid, 0)
                    self._pids.remove(pid)
                beat(self._progress())
        finally:
            for fd in living:
                os.close(fd)

    def reap(self) -> None:
        """Wait for the children that are left."""
        for pid in self._pids:
            os.waitpid(pid, 0)

    def _progress(self) -> CampaignProgress:
        done = failed = 0
        for n in range(self._count):
            child_done, child_failed = _COUNTERS.unpack_from(self._counters, n * _COUNTERS.size)
            done, failed = done + child_done, failed + child_failed
        return progress_of(self._campaign.spec, {"forks.succeeded": done - failed, "forks.failed": failed}, self._began)

    def _spawn(self, index: int, parent: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            self._work(index, parent)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(0)

    def _work(self, index: int, parent: int) -> None:
        # The parent answers for the terminal and for TERM; a child left without it would hold the lock for ever.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        syscalls.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            return
        campaign, staging = self._campaign, self._campaign.staging
        # Of its own: processes that share a directory's descriptor share the place up to which it was listed.
        staging.fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=staging.fd)
        ledger = _Counting(staging, self._counters, index, campaign.spec.aims.on_error == "abort")

        def look(progress: Progress) -> None:
            if staging.is_stopped():
                raise ForkError(Code.CANCELLED, "the campaign was ended", campaign.spec.source)
            if error := late(campaign):
                raise error

        ticker = Ticker(look)
        for first in range(0, campaign.spec.aims.count, campaign.plan.batch):
            if staging.is_stopped() or campaign.spec.is_late():
                return
            with suppress(Held, Superseded):  # another child makes it
                make_batch(campaign, self._roots, first, ticker, ledger)


@dataclass(frozen=True)
class _Counting(_Files):
    """As `_Files`, and tells the parent; the first failure ends the campaign where that is asked for."""

    counters: mmap.mmap
    child: int
    aborts: bool

    def settle(self, first: int, outcomes: list[Outcome]) -> None:
        """See `CampaignLedger`."""
        super().settle(first, outcomes)
        failed = sum(outcome.result["status"] == "failed" for outcome in outcomes)
        at = self.child * _COUNTERS.size
        done_before, failed_before = _COUNTERS.unpack_from(self.counters, at)
        _COUNTERS.pack_into(self.counters, at, done_before + len(outcomes), failed_before + failed)
        if failed and self.aborts:
            self.staging.stop()
