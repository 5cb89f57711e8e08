"""The ids of a campaign's forks, `<campaign id>.<n>`: whether they are free, and how long they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

from tasks.copier.campaign.spec import CampaignSpec
from tasks.copier.errors import Code, ForkError
from tasks.store.results import Claim, Results, key_of

#: Forks that one script goes through: Redis serves nobody else meanwhile, for a few milliseconds.
_SLICE = 1_000

#: Finds the first of some forks whose id a job has, and deletes what an earlier campaign left of the others unless the
#: campaign has begun. Answers with that fork's number, or -1.
#:
#: KEYS: the campaign's claim. ARGV: how the forks' states and their other keys begin, the first and the last number.
_FREE = """
local has_begun = redis.call('EXISTS', KEYS[1]) == 1
for n = tonumber(ARGV[3]), tonumber(ARGV[4]) do
    local number = string.format('%.0f', n)
    local own = ARGV[2] .. number .. ':'
    if redis.call('EXISTS', own .. 'claim') == 1 then return number end
    if not has_begun then
        redis.call('DEL', ARGV[1] .. number, own .. 'result', own .. 'page', own .. 'pages')
    end
end
return '-1'
"""

#: Has what is kept of some forks expire. KEYS: none. ARGV: as above, but after the numbers the TTL.
_EXPIRE = """
for n = tonumber(ARGV[3]), tonumber(ARGV[4]) do
    local number = string.format('%.0f', n)
    local own = ARGV[2] .. number .. ':'
    redis.call('EXPIRE', ARGV[1] .. number, ARGV[5])
    redis.call('EXPIRE', own .. 'result', ARGV[5])
    if redis.call('EXPIRE', own .. 'page', ARGV[5]) == 0 and redis.call('EXPIRE', own .. 'pages', ARGV[5]) == 1 then
        for page = 0, tonumber(redis.call('HGET', own .. 'pages', '0') or 0) - 1 do
            redis.call('EXPIRE', own .. 'page:0:' .. string.format('%d', page), ARGV[5])
        end
    end
end
"""


def campaign_of_fork(results: Results, job_id: str) -> str | None:
    """The id of the campaign that has a fork of this id; None where no campaign does, or none is known any more."""
    campaign_id, _, number = job_id.rpartition(".")
    if not campaign_id or not number.isascii() or not number.isdigit() or str(int(number[:18])) != number:
        return None
    claim = results.claim_of(campaign_id)
    return campaign_id if claim is not None and _has_fork(claim, int(number)) else None


def _has_fork(claim: Claim, number: int) -> bool:
    if not claim.get("campaign"):
        return False
    start = claim["request"]["start"]
    return bool(start <= number < start + claim["request"]["forks"])


def free_fork_ids(results: Results, spec: CampaignSpec) -> None:
    """Have the ids of a campaign's forks free of what an earlier campaign of its id left.

    Raises ForkError invalid_request where another job has one of them.
    """
    script = results.redis.register_script(_FREE)
    for forks in _slices(results, spec):
        ask = partial(script, [key_of(spec.campaign_id, "claim")], forks)
        number = int(cast("bytes", results.ask(ask)))
        if number >= 0:
            taken = f"{spec.campaign_id}.{number}"
            message = f"its fork {number} would have the id {taken}, which another job has; send it under another id"
            raise ForkError(Code.INVALID_REQUEST, message, spec.source)


def expire_forks(results: Results, spec: CampaignSpec) -> None:
    """Have what is kept of a campaign's forks expire with the campaign's own result, which is to be kept next."""
    script = results.redis.register_script(_EXPIRE)
    for forks in _slices(results, spec):
        results.ask(partial(script, [], [*forks, results.expires]))


def _slices(results: Results, spec: CampaignSpec) -> Iterator[list[str | int]]:
    """The arguments that both scripts begin with."""
    state, own = results.state_key(f"{spec.campaign_id}."), f"forkvm:{spec.campaign_id}."
    start, end = spec.aims.start, spec.aims.start + spec.aims.count
    for first in range(start, end, _SLICE):
        yield [state, own, first, min(first + _SLICE, end) - 1]
