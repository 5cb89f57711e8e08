"""The result of a small fork may be stored after it is published, with those of others. Until then it is held."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.copier.endpoints import open_endpoints
from tasks.copier.fork.attempt import Published
from tasks.copier.fork.lifecycle import start
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.options import Limits
from tasks.copier.progress import Cancellation, Ticker
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


def _start(spec: ForkSpec, ledger: Ledger, taken: list[Published] | None, limits: Limits = INLINE) -> object:
    """Begin or resume the fork. With `taken`, its end goes there, and its process ends before it is stored."""
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, spec.fork_id, wait=0) as staging,
    ):
        take = None if taken is None else taken.append
        return start(ends, staging, spec, limits, Ticker(never_stop), ledger, take_end=take)


def _published(workdir: Path, ledger: Ledger) -> tuple[ForkSpec, Published]:
    """A fork that is published, and whose end is not stored."""
    spec, taken = spec_of(workdir / "a", workdir / "b"), list[Published]()
    _start(spec, ledger, taken)
    (published,) = taken
    return spec, published


def test_the_end_of_a_published_fork_is_given_to_its_taker(workdir: Path) -> None:
    ledger = Ledger()

    _, published = _published(workdir, ledger)

    assert (published.result["status"], ledger.stored) == ("succeeded", [])
    assert ledger.files.keys() == NAMES
    assert_alike(workdir / "a", workdir / "b")
    assert leftovers(workdir) == [control_name("fork-1")]


def test_a_fork_that_another_process_has_ended_is_not_published(workdir: Path) -> None:
    """Its process was paused since it took the request. The client has used and removed the fork meanwhile."""
    taken: list[Published] = []
    ledger = Ledger(cancellation=Cancellation.REQUESTED)

    _start(spec_of(workdir / "a", workdir / "b"), ledger, taken)

    assert (taken, ledger.result["status"]) == ([], "cancelled")
    assert not (workdir / "b").exists()
    assert leftovers(workdir) == []


def test_the_taker_removes_the_staging(workdir: Path) -> None:
    spec, taken = spec_of(workdir / "a", workdir / "b"), list[Published]()
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, spec.fork_id, wait=0) as staging,
    ):
        start(ends, staging, spec, INLINE, Ticker(never_stop), Ledger(), take_end=taken.append)

        taken[0].remove_staging()

        assert leftovers(workdir) == []


def test_the_next_process_stores_the_result_of_a_fork_whose_process_died(workdir: Path) -> None:
    ledger = Ledger()
    spec, published = _published(workdir, ledger)
    inode = (workdir / "b").stat().st_ino

    _start(spec, ledger, [])

    assert ledger.result == published.result
    assert ledger.files.keys() == NAMES
    assert (workdir / "b").stat().st_ino == inode
    assert leftovers(workdir) == []


def test_a_fork_that_cannot_be_published_is_not_given_to_the_taker(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Staging.publish

    def late(staging: Staging, *args: object, **options: bool) -> None:
        (workdir / "b").mkdir()  # another program makes the destination just before the rename
        publish(staging, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Staging, "publish", late)
    taken: list[Published] = []
    ledger = Ledger()

    _start(spec_of(workdir / "a", workdir / "b"), ledger, taken)

    assert taken == []
    assert ledger.result["error"] is not None
    assert ledger.result["error"]["code"] == "destination_exists"
    assert leftovers(workdir) == []


def test_the_end_of_a_fork_in_chunks_is_stored_by_the_ledger(workdir: Path) -> None:
    taken: list[Published] = []
    ledger = Ledger()

    outcome = _start(spec_of(workdir / "a", workdir / "b"), ledger, taken, CHUNKED)

    assert isinstance(outcome, Plan)
    assert (taken, ledger.stored) == ([], [])
