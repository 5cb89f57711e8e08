"""`max_copied_bytes`: a fork never copies more, and fails before the first byte if the plan exceeds the limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.copier.errors import ErrorRecord
from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import Limits, Options
from tasks.copier.space.budget import chunk_budget
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh, OverlayOver
from tests.support.engine.forks import MIB, fork, forked, leftovers
from tests.support.engine.local_campaigns import SIZES, campaign, codes, counts
from tests.support.extents import data_extents, set_nocow
from tests.support.guests import make_guest, make_sparse_file


def _data(source: Path) -> int:
    """The bytes of data that a fork with default options copies of a guest directory."""
    files = [path for path in source.rglob("*") if path.is_file() and path.parent.name != "logs"]
    return sum(end - start for path in files if path.suffix != ".tmp" for start, end in data_extents(path))


def _refused(source: Path, destination: Path, most: int, **arguments: object) -> tuple[ErrorRecord, ForkResult]:
    """Make a fork that must exceed its budget and leave nothing."""
    result = fork(source, destination, max_copied_bytes=most, **arguments)  # type: ignore[arg-type]
    assert result["error"] is not None
    assert result["error"]["code"] == "copy_budget_exceeded"
    assert not destination.exists()
    assert leftovers(destination.parent) == []
    return result["error"], result


def test_a_fork_may_copy_exactly_its_budget(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("ext4")
    source = make_guest(directory / "source")
    data = _data(source)

    exact = forked(source, directory / "exact", limits=limits, max_copied_bytes=data)
    error, result = _refused(source, directory / "less", data - 1, limits=limits)

    assert exact["bytes"]["copied"] == data
    assert (error["errno"], result["bytes"]["copied"]) == (95, 0)
    assert result["fallback"] is not None
    assert str(data - 1) in error["message"]
    assert "EOPNOTSUPP" in error["message"]


def test_a_budget_of_0_allows_reflinks_only(reflink_fs: Path, limits: Limits) -> None:
    source = make_guest(reflink_fs / "source")

    result = forked(source, reflink_fs / "fork", limits=limits, max_copied_bytes=0)
    _refused(source, reflink_fs / "never", 0, limits=limits, reflink="never")

    assert result["bytes"]["copied"] == 0


def test_an_empty_file_and_a_hole_cost_nothing(fresh: Fresh) -> None:
    directory = fresh("tmpfs")
    (directory / "source").mkdir()
    (directory / "source/empty").touch()
    (directory / "source/hole").touch()
    os.truncate(directory / "source/hole", MIB)

    forked(directory / "source", directory / "fork", max_copied_bytes=0)


def test_another_filesystem_is_detected_before_anything_is_copied(fresh: Fresh, limits: Limits) -> None:
    source = make_guest(fresh("xfs") / "source")

    error, _ = _refused(source, fresh("btrfs") / "fork", 0, limits=limits)

    assert error["errno"] == 18
    assert "EXDEV" in error["message"]


def test_one_nocow_file_among_many_is_detected_before_anything_is_copied(fresh: Fresh, limits: Limits) -> None:
    # Given a small file that the reflink probe does not try
    directory = fresh("btrfs")
    source = make_guest(directory / "source")
    for n in range(10):
        (source / f"large-{n}").write_bytes(os.urandom(64 << 10))
    (source / "nocow").touch()
    set_nocow(source / "nocow")
    (source / "nocow").write_bytes(b"x" * 5000)

    # When
    error, result = _refused(source, directory / "fork", 4999, limits=limits)
    allowed = forked(source, directory / "allowed", limits=limits, max_copied_bytes=8192)

    # Then
    assert error["path"] == str(source / "nocow")
    assert result["bytes"]["copied"] == 0
    assert (allowed["files"]["copied"], allowed["bytes"]["copied"]) == (1, 5000)


def test_an_unexpected_reflink_refusal_ends_the_fork_at_its_budget(
    fresh: Fresh, overlay_over: OverlayOver, limits: Limits
) -> None:
    # Given files on one device. Some cannot be reflinked, and only FICLONE shows that
    lower = fresh("ext4")
    (lower / "source").mkdir()
    for n in range(4):
        make_sparse_file(lower / "source" / f"below-{n}", MIB, MIB, seed=n)
    overlay = overlay_over(lower)
    make_sparse_file(overlay / "source" / "large", 4 * MIB, 4 * MIB)

    # When
    error, result = _refused(overlay / "source", overlay / "fork", 3 * MIB, limits=limits)
    allowed = forked(overlay / "source", overlay / "allowed", limits=limits, max_copied_bytes=4 * MIB)

    # Then
    assert "max_copied_bytes" in error["message"]
    assert result["bytes"]["copied"] <= 3 * MIB
    assert (allowed["files"]["reflinked"], allowed["bytes"]["copied"]) == (1, 4 * MIB)


def test_a_chunk_that_is_made_again_does_not_count_twice(tmp_path: Path) -> None:
    parent_fd = os.open(tmp_path, os.O_RDONLY)
    with Staging.claim(parent_fd, "fork-1", wait=0) as staging:
        # Given a process that was killed after it had copied a part of chunk 1, while another one works on chunk 0
        with chunk_budget(staging, 1, 100) as take:
            assert take(60)
        with chunk_budget(staging, 0, 100) as take_0, chunk_budget(staging, 1, 100) as take_1:
            # Then
            assert take_0(30)
            assert not take_1(71)
            assert take_1(70)
            assert not take_0(1)
        staging.remove()
    os.close(parent_fd)


def test_each_fork_of_a_campaign_has_its_own_budget(fresh: Fresh) -> None:
    # Given a campaign that can reflink into one parent and cannot into the other
    directory, other = fresh("xfs"), fresh("ext4")
    source = make_guest(directory / "source", SIZES)
    paths = [directory / "vm-0", directory / "vm-1", other / "vm-2", other / "vm-3", directory / "vm-4"]

    # When
    reflinks = campaign(source, paths, max_copied_bytes=0)
    copies = campaign(
        source, [path.with_name(f"{path.name}b") for path in paths], campaign_id="b", max_copied_bytes=_data(source)
    )

    # Then
    assert counts(reflinks) == (3, 2, 0)
    assert codes(reflinks) == {"vm-2": "copy_budget_exceeded", "vm-3": "copy_budget_exceeded"}
    assert [path.exists() for path in paths] == [True, True, False, False, True]
    assert counts(copies) == (5, 0, 0)
    assert leftovers(directory) == leftovers(other) == []


def test_a_campaign_that_cannot_reflink_ends_before_it_begins(fresh: Fresh) -> None:
    directory = fresh("ext4")
    source = make_guest(directory / "source", SIZES)

    result = campaign(source, [directory / f"vm-{n}" for n in range(3)], max_copied_bytes=0)

    assert counts(result) == (0, 3, 0)
    assert set(codes(result).values()) == {"copy_budget_exceeded"}


@pytest.mark.parametrize("most", [None, 0, 1 << 40])
def test_the_journal_names_a_budget_only_where_there_is_one(most: int | None) -> None:
    """A worker of an earlier version refuses a request with a field that it does not know."""
    data = Options(max_copied_bytes=most).to_data()

    assert ("max_copied_bytes" in data) == (most is not None)
    assert Options.from_data(data).max_copied_bytes == most
