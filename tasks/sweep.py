"""`forkvm.sweep`: sends jobs again whose message was lost, and removes abandoned staging.

The workers of a domain send a sweep periodically, one at a time (see `worker.runtime.bootsteps.Sweeper`). A message can
be lost: kombu removes it from its list in one step and notes it as unacknowledged in another. If Redis or the
connection fails in between, no worker continues the job.

**How a lost job is found.** The sweep waits in the queue of chunks, behind every message that was there when it was
sent. So between two sweeps, workers have taken all messages of a job. A process that works on it gives a heartbeat
every `HEARTBEAT_SECONDS`. If the heartbeat has not changed between two sweeps, the job's request is sent again. It
continues where the job stopped, or takes the job from a paused process. If the sweep is wrong, it does no harm: any
message may be delivered twice.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from redis.exceptions import RedisError

from tasks import events
from tasks.context import Context
from tasks.copier.errors import ForkError
from tasks.copier.staging.control_directory import last_sign_of_life
from tasks.copier.staging.gc import YOUNG, collect
from tasks.names import FINISH_CAMPAIGN_TASK, FORK_TASK, job_fields
from tasks.store import keys
from tasks.store.open_jobs import OpenJob
from tasks.store.redis_errors import cause
from tasks.store.results import Results

log = logging.getLogger(__name__)

#: How often the roots are searched for abandoned staging, in seconds. The search finds staging for which Redis has no
#: claim: of a local fork that was killed, or from before Redis lost its data (then the search is due at once).
WALK_SECONDS = 3600
#: Staging for which Redis has no claim is removed once it has had no heartbeat for so long, in seconds: a worker of
#: another deployment on the same disks may be about to continue it. Younger staging is checked again after this time.
SILENT_SECONDS = 300

#: Errors that a bad claim or bad staging of one job can cause. They do not end the sweep; errors of Redis do.
_ERRORS_OF_ONE_JOB = (OSError, ForkError, ValueError, TypeError, LookupError, AttributeError)
#: How each verdict of a search is logged.
_LOGGED = {
    "removed": (logging.WARNING, "removed staging of fork %r: %r: %s"),
    "kept": (logging.INFO, "kept staging of fork %r: %r: %s"),
    "failed": (logging.WARNING, "could not check staging of fork %r: %r: %s"),
}


def is_sweep_needed(results: Results, queue: str) -> bool:
    """Whether a sweep of this queue has anything to do. Raises RedisError."""
    return results.open_jobs.any() or results.periodic_work.is_due(keys.WALK, queue)


def run_sweep(context: Context, every: int) -> None:
    """Send again the jobs that no process works on, and remove abandoned staging. The next sweep is in `every` seconds.

    It does not wait while Redis is away: another sweep follows, and a worker that shuts down waits for this one.
    """
    context = replace(context, results=replace(context.results, patient=False))
    try:
        sweep_forks(context)
        if context.results.periodic_work.start(keys.WALK, context.queue, WALK_SECONDS):
            remove_abandoned(context)
        context.results.periodic_work.set_due(keys.SWEEP, context.queue, every - 1)
    except RedisError as error:
        log.warning("a sweep was ended early: Redis does not answer: %s", cause(error))


def sweep_forks(context: Context) -> None:
    """Send again the requests of forks and campaigns whose heartbeat has not changed since the last sweep.

    A job that cannot be checked is logged and skipped.
    """
    for job in context.results.open_jobs.of_queue(context.queue):
        try:
            _check(context, job)
        except _ERRORS_OF_ONE_JOB as error:
            log.warning("the sweep skips job %r: %s: %s", job.job_id, type(error).__name__, error)


def _check(context: Context, job: OpenJob) -> None:
    heartbeat = _last_heartbeat(context, job.job_id, job.claim["destination"])
    if heartbeat != job.heartbeat:
        context.results.open_jobs.store_heartbeat(job.job_id, heartbeat)
        return
    if job.claim.get("campaign"):  # this task sends the batches that are not done
        task, arguments = FINISH_CAMPAIGN_TASK, {"home": job.claim["destination"]}
    else:
        task, arguments = FORK_TASK, {"request": job.claim["request"]}
    line = "job %r is sent again: without a new heartbeat, its message was lost or its process is paused"
    log.warning(line, job.job_id, extra=job_fields(task, job.job_id))
    events.happened("redelivery", "message_lost")
    context.send(task, arguments, job.job_id)


def remove_abandoned(context: Context) -> None:
    """Remove staging below the roots that no process holds and whose job has ended, or has no claim in Redis.

    Staging that is kept or cannot be removed is logged, and does not end the search.
    """
    for root in context.roots.paths:
        try:
            for finding in collect(root, context.results.is_open, SILENT_SECONDS):
                level, line = _LOGGED[finding.verdict]
                log.log(level, line, finding.fork_id, finding.path, finding.reason)
                if finding.reason == YOUNG:
                    context.results.periodic_work.set_due(keys.WALK, context.queue, SILENT_SECONDS)
        except (ForkError, OSError) as error:
            log.warning("the search for abandoned staging failed: %s", error)


def _last_heartbeat(context: Context, fork_id: str, destination: str) -> int:
    """The last heartbeat in a job's staging, in milliseconds since the epoch; 0 if there is none that can be read."""
    try:
        with context.roots.open_parent(destination) as parent:
            return last_sign_of_life(parent.fd, fork_id)
    except (ForkError, OSError):
        return 0  # the job is then sent again, and its worker reports the error
