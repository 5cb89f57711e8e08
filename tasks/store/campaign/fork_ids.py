"""The ids of a campaign's forks, `<campaign id>.<n>`: whether they are free, and when their keys expire."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from tasks.copier.campaign.spec import CampaignSpec
from tasks.copier.errors import Code, ForkError
from tasks.store import keys, lua
from tasks.store.claims import Claim
from tasks.store.results import Results

#: How many forks one script handles. It blocks Redis for a few milliseconds.
_SLICE = 1_000


def campaign_of_fork(results: Results, job_id: str) -> str | None:
    """The id of the campaign that has a fork of this id; None if no known campaign has."""
    campaign_id, _, number = job_id.rpartition(".")
    if not campaign_id or not number.isascii() or not number.isdigit() or str(int(number[:18])) != number:
        return None
    claim = results.claims.get(campaign_id)
    return campaign_id if claim is not None and _has_fork(claim, int(number)) else None


def _has_fork(claim: Claim, number: int) -> bool:
    if not claim.get("campaign"):
        return False
    start = claim["request"]["start"]
    return bool(start <= number < start + claim["request"]["forks"])


def free_fork_ids(results: Results, spec: CampaignSpec) -> None:
    """Delete what an earlier campaign of the same id left under the ids of a campaign's forks.

    Does nothing after the campaign has started. Raises ForkError invalid_request where another job holds one of them.
    """
    for part in _slices(results, spec):
        ask = partial(lua.FREE_FORK_IDS.run, results.redis, campaign_claim_key=keys.CLAIM.of(spec.campaign_id), **part)
        number = int(cast("bytes", results.ask(ask)))
        if number >= 0:
            taken = f"{spec.campaign_id}.{number}"
            message = f"its fork {number} would have the id {taken}, which another job has; send it under another id"
            raise ForkError(Code.INVALID_REQUEST, message, spec.source)


def expire_forks(results: Results, spec: CampaignSpec) -> None:
    """Set the TTL of all keys of a campaign's forks to that of the campaign's result, which the caller stores next."""
    for part in _slices(results, spec):
        results.ask(partial(lua.EXPIRE_FORKS.run, results.redis, ttl=results.expires, **part))


def _slices(results: Results, spec: CampaignSpec) -> Iterator[dict[str, Any]]:
    """The arguments that both scripts have in common."""
    start, end = spec.aims.start, spec.aims.start + spec.aims.count
    for first in range(start, end, _SLICE):
        yield {
            "state_prefix": results.state_key(f"{spec.campaign_id}."),
            "own_prefix": keys.prefix_of_forks(spec.campaign_id),
            "first": first,
            "last": min(first + _SLICE, end) - 1,
        }
