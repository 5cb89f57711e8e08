"""The request and the result of a fork in the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypedDict, cast, final

from tasks.copier import validation
from tasks.copier.errors import Code, ErrorRecord, ForkError
from tasks.copier.metadata_losses import Lost, lost_of
from tasks.copier.options import Options
from tasks.copier.report import Fallback, Totals, fallback_of

Labels = dict[str, str] | list[str]


@dataclass(frozen=True, kw_only=True)
class ForkSpec:
    """One fork to make. Paths are absolute; times are seconds."""

    fork_id: str
    source: str
    destination: str
    options: Options = field(default_factory=Options)
    labels: Labels = field(default_factory=dict)
    #: queue: a crashed fork is delivered again. local: the fork ends with its process.
    owner: Literal["queue", "local"] = "local"
    #: How long the request waited, and when work on it began (seconds since the epoch).
    queued: float = 0.0
    started: float = field(default_factory=time.time)

    def to_data(self) -> dict[str, Any]:
        """JSON-ready data for the journal."""
        return {**vars(self), "options": self.options.to_data()}

    def request(self) -> dict[str, Any]:
        """The ForkRequest of this fork."""
        options = self.to_data()["options"]
        return {"source": self.source, "destination": self.destination, "labels": self.labels, **options}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> ForkSpec:
        """The spec that `to_data` returned. Raises Malformed for anything else."""
        with validation.reading("the fork's request"):
            return cls(
                **{
                    **data,
                    **checked_common_fields(data),
                    "fork_id": validation.text(data["fork_id"]),
                    "destination": validation.absolute_path(data["destination"]),
                }
            )

    def is_same_request(self, other: ForkSpec) -> bool:
        """Whether `other` requests the same fork. Times and the owner are not compared."""
        return replace(self, owner=other.owner, queued=other.queued, started=other.started) == other


def checked_common_fields(data: dict[str, Any]) -> dict[str, Any]:
    """The fields that a fork's request and a campaign's have in common, from the data of either.

    Call it within `validation.reading`, which turns what it raises into Malformed.
    """
    return {
        "source": validation.absolute_path(data["source"]),
        "options": Options.from_data(data["options"]),
        "labels": validation.labels(data["labels"]),
        "owner": validation.one_of(data["owner"], ("queue", "local")),
        "queued": validation.seconds(data["queued"]),
        "started": validation.seconds(data["started"]),
    }


@final
class ForkResult(TypedDict):
    """The result of a fork; the contract's ForkResult."""

    fork_id: str
    status: Literal["succeeded", "failed", "cancelled"]
    source: str
    destination: str
    #: Whether the destination is a btrfs subvolume.
    subvolume: bool
    error: ErrorRecord | None
    files: dict[str, int]
    bytes: dict[str, int]
    fallback: Fallback | None
    #: Metadata in `preserve` that the destination could not hold: the first losses, and the number of all.
    metadata_lost: list[Lost]
    metadata_lost_total: int
    chunks: int
    seconds: dict[str, float]
    started_at: str
    finished_at: str
    labels: Labels


def result_of(data: dict[str, Any] | None, spec: ForkSpec) -> ForkResult:
    """The ForkResult of a succeeded fork, from its journal. Raises Malformed for anything else."""
    with validation.reading("the fork's result"):
        result = validation.json_object(data)
        if any(result[name] != getattr(spec, name) for name in ("fork_id", "source", "destination")):
            raise validation.Malformed("it belongs to another fork")
        if result["status"] != "succeeded" or result["error"] is not None:
            raise validation.Malformed("it is not the result of a succeeded fork")
        for name in ("files", "bytes"):
            for value in validation.json_object(result[name]).values():
                validation.integer(value, validation.SUM)
        for seconds in validation.json_object(result["seconds"]).values():
            validation.seconds(seconds)
        validation.integer(result["chunks"])
        for name in ("started_at", "finished_at"):
            datetime.fromisoformat(validation.text(result[name]))
        validation.labels(result["labels"])
        validation.boolean(result["subvolume"])
        fallback_of(result["fallback"])
        lost_of(result.get("metadata_lost", []))
        validation.integer(result.get("metadata_lost_total", 0))
        return cast(ForkResult, result)


@dataclass
class Clock:
    """When the steps of a fork began, in seconds since the epoch. The steps may run in different processes."""

    started: float
    planned: float = 0.0
    cloned: float = 0.0

    def seconds(self, queued: float, now: float) -> dict[str, float]:
        """The contract's `seconds`. A step that was not reached took 0."""
        planned = self.planned or now
        cloned = max(self.cloned or now, planned)
        steps = {
            "queued": queued,
            "plan": planned - self.started,
            "copy": cloned - planned,
            "publish": now - cloned,
            "total": now - self.started,
        }
        return {name: round(max(0.0, value), 6) for name, value in steps.items()}


def succeeded(spec: ForkSpec, totals: Totals, chunks: int, clock: Clock, *, subvolume: bool = False) -> ForkResult:
    """The result of a complete fork, valid once it is published. `subvolume`: the fork is a btrfs subvolume."""
    return {**_result(spec, "succeeded", None, totals, chunks, clock), "subvolume": subvolume}


def failed(spec: ForkSpec, error: ForkError, totals: Totals, chunks: int, clock: Clock) -> ForkResult:
    """The result of a fork that failed or, with the error code `cancelled`, was cancelled."""
    status: Literal["cancelled", "failed"] = "cancelled" if error.code is Code.CANCELLED else "failed"
    return _result(spec, status, error.record(), totals, chunks, clock)


def _result(
    spec: ForkSpec,
    status: Literal["succeeded", "failed", "cancelled"],
    error: ErrorRecord | None,
    totals: Totals,
    chunks: int,
    clock: Clock,
) -> ForkResult:
    now = time.time()
    return {
        "fork_id": spec.fork_id,
        "status": status,
        "source": spec.source,
        "destination": spec.destination,
        "subvolume": False,
        "error": error,
        "files": totals.files(),
        "bytes": totals.bytes(),
        "fallback": totals.fallback,
        "metadata_lost": totals.metadata_lost,
        "metadata_lost_total": totals.metadata_lost_total,
        "chunks": chunks,
        "seconds": clock.seconds(spec.queued, now),
        "started_at": _timestamp(spec.started),
        "finished_at": _timestamp(max(now, spec.started)),  # the host that began it may have a clock that is ahead
        "labels": spec.labels,
    }


def _timestamp(epoch: float) -> str:
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="microseconds")
