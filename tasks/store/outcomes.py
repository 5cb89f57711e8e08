"""Keeping the results of some forks of a campaign: all of them at once, and once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache

from celery import states

from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.campaign.spec import MOST_FAILURES, Failure, failures_of, sums_of
from tasks.copier.errors import describe
from tasks.store.results import Results, key_of, page_key, state_json

#: A script is one command: one who was paused after a look, and wrote then, would count the forks a second time. It
#: takes half the time of a transaction, since it has one answer, and since a state is sent once to be kept and
#: published. Full, Redis refuses the first write, and so the whole; before Redis 7 it puts a place in the script before
#: the error's code.
#:
#: A campaign that has its result takes no more: what a batch made since is not in its sums.
#:
#: KEYS: settled, sums, failed, result; of each fork its state; others; the counts of pages.
#: ARGV: first, TTL, most failures, how many states, others, sums and counts; states; others; of each sum name and
#: value; counts; of each failure the fork's number and the failure.
_SCRIPT = """
local first, expires, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
local states, others = tonumber(ARGV[4]), tonumber(ARGV[5])
local sums, counts = tonumber(ARGV[6]), tonumber(ARGV[7])
if redis.call('GETBIT', KEYS[1], first) == 1 or redis.call('EXISTS', KEYS[4]) == 1 then return end
local answer = redis.pcall('SETBIT', KEYS[1], first, 1)
if type(answer) == 'table' and answer.err then
    return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err)
end
local key, at = 4, 7
for n = 1, states + others do
    redis.call('SET', KEYS[key + n], ARGV[at + n], 'EX', expires)
    if n <= states then redis.call('PUBLISH', KEYS[key + n], ARGV[at + n]) end
end
key, at = key + states + others, at + states + others
for n = 1, sums do
    redis.call('HINCRBY', KEYS[2], ARGV[at + 1], ARGV[at + 2])
    at = at + 2
end
for n = 1, counts do
    redis.call('HSET', KEYS[key + n], '0', ARGV[at + n])
    redis.call('EXPIRE', KEYS[key + n], expires)
end
at = at + counts
for n = at + 1, #ARGV, 2 do redis.call('ZADD', KEYS[3], ARGV[n], ARGV[n + 1]) end
for _, later in ipairs(redis.call('ZRANGE', KEYS[3], most, -1)) do redis.call('ZREM', KEYS[3], later) end
for n = 1, 3 do redis.call('EXPIRE', KEYS[n], expires) end
"""

#: How Celery writes down what a task raised.
_RAISED = {
    "failed": {"exc_type": "ForkFailed", "exc_module": "tasks.contract"},
    "cancelled": {"exc_type": "TaskRevokedError", "exc_module": "celery.exceptions"},
}
_STATES = {"failed": states.FAILURE, "cancelled": states.REVOKED}


@dataclass
class _Kept:
    """What is kept of the forks, by its keys."""

    states: dict[str, str] = field(default_factory=dict)
    others: dict[str, str | bytes] = field(default_factory=dict)
    #: How many pages a fork has whose FileResults are more than one.
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, results: Results, outcome: Outcome) -> None:
        """Take in one fork."""
        fork_id, pages = outcome.result["fork_id"], outcome.pages
        self.states[results.state_key(fork_id)] = _state(outcome)
        if outcome.result["error"] is not None:
            self.others[key_of(fork_id, "result")] = outcome.as_json
        if len(pages) == 1:
            self.others[results.only_page(fork_id)] = pages[0]
        elif pages:
            self.counts[key_of(fork_id, "pages")] = len(pages)
            self.others |= {page_key(fork_id, "0", number): page for number, page in enumerate(pages)}


def store_outcomes_of_run(results: Results, campaign_id: str, first: int, outcomes: list[Outcome]) -> None:
    """Keep the results of the run of forks that begins with the index `first`, unless they are kept.

    Raises RedisError: OutOfMemoryError where Redis is full, and then it took nothing.
    """
    kept = _Kept()
    for outcome in outcomes:
        kept.add(results, outcome)
    forks = [outcome.result for outcome in outcomes]
    sums, failures = sums_of(forks), failures_of(forks)[:MOST_FAILURES]
    own = [key_of(campaign_id, name) for name in ("settled", "sums", "failed", "result")]
    results.redis.register_script(_SCRIPT)(
        [*own, *kept.states, *kept.others, *kept.counts],
        [
            *(first, results.open_expires, MOST_FAILURES),
            *(len(kept.states), len(kept.others), len(sums), len(kept.counts)),
            *kept.states.values(),
            *kept.others.values(),
            *(word for item in sums.items() for word in item),
            *kept.counts.values(),
            *(word for failure in failures for word in (_number(failure), json.dumps(failure))),
        ],
    )


def _number(failure: Failure) -> str:
    """The fork's number in its campaign; forks that end unbegun are settled together, others may lie between them."""
    return failure["fork_id"].rpartition(".")[2]


def _state(outcome: Outcome) -> str:
    """Celery's record of a fork."""
    result = outcome.result
    fork_id, error = result["fork_id"], result["error"]
    if error is None:
        return state_json(fork_id, states.SUCCESS, outcome.as_json)
    return state_json(fork_id, _STATES[result["status"]], _raised(result["status"], describe(error)))


@lru_cache(maxsize=16)  # a campaign that is cancelled ends thousands of forks with the same words
def _raised(status: str, message: str) -> str:
    """What a fork that ended so is said to have raised, as JSON."""
    return json.dumps({**_RAISED[status], "exc_message": [message]})
