"""Everything of a fork that lies in Redis, each key with a TTL; see `lifetimes` for which.

    forkvm:{id}:claim      the request that holds this id
    forkvm:{id}:result     the final ForkResult, also of a failed fork
    forkvm:{id}:pages      a hash: how many pages each part of the fork has; as small as the number of chunks is
    forkvm:{id}:page:…     FileResults: zlib-compressed JSON, at most `report.PAGE_RESULTS` a page
    forkvm:{id}:progress   a hash: what each part has done so far
    forkvm:{id}:cancel     someone asked for an end
    forkvm:{id}:losses     how many processes died of a message of it (the id is the message's: a fork's or a chunk's)
    forkvm:open            a sorted set: the ids of jobs that have not ended, each with the last heartbeat a sweep saw
    forkvm:sweep:{queue}   a sweep of that domain is under way, or was a moment ago
    forkvm:walk:{queue}    the roots of that domain were searched for abandoned staging not long ago

and Celery's own `celery-task-meta-{id}`, which says STARTED, PROGRESS, and in the end SUCCESS, FAILURE or REVOKED.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar, cast

from celery import states
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import OutOfMemoryError, RedisError

from tasks.copier.errors import Code, ForkError, cancelled
from tasks.copier.fork_spec import ForkResult
from tasks.copier.progress import Progress
from tasks.copier.report import FileResult, unpack_pages
from tasks.store.lifetimes import CANCEL, FORGET, SETTLE, open_ttl
from tasks.store.redis_errors import wait_out

T = TypeVar("T")

#: Where the parts that have no number stand among the others.
_RANKS = {"plan": 0, "close": 1_000_000}
_OPEN = "forkvm:open"
#: No sweep has looked at the fork yet.
_NEVER_SEEN = -1
#: Celery's final state for each status of a ForkResult.
_END = {"succeeded": states.SUCCESS, "failed": states.FAILURE, "cancelled": states.REVOKED}
#: How many open forks are read at once.
_OPEN_PAGE = 500

#: Takes an id for a request unless it is taken, or its fork has ended: one command, so that nobody gets in between, and
#: in half the time of a transaction after a look. A campaign's fork that succeeded has no claim and no result of its
#: own: its state alone shows that it ended. What an earlier job left under the id is deleted. For `pcall` see
#: `outcomes`.
#:
#: KEYS: result, state, claim, open. ARGV: id, TTL, claim, the state STARTED, the sign of what was never seen, how the
#: job's keys begin.
#: Answers with the result and the state as they were, the claim as it is then, and whether it was taken just now.
_CLAIM = (
    """
local result, state, holder = unpack(redis.call('MGET', KEYS[1], KEYS[2], KEYS[3]))
local over = result or state and string.find(state, '^{"status": ?"SUCCESS"')
if holder or over then return {result, state, holder, 0} end
local answer = redis.pcall('SET', KEYS[3], ARGV[3], 'EX', ARGV[2])
if answer.err then return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err) end
if not state then
    redis.call('SET', KEYS[2], ARGV[4], 'EX', ARGV[2])
    redis.call('PUBLISH', KEYS[2], ARGV[4])
end
redis.call('ZADD', KEYS[4], 'NX', ARGV[5], ARGV[1])
redis.call('EXPIRE', KEYS[4], ARGV[2])
local own = ARGV[6]
"""
    + FORGET
    + """
return {result, state, ARGV[3], 1}
"""
)


class OpenFork(NamedTuple):
    """A fork without an end: `sign` is what a sweep saw last of it; see `control.sign_of_life`."""

    fork_id: str
    sign: int
    claim: Claim


class Claim(TypedDict):
    """Which request holds an id: the request as it came, its destination, and the queue of its domain."""

    request: Any
    destination: str
    queue: str
    #: Whether it is a campaign; the destination is its home then.
    campaign: NotRequired[bool]


class Claimed(NamedTuple):
    """Which request has an id, and the final result of its job, if that is over."""

    holder: Claim
    result: dict[str, Any] | None
    #: Whether the id was taken just now: no worker has begun with it before.
    is_new: bool = False
    #: The final state that the id has although nothing is kept of its result: Celery gave it, or it was kept longer.
    ended: str | None = None


@dataclass(frozen=True)
class Results:
    """The results of jobs in one Redis. `expires` is the TTL of all that is kept of one, from its end, in seconds."""

    redis: Redis
    expires: int
    #: Celery's key for the state of a task.
    state_key: Callable[[str], str]
    #: Whether to wait while Redis is away, as a worker does: its forks must not be lost for that.
    patient: bool = False

    @property
    def open_expires(self) -> int:
        """The TTL of what is kept of a job that has not ended, in seconds."""
        return open_ttl(self.expires)

    def now(self) -> float:
        """The time by Redis's clock, in seconds since the epoch: the only clock that all hosts of a job share."""
        seconds, microseconds = self.ask(self.redis.time)
        return float(seconds) + microseconds / 1e6

    # -- the id

    def claim(self, job_id: str, claim: Claim) -> Claimed:
        """Take the id for a request, whose state is STARTED from then on; or learn who has it, or how it ended."""
        keys = [key_of(job_id, "result"), self.state_key(job_id), key_of(job_id, "claim"), _OPEN]
        started = state_json(job_id, states.STARTED, "null")
        values: list[str | int] = [
            job_id,
            self.open_expires,
            json.dumps(claim),
            started,
            _NEVER_SEEN,
            key_of(job_id, ""),
        ]
        take = self.redis.register_script(_CLAIM)
        *found, is_new = self.ask(lambda: take(keys, values))
        kept, record, holder = map(_decoded, found)
        result = _final(kept, record)
        ended = record["status"] if record and result is None and record["status"] in states.READY_STATES else None
        return Claimed(holder or claim, result, bool(is_new), ended)

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

    def standing(self, fork_id: str) -> tuple[ForkResult | None, bool]:
        """The final ForkResult, or None while there is none; and whether an end was asked for. In one look."""
        keys = [key_of(fork_id, "result"), self.state_key(fork_id), key_of(fork_id, "cancel")]
        kept, record, cancelled = cast("list[Any]", self.ask(lambda: self.redis.mget(keys)))
        return cast("ForkResult | None", _final(_decoded(kept), _decoded(record))), cancelled is not None

    def store_result(self, job_id: str, result: Mapping[str, Any]) -> None:
        """Keep the final result, and let all that is kept of the job expire with it.

        Waits also while Redis is full: the job is over, and that must not be lost.
        """
        script = self.redis.register_script(SETTLE)
        values: list[str | int] = [json.dumps(result), self.expires, key_of(job_id, "")]
        self.ask(lambda: script([key_of(job_id, "result")], values), OutOfMemoryError)

    # -- forks without an end

    def is_open(self, fork_id: str) -> bool:
        """Whether a worker has begun with the fork, and it has no result yet."""
        return self.claim_of(fork_id) is not None and self.result(fork_id) is None

    def open_forks(self, queue: str) -> list[OpenFork]:
        """The forks of a domain without an end that their clients see; those with one are forgotten, all domains'."""
        entries = cast("list[tuple[bytes, float]]", self.ask(lambda: self.redis.zrange(_OPEN, 0, -1, withscores=True)))
        return [
            fork for n in range(0, len(entries), _OPEN_PAGE) for fork in self._open(entries[n : n + _OPEN_PAGE], queue)
        ]

    def _open(self, entries: list[tuple[bytes, float]], queue: str) -> Iterator[OpenFork]:
        ids = [fork_id.decode() for fork_id, _ in entries]
        claims = self._many(key_of(fork_id, "claim") for fork_id in ids)
        results = self._many(key_of(fork_id, "result") for fork_id in ids)
        records = self._many(self.state_key(fork_id) for fork_id in ids)
        over = [
            claim is None or (result is not None and record is not None and record["status"] in states.READY_STATES)
            for claim, result, record in zip(claims, results, records, strict=True)
        ]
        if any(over):
            gone = [member for (member, _), is_over in zip(entries, over, strict=True) if is_over]
            self.ask(lambda: self.redis.zrem(_OPEN, *gone))
        for (_, sign), fork_id, claim, is_over in zip(entries, ids, claims, over, strict=True):
            if not is_over and claim["queue"] == queue:
                yield OpenFork(fork_id, int(sign), claim)

    def note_sign(self, fork_id: str, sign: int) -> None:
        """Note the sign of life that was seen of a fork, unless it has ended meanwhile."""
        self.ask(lambda: self.redis.zadd(_OPEN, {fork_id: sign}, xx=True))

    def _many(self, keys: Iterable[str]) -> list[Any]:
        wanted = list(keys)
        return [_decoded(value) for value in cast("list[bytes | None]", self.ask(lambda: self.redis.mget(wanted)))]

    def count_loss(self, task_id: str) -> int:
        """Count one more process that died of a message; how many by now."""
        with self.redis.pipeline(transaction=True) as pipe:
            pipe.incr(key_of(task_id, "losses"))
            pipe.expire(key_of(task_id, "losses"), self.expires)
            return int(pipe.execute()[0])

    # -- turns

    def take_turn(self, what: str, queue: str, seconds: int) -> bool:
        """Whether it is the caller's turn to do what one of a domain's workers is to do once in so many seconds."""
        return bool(self.ask(lambda: self.redis.set(f"forkvm:{what}:{queue}", b"1", nx=True, ex=seconds)))

    def shorten_turn(self, what: str, queue: str, seconds: int) -> None:
        """Let the next turn come in so many seconds."""
        self.ask(lambda: self.redis.expire(f"forkvm:{what}:{queue}", seconds))

    # -- FileResults

    def keep_pages(self, fork_id: str, parts: dict[str, list[bytes]], *, anew: bool = False) -> bool:
        """Keep the FileResults of parts of a fork (`plan`, a chunk's number, `close`), in place of their earlier ones.

        `anew`: in place of those of all parts, since what an earlier attempt kept is of no attempt any more. Returns
        whether an end of the fork was asked for, which saves a round trip.
        """

        def write() -> bool:
            with self.redis.pipeline(transaction=True) as pipe:
                if anew:
                    pipe.delete(key_of(fork_id, "pages"), self.only_page(fork_id))
                for part, pages in parts.items():
                    for number, page in enumerate(pages):
                        pipe.set(page_key(fork_id, part, number), page, ex=self.open_expires)
                    pipe.hset(key_of(fork_id, "pages"), part, str(len(pages)))
                pipe.expire(key_of(fork_id, "pages"), self.open_expires)
                pipe.exists(key_of(fork_id, "cancel"))
                return bool(pipe.execute()[-1])

        return self.ask(write)

    def keep_all_pages(self, fork_id: str, pages: list[bytes]) -> bool:
        """As `keep_pages`, of a fork that has no parts: in place of all that earlier attempts kept."""
        if len(pages) != 1:
            return self.keep_pages(fork_id, {"0": pages}, anew=True)

        def write() -> bool:
            with self.redis.pipeline(transaction=True) as pipe:
                pipe.delete(key_of(fork_id, "pages"))
                pipe.set(self.only_page(fork_id), pages[0], ex=self.open_expires)
                pipe.exists(key_of(fork_id, "cancel"))
                return bool(pipe.execute()[-1])

        return self.ask(write)

    def files(self, fork_id: str) -> Iterator[FileResult]:
        """Yield the FileResults that are there by now, a page at a time, in the order of the manifest's parts."""
        counts = cast("dict[bytes, bytes]", self.redis.hgetall(key_of(fork_id, "pages")))
        pages = {part.decode(): int(count) for part, count in counts.items()}
        keys = [page_key(fork_id, part, n) for part in sorted(pages, key=_rank) for n in range(pages[part])]
        for key in keys or [self.only_page(fork_id)]:
            page = cast("bytes | None", self.redis.get(key))
            if page is not None:
                yield from unpack_pages([page])

    @staticmethod
    def only_page(fork_id: str) -> str:
        """The key of the page of a fork that has one page and no count of pages, as most have that one task makes."""
        return key_of(fork_id, "page")

    # -- progress

    def state(self, fork_id: str) -> dict[str, Any]:
        """Celery's record of the fork: `status`, `result` …; PENDING where there is none."""
        record = _decoded(self.redis.get(self.state_key(fork_id)))
        return record or {"status": states.PENDING, "result": None}

    def publish_progress(self, fork_id: str, part: str, progress: Progress) -> None:
        """Publish the state PROGRESS: the sums over all parts. A final state is never overwritten."""
        parts = key_of(fork_id, "progress")
        with self.redis.pipeline(transaction=True) as pipe:
            pipe.hset(parts, part, json.dumps([progress["files_done"], progress["bytes_done"]]))
            pipe.expire(parts, self.open_expires)
            pipe.execute()

        def sums(pipe: Pipeline) -> Progress:
            counts = [json.loads(value) for value in cast("list[bytes]", pipe.hvals(parts))]
            files, count = sum(f for f, _ in counts), sum(b for _, b in counts)
            return {**progress, "files_done": files, "bytes_done": count}

        self.publish_state(fork_id, sums)

    def publish_state(self, job_id: str, progress: Callable[[Pipeline], Mapping[str, Any]]) -> None:
        """Publish the state PROGRESS with what `progress` reads. A final state is never overwritten."""
        key = self.state_key(job_id)

        def update(pipe: Pipeline) -> None:
            current = _decoded(pipe.get(key))
            # Read after the state was: who writes in between has us read again, so the sums never go back.
            told = progress(pipe)
            pipe.multi()
            if current is None or current.get("status") not in states.READY_STATES:
                record = state_json(job_id, "PROGRESS", json.dumps(told))
                pipe.set(key, record, ex=self.open_expires)
                pipe.publish(key, record)

        self.redis.transaction(update, key)

    # -- cancellation

    def cancel(self, fork_id: str) -> None:
        """Ask for an end of the fork, also of one that no worker has begun yet. One that has ended stays as it is."""
        script = self.redis.register_script(CANCEL)
        script([key_of(fork_id, "cancel"), key_of(fork_id, "result")], [b"1", self.open_expires])

    def is_cancelled(self, fork_id: str) -> bool:
        """Whether an end was asked for."""
        return bool(self.ask(lambda: self.redis.exists(key_of(fork_id, "cancel"))))

    def ask(self, call: Callable[[], T], *also: type[RedisError]) -> T:
        """Ask Redis; the patient ask again while it is away or refuses writes, or answers with one of `also`."""
        return wait_out(call, *also) if self.patient else call()


def state_json(job_id: str, status: str, result: str) -> str:
    """A state as Celery's Redis backend writes it; `result` is JSON."""
    return (
        f'{{"status":"{status}","result":{result},"traceback":null,"children":[],"date_done":null,'
        f'"task_id":{json.dumps(job_id)}}}'
    )


def end_state(result: Mapping[str, Any]) -> str:
    """Celery's final state of a fork or campaign with this result.

    A campaign has a result also where forks failed; only one that was given up as a whole fails itself.
    """
    if "campaign_id" in result and (result["status"] == "partial" or result["error"] is None):
        return states.SUCCESS
    return _END[result["status"]]


def unwanted(claimed: Claimed, path: str, *, expired: bool) -> ForkError | None:
    """Why a job is not to be begun, although its id was claimed for it; None if it is.

    `expired`: its message's time had passed. That counts only before a worker has begun with it.
    """
    if claimed.ended == states.REVOKED:
        return cancelled(path)
    if claimed.ended is not None:
        return ForkError(Code.IO_ERROR, f"a task of this id ended as {claimed.ended} before", path)
    if expired and claimed.is_new:
        return ForkError(Code.CANCELLED, "its message expired before a worker began with it", path)
    return None


def _rank(part: str) -> int:
    """Where a part stands among the parts of a fork."""
    return _RANKS[part] if part in _RANKS else int(part) + 1


def page_key(fork_id: str, part: str, number: int) -> str:
    """The key of one page of a part of a fork."""
    return key_of(fork_id, f"page:{part}:{number}")


def key_of(fork_id: str, what: str) -> str:
    """The key of one thing that is kept of a fork or campaign."""
    return f"forkvm:{fork_id}:{what}"


def _final(kept: dict[str, Any] | None, record: dict[str, Any] | None) -> dict[str, Any] | None:
    if kept is None and record is not None and record["status"] == states.SUCCESS:
        return cast("dict[str, Any] | None", record["result"])
    return kept


def _decoded(value: Any) -> Any:
    return None if value is None else json.loads(value)
