"""What Redis holds of jobs, by subject."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tasks.store.cancellation import Cancellations
from tasks.store.claims import Claims
from tasks.store.connection import Connection
from tasks.store.final_results import FinalResults
from tasks.store.job_states import JobStates
from tasks.store.open_jobs import OpenJobs
from tasks.store.pages import Pages
from tasks.store.periodic_work import PeriodicWork
from tasks.store.workers import Workers


@dataclass(frozen=True)
class Results(Connection):
    """The store of one Redis."""

    @cached_property
    def claims(self) -> Claims:
        """Which request holds each id."""
        return Claims(self)

    @cached_property
    def final(self) -> FinalResults:
        """The final results."""
        return FinalResults(self)

    @cached_property
    def pages(self) -> Pages:
        """The FileResults."""
        return Pages(self)

    @cached_property
    def states(self) -> JobStates:
        """Celery's records, with the progress."""
        return JobStates(self)

    @cached_property
    def cancellations(self) -> Cancellations:
        """The requests to cancel jobs."""
        return Cancellations(self)

    @cached_property
    def open_jobs(self) -> OpenJobs:
        """The jobs that have not ended."""
        return OpenJobs(self)

    @cached_property
    def periodic_work(self) -> PeriodicWork:
        """When sweeps and searches are due."""
        return PeriodicWork(self)

    @cached_property
    def workers(self) -> Workers:
        """What workers say about themselves."""
        return Workers(self)

    def is_open(self, job_id: str) -> bool:
        """Whether a worker has started the job, and it has no result yet. Raises RedisError."""
        return self.claims.get(job_id) is not None and self.final.get(job_id) is None
