"""The jobs that are sent: forks of every kind, each with its allowed outcomes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tasks.copier.staging.control_directory import control_name
from tests.soak.plants import Plant, plant
from tests.support.guests import MIB, make_sparse_file


@dataclass
class Job:
    """One id that is sent: the request, and its allowed ends (None for success, or error codes)."""

    fork_id: str
    kind: str
    request: dict[str, Any]
    ends: frozenset[str | None]
    #: The number of messages that are sent at once, and their Celery options.
    copies: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    #: The number of seconds after which the job is cancelled, and in which way.
    cancel_after: float | None = None
    cancel_by: Literal["cancel", "revoke", "terminate"] = "cancel"
    #: What is planted at the path of its control directory; and whether its staging may be damaged.
    plant: Plant | None = None
    may_be_damaged: bool = False
    #: The number of forks of a campaign; 0 for a single fork.
    forks: int = 0
    #: How many times it was sent, including retries while Redis was down.
    sent: int = field(default=0)

    @property
    def task(self) -> str:
        return "forkvm.campaign" if self.forks else "forkvm.fork"

    @property
    def source(self) -> Path:
        return Path(self.request["source"])

    @property
    def destination(self) -> Path:
        return Path(self.request["destination"])

    @property
    def control(self) -> Path:
        """Its control directory, which exists while it runs."""
        return next(iter(self.destinations.values())).parent / control_name(self.fork_id)

    @property
    def destinations(self) -> dict[str, Path]:
        """The destination of each fork, by its id."""
        if not self.forks:
            return {self.fork_id: self.destination}
        template = self.request["destinations"]["template"]
        return {f"{self.fork_id}.{n}": Path(template.format(n=n)) for n in range(1, self.forks + 1)}


@dataclass(frozen=True)
class Sources:
    """Sources of a fork in one task, in reflinked chunks, in copied chunks, and one with a FIFO."""

    small: Path
    reflinked: Path
    copied: Path
    unsupported: Path


def make_sources(reflink: Path, plain: Path) -> Sources:
    """Make the sources; `reflink` is on a filesystem with reflinks, `plain` on one without."""
    small, reflinked, copied, unsupported = reflink / "small", reflink / "large", plain / "large", reflink / "fifo"
    small.mkdir()
    make_sparse_file(small / "disk.raw", 4 * MIB, MIB)
    (small / "state").write_text("paused")
    for n in range(8):
        (reflinked / f"layer-{n}").mkdir(parents=True)
        for m in range(20):
            (reflinked / f"layer-{n}" / f"block-{m}").write_bytes(b"%d/%d" % (n, m) * 2000)
    copied.mkdir()
    make_sparse_file(copied / "disk.raw", 24 * MIB, 12 * MIB)
    (copied / "config").write_text("{}")
    unsupported.mkdir()
    os.mkfifo(unsupported / "pipe")
    return Sources(small, reflinked, copied, unsupported)


#: A kind of job: takes the sources, the two directories for forks, an id and a random generator.
Kind = Callable[[Sources, Path, Path, str, random.Random], Job]


def _fork(source: Path, parent: Path, fork_id: str, kind: str, **fields: Any) -> Job:
    request = {"source": str(source), "destination": str(parent / fork_id)}
    return Job(fork_id, kind, request, frozenset({None}), **fields)


def _small(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    return _fork(sources.small, reflink, fork_id, "small")


def _reflinked(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    return _fork(sources.reflinked, reflink, fork_id, "reflinked in chunks")


def _copied(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    return _fork(sources.copied, plain, fork_id, "copied in chunks")


def _doubled(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    source = rng.choice([sources.small, sources.reflinked])
    return _fork(source, reflink, fork_id, "sent three times", copies=3)


def _cancelled(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    job = _fork(sources.copied, plain, fork_id, "cancelled", cancel_after=rng.uniform(0.0, 0.5))
    job.ends = frozenset({None, "cancelled"})
    return job


def _unsupported(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    job = _fork(sources.unsupported, reflink, fork_id, "of a FIFO")
    job.ends = frozenset({"unsupported_file_type"})
    return job


def _missing(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    job = _fork(reflink / "missing", reflink, fork_id, "of nothing")
    job.ends = frozenset({"source_not_found"})
    return job


def _taken(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    job = _fork(sources.small, reflink, fork_id, "to an existing destination")
    job.destination.symlink_to("nowhere")
    job.ends = frozenset({"destination_exists"})
    return job


def _campaign(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    forks = rng.randint(2, 24)
    destinations = {"template": f"{reflink / fork_id}-{{n}}", "count": forks}
    request = {"source": str(rng.choice([sources.small, sources.reflinked])), "destinations": destinations}
    return Job(fork_id, "campaign", request, frozenset({None}), forks=forks, copies=rng.choice([1, 1, 2]))


def _cancelled_campaign(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    job = _campaign(sources, reflink, plain, fork_id, rng)
    job.kind, job.cancel_after, job.ends = "cancelled campaign", rng.uniform(0.0, 0.5), frozenset({None, "cancelled"})
    return job


def _revoked(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    make = rng.choice([_cancelled, _cancelled_campaign])
    job = make(sources, reflink, plain, fork_id, rng)
    job.cancel_by = rng.choice(["revoke", "terminate"])
    job.kind = f"{job.kind} by {job.cancel_by}"
    return job


def _expiring(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    source = rng.choice([sources.small, sources.reflinked])
    job = _fork(source, reflink, fork_id, "expiring", options={"expires": rng.uniform(0.02, 1.0)})
    job.ends = frozenset({None, "cancelled"})
    return job


def _planted(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    source, parent = rng.choice([(sources.small, reflink), (sources.copied, plain)])
    job = _fork(source, parent, fork_id, "planted")
    job.plant = plant(parent, fork_id, rng)
    job.kind, job.ends = f"planted {job.plant.kind}", frozenset({"io_error"})
    return job


#: The allowed ends of a job whose staging was damaged: what is read back may no longer describe the source.
_DAMAGED = frozenset({None, "io_error", "source_changed", "worker_lost"})


def _damaged(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    job = rng.choice([_reflinked, _copied])(sources, reflink, plain, fork_id, rng)
    job.kind, job.ends, job.may_be_damaged = f"{job.kind}, damaged", _DAMAGED, True
    return job


def _damaged_campaign(sources: Sources, reflink: Path, plain: Path, fork_id: str, rng: random.Random) -> Job:
    job = _campaign(sources, reflink, plain, fork_id, rng)
    job.kind, job.ends, job.may_be_damaged = "damaged campaign", _DAMAGED, True
    return job


#: Each kind is chosen in proportion to its number of entries here.
KINDS: tuple[Kind, ...] = (
    *(_small,) * 5,
    *(_reflinked,) * 4,
    *(_copied,) * 2,
    *(_doubled,) * 2,
    *(_campaign,) * 2,
    _cancelled_campaign,
    _cancelled,
    _unsupported,
    _missing,
    _taken,
    *(_revoked,) * 2,
    _expiring,
    *(_planted,) * 2,
    *(_damaged,) * 3,
    _damaged_campaign,
)

#: The kinds whose staging no other process writes to.
UNDAMAGED_KINDS = tuple(kind for kind in KINDS if kind not in (_planted, _damaged, _damaged_campaign))
