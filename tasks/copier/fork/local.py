"""One fork in this process and its children, without a broker: the same steps and the same result as in a worker."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

from tasks.copier.copy_rate import Pace, unbounded
from tasks.copier.endpoints import Endpoints, open_endpoints
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.fork.child_pool import ChildPool
from tasks.copier.fork.completion import Superseded
from tasks.copier.fork.lifecycle import finish, start
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed
from tasks.copier.options import Limits
from tasks.copier.progress import Cancellation, Poll, Ticker
from tasks.copier.report import Totals
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import LOCK_WAIT, Held
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import Workspace, open_work

#: How many times smaller chunks are than in a worker. A chunk needs no message here, so it costs almost nothing, and
#: small ones keep a child from waiting long for the last one.
_TIMES_SMALLER = 5
_REMOVED = "the staging directory was removed"


class _NoLedger:
    """Keeps no results: the caller of a local fork gets them, and cancels it by raising in `poll`."""

    def keep_pages(self, pages_by_part: dict[str, list[bytes]], *, replace_all: bool = False) -> Cancellation:
        """Keep nothing."""
        return Cancellation.NOT_REQUESTED

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        """Keep nothing."""
        return Cancellation.NOT_REQUESTED

    def lost_parts(self, parts: Iterable[str]) -> list[str]:
        """Nothing was kept, so nothing is lost."""
        return []

    def store_result(self, result: ForkResult) -> None:
        """Keep nothing."""


def fork_here(
    spec: ForkSpec, roots: Roots, limits: Limits, processes: int, poll: Poll, pace: Pace = unbounded
) -> ForkResult:
    """Make one fork with at most `processes` children. Never raises ForkError: a failure is a result.

    `poll` is called about four times a second and raises ForkError to cancel the fork.
    """
    try:
        with open_endpoints(roots, spec.source, spec.destination) as ends:
            return _fork(ends, spec, limits, processes, Ticker(poll, pace))
    except ForkError as error:
        return failed(spec, error, Totals(), 0, Clock(spec.started))
    except OSError as error:
        failure = from_oserror(error, "opening the source and the destination's parent", spec.destination)
        return failed(spec, failure, Totals(), 0, Clock(spec.started))


@lru_cache(maxsize=1)
def _smaller(limits: Limits) -> Limits:
    return replace(limits, chunk_files=max(1, limits.chunk_files // _TIMES_SMALLER))


def _fork(ends: Endpoints, spec: ForkSpec, limits: Limits, processes: int, ticker: Ticker) -> ForkResult:
    ledger = _NoLedger()
    limits = _smaller(limits)
    pools: list[ChildPool] = []

    def start_early(work: Workspace) -> ChildPool:
        pools.append(ChildPool(work, processes, ticker))
        return pools[0]

    try:
        with Staging.claim(ends.parent_fd, spec.fork_id, LOCK_WAIT) as staging:
            plan = start(ends, staging, spec, limits, ticker, ledger, start_early)
            if not isinstance(plan, Plan):
                return plan
            try:
                error = _run_chunks(ends, staging, spec, plan, pools, processes, ticker)
            finally:
                for pool in pools:
                    pool.stop()  # the children hold the lock too: none may run when the fork ends, however it does
            result = finish(ends, staging, ticker, ledger, error)
            if result is None:
                what = "some chunks of the fork were not done" if staging.is_current() else _REMOVED
                raise ForkError(Code.IO_ERROR, what, spec.destination)
            return result
    except Held:
        raise ForkError(Code.IO_ERROR, "another process makes a fork with this id", spec.destination) from None
    except Superseded:
        raise ForkError(Code.IO_ERROR, _REMOVED, spec.destination) from None
    except OSError as error:
        failure = from_oserror(error, "working in the staging directory", spec.destination)
        return _abandon(ends, spec, failure, ticker)


def _abandon(ends: Endpoints, spec: ForkSpec, error: ForkError, ticker: Ticker) -> ForkResult:
    """Abandon a fork after an error of its staging directory, which may be readable and writable again.

    Raises `error` if it is not.
    """
    with (
        suppress(OSError, Held, Superseded),
        Staging.attach(ends.parent_fd, spec.fork_id, LOCK_WAIT, alone=True) as staging,
    ):
        result = finish(ends, staging, ticker, _NoLedger(), error) if staging is not None else None
        if result is not None:
            return result
    raise error


def _run_chunks(
    ends: Endpoints,
    staging: Staging,
    spec: ForkSpec,
    plan: Plan,
    pools: list[ChildPool],
    processes: int,
    ticker: Ticker,
) -> ForkError | None:
    """Have children do all chunks, and do again what a dead child left. Returns the error that ends the fork, if any.

    `pools` has the pool that was started during the walk, if there was one.
    """
    journal = staging.journal()
    if journal is None:
        return ForkError(Code.IO_ERROR, _REMOVED, spec.destination)
    with open_work(ends, staging, spec.options, staging.open_tree(journal)) as work:
        try:
            for pool in pools:
                if pool.is_at_work:
                    pool.complete(work, plan)
            while not staging.is_stopped() and not all(staging.has_report(str(n)) for n in range(len(plan.chunks))):
                ChildPool(work, processes, ticker).complete(work, plan)
        except ForkError as error:
            return error
    return None
