"""What Redis holds of one campaign.

The ForkResult of a fork that succeeded is only in Celery's record; that of any other fork is under `keys.RESULT`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from redis.exceptions import OutOfMemoryError

from tasks import events
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
from tasks.fork_summary import log_end
from tasks.store import keys, lua
from tasks.store.campaign.outcomes import store_outcomes_of_run
from tasks.store.recent_forks.campaign_forks import RecentCampaignForks
from tasks.store.results import Results

#: How many ForkResults are read at once.
_PAGE = 500


@dataclass(frozen=True)
class CampaignResults:
    """The results of one campaign; the ledger of the engine while it makes the forks."""

    results: Results
    campaign_id: str
    #: Notes about forks whose results Redis may have lost; None for a caller that stores no outcomes.
    recent_forks: RecentCampaignForks | None = None

    # -- the forks

    def has_outcomes(self, first: int) -> bool:
        """Whether the results of the run of forks that begins with the index `first` are stored."""
        return bool(self._ask(lambda: self.results.redis.getbit(self._key(keys.SETTLED), first)))

    def store_outcomes(self, first: int, outcomes: list[Outcome], *, ends: bool = False) -> None:
        """Store the results of a run of forks, once. Waits while Redis is away or full: they must not be lost.

        `ends`: the caller ends the campaign, and has closed it to others; see `close`.

        A fork that failed now because it had succeeded before, which Redis has lost, gets the earlier result.
        """
        if self.recent_forks is not None:
            outcomes = self.recent_forks.corrected_outcomes(self.results, self.campaign_id, outcomes)
        forks = [outcome.result for outcome in outcomes]
        events.forks_ended(f"{self.campaign_id}.{first}", forks, of_campaign=True)
        self._ask(
            lambda: store_outcomes_of_run(self.results, self.campaign_id, first, outcomes, ends=ends), OutOfMemoryError
        )
        for fork in forks:
            log_end(fork, self.campaign_id)

    def close(self) -> None:
        """Take no more results from batches: the caller ends each fork that has no result now."""
        with self.results.redis.pipeline(transaction=True) as pipe:
            pipe.hset(self._key(keys.SUMS), "closed", 1)
            pipe.expire(self._key(keys.SUMS), self.results.open_expires)
            self._ask(pipe.execute, OutOfMemoryError)

    def delete_outcomes(self) -> None:
        """Delete what batches of an earlier campaign of this id stored after Redis had lost its data."""
        self._ask(lambda: self.results.redis.delete(*map(self._key, keys.OF_BATCHES)))

    def without_result(self, indexes: range, spec: CampaignSpec) -> list[int]:
        """The indexes of the forks without a result, out of `indexes`."""
        found = self.results.final.get_many([spec.fork_id(index) for index in indexes])
        return [index for index, result in zip(indexes, found, strict=True) if result is None]

    def forks(self, start: int, count: int) -> Iterator[ForkResult]:
        """Yield the results of the forks that have ended, in order, out of `count` forks from the number `start` on."""
        ids = (f"{self.campaign_id}.{n}" for n in range(start, start + count))
        while page := list(islice(ids, _PAGE)):
            for result in self.results.final.get_many(page):
                if result is not None:
                    yield cast(ForkResult, result)

    # -- the whole

    def sums(self) -> dict[str, int]:
        """The sums over the results of the forks that have ended."""
        found = cast("dict[bytes, bytes]", self._ask(lambda: self.results.redis.hgetall(self._key(keys.SUMS))))
        return {name.decode(): int(value) for name, value in found.items()}

    def failures(self) -> list[Failure]:
        """The first failures so far, in the order of the forks."""
        found = cast("list[bytes]", self._ask(lambda: self.results.redis.zrange(self._key(keys.FAILED), 0, -1)))
        return [json.loads(failure) for failure in found]

    def result(self) -> CampaignResult | None:
        """The final CampaignResult, or None before the campaign has ended."""
        return cast("CampaignResult | None", self.results.final.get(self.campaign_id))

    def store_campaign_result(self, result: CampaignResult) -> None:
        """Store the final result; all keys of the campaign itself then expire with it."""
        events.campaign_ended(result)
        self.results.final.store(self.campaign_id, result)

    def publish_progress(self, spec: CampaignSpec, sums: dict[str, int], planned_at: float) -> None:
        """Publish the state PROGRESS of the campaign."""
        self.results.states.publish(self.campaign_id, lambda pipe: progress_of(spec, sums, planned_at))

    # -- batches

    def end_batch(self, first: int, runs: Iterable[int]) -> bool:
        """Record that the batch that begins with the index `first` is done, and that the next one was sent.

        `runs`: the index of the first fork of each of its runs. False if the results of one are not stored.
        """
        return bool(
            self._ask(
                lambda: lua.END_BATCH.run(
                    self.results.redis,
                    settled_key=self._key(keys.SETTLED),
                    batches_key=self._key(keys.BATCHES),
                    first=first,
                    ttl=self.results.open_expires,
                    more_args=runs,
                ),
                OutOfMemoryError,
            )
        )

    def is_batch_done(self, first: int) -> bool:
        """Whether the batch that begins with the index `first` is done."""
        return bool(self._ask(lambda: self.results.redis.getbit(self._key(keys.BATCHES), first)))

    # -- ending early

    def end_early(self, error: ForkError) -> None:
        """Request that the campaign ends with `error`; no effect if its end was requested before."""
        value, ttl = json.dumps(error.record()), self.results.open_expires
        self._ask(lambda: self.results.redis.set(self._key(keys.CANCEL), value, nx=True, ex=ttl))

    def abandon(self) -> str:
        """Request the end of a campaign whose messages kill processes; returns its home, "" if it is not known."""
        claim = self.results.claims.get(self.campaign_id)
        self.end_early(worker_lost(claim["request"]["kept"].get("source", "") if claim is not None else ""))
        return claim["destination"] if claim is not None else ""

    def reason_to_end(self, source: str) -> ForkError | None:
        """The error with which the campaign must end early; None if its end was not requested.

        `source`: the path of the error after a client's cancellation.
        """
        given: Any = self.results.read(self._key(keys.CANCEL))
        if given is None:
            return None
        return from_record(cast(ErrorRecord, given)) if isinstance(given, dict) else cancelled(source)

    def _key(self, key: keys.Key) -> str:
        return key.of(self.campaign_id)

    def _ask(self, call: Any, *also: Any) -> Any:
        return self.results.ask(call, *also)
