"""What happens to jobs and messages, for the observer that a worker installs in its processes.

The tasks call the functions here and know nothing of metrics. Without an observer, a call does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from tasks.copier.campaign.spec import CampaignResult
from tasks.copier.fork_spec import ForkResult

#: `redelivery`: a message is delivered again. `takeover`: a job was taken from a process without a heartbeat.
#: `retry`: a message went back to its queue because it has to wait. `rejection`: a message was refused.
Kind = Literal["redelivery", "takeover", "retry", "rejection"]

#: The reasons of each kind that has some.
REASONS: dict[Kind, tuple[str, ...]] = {
    # The process died; it took too long; Redis refused a write; the worker died; the message was lost in Redis.
    "redelivery": ("process_lost", "time_limit", "redis", "worker_lost", "message_lost"),
    # Another process holds the job; nothing of it was found.
    "retry": ("held", "not_found"),
    # Not JSON or not of Celery's protocol 2; no such task; wrong arguments; a bad eta or expires; bad callbacks.
    "rejection": ("malformed", "unknown_task", "arguments", "time", "options"),
}


class Observer(Protocol):
    """What is reported. An observer must neither raise nor wait for long."""

    def forks_ended(self, run_id: str, results: Sequence[ForkResult], *, of_campaign: bool) -> None:
        """See the function `forks_ended`."""

    def campaign_ended(self, result: CampaignResult) -> None:
        """See the function `campaign_ended`."""

    def happened(self, kind: Kind, reason: str) -> None:
        """See the function `happened`."""


_observers: list[Observer] = []


def install(observer: Observer) -> None:
    """Report to `observer` from now on, also in processes that are forked later."""
    _observers[:] = [observer]


def forks_ended(run_id: str, results: Sequence[ForkResult], *, of_campaign: bool) -> None:
    """Some forks have ended: one fork, whose id is `run_id`, or a run of a campaign's forks.

    Called before the results are stored, and so again with the same `run_id` if the process dies in between and the
    message is delivered again.
    """
    for observer in _observers:
        observer.forks_ended(run_id, results, of_campaign=of_campaign)


def campaign_ended(result: CampaignResult) -> None:
    """A campaign has ended. Called before its result is stored; see `forks_ended`."""
    for observer in _observers:
        observer.campaign_ended(result)


def happened(kind: Kind, reason: str = "") -> None:
    """Something else happened. `reason` is one of a few words, or empty where there is only one."""
    for observer in _observers:
        observer.happened(kind, reason)
