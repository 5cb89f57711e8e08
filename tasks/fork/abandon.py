"""`forkvm.abandon`: the end of a fork of which a message kills whoever takes it."""

from __future__ import annotations

from dataclasses import replace

from tasks.context import LOCK_WAIT, Context, ForkLedger, RetryLater
from tasks.copier.endpoints import Endpoints
from tasks.copier.errors import ForkError
from tasks.copier.fork.chunk import worker_lost
from tasks.copier.fork.lifecycle import Superseded, finish
from tasks.copier.fork_spec import ForkResult, ForkSpec
from tasks.copier.progress import Ticker
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.journal import Phase
from tasks.copier.staging.staging import Staging
from tasks.fork.finish import is_asked_for, known_result, refuse
from tasks.fork.takeover import store_published


def run_abandon(context: Context, fork_id: str, destination: str) -> ForkResult | None:
    """Give a fork up without trying anything of it again, unless it is published: its result.

    Raises Again while another process works on it.
    """
    known = known_result(context, fork_id)
    if known is not None:
        return known
    unknown = ForkSpec(fork_id=fork_id, source="", destination=destination)
    try:
        with (
            context.roots.open_parent(destination) as parent,
            Staging.attach(parent.fd, fork_id, LOCK_WAIT, alone=True) as staging,
        ):
            if staging is None:
                return context.results.final.fork(fork_id) or refuse(context, unknown, worker_lost(destination))
            if not is_asked_for(context, staging.own_journal(), fork_id, destination):
                return refuse(context, unknown, worker_lost(destination))
            if store_published(context, fork_id, destination):
                return context.results.final.fork(fork_id)
            ends = Endpoints("", destination, -1, parent.fd, parent.name)
            return _give_up(context, staging, ends, fork_id) or refuse(context, unknown, worker_lost(destination))
    except Held as held:
        raise RetryLater(held.heartbeat) from None
    except Superseded:
        return None
    except (ForkError, OSError):  # what is there is not ours, or cannot be read
        return refuse(context, unknown, worker_lost(destination))


def _give_up(context: Context, staging: Staging, ends: Endpoints, fork_id: str) -> ForkResult | None:
    journal = staging.journal()
    if journal is not None and journal.phase is Phase.PUBLISHING:
        staging.write_journal(replace(journal, phase=Phase.CLONING))  # it is not to be published any more
    source = ForkSpec.from_data(journal.spec).source if journal is not None else ""
    ledger = ForkLedger(context.results, fork_id)
    return finish(ends, staging, Ticker(lambda progress: None), ledger, worker_lost(source))
