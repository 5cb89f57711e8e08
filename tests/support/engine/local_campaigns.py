"""Campaigns made without Celery and Redis: with child processes, or batch by batch in this process."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.copier.campaign.batch import make_batch
from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.campaign.finish import remove_annexes
from tasks.copier.campaign.local import CampaignPoll, campaign_here
from tasks.copier.campaign.plan import Campaign, find_home, open_campaign, plan_campaign
from tasks.copier.campaign.spec import (
    Aims,
    CampaignResult,
    CampaignSpec,
    campaign_result,
    failures_of,
    sums_of,
)
from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import ForkError
from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import OnError, Options
from tasks.copier.progress import Poll, Ticker
from tasks.copier.report import FileResult, unpack_pages
from tasks.copier.roots import Roots
from tasks.copier.staging.staging import Staging
from tests.support.engine.forks import leftovers, never_stop
from tests.support.guests import MIB, GuestSizes

ID = "fan"
SIZES = GuestSizes(overlay=8 * MIB, overlay_data=MIB, memory=4 * MIB, memory_data=MIB, config=64 << 10)
_COUNTED = ("succeeded", "failed", "cancelled")


def spec_of(
    source: Path,
    count: int,
    *,
    campaign_id: str = ID,
    max_parallel: int | None = None,
    on_error: OnError = "continue",
    deadline: float | None = None,
    **options: Any,
) -> CampaignSpec:
    """`deadline` is in seconds since the epoch; `options` are the fields of Options."""
    aims = Aims(count=count, max_parallel=max_parallel, on_error=on_error, deadline=deadline)
    return CampaignSpec(campaign_id=campaign_id, source=os.fspath(source), options=Options(**options), aims=aims)


def destinations(parent: Path, count: int) -> list[Path]:
    """Destinations in one directory."""
    return [parent / f"vm-{n:03}" for n in range(count)]


def campaign(
    source: Path,
    paths: Iterable[Path],
    *,
    roots: Iterable[Path] = (),
    processes: int = 2,
    poll: CampaignPoll = lambda progress: None,
    **arguments: Any,
) -> CampaignResult:
    """One local campaign, whatever its result. `arguments` as for `spec_of`."""
    names = [os.fspath(path) for path in paths]
    spec = spec_of(source, len(names), **arguments)
    return campaign_here(spec, names, Roots(tuple(map(os.fspath, roots))), processes, poll)


def counts(result: CampaignResult) -> tuple[int, int, int]:
    """The numbers of forks that succeeded, failed and were cancelled; their sum is the total."""
    succeeded, failed, cancelled = (result["forks"][name] for name in _COUNTED)
    assert result["forks"]["total"] == succeeded + failed + cancelled
    return succeeded, failed, cancelled


def codes(result: CampaignResult) -> dict[str, str]:
    """The error codes of the failures by destination."""
    return {os.path.basename(failure["destination"]): failure["error"]["code"] for failure in result["failures"]}


@dataclass(frozen=True)
class Ledger:
    """Stores the outcomes of a campaign's forks in files, so that they outlive the process that stored them."""

    directory: Path

    def has_outcomes(self, first: int) -> bool:
        return (self.directory / str(first)).exists()

    def store_outcomes(self, first: int, outcomes: list[Outcome]) -> None:
        new = self.directory / f"{first}.{os.getpid()}.new"
        new.write_bytes(pickle.dumps(outcomes))
        if not self.has_outcomes(first):
            new.rename(self.directory / str(first))

    @property
    def outcomes(self) -> list[Outcome]:
        """In the order of the forks."""
        runs = sorted(int(name) for name in os.listdir(self.directory) if name.isdigit())
        return [outcome for first in runs for outcome in pickle.loads((self.directory / str(first)).read_bytes())]

    @property
    def forks(self) -> list[ForkResult]:
        return [outcome.result for outcome in self.outcomes]

    def files(self, n: int) -> list[FileResult]:
        """The FileResults of the fork at the index `n`."""
        return list(unpack_pages(self.outcomes[n].pages))

    def result(self, campaign: Campaign) -> CampaignResult:
        return campaign_result(campaign.spec, sums_of(self.forks), failures_of(self.forks))


def plan(source: Path, paths: Iterable[Path], **arguments: Any) -> None:
    """Plan a campaign and return. Raises ForkError."""
    names = [os.fspath(path) for path in paths]
    spec = spec_of(source, len(names), **arguments)
    with (
        open_endpoints(Roots(), spec.source, find_home(Roots(), names)) as ends,
        Staging.claim(ends.parent_fd, spec.campaign_id, wait=0) as staging,
    ):
        plan_campaign(ends, staging, spec, names, Ticker(never_stop))


@contextmanager
def holding(home: Path, campaign_id: str = ID) -> Iterator[Campaign]:
    """Open a planned campaign with a shared lock."""
    with open_campaign(Roots(), os.fspath(home), campaign_id, 5.0) as found:
        assert found is not None, "no planned campaign here"
        yield found


def firsts(campaign: Campaign) -> range:
    """The first fork of each batch."""
    return range(0, campaign.spec.aims.count, campaign.plan.batch)


def make_batches(
    home: Path,
    ledger: Ledger,
    *,
    only: Iterable[int] | None = None,
    poll: Poll = never_stop,
    abort: ForkError | None = None,
) -> None:
    """Make all batches of a planned campaign, or `only` these. A batch whose outcomes are stored is not made again."""
    with holding(home) as found:
        for first in firsts(found) if only is None else only:
            make_batch(found, Roots(), first, Ticker(poll), ledger, abort)


def end(home: Path, ledger: Ledger) -> CampaignResult:
    """Remove the staging of a campaign whose forks have all ended."""
    with holding(home) as found:
        result = ledger.result(found)
        remove_annexes(found, Roots())
        found.staging.remove()
    return result


def campaign_with_ledger(
    source: Path, paths: list[Path], directory: Path, *, poll: Poll = never_stop, **arguments: Any
) -> tuple[CampaignResult, Ledger]:
    """One campaign in this process, batch after batch; its outcomes are stored in `directory`."""
    directory.mkdir()
    ledger = Ledger(directory)
    plan(source, paths, **arguments)
    make_batches(paths[0], ledger, poll=poll)
    result = end(paths[0], ledger)
    for parent in {path.parent for path in paths}:
        assert leftovers(parent) == []
    return result, ledger


def main(argv: Sequence[str] = sys.argv) -> None:
    """Entry point of a traced process: the source, a directory for the ledger, the durability, the destinations."""
    source, ledger, durability, *paths = argv[1:]
    result, _ = campaign_with_ledger(Path(source), [Path(path) for path in paths], Path(ledger), durability=durability)
    assert result["status"] == "succeeded", result
