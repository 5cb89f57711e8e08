"""The pages that a copy leaves in the page cache, and how many of them are dirty."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tasks.copier.clone.write_behind import WriteBehind
from tasks.copier.copy_rate import CopyRate
from tasks.copier.fork.local import fork_here
from tasks.copier.roots import Roots
from tests.fixtures.filesystems import Fresh, Kind
from tests.fixtures.processes import wait_until
from tests.support.cached_pages import cached_pages, evict
from tests.support.engine.forks import CHUNKED, INLINE, MIB, assert_alike, forked, never_stop, spec_of
from tests.support.engine.traced_processes import TracedChild
from tests.support.guests import make_sparse_file
from tests.support.requirements import require_command

#: Kinds with a page cache in front of a disk.
ON_DISK: tuple[Kind, ...] = ("xfs", "btrfs", "ext4")
_SIZE = 32 * MIB
_PAGES = _SIZE // mmap.PAGESIZE
#: Pages that may be left: of the last writes, or of a part of a large folio.
_FEW = _PAGES // 20


@pytest.fixture(params=ON_DISK)
def workdir(request: pytest.FixtureRequest, fresh: Fresh) -> Path:
    return fresh(request.param)


def make_source(workdir: Path) -> Path:
    """A source with one dense file whose pages are not cached."""
    source = workdir / "source"
    source.mkdir()
    make_sparse_file(source / "disk.raw", _SIZE, _SIZE)
    evict(source / "disk.raw")
    assert cached_pages(source / "disk.raw").cached <= _FEW
    return source


def test_a_copy_with_cache_drop_leaves_no_pages(workdir: Path) -> None:
    source = make_source(workdir)

    forked(source, workdir / "fork", reflink="never", cache="drop")

    wait_until(lambda: cached_pages(workdir / "fork" / "disk.raw").cached <= _FEW, "the end of the write-out")
    assert cached_pages(source / "disk.raw").cached <= _FEW
    assert_alike(source, workdir / "fork")


def test_pages_of_the_source_that_were_cached_before_are_kept(workdir: Path) -> None:
    source = make_source(workdir)
    read = 8 * MIB
    with (source / "disk.raw").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no more than this
        file.read(read)
    before = cached_pages(source / "disk.raw", 0, read).cached

    forked(source, workdir / "fork", reflink="never", cache="drop")

    assert before > _FEW
    assert cached_pages(source / "disk.raw", 0, read).cached >= before - _FEW
    assert cached_pages(source / "disk.raw", 2 * read).cached <= _FEW


def test_a_copy_with_defaults_stays_in_the_cache(workdir: Path) -> None:
    source = make_source(workdir)

    forked(source, workdir / "fork", reflink="never")

    assert cached_pages(workdir / "fork" / "disk.raw").cached >= _PAGES - _FEW


def test_writeback_is_started_behind_a_copy_while_the_host_has_many_dirty_pages(workdir: Path) -> None:
    with (workdir / "file").open("wb", buffering=0) as file:
        behind = WriteBehind(file.fileno(), 0, drops=False, most_dirty=0)
        try:
            for at in range(0, _SIZE, MIB):
                file.write(os.urandom(MIB))
                behind.wrote(MIB, at + MIB)
            wait_until(lambda: cached_pages(workdir / "file").dirty <= _FEW, "the begin of the write-out", timeout=8.0)
        finally:
            behind.stop()


def test_a_copy_slowed_down_by_a_copy_rate_is_written_at_once(workdir: Path) -> None:
    source, spec = make_source(workdir), spec_of(workdir / "source", workdir / "fork", "fork-1", reflink="never")
    pace = CopyRate(str(workdir / "runtime"), _SIZE)

    result = fork_here(spec, Roots(()), INLINE, 1, never_stop, pace)

    assert result["status"] == "succeeded", result["error"]
    pages = cached_pages(workdir / "fork" / "disk.raw")
    assert pages.dirty <= 4 * MIB // mmap.PAGESIZE
    assert pages.cached >= _PAGES - _FEW
    assert_alike(source, workdir / "fork")


def test_a_copy_slowed_down_by_a_copy_rate_is_made_in_small_steps(fresh: Fresh, tmp_path: Path) -> None:
    """A neighbour's fsync waits behind each of them."""
    strace, workdir = require_command("strace", "the sizes of the calls"), fresh("xfs_noreflink")
    source = make_source(workdir)
    make_sparse_file(source / "memory", 4 * MIB, 4 * MIB)
    spec = spec_of(source, workdir / "fork", "fork-1")
    pace = CopyRate(str(workdir / "runtime"), _SIZE)

    traced = TracedChild(
        strace,
        tmp_path / "trace",
        lambda: fork_here(spec, Roots(()), INLINE, 1, never_stop, pace),
        calls="copy_file_range",
    )
    traced.begin()
    assert traced.result()["status"] == "succeeded"

    copied = [int(line.rpartition("= ")[2]) for line in traced.trace() if "copy_file_range(" in line]
    assert sum(copied) == _SIZE + 4 * MIB
    assert max(copied[1:]) <= MIB  # before the first, it is not known


@pytest.mark.parametrize("kind", ["tmpfs", "overlayfs", "xfs_noreflink"])
@pytest.mark.parametrize("limits", [INLINE, CHUNKED], ids=["inline", "chunked"])
def test_cache_drop_makes_the_same_fork_everywhere(fresh: Fresh, kind: Kind, limits: object) -> None:
    workdir = fresh(kind)
    source = workdir / "source"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 24 * MIB + 5, 17 * MIB)
    (source / "state").write_bytes(b"paused")

    forked(source, workdir / "fork", reflink="never", cache="drop", limits=limits)

    assert_alike(source, workdir / "fork")
