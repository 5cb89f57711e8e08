"""The counters: what the processes of this worker have reported since it started.

The names and labels are part of the contract (docs/operations.md has the table). Each label has few values: a code, a
method, a filesystem, never an id or a path.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from typing import Any, get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tasks.copier.campaign.spec import Status
from tasks.copier.errors import errno_name
from tasks.copier.report import Method
from tasks.events import REASONS
from worker.observability.reports import Repetitions, Report

#: The names in `seconds` of a ForkResult.
PHASES = ("queued", "plan", "copy", "publish", "total")

#: Upper bounds of the durations of a phase, in seconds.
_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 300, 900, 3600),
)


class Metrics:
    """The registry with all counters; `count` adds one report."""

    def __init__(self) -> None:
        disable_created_metrics: Any = prometheus_client.disable_created_metrics
        disable_created_metrics()  # a series for each counter that no alert or dashboard uses
        self.registry = CollectorRegistry()
        self._repetitions = Repetitions()
        ProcessCollector(registry=self.registry)
        self._forks = self._counter("forks", "Forks that ended.", "status", "code", "campaign")
        self._files = self._counter("files", "Entries of the forks that ended, by the method that made them.", "method")
        self._bytes = self._counter("bytes", "Bytes that were reflinked, or copied.", "method")
        self._fallbacks = self._counter(
            "fallbacks",
            "Forks with files that were to be reflinked and were copied, since the kernel refused.",
            *("errno", "source_filesystem", "destination_filesystem"),
        )
        self._campaigns = self._counter("campaigns", "Campaigns that ended.", "status")
        self._events = {
            "redelivery": self._counter("redeliveries", "Messages that were delivered again.", "reason"),
            "takeover": self._counter("takeovers", "Jobs taken from a process without a heartbeat."),
            "retry": self._counter("retries", "Messages that went back to their queue to wait.", "reason"),
            "rejection": self._counter("rejected_messages", "Messages that were refused.", "reason"),
        }
        self._durations = _Durations()
        self.registry.register(self._durations)
        #: As `labels` of a metric, which takes longer than the count itself.
        self._labelled = cache(lambda metric, *labels: metric.labels(*labels))
        self._begin_at_zero()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"forkvm_{name}", text, labels, registry=self.registry)

    def count(self, report: Report) -> None:
        """Add one report of `reports.Reporter`."""
        kind, *values = report
        match kind:
            case "forks":
                self._count_forks(*values)
            case "fallback":
                number, source, destination, count, *_ = values
                self._fallbacks.labels(errno_name(number), source, destination).inc(count)
            case "campaign":
                campaign_id, status = values
                if not self._repetitions.has_seen(campaign_id, ""):
                    self._campaigns.labels(status).inc()
            case _:
                counter = self._events[kind]
                (counter.labels(*values) if values else counter).inc()

    def _begin_at_zero(self) -> None:
        """Show the series with known labels before their first event: a rate needs two values."""
        for campaign in ("yes", "no"):
            self._forks.labels("succeeded", "", campaign)
        for status in get_args(Status):
            self._campaigns.labels(status)
        for method in get_args(Method):
            self._files.labels(method)
        for method in ("snapshot", "reflink", "copy"):
            self._bytes.labels(method)
        for kind, reasons in REASONS.items():
            for reason in reasons:
                self._events[kind].labels(reason)

    def _count_forks(
        self,
        run_id: str,
        finished_at: str,
        of_campaign: bool,
        ends: list[tuple[str, str, int]],
        *sums: dict[str, Any],
    ) -> None:
        if self._repetitions.has_seen(run_id, finished_at):
            return
        files, sizes, seconds = sums
        campaign = "yes" if of_campaign else "no"
        for status, code, count in ends:
            self._labelled(self._forks, status, code, campaign).inc(count)
        for counter, counts in ((self._files, files), (self._bytes, sizes)):
            for method, count in counts.items():
                if count:
                    self._labelled(counter, method).inc(count)
        for phase, value in seconds.items():
            self._durations.add(phase, value)


class _Durations(Collector):
    """The histogram of durations. That of prometheus_client takes four times as long, which each fork would pay."""

    def __init__(self) -> None:
        #: The number of durations in each bucket, and of those above the last, by phase.
        self._counts = {phase: [0] * (len(_BUCKETS) + 1) for phase in PHASES}
        self._sums = dict.fromkeys(PHASES, 0.0)

    def add(self, phase: str, seconds: float) -> None:
        """Count one duration."""
        self._counts[phase][bisect_left(_BUCKETS, seconds)] += 1
        self._sums[phase] += seconds

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram."""
        text = "Durations of the phases of forks that succeeded, without those of campaigns."
        family = HistogramMetricFamily("forkvm_fork_duration_seconds", text, labels=["phase"])
        bounds = [*map(floatToGoString, _BUCKETS), "+Inf"]
        for phase, counts in self._counts.items():
            family.add_metric([phase], [*zip(bounds, accumulate(counts), strict=True)], self._sums[phase])
        yield family
