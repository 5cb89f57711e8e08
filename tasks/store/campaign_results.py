"""What Redis keeps of a campaign beside what `results` keeps of every job; see `lifetimes` for the TTL of each key.

    forkvm:{id}:sums       a hash: sums over the results of the forks that have ended
    forkvm:{id}:settled    a bitmap by index: the first fork of each run of forks whose results are kept
    forkvm:{id}:batches    a bitmap by index: the first fork of each batch that is done
    forkvm:{id}:failed     a sorted set by the fork's number: the first failures

Of each fork there is Celery's own `celery-task-meta-{fork id}`, which holds the ForkResult of one that succeeded; one
that did not has it where `results` keeps it. A fork's pages have no count where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from redis.exceptions import OutOfMemoryError

from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.campaign.spec import (
    CampaignResult,
    CampaignSpec,
    Failure,
    progress_of,
)
from tasks.copier.errors import ErrorRecord, ForkError, cancelled, from_record
from tasks.copier.fork.chunk import worker_lost
from tasks.copier.fork_spec import ForkResult
from tasks.store.ended_campaigns import EndedRuns
from tasks.store.lifetimes import OF_EARLIER_JOB
from tasks.store.outcomes import store_outcomes_of_run
from tasks.store.results import Results, key_of

#: ForkResults that are asked for at a time.
_PAGE = 500


@dataclass(frozen=True)
class CampaignResults:
    """The results of one campaign; its ledger while it is made."""

    results: Results
    campaign_id: str
    #: Knows the forks that Redis has forgotten; None for who settles none.
    past: EndedRuns | None = None

    # -- the forks

    def has_outcomes(self, first: int) -> bool:
        """Whether the results of the run of forks that begins with the index `first` are kept."""
        return bool(self._ask(lambda: self.results.redis.getbit(self._key("settled"), first)))

    def store_outcomes(self, first: int, outcomes: list[Outcome]) -> None:
        """Keep the results of a run of forks, once. Waits while Redis is away or full: they must not be lost.

        Of a failed fork that ended well before, which Redis has forgotten, the result of then is kept.
        """
        if self.past is not None:
            outcomes = self.past.true_outcomes(self.results, self.campaign_id, outcomes)
        self._ask(lambda: store_outcomes_of_run(self.results, self.campaign_id, first, outcomes), OutOfMemoryError)

    def forget(self) -> None:
        """Forget what is settled: batches of an earlier campaign of this id wrote it when Redis had been emptied."""
        self._ask(lambda: self.results.redis.delete(*(self._key(name) for name in OF_EARLIER_JOB)))

    def without_result(self, indexes: range, spec: CampaignSpec) -> list[int]:
        """Those of these forks, by index, that have no result."""
        found = self.results.finals([spec.fork_id(index) for index in indexes])
        return [index for index, result in zip(indexes, found, strict=True) if result is None]

    def forks(self, start: int, count: int) -> Iterator[ForkResult]:
        """Yield the results of the forks that have ended by now, in order; `count` forks from the `n` given."""
        ids = (f"{self.campaign_id}.{n}" for n in range(start, start + count))
        while page := list(islice(ids, _PAGE)):
            for result in self.results.finals(page):
                if result is not None:
                    yield cast(ForkResult, result)

    # -- the whole

    def sums(self) -> dict[str, int]:
        """The sums over the results of the forks that have ended."""
        found = cast("dict[bytes, bytes]", self._ask(lambda: self.results.redis.hgetall(self._key("sums"))))
        return {name.decode(): int(value) for name, value in found.items()}

    def failures(self) -> list[Failure]:
        """The first failures so far, in the order of the forks."""
        found = cast("list[bytes]", self._ask(lambda: self.results.redis.zrange(self._key("failed"), 0, -1)))
        return [json.loads(failure) for failure in found]

    def result(self) -> CampaignResult | None:
        """The final CampaignResult, or None while there is none."""
        return cast("CampaignResult | None", self.results.final(self.campaign_id))

    def store_campaign_result(self, result: CampaignResult) -> None:
        """Keep the final result."""
        self.results.store_result(self.campaign_id, result)

    def publish_progress(self, spec: CampaignSpec, sums: dict[str, int], planned_at: float) -> None:
        """Publish how far the campaign is."""
        self.results.publish_state(self.campaign_id, lambda pipe: progress_of(spec, sums, planned_at))

    # -- batches

    def end_batch(self, first: int) -> None:
        """Note that the batch that begins with the index `first` is done, and that the next one was sent."""
        with self.results.redis.pipeline(transaction=True) as pipe:
            pipe.setbit(self._key("batches"), first, 1)
            pipe.expire(self._key("batches"), self.results.open_expires)
            self._ask(pipe.execute, OutOfMemoryError)

    def is_batch_done(self, first: int) -> bool:
        """Whether `end_batch` was called for it."""
        return bool(self._ask(lambda: self.results.redis.getbit(self._key("batches"), first)))

    # -- ending early

    def end_early(self, error: ForkError) -> None:
        """Have the campaign ended with `error`, unless that was asked for already."""
        value = json.dumps(error.record())
        self._ask(lambda: self.results.redis.set(self._key("cancel"), value, nx=True, ex=self.results.open_expires))

    def abandon(self) -> str:
        """Have the campaign ended since processes die of it, and return its home."""
        claim = self.results.claim_of(self.campaign_id)
        self.end_early(worker_lost(claim["request"]["kept"].get("source", "") if claim is not None else ""))
        return claim["destination"] if claim is not None else ""

    def ended(self, source: str) -> ForkError | None:
        """Why the campaign, whose source is `source`, is to end early; None while nobody wants that."""
        found = self._ask(lambda: self.results.redis.get(self._key("cancel")))
        if found is None:
            return None
        given: Any = json.loads(found)
        return from_record(cast(ErrorRecord, given)) if isinstance(given, dict) else cancelled(source)

    def _key(self, what: str) -> str:
        return key_of(self.campaign_id, what)

    def _ask(self, call: Any, *also: Any) -> Any:
        return self.results.ask(call, *also)
