"""The table of this program's Redis keys: what each one holds, its type, and when it expires.

The store, the Lua scripts, docs/redis-keys.md and the tests use the tables. The formats are part of the wire format:
workers of two versions share a Redis.

A key of a job that has not ended has a TTL of `open_ttl`, so no worker must renew it: a job loses nothing when it runs
longer than `FORKVM_RESULT_EXPIRES`, or when no worker runs for that long. The script that stores the result of the job
sets the TTL of all its keys to `FORKVM_RESULT_EXPIRES`. They expire together, and the id is then free.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

#: TTL of each key of a job that has not ended, in seconds: 30 days. Only a job that never ends keeps a key so long.
OPEN_SECONDS = 30 * 86_400
#: TTL of the records of workers, in seconds. A worker that no longer writes its record is shown for so long.
WORKER_SECONDS = 3600
#: How long one process may send what follows a job before another one sends it too, in seconds.
SENDING_SECONDS = 10

_OF_JOB = "forkvm:{id}:"


class Lifetime(Enum):
    """When a key expires."""

    #: `open_ttl` until the job ends, then `FORKVM_RESULT_EXPIRES`.
    JOB = "with the job"
    #: `open_ttl` after the last write.
    OPEN = "after 30 days"
    #: `FORKVM_RESULT_EXPIRES` after the last write.
    RESULT = "after `FORKVM_RESULT_EXPIRES`"
    #: `WORKER_SECONDS` after the last write.
    HOUR = "after an hour"
    #: `SENDING_SECONDS` after the write.
    SENDING = "after 10 s"
    #: After the time that `PeriodicWork` was given.
    INTERVAL = "when the work is due again"
    #: kombu's lock around a redelivery.
    LOCK = "after 3 s"
    #: kombu's keys without a TTL. A list, hash or set that becomes empty is removed by Redis.
    NEVER = "when it is empty"


@dataclass(frozen=True)
class Key:
    """One kind of key."""

    #: With the variable parts in braces.
    pattern: str
    #: The Redis type, as the command TYPE returns it; a bitmap is a string.
    type: str
    holds: str
    lifetime: Lifetime = Lifetime.JOB
    #: Whether a job that takes the id deletes what an earlier job left under this key.
    is_reset: bool = False

    @property
    def name(self) -> str:
        """The part after the id, for a key of a job."""
        return self.pattern.removeprefix(_OF_JOB)

    def of(self, job_id: str) -> str:
        """This key for a job."""
        return f"forkvm:{job_id}:{self.name}"


def _key_of_job(name: str, *args: str, lifetime: Lifetime = Lifetime.JOB, is_reset: bool = False) -> Key:
    kind, holds = args
    return Key(_OF_JOB + name, kind, holds, lifetime, is_reset)


CLAIM = _key_of_job("claim", "string", "JSON: the request that holds the id, its destination, and its queue")
RESULT = _key_of_job("result", "string", "JSON: the final result; absent for a fork of a campaign that succeeded")
CANCEL = _key_of_job("cancel", "string", "cancellation was requested: `1`, or the error that ends a campaign as JSON")
PROGRESS = _key_of_job(
    "progress", "hash", "for each part of a fork, JSON: the entries and bytes that are done", is_reset=True
)
PAGES = _key_of_job("pages", "hash", "for each part of a fork, how many pages it has", is_reset=True)
PART_PAGE = _key_of_job(
    "page:{part}:{number}", "string", "FileResults of one part: JSON, compressed with zlib, at most 1 MiB"
)
ONLY_PAGE = _key_of_job(
    "page",
    "string",
    "the FileResults of a fork that has one page and no `pages`; written just before the fork ends",
    lifetime=Lifetime.RESULT,
    is_reset=True,
)
LOSSES = _key_of_job(
    "losses",
    "string",
    "how many processes died of a message; the id is the message's (a job, a chunk, or a batch)",
    lifetime=Lifetime.RESULT,
    is_reset=True,
)
CANVAS = _key_of_job(
    "canvas",
    "hash",
    "for each message of the job, JSON: what its client wants sent when the job ends; empty once it was sent",
    lifetime=Lifetime.OPEN,
    is_reset=True,
)
SENDING = _key_of_job(
    "sending",
    "string",
    "a process sends what follows the job; others wait",
    lifetime=Lifetime.SENDING,
    is_reset=True,
)
SUMS = _key_of_job("sums", "hash", "sums over the results of a campaign's forks that have ended", is_reset=True)
SETTLED = _key_of_job(
    "settled", "string", "bitmap by index: the first fork of each run of forks whose results are stored", is_reset=True
)
BATCHES = _key_of_job("batches", "string", "bitmap by index: the first fork of each batch that is done", is_reset=True)
FAILED = _key_of_job("failed", "zset", "the first failures of a campaign as JSON, by the fork's number", is_reset=True)
OPEN = Key(
    "forkvm:open",
    "zset",
    "the ids of jobs that have not ended, each with the heartbeat that a sweep saw",
    Lifetime.OPEN,
)
SWEEP = Key("forkvm:sweep:{queue}", "string", "a sweep of this queue's jobs runs, or ran recently", Lifetime.INTERVAL)
WALK = Key("forkvm:walk:{queue}", "string", "the roots were searched for abandoned staging recently", Lifetime.INTERVAL)
WORKERS = Key(
    "forkvm:workers",
    "hash",
    "for each worker by its name, JSON: what it serves, and the time of its last heartbeat; see `forkvm queues`",
    Lifetime.HOUR,
)
STATE = Key(
    "celery-task-meta-{id}",
    "string",
    "Celery's record of a job or a campaign's fork: STARTED, PROGRESS, and then SUCCESS, FAILURE or REVOKED",
)

TABLE = (
    *(CLAIM, RESULT, CANCEL, PROGRESS, PAGES, PART_PAGE, ONLY_PAGE, LOSSES, CANVAS, SENDING),
    *(SUMS, SETTLED, BATCHES, FAILED),
    *(OPEN, SWEEP, WALK, WORKERS, STATE),
)
#: What kombu keeps for this program in the broker's Redis. A queue has a list for each priority but 0, too.
OF_KOMBU = (
    Key("{queue}", "list", "messages that wait in a queue: `forkvm`, `forkvm#chunk` and so on", Lifetime.NEVER),
    Key(
        r"{queue}\x06\x16{priority}",
        "list",
        "the same, of those that were sent with a priority: `3`, `6` or `9`",
        Lifetime.NEVER,
    ),
    Key("forkvm:unacked", "hash", "messages that workers have taken and not acknowledged", Lifetime.NEVER),
    Key("forkvm:unacked_index", "zset", "when the lease of each of them was renewed last", Lifetime.NEVER),
    Key("forkvm:unacked_mutex", "string", "a worker puts messages of dead workers back", Lifetime.LOCK),
    Key("_kombu.binding.{exchange}", "set", "the queues that are bound to an exchange", Lifetime.NEVER),
    Key("_kombu.binding_permanent.{exchange}", "set", "those of them that do not expire", Lifetime.NEVER),
    Key(
        "_kombu.binding_deadlines",
        "zset",
        "until when kombu keeps the bindings of an exchange of remote control, all of whose queues expire",
        Lifetime.NEVER,
    ),
    Key("{id}.reply.celery.pidbox", "list", "replies of workers to a command of remote control", Lifetime.NEVER),
)
#: What batches write about their campaign.
OF_BATCHES = (SUMS, SETTLED, BATCHES, FAILED)


def prefix_of(job_id: str) -> str:
    """The beginning of all keys of a job, except Celery's."""
    return f"forkvm:{job_id}:"


def prefix_of_forks(campaign_id: str) -> str:
    """The beginning of all keys of a campaign's forks, except Celery's. The number of the fork follows."""
    return f"forkvm:{campaign_id}."


def page_key(job_id: str, part: str, number: int) -> str:
    """The key of one page of a part of a fork."""
    return f"forkvm:{job_id}:page:{part}:{number}"


def open_ttl(expires: int) -> int:
    """The TTL of the keys of a job that has not ended, where results expire after `expires`; both in seconds."""
    return max(expires, OPEN_SECONDS)


#: For the Lua scripts: names of keys of a job, separated by spaces. One argument costs less than a key for each.
#: Keys that every job has, and keys that a small fork has not. The script that stores a result finds the pages of parts
#: by their counts.
USUAL_OF_JOB = CLAIM.name
OTHERS_OF_JOB = " ".join(
    key.name
    for key in TABLE
    if key.lifetime is Lifetime.JOB and key.pattern.startswith(_OF_JOB) and key not in (CLAIM, RESULT, PART_PAGE)
)
#: Without the cancellation flag: a job can be cancelled before a worker starts it.
DELETE_WITH_CLAIM = " ".join(key.name for key in TABLE if key.is_reset)
