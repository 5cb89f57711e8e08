"""`forkvm.sweep`: looks after what has no end yet and nobody to give it one, so that nothing accepted is lost.

The workers of a domain send it, one at a time, again and again (see `Sweeper`). A message can be lost: kombu
takes one from its list in one step and notes it as taken in another, and Redis, or the connection, may go in between.
Then a fork stands still: its journal tells how far it is, and nobody goes on.

**Who stands still.** The sweep goes through the queue of chunks, behind every message that was there when it was sent.
So between two sweeps of a fork whatever was waiting for it was taken. If nothing has moved in its staging meanwhile,
nobody is at work on it: who works gives a sign every `HEARTBEAT_SECONDS`. Then its request is sent again, which goes on
with it wherever it stopped, or takes it from a process that is paused. A sweep that errs does no harm: a second
delivery never does.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from redis.exceptions import RedisError

from tasks.context import Context
from tasks.copier.errors import ForkError
from tasks.copier.staging.control_directory import last_sign_of_life
from tasks.copier.staging.gc import YOUNG, collect
from tasks.names import FINISH_CAMPAIGN_TASK, FORK_TASK
from tasks.store import keys
from tasks.store.open_jobs import OpenJob
from tasks.store.redis_errors import cause

log = logging.getLogger(__name__)

#: How often the roots are searched for abandoned staging, in seconds. Redis tells of all other: this is for what it
#: does not know, of a local fork that was killed, or from before it was emptied (then it forgot the last search too).
WALK_SECONDS = 3600
#: How long nothing must have moved in a staging that Redis does not know before it is removed, in seconds: a worker of
#: another deployment on the same disks may be about to go on with it. What is younger is looked at again after so long.
SILENT_SECONDS = 300

#: What the claim or the staging of one fork may cause; a Redis that does not answer ends the sweep.
_OF_ONE_FORK = (OSError, ForkError, ValueError, TypeError, LookupError, AttributeError)
#: How each verdict of a search is logged.
_LOGGED = {
    "removed": (logging.WARNING, "removed staging of fork %r: %r: %s"),
    "kept": (logging.INFO, "kept staging of fork %r: %r: %s"),
    "failed": (logging.WARNING, "could not look after staging of fork %r: %r: %s"),
}


def run_sweep(context: Context, every: int) -> None:
    """Send again what nobody works on, and remove what is abandoned. The next sweep comes in `every` seconds.

    It does not wait for a Redis that is away: another sweep follows, and a worker that is told to end waits for this
    one.
    """
    context = replace(context, results=replace(context.results, patient=False))
    try:
        sweep_forks(context)
        if context.results.periodic_work.start(keys.WALK, context.queue, WALK_SECONDS):
            remove_abandoned(context)
        context.results.periodic_work.set_due(keys.SWEEP, context.queue, every - 1)
    except RedisError as error:
        log.warning("a sweep was abandoned, since Redis does not answer: %s", cause(error))


def sweep_forks(context: Context) -> None:
    """Send again the requests of forks and campaigns in which nothing moves.

    One that cannot be judged is logged and passed over.
    """
    for job in context.results.open_jobs.of_queue(context.queue):
        try:
            _look_after(context, job)
        except _OF_ONE_FORK as error:
            log.warning("%r is passed over: %s: %s", job.job_id, type(error).__name__, error)


def _look_after(context: Context, job: OpenJob) -> None:
    sign = _sign_of_life(context, job.job_id, job.claim["destination"])
    if sign != job.heartbeat:
        context.results.open_jobs.store_heartbeat(job.job_id, sign)
        return
    log.warning("nothing moves in %s: its message was lost, or its process is paused; it is sent again", job.job_id)
    if job.claim.get("campaign"):  # not over: what is left of it is sent again
        context.send(FINISH_CAMPAIGN_TASK, {"home": job.claim["destination"]}, job.job_id)
    else:
        context.send(FORK_TASK, {"request": job.claim["request"]}, job.job_id)


def remove_abandoned(context: Context) -> None:
    """Remove the staging below the roots that no process holds and whose fork has ended, or is not known any more.

    What is kept or cannot be removed is logged, and does not end the search.
    """
    for root in context.roots.paths:
        try:
            for finding in collect(root, context.results.is_open, SILENT_SECONDS):
                level, line = _LOGGED[finding.verdict]
                log.log(level, line, finding.fork_id, finding.path, finding.reason)
                if finding.reason == YOUNG:
                    context.results.periodic_work.set_due(keys.WALK, context.queue, SILENT_SECONDS)
        except (ForkError, OSError) as error:
            log.warning("abandoned staging was not looked for: %s", error)


def _sign_of_life(context: Context, fork_id: str, destination: str) -> int:
    """When anything last moved in a fork's staging; 0 where it has none, or none that can be looked at."""
    try:
        with context.roots.open_parent(destination) as parent:
            return last_sign_of_life(parent.fd, fork_id)
    except (ForkError, OSError):
        return 0  # sent again, it ends with the error that its worker meets
