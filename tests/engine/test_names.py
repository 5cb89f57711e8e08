"""Two names that are one on the destination's filesystem: the fork fails and names both, no entry replaces another."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import ErrorRecord
from tasks.copier.fork.chunk import run_held_chunk
from tasks.copier.fork.lifecycle import finish, start
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import Limits
from tasks.copier.progress import Ticker
from tasks.copier.roots import Roots
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import Workspace, open_work
from tests.fixtures.filesystems import Fresh
from tests.fixtures.fuse import Passthrough
from tests.support.engine.forks import (
    CHUNKED,
    MIB,
    Ledger,
    assert_alike,
    forked,
    leftovers,
    never_stop,
    refused,
    spec_of,
)
from tests.support.engine.local_campaigns import campaign, counts, destinations
from tests.support.guests import make_sparse_file

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def file(path: Path) -> None:
    path.write_text(path.name)


def large_file(path: Path) -> None:
    """A file that `CHUNKED` copies in ranges."""
    make_sparse_file(path, 4 * MIB, 3 * MIB, seed=len(path.name))


def directory(path: Path) -> None:
    path.mkdir()
    file(path / f"in {path.name}")


def symlink(path: Path) -> None:
    path.symlink_to(path.name)


def hard_link(path: Path) -> None:
    first = path.with_name("first")
    if not first.exists():
        file(first)
    path.hardlink_to(first)


Make = Callable[[Path], None]
KINDS: dict[str, Make] = {kind.__name__: kind for kind in (file, large_file, directory, symlink, hard_link)}
PAIRS = [(a, b) for n, a in enumerate(KINDS) for b in list(KINDS)[n:]]


@pytest.fixture
def folding(passthrough: Passthrough, fresh: Fresh) -> Path:
    """A directory on a filesystem that ignores case."""
    return passthrough(fresh("xfs"), "fold")


@pytest.fixture
def decomposing(passthrough: Passthrough, fresh: Fresh) -> Path:
    """A directory on a filesystem that stores names decomposed."""
    return passthrough(fresh("xfs"), "decompose")


@pytest.fixture
def source(fresh: Fresh) -> Path:
    source = fresh("ext4") / "source"
    source.mkdir()
    return source


def assert_names_both(error: ErrorRecord, *names: str) -> None:
    assert (error["code"], error["errno"]) == ("io_error", errno.EEXIST)
    assert "are the same name on the destination's filesystem" in error["message"]
    for name in names:
        assert repr(name) in error["message"]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_entries_of_any_kind_with_colliding_names_fail_the_fork(
    folding: Path, source: Path, limits: Limits, first: str, second: str
) -> None:
    (source / "below").mkdir()
    KINDS[first](source / "below" / "Disk.raw")
    KINDS[second](source / "below" / "disk.raw")

    error = refused(source, folding / "fork", limits=limits, verify="content")

    assert_names_both(error, "Disk.raw", "disk.raw")
    assert error["path"].lower() == str(folding / "fork" / "below" / "disk.raw").lower()
    assert list(folding.iterdir()) == []


@pytest.mark.parametrize("skip", ["Disk.raw", "disk.raw"])
def test_a_collision_with_a_skipped_entry_does_not_fail_the_fork(
    folding: Path, source: Path, limits: Limits, skip: str
) -> None:
    file(source / "Disk.raw")
    file(source / "disk.raw")

    forked(source, folding / "fork", limits=limits, skip=(skip,))

    (kept,) = {"Disk.raw", "disk.raw"} - {skip}
    assert [(path.name, path.read_text()) for path in (folding / "fork").iterdir()] == [(kept, kept)]


def test_two_forms_of_one_character_collide_too(decomposing: Path, source: Path, limits: Limits) -> None:
    file(source / COMPOSED)
    file(source / DECOMPOSED)

    assert_names_both(refused(source, decomposing / "fork", limits=limits), COMPOSED, DECOMPOSED)


def test_a_large_source_that_is_cloned_while_it_is_walked_fails_too(folding: Path, source: Path) -> None:
    for number in range(3000):
        (source / f"file-{number}").touch()
    file(source / "file-7X")
    file(source / "file-7x")

    limits = Limits(inline_files=10, chunk_files=100)

    assert_names_both(refused(source, folding / "fork", limits=limits), "file-7X", "file-7x")


@pytest.mark.parametrize(("first", "second"), [("file", "file"), ("directory", "directory"), ("hard_link", "file")])
def test_a_campaign_with_colliding_names_fails_every_fork(
    folding: Path, source: Path, tmp_path: Path, first: str, second: str
) -> None:
    KINDS[first](source / "Disk.raw")
    KINDS[second](source / "disk.raw")
    good = tmp_path / "good"
    good.mkdir()

    result = campaign(source, [*destinations(good, 1), *destinations(folding, 2)])

    assert counts(result) == (1, 2, 0)
    for failure in result["failures"]:
        assert_names_both(failure["error"], "Disk.raw", "disk.raw")
    assert_alike(source, good / "vm-000")
    assert list(folding.iterdir()) == []


# -- after a crash


def fork_with_crashes(
    source: Path,
    destination: Path,
    *,
    in_chunks: Callable[[Workspace, Plan], object] = lambda work, plan: None,
    in_closing: Callable[[Workspace, Plan], object] | None = None,
) -> ForkResult:
    """A fork whose chunks were all started earlier by a process that was killed; `in_chunks` creates what it had made.

    `in_closing` does so for a process that was killed while it closed the fork.
    """
    spec, ledger, ticker = spec_of(source, destination), Ledger(), Ticker(never_stop)
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, spec.fork_id, wait=0) as staging,
    ):
        plan = start(ends, staging, spec, CHUNKED, ticker, ledger)
        assert isinstance(plan, Plan)
        journal = staging.journal()
        assert journal is not None
        with open_work(ends, staging, spec.options, staging.open_tree(journal)) as work:
            in_chunks(work, plan)
            for number, chunk in enumerate(plan.chunks):
                with staging.hold_chunk(number):
                    pass
                assert run_held_chunk(work, plan, chunk, number, ticker) is not None
            if in_closing is not None:
                in_closing(work, plan)
                staging.write_journal(replace(journal, closings=1))
        result = finish(ends, staging, ticker, ledger)
    assert result is not None
    assert leftovers(destination.parent) == []
    return result


def made_in_tree(*names: str) -> Callable[[Workspace, Plan], None]:
    """The entries that a process leaves if it is killed while it makes these files."""

    def make(work: Workspace, plan: Plan) -> None:
        for name in names:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=work.tree_fd))

    return make


def linked_in_tree(*names: str) -> Callable[[Workspace, Plan], None]:
    def make(work: Workspace, plan: Plan) -> None:
        for name in names:
            os.link("first", name, src_dir_fd=work.tree_fd, dst_dir_fd=work.tree_fd)

    return make


@pytest.mark.parametrize("left", [(), ("Disk.raw",), ("disk.raw",)])
@pytest.mark.parametrize(
    ("first", "second"),
    [("file", "file"), ("file", "symlink"), ("file", "directory"), ("symlink", "directory"), ("file", "large_file")],
)
def test_colliding_names_are_found_in_a_second_attempt_too(
    folding: Path, source: Path, first: str, second: str, left: tuple[str, ...]
) -> None:
    KINDS[first](source / "Disk.raw")
    KINDS[second](source / "disk.raw")
    if second in ("directory", "large_file"):
        left = ()  # made by the planner

    result = fork_with_crashes(source, folding / "fork", in_chunks=made_in_tree(*left))

    assert result["error"] is not None
    assert_names_both(result["error"], "Disk.raw", "disk.raw")
    assert list(folding.iterdir()) == []


def test_colliding_names_are_found_in_different_chunks_of_a_second_attempt(folding: Path, source: Path) -> None:
    for number in range(8):  # three files per chunk
        file(source / f"file-{number}")
    names = ["Disk-1", "disk-1", "Disk-2", "disk-2"]
    for name in names:
        file(source / name)

    result = fork_with_crashes(source, folding / "fork")

    assert result["error"] is not None
    assert_names_both(result["error"])
    assert list(folding.iterdir()) == []


@pytest.mark.parametrize("left", [(), ("Link",), ("link",)])
@pytest.mark.parametrize("other", ["first", "file", "hard_link"])
def test_colliding_hard_links_are_found_in_a_second_closing(
    folding: Path, source: Path, other: str, left: tuple[str, ...]
) -> None:
    if other == "first":
        (source / "other").hardlink_to(_touched(source / "first"))
        (source / "First").hardlink_to(source / "first")
        names, left = ("first", "First"), ()
    else:
        hard_link(source / "Link")
        KINDS[other](source / "link")
        names = ("Link", "link")
        left = left if other == "hard_link" else ()

    result = fork_with_crashes(source, folding / "fork", in_closing=_links_unless_walked_first(left))

    assert result["error"] is not None
    assert_names_both(result["error"], *names)


def _touched(path: Path) -> Path:
    file(path)
    return path


def _links_unless_walked_first(names: tuple[str, ...]) -> Callable[[Workspace, Plan], None]:
    """The walk's first name of a file is the file; the others are links to it."""

    def make(work: Workspace, plan: Plan) -> None:
        made = os.listdir(work.tree_fd)
        if "first" in made:
            linked_in_tree(*names)(work, plan)

    return make


@pytest.mark.parametrize("kind", ["folding", "decomposing"])
def test_entries_of_an_earlier_attempt_are_replaced(kind: str, request: pytest.FixtureRequest, source: Path) -> None:
    directory: Path = request.getfixturevalue(kind)
    names = [COMPOSED, "Disk.raw", "state", "link"]
    for name in names[:3]:
        file(source / name)
    symlink(source / "link")
    (source / "first").write_text("first")
    hard_link(source / "hard")
    hard_link(source / "hard2")

    result = fork_with_crashes(
        source,
        directory / "fork",
        in_chunks=made_in_tree(*names),
        in_closing=_links_unless_walked_first(("hard", "hard2")),
    )

    assert result["status"] == "succeeded", result["error"]
    assert {path.name: path.read_text() for path in (directory / "fork").iterdir() if not path.is_symlink()} == {
        path.name if kind == "folding" else path.name.replace("\u00e9", "e\u0301"): path.read_text()
        for path in source.iterdir()
        if not path.is_symlink()
    }
    assert (directory / "fork" / "link").readlink() == Path("link")
    assert (directory / "fork" / "hard").stat().st_nlink == 3


def test_a_first_attempt_replaces_nothing_on_any_filesystem(fresh: Fresh) -> None:
    workdir = fresh("xfs")
    source = workdir / "source"
    source.mkdir()
    file(source / "state")
    spec, ledger, ticker = spec_of(source, workdir / "fork", reflink="never"), Ledger(), Ticker(never_stop)
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, spec.fork_id, wait=0) as staging,
    ):
        plan = start(ends, staging, spec, CHUNKED, ticker, ledger)
        assert isinstance(plan, Plan)
        journal = staging.journal()
        assert journal is not None
        with open_work(ends, staging, spec.options, staging.open_tree(journal)) as work:
            made_in_tree("state")(work, plan)

            report = run_held_chunk(work, plan, plan.chunks[0], 0, ticker)

            assert report is not None
            error = report.totals.error
            assert error is not None
            assert (error["code"], error["errno"], error["path"]) == (
                "io_error",
                errno.EEXIST,
                str(workdir / "fork/state"),
            )
            assert "'state' exists already" in error["message"]
            assert os.stat("state", dir_fd=work.tree_fd).st_size == 0
        assert finish(ends, staging, ticker, ledger) is not None
