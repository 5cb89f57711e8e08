"""A small fork is complete before it is published, so that a process can end several together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.completion import CompleteFork
from tasks.copier.fork.lifecycle import begin, start
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import Limits
from tasks.copier.progress import Cancellation, Ticker
from tasks.copier.report import unpack_pages
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import control_name
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh
from tests.support.engine.forks import CHUNKED, INLINE, Ledger, assert_alike, leftovers, never_stop, spec_of

NAMES = {"disk", "state"}


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    workdir = fresh("xfs")
    (workdir / "a").mkdir()
    for name in NAMES:
        (workdir / "a" / name).write_bytes(bytes(5000))
    return workdir


@contextmanager
def _begun(workdir: Path, ledger: Ledger, limits: Limits = INLINE) -> Iterator[object]:
    """What `begin` returns for a fork of `a`, while its staging is held."""
    spec = spec_of(workdir / "a", workdir / "b")
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, spec.fork_id, wait=0) as staging,
    ):
        yield begin(ends, staging, spec, limits, Ticker(never_stop), ledger)


@contextmanager
def _complete(workdir: Path, ledger: Ledger) -> Iterator[CompleteFork]:
    with _begun(workdir, ledger) as fork:
        assert isinstance(fork, CompleteFork)
        yield fork


def _deliver_again(workdir: Path, ledger: Ledger) -> None:
    spec = spec_of(workdir / "a", workdir / "b")
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, spec.fork_id, wait=0) as staging,
    ):
        start(ends, staging, spec, INLINE, Ticker(never_stop), ledger)


def test_a_complete_fork_has_all_its_file_results_and_nothing_at_its_destination(workdir: Path) -> None:
    ledger = Ledger()

    with _complete(workdir, ledger) as fork:
        assert {result["path"] for result in unpack_pages(fork.pages())} == NAMES

    assert (ledger.stored, ledger.pages) == ([], {})
    assert not (workdir / "b").exists()


def test_it_is_ended_in_steps(workdir: Path) -> None:
    ledger = Ledger()

    with _complete(workdir, ledger) as fork:
        result = fork.publish(Cancellation.NOT_REQUESTED)
        assert leftovers(workdir) == [control_name("fork-1")]
        fork.remove_staging()

    assert (result["status"], ledger.stored) == ("succeeded", [])
    assert_alike(workdir / "a", workdir / "b")
    assert leftovers(workdir) == []


def test_its_end_does_all_steps(workdir: Path) -> None:
    ledger = Ledger()

    with _complete(workdir, ledger) as fork:
        result = fork.end()

    assert ledger.result == result
    assert ledger.files.keys() == NAMES
    assert_alike(workdir / "a", workdir / "b")
    assert leftovers(workdir) == []


def test_a_fork_that_was_cancelled_or_has_ended_in_another_process_is_not_published(workdir: Path) -> None:
    """Its process was paused since it took the request. The client has used and removed the fork meanwhile."""
    ledger = Ledger()

    with _complete(workdir, ledger) as fork:
        result = fork.publish(Cancellation.REQUESTED)

    assert ledger.result == result
    assert result["status"] == "cancelled"
    assert not (workdir / "b").exists()
    assert leftovers(workdir) == []


def test_a_fork_whose_file_results_are_refused_fails(workdir: Path) -> None:
    ledger = Ledger()

    with _complete(workdir, ledger) as fork:
        fork.publish(ForkError(Code.NO_SPACE, "Redis refused the results of the files", ""))

    assert ledger.result["error"] is not None
    assert ledger.result["error"]["code"] == "no_space"
    assert not (workdir / "b").exists()
    assert leftovers(workdir) == []


@pytest.mark.parametrize("published", [False, True])
def test_the_next_delivery_ends_a_fork_whose_process_died(workdir: Path, published: bool) -> None:
    # Given
    ledger, inode = Ledger(), None
    with _complete(workdir, ledger) as fork:
        if published:
            ledger.keep_all_pages(fork.pages())
            fork.publish(Cancellation.NOT_REQUESTED)
            inode = (workdir / "b").stat().st_ino

    # When
    _deliver_again(workdir, ledger)

    # Then
    assert ledger.result["status"] == "succeeded"
    assert ledger.files.keys() == NAMES
    assert_alike(workdir / "a", workdir / "b")
    assert inode in (None, (workdir / "b").stat().st_ino)
    assert leftovers(workdir) == []


def test_a_fork_that_cannot_be_published_fails(workdir: Path) -> None:
    ledger = Ledger()

    with _complete(workdir, ledger) as fork:
        (workdir / "b").mkdir()  # another program makes the destination just before the rename
        fork.publish(Cancellation.NOT_REQUESTED)

    assert ledger.result["error"] is not None
    assert ledger.result["error"]["code"] == "destination_exists"
    assert leftovers(workdir) == []


def test_the_next_delivery_repeats_the_failure_of_a_process_that_died_before_it_stored_it(workdir: Path) -> None:
    class Lost(Ledger):
        def store_result(self, result: ForkResult) -> None:
            raise ConnectionError

    # Given
    with _complete(workdir, Lost()) as fork:
        (workdir / "b").mkdir()
        with pytest.raises(ConnectionError):
            fork.publish(Cancellation.NOT_REQUESTED)

    # When
    ledger = Ledger()
    _deliver_again(workdir, ledger)

    # Then
    assert ledger.result["error"] is not None
    assert ledger.result["error"]["code"] == "destination_exists"
    assert os.listdir(workdir / "b") == []
    assert leftovers(workdir) == []


def test_a_fork_in_chunks_is_not_complete_but_planned(workdir: Path) -> None:
    ledger = Ledger()

    with _begun(workdir, ledger, CHUNKED) as outcome:
        assert isinstance(outcome, Plan)

    assert ledger.stored == []
