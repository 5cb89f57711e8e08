"""The end of an attempt: a complete tree is published and its result is stored, or all that was made is removed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from tasks.copier.endpoints import Endpoints, destination_exists
from tasks.copier.errors import Code, ForkError, cancelled, from_oserror
from tasks.copier.fork.attempt import Attempt
from tasks.copier.fork_spec import ForkResult, failed, result_of, succeeded
from tasks.copier.kernel import trees
from tasks.copier.progress import Cancellation
from tasks.copier.space.budget import refuse_excess
from tasks.copier.space.reservation import job_of, withdraw
from tasks.copier.staging.journal import Journal, Phase
from tasks.copier.staging.proof import NotOurs
from tasks.copier.staging.publishing import cannot_publish
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import Workspace

log = logging.getLogger(__name__)

#: How often a removal is tried: a call that failed once may succeed the next time.
_REMOVE_TRIES = 3


class Superseded(Exception):
    """Another process took the fork over, or its staging was removed: this process must not report a result.

    See `tasks.copier.staging.takeover`.
    """


@dataclass(frozen=True)
class CompleteFork:
    """A fork whose tree is complete. Its staging is held.

    `end` does all that is left. A caller with several does it in steps: it keeps the `pages` of all, then calls
    `publish` for each, stores the results of all, and calls `remove_staging` for each.
    """

    attempt: Attempt
    #: The identity of the tree. None if an earlier try has recorded it, with the result, in the journal.
    tree: int | None = None
    subvolume: bool = False

    def end(self) -> ForkResult:
        """Keep the FileResults, publish the fork, store its result, and remove the staging. Returns the result.

        A failure is a result. Raises Superseded. An exception while the result is stored is raised: the fork is
        published and must not be abandoned, and a later delivery stores its result.
        """
        cancellation = Cancellation.NOT_REQUESTED
        try:
            if not self._is_recorded():  # an earlier try, which recorded the result, has kept them
                cancellation = self.attempt.keep_pages()
        except Exception as error:
            return abandon(self.attempt, error)
        result = self.publish(cancellation)
        if result["error"] is None:
            self.attempt.ledger.store_result(result)
            self.remove_staging()
        return result

    def pages(self) -> list[bytes]:
        """The FileResults, to be kept before the fork is published."""
        return self.attempt.pages()

    def publish(self, answer: Cancellation | ForkError) -> ForkResult:
        """Publish the fork, and return its result. `answer`: the ledger's, when it was to keep the pages.

        If the fork is cancelled or cannot be published, its failure is stored and returned. Raises Superseded.
        """
        try:
            if isinstance(answer, ForkError):
                raise answer
            if answer is Cancellation.REQUESTED:
                raise cancelled(self.attempt.spec.destination)
            return self._publish()
        except Exception as error:
            return abandon(self.attempt, error)

    def remove_staging(self) -> None:
        """Remove the staging of the published fork, once its result is stored. Never raises OSError, ForkError."""
        attempt = self.attempt
        if not attempt.alone:
            _withdraw_reservation(attempt.staging)
        try_to_remove(partial(attempt.staging.remove, alone=attempt.alone))

    def _is_recorded(self) -> bool:
        journal = self.attempt.journal
        return journal is not None and journal.phase is Phase.PUBLISHING

    def _publish(self) -> ForkResult:
        attempt = self.attempt
        if self._is_recorded():
            result = result_of(cast(Journal, attempt.journal).result, attempt.spec)
        else:
            totals, clock = attempt.totals(), attempt.clock
            result = succeeded(attempt.spec, totals, attempt.chunks, clock, subvolume=self.subvolume)
            self._record(result)
        _publish_tree(attempt, cast(Journal, attempt.journal))
        return result

    def _record(self, result: ForkResult) -> None:
        """Write the result and the tree's identity into the journal."""
        attempt = self.attempt
        attempt.ticker.poll()  # a local fork is cancelled only here, and a sync may have taken long
        journal = replace(
            cast(Journal, attempt.journal),
            phase=Phase.PUBLISHING,
            tree=self.tree,
            result=cast(dict[str, Any], result),
        )
        attempt.staging.write_journal(journal, sync=attempt.spec.options.durability == "sync")
        attempt.journal = journal


def complete(attempt: Attempt, work: Workspace, *, subvolume: bool = False) -> CompleteFork:
    """The fork of this attempt, whose tree is closed. Writes it to the disk if the request asks for that.

    Raises ForkError copy_budget_exceeded, and OSError.
    """
    spec, most = attempt.spec, attempt.spec.options.max_copied_bytes
    if most is not None:
        refuse_excess(attempt.totals().bytes_copied, most, spec.destination)
    if spec.options.durability == "sync":
        trees.sync([work.tree_fd])
    return CompleteFork(attempt, trees.identity(work.tree_fd), subvolume)


def _publish_tree(attempt: Attempt, journal: Journal) -> None:
    """Publish the complete tree that the journal identifies, unless that is done."""
    ends, staging = attempt.ends, attempt.staging
    sync = attempt.spec.options.durability == "sync"
    if staging.is_published(journal, ends.name):
        if sync:
            os.fsync(ends.parent_fd)  # the process that renamed it may have died before its fsync
        return
    try:
        staging.publish(journal, ends.name, sync=sync)
    except FileExistsError:
        raise destination_exists(ends.destination) from None
    except FileNotFoundError as error:
        attempt.ends.refuse_existing()  # most likely an earlier try failed so, and died before it stored that
        message = "the finished fork was moved or removed by another process before it was published"
        raise ForkError(Code.IO_ERROR, message, ends.destination, error.errno) from None
    except OSError as error:
        raise cannot_publish(error, ends.destination) from None


def abandon(attempt: Attempt, cause: Exception) -> ForkResult:
    """Remove all that was made, and store the failure as the result. Raises Superseded."""
    staging = attempt.staging
    if not staging.is_current():
        raise Superseded from cause
    error = _as_fork_error(cause, attempt.ends)
    _withdraw_reservation(staging)
    if attempt.journal is not None:
        try_to_remove(partial(staging.discard_tree, attempt.journal))
    with suppress(ForkError):
        # Empty pages replace those of processes that died.
        attempt.keep_pages([part for part in attempt.parts() if part not in attempt.reports])
    result = failed(attempt.spec, error, attempt.totals(), attempt.chunks, attempt.clock)
    attempt.ledger.store_result(result)
    if attempt.journal is not None or not isinstance(cause, NotOurs):
        try_to_remove(staging.remove)
    return result


def try_to_remove(remove: Callable[[], None]) -> None:
    """Remove what an ended fork leaves. What cannot be removed in a few tries is removed by `gc` later."""
    for _ in range(_REMOVE_TRIES):
        with suppress(OSError, ForkError):
            remove()
            return


def _withdraw_reservation(staging: Staging) -> None:
    """Give back the bytes that the fork has reserved. A control directory that is gone (FUSE, NFS) has no name."""
    with suppress(OSError):
        withdraw(job_of(staging.fd))


def _as_fork_error(cause: Exception, ends: Endpoints) -> ForkError:
    if isinstance(cause, ForkError):
        return cause
    if isinstance(cause, OSError):
        return from_oserror(cause, "working in the staging directory", ends.destination)
    # An error in this program is a failed fork too: it must leave no files, and its client must get a result.
    log.error("unexpected error while making %r", ends.destination, exc_info=cause)
    return ForkError(Code.IO_ERROR, f"unexpected {type(cause).__name__}: {cause}", ends.destination)
