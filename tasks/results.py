"""Everything of a fork that lies in Redis, each key with a TTL.

    forkvm:{id}:claim      the request that holds this id
    forkvm:{id}:result     the final ForkResult, also of a failed fork
    forkvm:{id}:pages      a sorted set of the page keys, in the order of the fork's parts
    forkvm:{id}:page:…     FileResults: zlib-compressed JSON, at most `report.PAGE_RESULTS` a page
    forkvm:{id}:progress   a hash: what each part has done so far
    forkvm:{id}:cancel     someone asked for an end

and Celery's own `celery-task-meta-{id}`, which says STARTED, PROGRESS, and in the end SUCCESS, FAILURE or REVOKED.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, TypeVar, cast

from celery import states
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ConnectionError, OutOfMemoryError, RedisError, TimeoutError

from tasks.copier.progress import Progress
from tasks.copier.report import FileResult, unpack_pages
from tasks.copier.spec import ForkResult

T = TypeVar("T")

log = logging.getLogger(__name__)

#: Pause between two tries while Redis is away, in seconds.
_PAUSE_SECONDS = 0.5
#: Scores in the sorted set of pages: a part's rank times this, plus the page's number within it.
_PAGES_A_PART = 1_000_000
_RANKS = {"plan": 0, "close": 1_000_000}


class Claim(TypedDict):
    """Which request holds an id: the request as it came, its destination, and the queue of its domain."""

    request: Any
    destination: str
    queue: str
    #: Whether it is a campaign; the destination is its home then.
    campaign: NotRequired[bool]


@dataclass(frozen=True)
class Results:
    """The results of forks in one Redis. `expires` is the TTL of each key in seconds, from its last change."""

    redis: Redis
    expires: int
    #: Celery's key for the state of a task.
    state_key: Callable[[str], str]
    #: Whether to wait while Redis is away, as a worker does: its forks must not be lost for that.
    patient: bool = False

    # -- the id

    def claim(self, fork_id: str, claim: Claim) -> Claim:
        """Take the id for a request, whose state is STARTED from then on; or learn which request has it."""

        def take() -> bool:
            with self.redis.pipeline(transaction=True) as pipe:
                pipe.set(key_of(fork_id, "claim"), json.dumps(claim), nx=True, ex=self.expires)
                started = state_json(fork_id, states.STARTED, "null")
                pipe.set(self.state_key(fork_id), started, nx=True, ex=self.expires)
                pipe.publish(self.state_key(fork_id), started)
                return bool(pipe.execute()[0])

        return claim if self.ask(take) else self.claim_of(fork_id) or claim

    def claim_of(self, fork_id: str) -> Claim | None:
        """The claim on an id; None before a worker has begun with it."""
        return cast("Claim | None", _decoded(self.ask(lambda: self.redis.get(key_of(fork_id, "claim")))))

    # -- the final result

    def result(self, fork_id: str) -> ForkResult | None:
        """The final ForkResult, or None while there is none."""
        return cast("ForkResult | None", self.final(fork_id))

    def final(self, job_id: str) -> dict[str, Any] | None:
        """The final result of a fork or campaign, or None while there is none.

        A campaign's fork that succeeded has it in Celery's record alone.
        """
        return self.finals([job_id])[0]

    def finals(self, job_ids: list[str]) -> list[dict[str, Any] | None]:
        """As `final`, of many jobs at once."""
        keys = [key for job_id in job_ids for key in (key_of(job_id, "result"), self.state_key(job_id))]
        found = iter([_decoded(value) for value in cast("list[Any]", self.ask(lambda: self.redis.mget(keys)))])
        return [_final(kept, record) for kept, record in zip(found, found, strict=True)]

    def settle(self, job_id: str, result: Mapping[str, Any]) -> None:
        """Keep the final result; waits also while Redis is full: the job is over, and that must not be lost."""
        value = json.dumps(result)
        self.ask(lambda: self.redis.set(key_of(job_id, "result"), value, ex=self.expires), OutOfMemoryError)

    # -- FileResults

    def keep_pages(self, fork_id: str, parts: dict[str, list[bytes]]) -> None:
        """Keep the FileResults of parts of a fork (`plan`, a chunk's number, `close`), in place of earlier ones."""

        def write() -> None:
            with self.redis.pipeline(transaction=True) as pipe:
                self.add_pages(pipe, fork_id, parts)
                pipe.execute()

        self.ask(write)

    def add_pages(self, pipe: Pipeline, fork_id: str, parts: dict[str, list[bytes]]) -> None:
        """As `keep_pages`, as a part of what `pipe` does."""
        index = key_of(fork_id, "pages")
        for part, pages in parts.items():
            first = _rank(part) * _PAGES_A_PART
            pipe.zremrangebyscore(index, first, first + _PAGES_A_PART - 1)  # there may have been more of them
            for number, page in enumerate(pages):
                key = key_of(fork_id, f"page:{part}:{number}")
                pipe.set(key, page, ex=self.expires)
                pipe.zadd(index, {key: first + number})
        pipe.expire(index, self.expires)

    def files(self, fork_id: str) -> Iterator[FileResult]:
        """Yield the FileResults that are there by now, a page at a time, in the order of the manifest's parts."""
        keys = cast("list[bytes]", self.redis.zrange(key_of(fork_id, "pages"), 0, -1))
        for key in keys or [self.only_page(fork_id).encode()]:
            page = cast("bytes | None", self.redis.get(key))
            if page is not None:
                yield from unpack_pages([page])

    @staticmethod
    def only_page(fork_id: str) -> str:
        """The key of the page of a fork that has one page and no index of pages: most forks of campaigns."""
        return key_of(fork_id, "page")

    # -- progress

    def state(self, fork_id: str) -> dict[str, Any]:
        """Celery's record of the fork: `status`, `result` …; PENDING where there is none."""
        record = _decoded(self.redis.get(self.state_key(fork_id)))
        return record or {"status": states.PENDING, "result": None}

    def tell(self, fork_id: str, part: str, progress: Progress) -> None:
        """Publish the state PROGRESS: the sums over all parts. A final state is never overwritten."""
        parts = key_of(fork_id, "progress")
        with self.redis.pipeline(transaction=True) as pipe:
            pipe.hset(parts, part, json.dumps([progress["files_done"], progress["bytes_done"]]))
            pipe.expire(parts, self.expires)
            pipe.execute()

        def sums(pipe: Pipeline) -> Progress:
            counts = [json.loads(value) for value in cast("list[bytes]", pipe.hvals(parts))]
            files, count = sum(f for f, _ in counts), sum(b for _, b in counts)
            return {**progress, "files_done": files, "bytes_done": count}

        self.tell_state(fork_id, sums)

    def tell_state(self, job_id: str, progress: Callable[[Pipeline], Mapping[str, Any]]) -> None:
        """Publish the state PROGRESS with what `progress` reads. A final state is never overwritten."""
        key = self.state_key(job_id)

        def update(pipe: Pipeline) -> None:
            current = _decoded(pipe.get(key))
            # Read after the state was: who writes in between has us read again, so the sums never go back.
            told = progress(pipe)
            pipe.multi()
            if current is None or current.get("status") not in states.READY_STATES:
                record = state_json(job_id, "PROGRESS", json.dumps(told))
                pipe.set(key, record, ex=self.expires)
                pipe.publish(key, record)

        self.redis.transaction(update, key)

    # -- cancellation

    def cancel(self, fork_id: str) -> None:
        """Ask for an end of the fork, also of one that no worker has begun yet."""
        self.redis.set(key_of(fork_id, "cancel"), b"1", ex=self.expires)

    def is_cancelled(self, fork_id: str) -> bool:
        """Whether an end was asked for."""
        return bool(self.ask(lambda: self.redis.exists(key_of(fork_id, "cancel"))))

    def ask(self, call: Callable[[], T], *also: type[RedisError]) -> T:
        """Ask Redis; the patient ask again while it is away, or answers with one of `also`."""
        passing: tuple[type[RedisError], ...] = (ConnectionError, TimeoutError, *also) if self.patient else ()
        while True:
            try:
                return call()
            except passing as error:
                log.warning("Redis does not answer; trying again: %s", error)
                time.sleep(_PAUSE_SECONDS)


def state_json(job_id: str, status: str, result: str) -> str:
    """A state as Celery's Redis backend writes it; `result` is JSON."""
    return (
        f'{{"status":"{status}","result":{result},"traceback":null,"children":[],"date_done":null,'
        f'"task_id":{json.dumps(job_id)}}}'
    )


def _rank(part: str) -> int:
    """Where a part stands among the parts of a fork."""
    return _RANKS[part] if part in _RANKS else int(part) + 1


def key_of(fork_id: str, what: str) -> str:
    """The key of one thing that is kept of a fork or campaign."""
    return f"forkvm:{fork_id}:{what}"


def _final(kept: dict[str, Any] | None, record: dict[str, Any] | None) -> dict[str, Any] | None:
    if kept is None and record is not None and record["status"] == states.SUCCESS:
        return cast("dict[str, Any] | None", record["result"])
    return kept


def _decoded(value: Any) -> Any:
    return None if value is None else json.loads(value)
