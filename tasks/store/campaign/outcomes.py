"""Stores the results of a run of a campaign's forks, in one command and once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.campaign.spec import MOST_FAILURES, Failure, failures_of, sums_of
from tasks.store import keys, lua
from tasks.store.job_states import final_record
from tasks.store.results import Results


@dataclass
class _Stored:
    """What is stored of the forks, by key."""

    states: dict[str, str] = field(default_factory=dict)
    others: dict[str, str | bytes] = field(default_factory=dict)
    #: How many pages each fork has that has several.
    page_counts: dict[str, int] = field(default_factory=dict)

    def add(self, results: Results, outcome: Outcome) -> None:
        """Add one fork."""
        fork_id, pages = outcome.result["fork_id"], outcome.pages
        self.states[results.state_key(fork_id)] = final_record(fork_id, outcome.result, outcome.as_json)
        if outcome.result["error"] is not None:
            self.others[keys.RESULT.of(fork_id)] = outcome.as_json
        if len(pages) == 1:
            self.others[keys.ONLY_PAGE.of(fork_id)] = pages[0]
        elif pages:
            self.page_counts[keys.PAGES.of(fork_id)] = len(pages)
            self.others |= {keys.page_key(fork_id, "0", number): page for number, page in enumerate(pages)}


def store_outcomes_of_run(
    results: Results, campaign_id: str, first: int, outcomes: list[Outcome], *, ends: bool
) -> None:
    """Store the results of the run of forks that begins with the index `first`, unless they are stored.

    `ends`: also if the campaign is closed. Raises RedisError; OutOfMemoryError when Redis is full, and then nothing was
    stored.
    """
    stored = _Stored()
    for outcome in outcomes:
        stored.add(results, outcome)
    forks = [outcome.result for outcome in outcomes]
    sums, failures = sums_of(forks), failures_of(forks)[:MOST_FAILURES]
    lua.STORE_OUTCOMES.run(
        results.redis,
        settled_key=keys.SETTLED.of(campaign_id),
        sums_key=keys.SUMS.of(campaign_id),
        failed_key=keys.FAILED.of(campaign_id),
        result_key=keys.RESULT.of(campaign_id),
        first=first,
        ends=int(ends),
        ttl=results.open_expires,
        most_failures=MOST_FAILURES,
        state_count=len(stored.states),
        other_count=len(stored.others),
        sum_count=len(sums),
        page_count=len(stored.page_counts),
        more_keys=[*stored.states, *stored.others, *stored.page_counts],
        more_args=[
            *stored.states.values(),
            *stored.others.values(),
            *(word for item in sums.items() for word in item),
            *stored.page_counts.values(),
            *(word for failure in failures for word in (_number(failure), json.dumps(failure))),
        ],
    )


def _number(failure: Failure) -> str:
    """The fork's number in its campaign. A run may have gaps: forks that were not started are stored together."""
    return failure["fork_id"].rpartition(".")[2]
