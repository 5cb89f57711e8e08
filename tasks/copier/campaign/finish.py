"""The end of a campaign: forks that were not made are ended, and the control directories are removed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial

from tasks.copier.campaign.batch import CampaignLedger, failed_outcome, make_batch
from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.campaign.plan import Campaign
from tasks.copier.campaign.spec import CampaignSpec
from tasks.copier.errors import Code, ForkError
from tasks.copier.progress import Ticker
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.staging import Staging

#: Outcomes of forks that were not started are stored this many at a time.
_STORED_AT_ONCE = 500
#: Destinations that are read at a time.
_SLICE = 10_000


def late(campaign: Campaign, clock: Callable[[], float] = time.time) -> ForkError | None:
    """The error of a campaign whose deadline has passed by the clock of `Aims.deadline`, or None."""
    if campaign.spec.is_late(clock):
        return ForkError(Code.CANCELLED, "the campaign's deadline passed", campaign.spec.source)
    return None


def aborted(campaign: Campaign) -> ForkError:
    """The error of the remaining forks of a campaign after a failure, if `on_error` is abort."""
    return ForkError(Code.CANCELLED, "another fork of the campaign failed, and on_error is abort", campaign.spec.source)


def end_rest(campaign: Campaign, roots: Roots, ticker: Ticker, ledger: CampaignLedger, error: ForkError) -> None:
    """End every fork that is not published with `error`, store its outcome, and remove what was made of it.

    The control directory is held exclusively. Raises Held, OSError.
    """
    not_started: dict[int, str] = {}
    begun = campaign.staging.begun_chunks()
    is_home = cache(partial(_is_home, campaign, roots))
    for first in range(0, campaign.spec.aims.count, campaign.plan.batch):
        destinations = campaign.destinations(first, campaign.plan.batch)
        if first in begun or ledger.has_outcomes(first) or not all(is_home(os.path.dirname(p)) for p in destinations):
            make_batch(campaign, roots, first, ticker, ledger, error)
            continue
        not_started |= {first + n: path for n, path in enumerate(destinations)}
        if len(not_started) >= _STORED_AT_ONCE:
            _store_not_started(campaign, ledger, not_started, error)
            not_started = {}
    _store_not_started(campaign, ledger, not_started, error)


def _store_not_started(campaign: Campaign, ledger: CampaignLedger, forks: dict[int, str], error: ForkError) -> None:
    """Store `error` as the outcome of forks that were not started: destinations by index."""
    if forks:
        ledger.store_outcomes(min(forks), not_started(campaign.spec, forks, time.time(), error, campaign.home))


def named_destination(error: ForkError, paths: Iterable[str]) -> str:
    """The destination out of `paths` that an error of the whole campaign names; empty if it names none."""
    return next((path for path in paths if f"{error.path}/".startswith(f"{path}/")), "")


def not_started(
    spec: CampaignSpec, forks: Mapping[int, str], started: float, error: ForkError, home: str
) -> list[Outcome]:
    """The outcomes of forks that were not started and end with `error`: one or more destinations, by index.

    They are copies that differ in id and destination only, because there may be 100,000. `started`: see
    `CampaignSpec.fork`. `home`: the destination that an error of the whole campaign names.
    """
    index, destination = next(iter(forks.items()))
    like = failed_outcome(spec.fork(index, destination, started), error).result
    return [
        Outcome(
            {**like, "fork_id": spec.fork_id(n), "destination": path, "error": error.for_fork(home, path).record()}, []
        )
        for n, path in forks.items()
    ]


def _is_home(campaign: Campaign, roots: Roots, parent: str) -> bool:
    """Whether the control directory that is held is in `parent`. A batch in another parent has its records there."""
    path = f"{parent}/any name"
    try:
        with roots.open_parent(path) as opened:
            return os.path.samestat(os.fstat(opened.fd), os.fstat(campaign.staging.parent_fd))
    except ForkError:
        return False


def remove_annexes(campaign: Campaign, roots: Roots) -> None:
    """Remove the control directories in further parents, and all trees that are left in any parent.

    If one cannot be removed now, `gc` removes it later.
    """
    home = os.fstat(campaign.staging.parent_fd)
    for path in _one_of_each_parent(campaign):
        try:
            parent = roots.open_parent(path)
        except ForkError:
            continue  # it holds no control directory of ours
        with parent:
            if not os.path.samestat(home, os.fstat(parent.fd)):
                _remove(parent.fd, campaign.spec.campaign_id)
    with suppress(OSError, ForkError):
        campaign.staging.discard_trees()


def _remove(parent_fd: int, campaign_id: str) -> None:
    with suppress(OSError, ForkError, Held), Staging.attach(parent_fd, campaign_id, 0, alone=True) as annex:
        if annex is not None:
            annex.discard_trees()
            annex.remove()


def _one_of_each_parent(campaign: Campaign) -> Iterator[str]:
    known: set[str] = set()
    for first in range(0, campaign.spec.aims.count, _SLICE):
        for path in campaign.destinations(first, _SLICE):
            parent = os.path.dirname(path)
            if parent not in known:
                known.add(parent)
                yield path
