"""A campaign as the engine sees it: the request, the progress and the result of many forks of one source."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, final, get_args

from tasks.copier import validation
from tasks.copier.errors import Code, ErrorRecord, ForkError
from tasks.copier.fork_spec import ForkResult, ForkSpec, Labels, checked_common_fields
from tasks.copier.options import OnError, Options

Status = Literal["succeeded", "partial", "failed", "cancelled"]

#: Upper limit of the forks of a campaign.
_MOST_FORKS = 10_000_000
#: Most failures in a CampaignResult; the results of the forks have all.
MOST_FAILURES = 100
#: Most bytes of these failures, since a path may have 4 KiB: no value in Redis may exceed 1 MiB.
_FAILURE_BYTES = 512 << 10


@dataclass(frozen=True, kw_only=True)
class Aims:
    """How a campaign is to be made."""

    #: Number of forks, and the `n` of the first: the fork ids are `<campaign id>.<n>`.
    count: int = 0
    start: int = 1
    #: Most forks in progress at once; None: no limit.
    max_parallel: int | None = None
    #: abort: the first fork that fails ends the campaign.
    on_error: OnError = "continue"
    #: When the forks that are not published are cancelled, in seconds since the epoch, or None. By the clock that all
    #: hosts of the campaign share: that of Redis, or of this host for a local campaign.
    deadline: float | None = None

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Aims:
        """Aims from plain data. Raises ForkError (Malformed) for anything else."""
        return cls(
            **{
                **data,
                "count": validation.integer(data["count"], _MOST_FORKS),
                "start": validation.integer(data["start"]),
                "max_parallel": validation.optional(data["max_parallel"], validation.integer),
                "on_error": validation.one_of(data["on_error"], get_args(OnError)),
                "deadline": validation.optional(data["deadline"], validation.seconds),
            }
        )


@dataclass(frozen=True, kw_only=True)
class CampaignSpec:
    """The request of one campaign, without its destinations (there may be a million). Times are seconds."""

    campaign_id: str
    source: str
    options: Options = field(default_factory=Options)
    labels: Labels = field(default_factory=dict)
    #: See `ForkSpec.owner`.
    owner: Literal["queue", "local"] = "local"
    #: How long the request waited in the queue, and when (since the epoch) work on it began.
    queued: float = 0.0
    started: float = field(default_factory=time.time)
    aims: Aims = field(default_factory=Aims)

    def to_data(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return {**vars(self), "options": self.options.to_data(), "aims": vars(self.aims)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> CampaignSpec:
        """The request that `to_data` returned. Raises ForkError (Malformed) for anything else."""
        with validation.reading("the campaign's request"):
            return cls(
                **{
                    **data,
                    **checked_common_fields(data),
                    "campaign_id": validation.text(data["campaign_id"]),
                    "aims": Aims.from_data(validation.json_object(data["aims"])),
                }
            )

    def fork_id(self, index: int) -> str:
        """The id of the fork at `index`, counted from 0."""
        return f"{self.campaign_id}.{self.aims.start + index}"

    def fork(self, index: int, destination: str, started: float) -> ForkSpec:
        """The fork at `index`, on which work began at `started` (since the epoch)."""
        return ForkSpec(
            fork_id=self.fork_id(index),
            source=self.source,
            destination=destination,
            options=self.options,
            labels=self.labels,
            owner=self.owner,
            queued=self.queued + max(0.0, started - self.started),
            started=started,
        )

    def is_late(self, clock: Callable[[], float] = time.time) -> bool:
        """Whether the deadline has passed by the clock of `Aims.deadline`."""
        return self.aims.deadline is not None and clock() > self.aims.deadline


@final
class CampaignProgress(TypedDict):
    """How far a campaign is."""

    forks_done: int
    forks_total: int
    forks_failed: int
    #: Remaining time at the present rate, in seconds; None before the first fork is done.
    eta_seconds: float | None


class Failure(TypedDict):
    """One fork that failed."""

    fork_id: str
    destination: str
    error: ErrorRecord


@final
class CampaignResult(TypedDict):
    """The result of a campaign; the contract's CampaignResult."""

    campaign_id: str
    status: Status
    source: str
    #: Why the campaign could not be started or ended early, or None.
    error: ErrorRecord | None
    forks: dict[str, int]
    files: dict[str, int]
    bytes: dict[str, int]
    seconds: dict[str, float]
    forks_per_second: float
    failures: list[Failure]


#: Sums over ForkResults, by flat names such as `forks.succeeded`, `files.total`, `bytes.logical`.
Sums = Mapping[str, int]

_FORKS = ("succeeded", "failed", "cancelled")
_FILES = ("total", "reflinked", "copied", "hardlinked", "symlinked", "directories", "skipped", "failed")
_BYTES = ("logical", "reflinked", "copied")


def sums_of(results: list[ForkResult]) -> dict[str, int]:
    """The sums over some ForkResults, without zeros."""
    sums: dict[str, int] = {}
    for result in results:
        sums[f"forks.{result['status']}"] = sums.get(f"forks.{result['status']}", 0) + 1
        for group, counts in (("files", result["files"]), ("bytes", result["bytes"])):
            for name, value in counts.items():
                if value:
                    key = f"{group}.{name}"
                    sums[key] = sums.get(key, 0) + value
    return sums


def forks_done(sums: Sums) -> int:
    """The number of forks that succeeded, failed or were cancelled."""
    return sum(sums.get(f"forks.{status}", 0) for status in _FORKS)


def progress_of(spec: CampaignSpec, sums: Sums, planned_at: float) -> CampaignProgress:
    """The progress of a campaign that was planned at `planned_at` (seconds since the epoch)."""
    done, total = forks_done(sums), spec.aims.count
    elapsed = max(0.0, time.time() - planned_at)
    return {
        "forks_done": done,
        "forks_total": total,
        "forks_failed": sums.get("forks.failed", 0),
        "eta_seconds": round(elapsed / done * (total - done), 3) if done else None,
    }


def failures_of(results: list[ForkResult]) -> list[Failure]:
    """The failures among some ForkResults."""
    return [
        {"fork_id": result["fork_id"], "destination": result["destination"], "error": result["error"]}
        for result in results
        if result["status"] == "failed" and result["error"] is not None
    ]


def campaign_result(
    spec: CampaignSpec,
    sums: Sums,
    failures: list[Failure],
    *,
    planned_at: float = 0.0,
    error: ForkError | None = None,
) -> CampaignResult:
    """The result of a campaign whose forks have all ended, or that was not started. `error`: why it ended early."""
    now = time.time()
    forks = {"total": spec.aims.count, **{name: sums.get(f"forks.{name}", 0) for name in _FORKS}}
    planned = planned_at or now
    seconds = {
        "queued": spec.queued,
        "plan": planned - spec.started,
        "copy": now - planned,
        "total": now - spec.started,
    }
    total = max(seconds["total"], 1e-6)
    return {
        "campaign_id": spec.campaign_id,
        "status": _status(forks, error),
        "source": spec.source,
        "error": None if error is None else error.record(),
        "forks": forks,
        "files": {name: sums.get(f"files.{name}", 0) for name in _FILES},
        "bytes": {name: sums.get(f"bytes.{name}", 0) for name in _BYTES},
        "seconds": {name: round(max(0.0, value), 6) for name, value in seconds.items()},
        "forks_per_second": round(forks["succeeded"] / max(total, 1e-6), 3),
        "failures": _bounded(failures),
    }


def _status(forks: dict[str, int], error: ForkError | None) -> Status:
    if error is not None and error.code is Code.CANCELLED:
        return "cancelled"
    if forks["total"] and forks["succeeded"] == forks["total"]:
        return "succeeded"
    return "partial" if forks["succeeded"] else "failed"


def _bounded(failures: list[Failure]) -> list[Failure]:
    kept: list[Failure] = []
    room = _FAILURE_BYTES
    for failure in failures[:MOST_FAILURES]:
        room -= len(json.dumps(failure))
        if room < 0:
            break
        kept.append(failure)
    return kept
