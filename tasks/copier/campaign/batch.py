"""One batch of a campaign: some of its forks, made in one task, each published by its own rename.

If a process dies, the next one reads its records (see `batch_record`), and publishes or removes its trees.

**The fence.** A process that makes a batch holds the campaign's lock shared, as a chunk holds its fork's, and the
batch's own lock exclusively. So no other process writes into its trees, and when it releases the lock, all of them are
published or removed.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from tasks.copier.campaign import batch_record
from tasks.copier.campaign.batch_build import build
from tasks.copier.campaign.batch_record import Outcome, Record
from tasks.copier.campaign.batch_room import reserve_room
from tasks.copier.campaign.batch_trees import Tree, Trees, snapshot_trees
from tasks.copier.campaign.plan import Campaign
from tasks.copier.campaign.spec import CampaignSpec
from tasks.copier.clone.file import Cloner
from tasks.copier.endpoints import Endpoints, destination_exists, reopen_endpoints
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.fork.chunk import MAX_TRIES, worker_lost
from tasks.copier.fork.completion import Superseded
from tasks.copier.fork_spec import Clock, ForkSpec, failed, result_of, succeeded
from tasks.copier.kernel import syscalls, trees
from tasks.copier.progress import Ticker
from tasks.copier.report import Fallback, Report
from tasks.copier.roots import Parent, Roots
from tasks.copier.space.reservation import job_of
from tasks.copier.space.room import Room
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.journal import Journal
from tasks.copier.staging.publishing import cannot_publish, noreplace_refusal
from tasks.copier.staging.staging import Staging
from tasks.copier.validation import Malformed

#: How long a batch waits for the lock of a further parent's control directory, in seconds. It is held for a short time.
_LOCK_WAIT = 5.0


class CampaignLedger(Protocol):
    """Where the outcomes of a campaign's forks are stored. Forks are identified by their index in the campaign."""

    def has_outcomes(self, first: int) -> bool:
        """Whether the outcomes of the run of forks that begins with `first` are stored."""

    def store_outcomes(self, first: int, outcomes: list[Outcome]) -> None:
        """Store the outcomes of the run of forks that begins with `first`. A second call has no effect."""


def make_batch(
    campaign: Campaign,
    roots: Roots,
    first: int,
    ticker: Ticker,
    ledger: CampaignLedger,
    abort: ForkError | None = None,
) -> None:
    """Make the forks of the batch that begins with the index `first` and have no stored outcome, and store it.

    A failed fork is an outcome. `abort` ends all forks that are not published; so does the ForkError cancelled that
    `ticker` may raise. Raises Held while another process makes one of them, Superseded if the batch was taken from this
    process, and OSError if the staging cannot be written.
    """
    for at, destinations in _runs(campaign, first):
        if not ledger.has_outcomes(at):
            _make_run(campaign, roots, at, destinations, ticker, ledger, abort)


def seize_batch(campaign: Campaign, roots: Roots, first: int) -> None:
    """Take the batch that begins with the index `first` from a holder that gives no sign of life.

    The rename of its trees decides: after it, the holder cannot publish them, and writes only into files that belong to
    no fork. Its record shows what it has published. Raises ForkError, Held, OSError.
    """
    for at, destinations in _runs(campaign, first):
        with (
            roots.open_parent(destinations[0]) as parent,
            _control(campaign, parent.fd, make=False) as staging,
        ):
            if staging is not None:
                _seize_run(staging, at)


def _seize_run(staging: Staging, first: int) -> None:
    records = list(batch_record.read_all(staging, first))
    staging.seize_chunk(first)  # before the trees: a holder that makes trees later finds that it lost the batch
    for record in records:
        for name in record.trees.values():
            _discard(staging, name)


def _discard(staging: Staging, name: str) -> None:
    """Remove a tree. It is renamed first, so that no process can publish it meanwhile."""
    away = staging.new_tree_name()
    with suppress(FileNotFoundError):
        os.rename(name, away, src_dir_fd=staging.parent_fd, dst_dir_fd=staging.parent_fd)
        staging.discard_named_tree(away, made_as=name)


def first_of_runs(campaign: Campaign, first: int) -> list[int]:
    """The index of the first fork of each run of the batch that begins with the index `first`."""
    return [at for at, _ in _runs(campaign, first)]


def _runs(campaign: Campaign, first: int) -> Iterator[tuple[int, list[str]]]:
    """The runs of forks with the same parent in a batch: the index of the first fork, and the destinations."""
    for _, group in groupby(campaign.destinations(first, campaign.plan.batch), key=os.path.dirname):
        run = list(group)
        yield first, run
        first += len(run)


def _make_run(
    campaign: Campaign,
    roots: Roots,
    first: int,
    destinations: list[str],
    ticker: Ticker,
    ledger: CampaignLedger,
    abort: ForkError | None,
) -> None:
    """Make forks that have the same parent, and store their outcomes."""
    began = time.time()
    abort = abort and abort.for_fork(campaign.home, destinations[0])
    forks = {first + n: campaign.spec.fork(first + n, path, began) for n, path in enumerate(destinations)}

    def refuse(error: ForkError) -> None:
        ledger.store_outcomes(
            first, [failed_outcome(fork, abort or error, of=destinations[0]) for fork in forks.values()]
        )

    try:
        with ExitStack() as opened:
            try:
                ends = opened.enter_context(_open_both(campaign, roots, destinations[0]))
            except ForkError as error:  # a process that died may have published some before
                abort = abort or error
                ends = opened.enter_context(_open_parent(campaign, roots, destinations[0]))
            staging = opened.enter_context(_control(campaign, ends.parent_fd, make=abort is None))
            if staging is None:
                raise abort or AssertionError("it was to be made")
            try:
                with staging.hold_chunk(first) as begun:
                    if begun is None:
                        raise Held(campaign.staging.holder_heartbeat())
                    if not ledger.has_outcomes(
                        first
                    ):  # another process may have stored them before this one got the lock
                        run = _Run(campaign, staging, ends, first, begun, forks, ticker)
                        ledger.store_outcomes(first, run.make(abort))
                    with suppress(OSError):  # unlink(2) may find btrfs full; they are removed with the staging
                        batch_record.forget(staging, first)
                        staging.forget_chunk(first)
            except OSError as error:
                if batch_record.has_any(staging, first):  # an earlier try may have published some
                    raise Held(campaign.staging.holder_heartbeat()) from error
                refuse(from_oserror(error, "working in the staging directory", destinations[0]))
    except ForkError as error:  # no fork can be made in this parent
        refuse(error)
    except OSError as error:
        refuse(from_oserror(error, "making the staging directory", destinations[0]))


def _open_both(campaign: Campaign, roots: Roots, destination: str) -> AbstractContextManager[Endpoints]:
    return reopen_endpoints(roots, campaign.spec.source, destination, campaign.plan.fork.top.ino)


@contextmanager
def _open_parent(campaign: Campaign, roots: Roots, destination: str) -> Iterator[Endpoints]:
    """As `_open_both`, without the source: enough to resume or to end forks. Raises ForkError.

    The home's parent is open already, even if its path leads elsewhere now. Without a look into it, forks would be
    reported as failed that another process is about to publish.
    """
    directory, name = os.path.split(destination)
    if directory == campaign.plan.parent:
        opened = Parent(os.dup(campaign.staging.parent_fd), name)
    else:
        opened = roots.open_parent(destination)
    with opened as parent:
        yield Endpoints(campaign.spec.source, destination, -1, parent.fd, parent.name)


@contextmanager
def _control(campaign: Campaign, parent_fd: int, *, make: bool = True) -> Iterator[Staging | None]:
    """The campaign's control directory in this parent, held shared. If there is none, it is made (`make`) or None."""
    if os.path.samestat(os.fstat(campaign.staging.parent_fd), os.fstat(parent_fd)):
        yield campaign.staging
        return
    while True:
        with Staging.attach(parent_fd, campaign.spec.campaign_id, _LOCK_WAIT) as staging:
            if staging is not None and _is_of(campaign, staging.journal()):
                yield staging
                return
        if not make:
            yield None
            return
        with Staging.claim(parent_fd, campaign.spec.campaign_id, _LOCK_WAIT) as staging:
            journal = staging.journal()
            if not _is_of(campaign, journal):
                if journal is not None:
                    staging.discard_trees()
                staging.begin(campaign.spec.to_data(), None)


def _is_of(campaign: Campaign, journal: Journal | None) -> bool:
    """Whether a control directory belongs to this campaign, and not to an earlier one with the same id."""
    with suppress(Malformed):
        return journal is not None and journal.is_campaign and CampaignSpec.from_data(journal.spec) == campaign.spec
    return False


@dataclass
class _Run:
    """Forks with the same parent, whose lock this process holds."""

    campaign: Campaign
    staging: Staging
    ends: Endpoints
    first: int
    #: Which try this is, counted from 1.
    attempt: int
    forks: dict[int, ForkSpec]
    ticker: Ticker
    #: See `Staging.chunk_lock`.
    lock: int | None = None
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def make(self, abort: ForkError | None) -> list[Outcome]:
        """Make the forks. Returns their outcomes in order. Raises Superseded, and OSError."""
        self.lock = self.staging.chunk_lock(self.first)
        if abort is None and self.attempt > MAX_TRIES:
            abort = worker_lost(self.campaign.spec.source)
        try:
            self._resume()
            if abort is None and len(self.outcomes) < len(self.forks):
                self._make_rest()
        except OSError as error:
            abort = abort or from_oserror(error, "working in the staging directory", self.ends.destination)
        if not self._is_ours():
            raise Superseded
        return [
            self.outcomes.get(index) or failed_outcome(spec, abort or _moved_or_removed(spec), of=self.ends.destination)
            for index, spec in self.forks.items()
        ]

    def _is_ours(self) -> bool:
        """Whether no other process has taken the batch from this one."""
        return self.staging.chunk_lock(self.first) == self.lock

    def _resume(self) -> None:
        """Publish the trees that earlier tries completed, and remove the others."""
        for record in batch_record.read_all(self.staging, self.first):
            for index, name in record.trees.items():
                outcome = self._outcome_of(record, index)
                if outcome is None:
                    _discard(self.staging, name)
                elif self._identity_at_destination(index) == record.identities[index]:
                    self.outcomes[index] = outcome
                else:
                    self._publish(index, name, record.identities[index], outcome)
        if self.outcomes and self.campaign.spec.options.durability == "sync":
            os.fsync(self.ends.parent_fd)

    def _outcome_of(self, record: Record, index: int) -> Outcome | None:
        """The outcome that the record gives a complete tree, if it is one of this run's forks."""
        outcome, spec = record.outcomes.get(index), self.forks.get(index)
        if outcome is None or spec is None:
            return None
        with suppress(Malformed):
            result_of(dict(outcome.result), spec)
            return outcome
        return None

    def _identity_at_destination(self, index: int) -> int | None:
        return trees.identity_of(self.ends.parent_fd, os.path.basename(self.forks[index].destination))

    def _make_rest(self) -> None:
        """Make the forks that have no outcome yet."""
        missing = {index: spec for index, spec in self.forks.items() if index not in self.outcomes}
        refusal = noreplace_refusal(self.staging.fd)
        if refusal is not None:  # in this parent only; the campaign may have others
            for index, spec in missing.items():
                self.outcomes[index] = failed_outcome(spec, cannot_publish(refusal, spec.destination))
            return
        names = {index: self.staging.new_tree_name() for index in missing}
        record = Record(names)
        batch_record.write(self.staging, self.first, self.attempt, record)
        plan, options = self.campaign.plan.fork, self.campaign.spec.options
        refused = {(src, dst): number for src, dst, number in plan.refused}
        with ExitStack() as opened:
            room = Room(self.ends.parent_fd, self.ends.destination, job_of(self.staging.fd, str(self.first)))
            opened.callback(room.leave)
            cloner = Cloner(options, refused, room.counted(self.ticker.step))
            made = Trees(self.campaign.staging, self.staging, self.ends, plan, cloner, self.ticker, opened)
            try:
                for index, name in names.items():
                    made.make(index, self.forks[index], name)
                made.note()
                if self.campaign.plan.snapshot:
                    snapshot_trees(made)
                reserve_room(made, room)
                build(made)
                self._publish_all(made, record)
            except ForkError as error:
                made.fail_all(error)
            except OSError as error:
                made.fail_all(from_oserror(error, "working in the staging directory", self.ends.destination))
        for index, failure in made.failures.items():
            self.outcomes.setdefault(index, failed_outcome(failure.spec, failure.error, failure.report))

    def _publish_all(self, made: Trees, record: Record) -> None:
        if not made.complete:
            return
        sync = self.campaign.spec.options.durability == "sync"
        if sync:
            trees.sync([tree.work.tree_fd for tree in made.complete])
        for tree in made.complete:
            record.outcomes[tree.index] = self._succeeded(tree, made.cloner.fallback)
            record.identities[tree.index] = trees.identity(tree.work.tree_fd)
        self.ticker.poll_now()
        if not self._is_ours():
            raise ForkError(Code.IO_ERROR, "another process took the batch over", self.campaign.spec.source)
        batch_record.write(self.staging, self.first, self.attempt, record, sync=sync)
        for tree in made.complete:
            self._publish(tree.index, tree.name, record.identities[tree.index], record.outcomes[tree.index])
        if sync:
            self._sync_parent(made)

    def _publish(self, index: int, tree: str, identity: int, outcome: Outcome) -> None:
        """Rename a complete tree to its destination, and keep the fork's outcome."""
        spec = self.forks[index]
        try:
            self.staging.publish_tree(tree, os.path.basename(spec.destination), identity)
        except FileNotFoundError:
            return  # the tree was removed, or taken from this process while it was paused
        except ForkError as error:
            outcome = failed_outcome(spec, ForkError(error.code, error.message, spec.destination))
        except OSError as error:
            exists = error.errno == errno.EEXIST
            with suppress(OSError):
                self.staging.discard_named_tree(tree, identity)
            cause = cannot_publish(error, spec.destination)
            outcome = failed_outcome(spec, destination_exists(spec.destination) if exists else cause)
        self.outcomes[index] = outcome

    def _sync_parent(self, made: Trees) -> None:
        """Write the renames to the disk. If that fails, they are undone."""
        parent_fd = self.ends.parent_fd
        try:
            os.fsync(parent_fd)
        except OSError:
            for tree in made.complete:
                if self.outcomes.pop(tree.index).result["error"] is None:
                    name = os.path.basename(tree.spec.destination)
                    syscalls.rename_noreplace(parent_fd, name, parent_fd, tree.name)
            raise

    def _succeeded(self, tree: Tree, fallback: Fallback | None) -> Outcome:
        totals = tree.report.totals
        totals.fallback = (self.campaign.plan.fallback or fallback) if totals.copied else None
        clock = Clock(tree.spec.started, planned=tree.spec.started, cloned=time.time())
        return Outcome(succeeded(tree.spec, totals, 1, clock, subvolume=tree.is_subvolume), tree.report.close())


def failed_outcome(spec: ForkSpec, error: ForkError, report: Report | None = None, *, of: str = "") -> Outcome:
    """The outcome of a fork that failed; `report` is what had been done of it, `of` the fork whose error it is."""
    report, error = report or Report(), error.for_fork(of, spec.destination)
    return Outcome(failed(spec, error, report.totals, 1, Clock(spec.started)), report.close())


def _moved_or_removed(spec: ForkSpec) -> ForkError:
    message = "the finished fork was moved or removed by another process before it was published"
    return ForkError(Code.IO_ERROR, message, spec.destination, errno.ENOENT)
