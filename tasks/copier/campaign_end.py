"""The end of a campaign: what was not made is given up, and its control directories go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from tasks.copier.batch import CampaignLedger, make_batch
from tasks.copier.campaign_plan import Campaign
from tasks.copier.errors import Code, ForkError
from tasks.copier.progress import Ticker
from tasks.copier.roots import Roots
from tasks.copier.staging import Held, Staging

#: Destinations that are looked at at a time.
_SLICE = 10_000


def late(campaign: Campaign) -> ForkError | None:
    """The error that ends a campaign whose deadline has passed; None while it has not."""
    if campaign.spec.is_late():
        return ForkError(Code.CANCELLED, "the campaign's deadline passed", campaign.spec.source)
    return None


def aborted(campaign: Campaign) -> ForkError:
    """The error that ends what is left of a campaign when `on_error` is abort."""
    return ForkError(Code.CANCELLED, "another fork of the campaign failed, and on_error is abort", campaign.spec.source)


def end_rest(campaign: Campaign, roots: Roots, ticker: Ticker, ledger: CampaignLedger, error: ForkError) -> None:
    """End every fork that is not published with `error`, and settle it; nothing is left of those that were begun.

    The control directory is held alone. Raises Held, OSError.
    """
    for first in range(0, campaign.spec.aims.count, campaign.plan.batch):
        make_batch(campaign, roots, first, ticker, ledger, error)


def remove_annexes(campaign: Campaign, roots: Roots) -> None:
    """Remove the control directories in further parents, with all trees that are left there, and here.

    What cannot be removed now, `gc` removes later.
    """
    home = os.fstat(campaign.staging.parent_fd)
    for path in _one_of_each_parent(campaign):
        try:
            parent_fd, _ = roots.open_parent(path)
        except ForkError:
            continue  # none of ours stands there
        try:
            if not os.path.samestat(home, os.fstat(parent_fd)):
                _remove(parent_fd, campaign.spec.campaign_id)
        finally:
            os.close(parent_fd)
    with suppress(OSError):
        campaign.staging.discard_trees()


def _remove(parent_fd: int, campaign_id: str) -> None:
    with suppress(OSError, Held), Staging.attach(parent_fd, campaign_id, 0, alone=True) as annex:
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
