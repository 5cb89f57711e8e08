"""Campaigns with failing forks, or that are ended early: published forks stay complete, the rest is removed."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.campaign import batch_record, local
from tasks.copier.campaign.batch import make_batch
from tasks.copier.campaign.spec import CampaignProgress
from tasks.copier.errors import Code, ForkError
from tasks.copier.progress import Progress
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh, SmallTmpfs
from tests.support.engine.forks import assert_alike, leftovers
from tests.support.engine.local_campaigns import (
    SIZES,
    campaign,
    campaign_with_ledger,
    codes,
    counts,
    destinations,
)
from tests.support.engine.source_writers import wait_for_clock_tick
from tests.support.guests import MIB, SKIPPED_BY_DEFAULT, make_guest, make_sparse_file
from tests.support.system.result_checks import check_file_results


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("xfs")


@pytest.fixture
def source(directory: Path) -> Path:
    return make_guest(directory / "source", SIZES)


@pytest.mark.usefixtures("few_batches")
def test_forks_that_another_process_found_published_are_not_reported_as_failed(
    directory: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process publishes a batch, cannot store the outcome, and another one stores it before the first looks."""
    has_any, write = batch_record.has_any, Staging.write_file
    batches: list[tuple[Any, ...]] = []
    steps: list[str] = []

    def note(*args: Any) -> None:
        batches.append(args)
        make_batch(*args)

    def fill_once(staging: Staging, name: str, data: bytes, **options: Any) -> None:
        if name == "settled-0" and not steps:
            steps.append("the disk is full")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(staging, name, data, **options)

    def look_late(staging: Staging, first: int) -> bool:
        if steps == ["the disk is full"]:
            steps.append("another process makes the batch")
            make_batch(*batches[-1])
        return has_any(staging, first)

    monkeypatch.setattr(local, "make_batch", note)
    monkeypatch.setattr(Staging, "write_file", fill_once)
    monkeypatch.setattr(batch_record, "has_any", look_late)
    paths = destinations(directory, 6)

    result = campaign(source, paths, processes=1)

    assert counts(result) == (6, 0, 0)
    for path in paths:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)


@pytest.mark.usefixtures("few_batches")
def test_invalid_destinations_fail_alone_and_are_not_changed(fresh: Fresh, directory: Path, source: Path) -> None:
    # Given every reason for which a destination can exist or be unreachable
    paths = destinations(directory, 12)
    (directory / "vm-002").mkdir()
    (directory / "vm-002" / "theirs").write_text("theirs")
    (directory / "vm-004").write_text("a file")
    (directory / "vm-006").symlink_to("nowhere")
    paths[8] = directory / "missing" / "vm-008"
    paths[10] = source / "vm-010"

    # When
    result = campaign(source, paths)

    # Then
    assert (result["status"], counts(result)) == ("partial", (7, 5, 0))
    assert codes(result) == {
        "vm-002": "destination_exists",
        "vm-004": "destination_exists",
        "vm-006": "destination_exists",
        "vm-008": "invalid_request",
        "vm-010": "destination_inside_source",
    }
    for n in (0, 1, 3, 5, 7, 9, 11):
        assert_alike(source, paths[n], SKIPPED_BY_DEFAULT)
    assert (directory / "vm-002" / "theirs").read_text() == "theirs"
    assert (directory / "vm-004").read_text() == "a file"
    assert os.readlink(directory / "vm-006") == "nowhere"
    assert not (directory / "missing").exists()
    assert leftovers(directory) == leftovers(source) == []


def test_destinations_outside_the_roots_fail_alone(directory: Path, source: Path, tmp_path: Path) -> None:
    (directory / "out").symlink_to(tmp_path)
    paths = [directory / "vm-0", tmp_path / "vm-1", directory / "out" / "vm-2", directory / "vm-3"]

    result = campaign(source, paths, roots=[directory])

    assert counts(result) == (2, 2, 0)
    assert codes(result) == {"vm-1": "outside_roots", "vm-2": "outside_roots"}
    assert list(tmp_path.iterdir()) == []


def test_an_error_before_the_first_fork_fails_every_fork(directory: Path, source: Path) -> None:
    missing = campaign(directory / "missing", destinations(directory, 3))
    parents = campaign(source, [directory / "no" / "vm-0", directory / "such" / "vm-1"])
    inside = campaign(source, [source / "vm-0", source / "vm-1"])

    for result, code in (
        (missing, "source_not_found"),
        (parents, "invalid_request"),
        (inside, "destination_inside_source"),
    ):
        assert result["status"] == "failed"
        assert result["error"] is not None
        assert result["error"]["code"] == code
        assert counts(result)[0] == 0
        assert set(codes(result).values()) == {code}
    assert [path.name for path in directory.iterdir()] == ["source"]
    assert leftovers(source) == []


def test_an_unsupported_file_ends_the_campaign_before_anything_is_cloned(directory: Path, source: Path) -> None:
    os.mkfifo(source / "fifo")

    result = campaign(source, destinations(directory, 5))

    assert result["error"] is not None
    assert (result["error"]["code"], result["error"]["path"]) == ("unsupported_file_type", str(source / "fifo"))
    assert counts(result) == (0, 5, 0)
    assert [path.name for path in directory.iterdir()] == ["source"]


def test_reflink_always_across_filesystems_fails_every_fork(fresh: Fresh, source: Path) -> None:
    elsewhere = fresh("ext4")

    result = campaign(source, destinations(elsewhere, 4), reflink="always")

    assert result["status"] == "failed"
    assert set(codes(result).values()) == {"reflink_unsupported"}
    assert list(elsewhere.iterdir()) == []


def test_reflink_always_fails_only_the_forks_on_other_filesystems(fresh: Fresh, directory: Path, source: Path) -> None:
    elsewhere = fresh("ext4")
    paths = [*destinations(directory, 4), elsewhere / "vm-a", elsewhere / "vm-b"]

    result = campaign(source, paths, reflink="always")

    assert counts(result) == (4, 2, 0)
    assert codes(result) == {"vm-a": "reflink_unsupported", "vm-b": "reflink_unsupported"}
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.usefixtures("few_batches")
def test_a_full_filesystem_has_only_complete_forks(fresh: Fresh, small_tmpfs: SmallTmpfs, processes: int) -> None:
    # Given room for about three forks of ten
    source = fresh("xfs") / "source"
    source.mkdir()
    for n in range(4):
        make_sparse_file(source / f"disk-{n}", MIB, MIB, seed=n)
    workdir = small_tmpfs(14 * MIB)

    # When
    result = campaign(source, destinations(workdir, 10), processes=processes)

    # Then
    succeeded, failed, cancelled = counts(result)
    assert (succeeded + failed, cancelled) == (10, 0)
    assert failed > 0
    assert set(codes(result).values()) == {"no_space"}
    assert {failure["error"]["errno"] for failure in result["failures"]} == {errno.ENOSPC}
    existing = sorted(workdir.iterdir())
    assert len(existing) == succeeded
    for path in existing:
        assert_alike(source, path)


@pytest.mark.usefixtures("every_poll", "few_batches")
@pytest.mark.parametrize("change", ["write", "truncate", "remove", "replace", "add", "rename the source"])
def test_a_source_that_changes_in_the_middle_gives_no_torn_fork(
    directory: Path, source: Path, tmp_path: Path, change: str
) -> None:
    # Given
    done: list[bool] = []

    def act(progress: Progress) -> None:
        if progress["files_done"] < 5 or done:
            return
        done.append(True)
        wait_for_clock_tick()
        disk = source / "overlay.raw"
        if change == "write":
            with disk.open("r+b") as file:
                file.write(b"the machine goes on")
        elif change == "truncate":
            os.truncate(disk, 4096)
        elif change == "remove":
            disk.unlink()
        elif change == "replace":
            make_sparse_file(source / "new", 8 * MIB, MIB)
            (source / "new").rename(disk)
        elif change == "add":
            (source / "snapshots" / "new").touch()
        else:
            source.rename(directory / "moved")

    # When
    result, ledger = campaign_with_ledger(source, destinations(directory, 6), tmp_path / "ledger", poll=act)

    # Then
    assert done
    if change == "rename the source":  # which does not affect processes that have it open: the forks are complete
        source = directory / "moved"
    existing = [path for path in destinations(directory, 6) if path.exists()]
    assert len(existing) == counts(result)[0]
    for path in existing:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
    if change != "rename the source":
        assert counts(result) == (0, 6, 0)
        assert set(codes(result).values()) == {"source_changed"}
    for n, fork in enumerate(ledger.forks):
        check_file_results(fork, ledger.files(n))


@pytest.mark.usefixtures("every_poll", "few_batches")
def test_a_file_that_changes_while_it_is_cloned_is_named_in_every_fork(
    directory: Path, source: Path, tmp_path: Path
) -> None:
    changed: list[bool] = []

    def append(progress: Progress) -> None:
        if progress["files_done"] == 8 and not changed:  # in the second of the trees
            changed.append(True)
            wait_for_clock_tick()
            with (source / "config.ext4").open("ab") as file:
                file.write(b"the machine goes on")

    result, ledger = campaign_with_ledger(source, destinations(directory, 4), tmp_path / "ledger", poll=append)

    assert counts(result) == (0, 4, 0)
    for n in range(4):
        assert [file["path"] for file in ledger.files(n) if file["error"]] == ["config.ext4"]


@pytest.mark.usefixtures("every_poll", "few_batches")
def test_corruption_of_one_fork_is_found_by_verify_and_fails_only_that_fork(
    directory: Path, source: Path, tmp_path: Path
) -> None:
    damaged: list[str] = []

    def corrupt(progress: Progress) -> None:
        for path in sorted(directory.glob(".forkvm-*.*/config.ext4")):
            if path.stat().st_blocks and (not damaged or damaged == [path.parent.name]):
                damaged[:] = [path.parent.name]
                with path.open("r+b") as file:
                    file.write(b"a flipped bit")

    result, _ = campaign_with_ledger(
        source, destinations(directory, 4), tmp_path / "ledger", poll=corrupt, reflink="never", verify="content"
    )

    assert damaged
    assert counts(result) == (3, 1, 0)
    assert set(codes(result).values()) == {"verify_failed"}


@pytest.mark.parametrize("processes", [1, 2])
def test_on_error_abort_ends_the_campaign_with_the_first_failure(directory: Path, source: Path, processes: int) -> None:
    paths = destinations(directory, 80)
    paths[10].mkdir()

    result = campaign(source, paths, on_error="abort", processes=processes)

    succeeded, failed, cancelled = counts(result)
    assert result["status"] == "partial"
    assert result["error"] is not None
    assert result["error"]["code"] == "destination_exists"
    assert failed == 1
    assert cancelled > 0
    assert succeeded == len(list(directory.glob("vm-*"))) - 1
    assert leftovers(directory) == []


def test_a_deadline_cancels_forks_that_are_not_published(directory: Path, source: Path) -> None:
    paths = destinations(directory, 400)

    result = campaign(source, paths, deadline=time.time() + 0.15)

    succeeded, failed, cancelled = counts(result)
    assert result["status"] == "cancelled"
    assert result["error"] is not None
    assert "deadline" in result["error"]["message"]
    assert (failed, cancelled) == (0, 400 - succeeded)
    assert cancelled > 0
    assert len(list(directory.glob("vm-*"))) == succeeded
    assert leftovers(directory) == []
    for path in sorted(directory.glob("vm-*"))[-3:]:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)


def test_a_cancelled_campaign_keeps_only_published_forks(directory: Path, source: Path) -> None:
    seen: list[CampaignProgress] = []

    def end(progress: CampaignProgress) -> None:
        seen.append(progress)
        if any(directory.glob("vm-*")):
            raise ForkError(Code.CANCELLED, "ended by SIGTERM")

    result = campaign(source, destinations(directory, 600), poll=end)

    succeeded, failed, cancelled = counts(result)
    assert result["status"] == "cancelled"
    assert (failed, cancelled > 0, succeeded > 0) == (0, True, True)
    assert len(list(directory.glob("vm-*"))) == succeeded
    assert leftovers(directory) == []
    assert set(seen[-1]) == {"forks_done", "forks_total", "forks_failed", "eta_seconds"}


@pytest.mark.usefixtures("every_poll")
def test_a_campaign_cancelled_while_it_is_planned_makes_nothing(directory: Path, source: Path) -> None:
    def end(progress: CampaignProgress) -> None:
        raise ForkError(Code.CANCELLED, "ended by SIGTERM")

    result = campaign(source, destinations(directory, 500), poll=end)

    assert result["status"] == "cancelled"
    assert counts(result) == (0, 0, 500)
    assert result["failures"] == []
    assert [path.name for path in directory.iterdir()] == ["source"]
