"""Forks that are half done in their staging, and a worker that continues or cancels them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.copier.endpoints import Endpoints, open_endpoints
from tasks.copier.errors import Code, ForkError, cancelled
from tasks.copier.fork.chunk import run_held_chunk
from tasks.copier.fork.lifecycle import finish, start
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.progress import Ticker
from tasks.copier.roots import Roots
from tasks.copier.source import manifest
from tasks.copier.source.walk import Block
from tasks.copier.staging.control_directory import control_name
from tasks.copier.staging.journal import Phase
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import open_work
from tests.support.engine.forks import CHUNKED, Ledger, never_stop, spec_of

ID = "fork-1"


def begin_fork(source: Path, destination: Path) -> tuple[Path, dict[str, Any]]:
    """Plan a fork in chunks, and make the first of them. Returns its control directory and its journal.

    The journal is without its checksum, so that changes by a test are accepted.
    """
    spec = spec_of(source, destination, ID, reflink="never")
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, ID, wait=0) as staging,
    ):
        plan = start(ends, staging, spec, CHUNKED, Ticker(never_stop), Ledger())
        assert isinstance(plan, Plan)
        assert len(plan.chunks) > 2
        _do_chunks(ends, staging, plan, 1)
    control = destination.parent / control_name(ID)
    journal = json.loads((control / "journal").read_bytes())
    del journal["check"]
    return control, journal


def continue_fork(source: Path, destination: Path, ledger: Ledger | None = None) -> str:
    """Make the rest of the fork as the tasks of a worker do. Returns "succeeded", or the error."""
    ledger = ledger or Ledger()
    spec = spec_of(source, destination, ID, reflink="never")
    try:
        with open_endpoints(Roots(), spec.source, spec.destination) as ends, _held(ends) as staging:
            journal = staging.own_journal()
            if journal is None or journal.plan is None:
                return _outcome(_delivered(ends, staging, spec))
            try:
                if journal.phase is Phase.CLONING:
                    _do_chunks(ends, staging, Plan.from_data(journal.plan), None)
            except (ForkError, OSError) as error:
                abort = error if isinstance(error, ForkError) else ForkError(Code.IO_ERROR, str(error))
                return _outcome(finish(ends, staging, Ticker(never_stop), ledger, abort)) + str(abort)
            return _outcome(finish(ends, staging, Ticker(never_stop), ledger))
    except ForkError as error:
        return str(error)


def cancel_fork(source: Path, destination: Path) -> str:
    """Cancel the fork as a worker does. Returns "succeeded", or the error."""
    try:
        with open_endpoints(Roots(), os.fspath(source), os.fspath(destination)) as ends, _held(ends) as staging:
            return _outcome(finish(ends, staging, Ticker(never_stop), Ledger(), cancelled(ends.destination)))
    except ForkError as error:
        return str(error)


def change_manifest(path: Path, fields: dict[str, Any]) -> None:
    """Replace fields of every entry of a manifest on disk."""
    with path.open("rb") as file:
        blocks = list(manifest.read(file.fileno(), manifest.whole(file.fileno())))
    with path.open("r+b") as file:
        writer = manifest.Writer(file)
        for block in blocks:
            writer.append(Block(block.path, [entry._replace(**fields) for entry in block.entries]))


@contextmanager
def _held(ends: Endpoints) -> Iterator[Staging]:
    with Staging.attach(ends.parent_fd, ID, wait=0, alone=True) as staging:
        assert staging is not None
        yield staging


def _delivered(ends: Endpoints, staging: Staging, spec: ForkSpec) -> Any:
    outcome = start(ends, staging, spec, CHUNKED, Ticker(never_stop), Ledger())
    if isinstance(outcome, Plan):
        _do_chunks(ends, staging, outcome, None)
        return finish(ends, staging, Ticker(never_stop), Ledger())
    return outcome


def _do_chunks(ends: Endpoints, staging: Staging, plan: Plan, count: int | None) -> None:
    journal = staging.own_journal()
    assert journal is not None
    options = ForkSpec.from_data(journal.spec).options
    with open_work(ends, staging, options, staging.open_tree(journal)) as work:
        for number, chunk in list(enumerate(plan.chunks))[:count]:
            run_held_chunk(work, plan, chunk, number, Ticker(never_stop))


def _outcome(result: Any) -> str:
    if result is None:
        return "nothing"
    return "succeeded" if result["error"] is None else str(result["error"])
