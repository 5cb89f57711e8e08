"""A small fork, which one process makes at once, keeps its manifests in memory; others write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.clone.file import Cloner
from tasks.copier.endpoints import open_endpoints
from tasks.copier.fork.plan import make_plan
from tasks.copier.options import Limits, Reflink
from tasks.copier.progress import Ticker
from tasks.copier.report import Report
from tasks.copier.roots import Roots
from tasks.copier.source.manifest import Span
from tasks.copier.source.walk import Block
from tasks.copier.space.reservation import job_of
from tasks.copier.space.room import Room
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import KeptManifests, Workspace, open_work
from tests.fixtures.filesystems import Fresh
from tests.support.engine.forks import INLINE, assert_alike, fork, never_stop, spec_of
from tests.support.guests import make_sparse_file

MIB = 1 << 20


def _small(source: Path) -> None:
    for directory in ("a", "b", "b/c"):
        (source / directory).mkdir(parents=True)
        (source / directory / "state").write_bytes(b"paused")
        (source / directory / "link").symlink_to("state")
    (source / "b/again").hardlink_to(source / "a/state")


def _many_directories(source: Path) -> None:
    _small(source)
    for number in range(2_000):
        (source / f"d{number}").mkdir()


def _large_file(source: Path) -> None:
    _small(source)
    make_sparse_file(source / "disk", 2 * MIB, 2 * MIB)


def _read(work: Workspace, dev: int, whole: Span) -> list[list[Block]]:
    return [
        list(work.blocks(dev)),
        list(work.blocks(dev, span=whole)),
        list(work.blocks(dev, span=Span(whole.offset, 1))),
        list(work.blocks(dev, closing=True)),
        list(work.blocks(dev, closing=True, backwards=True)),
    ]


def _planned(
    source: Path, limits: Limits, reflink: Reflink, kept: KeptManifests | None
) -> tuple[list[list[Block]], set[str]]:
    """What is read of the manifests of a planned fork, and the names of those that are on disk."""
    spec = spec_of(source, source.parent / "fork", reflink=reflink)
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, spec.fork_id, wait=0) as staging,
    ):
        journal = staging.begin(spec.to_data(), None)
        with open_work(ends, staging, spec.options, staging.make_tree(journal), kept) as work:
            room = Room(work.tree_fd, spec.destination, job_of(staging.fd))
            cloner = Cloner(spec.options, {}, lambda count: None)
            plan = make_plan(work, limits, cloner, Ticker(never_stop), Report(), room)
            room.leave()
            written = {name for name in ("manifest", "closing") if staging.has_file(name)}
            chunk = plan.chunks[0]
            whole = Span(chunk.offset, sum(chunk.length for chunk in plan.chunks))
            read = _read(work, plan.top.dev, whole)
        staging.discard_tree(journal)
        staging.remove()
    return read, written


@pytest.mark.parametrize(
    ("make", "limits", "reflink", "is_kept"),
    [
        (_small, INLINE, "auto", True),
        (_small, Limits(inline_files=2), "auto", False),
        (_many_directories, INLINE, "auto", False),
        (_large_file, INLINE, "never", True),
        (_large_file, Limits(inline_bytes=MIB), "auto", True),
        (_large_file, Limits(inline_bytes=MIB), "never", False),
    ],
)
def test_kept_manifests_are_read_like_those_on_disk(
    fresh: Fresh, make: Callable[[Path], None], limits: Limits, reflink: Reflink, is_kept: bool
) -> None:
    source = fresh("xfs") / "source"
    make(source)

    on_disk, names = _planned(source, limits, reflink, None)
    kept, written = _planned(source, limits, reflink, KeptManifests())

    assert kept == on_disk
    assert all(kept)
    assert names == {"manifest", "closing"}
    assert written == (set() if is_kept else names)


@pytest.mark.parametrize("make", [_small, _many_directories, _large_file])
def test_a_fork_is_whole_whether_its_manifests_are_kept_or_not(fresh: Fresh, make: Callable[[Path], None]) -> None:
    directory = fresh("ext4")
    make(directory / "source")

    assert fork(directory / "source", directory / "fork")["error"] is None

    assert_alike(directory / "source", directory / "fork")
