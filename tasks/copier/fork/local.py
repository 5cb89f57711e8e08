"""A fork in this process and its children, without a broker: the same steps, the same result."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from tasks.copier.endpoints import Endpoints, open_endpoints
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.fork.child_pool import ChildPool
from tasks.copier.fork.lifecycle import Superseded, finish, start
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed
from tasks.copier.options import Limits
from tasks.copier.progress import Beat, Cancellation, Ticker
from tasks.copier.report import Totals
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import Workspace, open_work

#: Without messages a chunk costs next to nothing: with so many in place of one, no child waits long for the last one.
_FINER = 5


class _NoLedger:
    """A local fork's results go to its caller alone, who ends it by what the beat raises."""

    def keep_pages(self, parts: dict[str, list[bytes]], *, anew: bool = False) -> Cancellation:
        """Nobody asks for them later."""
        return Cancellation.NOT_REQUESTED

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        """Nobody asks for them later."""
        return Cancellation.NOT_REQUESTED

    def store_result(self, result: ForkResult) -> None:
        """The caller gets it."""


def fork_here(spec: ForkSpec, roots: Roots, limits: Limits, processes: int, beat: Beat) -> ForkResult:
    """Make one fork with at most `processes` children. Never raises ForkError: a failure is a result.

    `beat` is called about four times a second and raises ForkError to end the fork.
    """
    try:
        with open_endpoints(roots, spec.source, spec.destination) as ends:
            return _fork(ends, spec, limits, processes, Ticker(beat))
    except ForkError as error:
        return failed(spec, error, Totals(), 0, Clock(spec.started))
    except OSError as error:
        failure = from_oserror(error, "opening the source and the destination's parent", spec.destination)
        return failed(spec, failure, Totals(), 0, Clock(spec.started))


def _fork(ends: Endpoints, spec: ForkSpec, limits: Limits, processes: int, ticker: Ticker) -> ForkResult:
    ledger = _NoLedger()
    limits = replace(limits, chunk_files=max(1, limits.chunk_files // _FINER))
    crews: list[ChildPool] = []

    def gather(work: Workspace) -> ChildPool:
        crews.append(ChildPool(work, processes, ticker))
        return crews[0]

    try:
        with Staging.claim(ends.parent_fd, spec.fork_id, wait=0) as staging:
            plan = start(ends, staging, spec, limits, ticker, ledger, gather)
            if not isinstance(plan, Plan):
                return plan
            try:
                abort = _complete(ends, staging, spec, plan, crews[0] if crews else None, processes, ticker)
            except OSError:
                for crew in crews:
                    crew.dismiss()  # they hold the lock too, and the fork is to be given up
                raise
            result = finish(ends, staging, ticker, ledger, abort)
            if result is None:
                raise ForkError(Code.IO_ERROR, "chunks were left undone", spec.source)
            return result
    except Held:
        raise ForkError(Code.IO_ERROR, "another process makes a fork under this id", spec.destination) from None
    except Superseded:
        raise ForkError(Code.IO_ERROR, "the staging directory was removed", spec.destination) from None
    except OSError as error:
        failure = from_oserror(error, "working in the staging directory", spec.destination)
        return _end_with(ends, spec, failure, ticker)


def _end_with(ends: Endpoints, spec: ForkSpec, error: ForkError, ticker: Ticker) -> ForkResult:
    """Give up a fork whose staging could not be read or written a moment ago: perhaps it can for the end.

    Raises `error` where it still cannot.
    """
    with (
        suppress(OSError, Held, Superseded),
        Staging.attach(ends.parent_fd, spec.fork_id, wait=0, alone=True) as staging,
    ):
        result = finish(ends, staging, ticker, _NoLedger(), error) if staging is not None else None
        if result is not None:
            return result
    raise error


def _complete(
    ends: Endpoints,
    staging: Staging,
    spec: ForkSpec,
    plan: Plan,
    crew: ChildPool | None,
    processes: int,
    ticker: Ticker,
) -> ForkError | None:
    """Have children do all chunks; what a dead one left undone is begun again. Returns why to give up, if so."""
    journal = staging.journal()
    if journal is None:
        return ForkError(Code.IO_ERROR, "the staging directory was removed", spec.destination)
    with open_work(ends, staging, spec.options, staging.open_tree(journal)) as work:
        try:
            if crew is not None and crew.is_at_work:
                crew.complete(plan)
            while not staging.is_stopped() and not all(staging.has_report(str(n)) for n in range(len(plan.chunks))):
                ChildPool(work, processes, ticker).complete(plan)
        except ForkError as error:
            return error
    return None
