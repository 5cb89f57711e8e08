"""Campaigns: every fork equals the source, entry by entry."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tasks.copier.campaign.spec import CampaignProgress, CampaignResult
from tasks.copier.kernel import syscalls, trees
from tasks.copier.progress import Progress
from tests.fixtures.filesystems import Fresh, Kind, make_subvolume
from tests.support.engine.forks import assert_alike, leftovers
from tests.support.engine.local_campaigns import (
    SIZES,
    campaign,
    campaign_with_ledger,
    counts,
    destinations,
    holding,
    plan,
    spec_of,
)
from tests.support.extents import sharing
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest
from tests.support.sources import make_everything
from tests.support.system.result_checks import check_file_results, check_fork_result, entries_of
from tests.support.tree import snapshot

KINDS: list[Kind] = ["xfs", "btrfs", "ext4", "tmpfs"]
REFLINK: list[Kind] = ["xfs", "btrfs"]


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("xfs")


@pytest.fixture
def source(directory: Path) -> Path:
    return make_guest(directory / "source", SIZES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fork_of_a_campaign_equals_the_source(fresh: Fresh, kind: Kind) -> None:
    # Given a source with every kind of entry
    directory = fresh(kind)
    source = make_everything(directory / "source")
    before = snapshot(source)
    paths = destinations(directory, 10)

    # When
    result = campaign(source, paths)

    # Then
    assert (result["status"], result["error"], counts(result)) == ("succeeded", None, (10, 0, 0))
    for path in paths:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
    assert snapshot(source) == before
    assert leftovers(directory) == []
    assert result["files"]["total"] == 10 * len(entries_of(source))
    assert result["bytes"]["logical"] == result["bytes"]["reflinked"] + _copied_logically(result)
    assert (result["files"]["copied"] == 0) == (kind in REFLINK)
    assert result["forks_per_second"] > 0


def _copied_logically(result: CampaignResult) -> int:
    """Logical bytes of files that were not reflinked; a reflinked file counts as 0 copied bytes."""
    return 0 if result["bytes"]["reflinked"] else result["bytes"]["logical"]


@pytest.mark.parametrize("kind", REFLINK)
def test_reflinked_forks_share_every_byte_with_the_source(fresh: Fresh, kind: Kind) -> None:
    directory = fresh(kind)
    source = make_guest(directory / "source", SIZES)
    paths = destinations(directory, 9)

    campaign(source, paths)

    assert all(sharing(path / "overlay.raw").whole for path in paths)


def test_a_sparse_copy_preserves_the_holes_in_every_fork(fresh: Fresh) -> None:
    directory = fresh("ext4")
    source = make_guest(directory / "source", SIZES)
    paths = destinations(directory, 9)

    result = campaign(source, paths)

    most = (source / "overlay.raw").stat().st_blocks
    assert all((path / "overlay.raw").stat().st_blocks <= most for path in paths)
    assert result["bytes"]["copied"] < result["bytes"]["logical"]


@pytest.mark.parametrize("batches", ["many", "one"])
def test_the_totals_of_each_fork_add_up_and_the_campaigns_are_their_sums(
    request: pytest.FixtureRequest, directory: Path, source: Path, tmp_path: Path, batches: str
) -> None:
    if batches == "one":
        request.getfixturevalue("few_batches")
    os.link(source / "state", source / "state.linked")
    (source / "link").symlink_to("state")
    paths = destinations(directory, 11)
    (directory / "vm-003").mkdir()

    result, ledger = campaign_with_ledger(source, paths, tmp_path / "ledger")

    assert (result["status"], counts(result)) == ("partial", (10, 1, 0))
    assert [fork["fork_id"] for fork in ledger.forks] == [f"fan.{n}" for n in range(1, 12)]
    assert [fork["destination"] for fork in ledger.forks] == [str(path) for path in paths]
    for n, fork in enumerate(ledger.forks):
        check_fork_result(fork)
        check_file_results(fork, ledger.files(n))
        if fork["status"] == "succeeded":
            assert {file["path"] for file in ledger.files(n)} == entries_of(source)
    for group in ("files", "bytes"):
        for name, value in result[group].items():
            assert value == sum(fork[group][name] for fork in ledger.forks)


def test_forks_go_into_several_parents_on_several_filesystems(fresh: Fresh, tmp_path: Path) -> None:
    # Given destinations that change their parent at every step, so that each batch has several parents
    workdirs = [fresh("xfs"), fresh("ext4"), fresh("tmpfs"), fresh("xfs")]
    source = make_guest(workdirs[0] / "source", SIZES)
    paths = [workdirs[n % 4] / f"vm-{n}" for n in range(24)]

    # When
    result, ledger = campaign_with_ledger(source, paths, tmp_path / "ledger")

    # Then
    assert counts(result) == (24, 0, 0)
    for n, path in enumerate(paths):
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
        check_file_results(ledger.forks[n], ledger.files(n))
        same = path.parent in (workdirs[0], workdirs[3])
        assert (ledger.forks[n]["fallback"] is None) == same
        assert (ledger.forks[n]["files"]["copied"] == 0) == same


def test_a_campaign_with_children_goes_into_several_parents(fresh: Fresh) -> None:
    workdirs = [fresh("xfs"), fresh("ext4")]
    source = make_guest(workdirs[0] / "source", SIZES)
    paths = [workdirs[n // 3 % 2] / f"vm-{n}" for n in range(24)]

    result = campaign(source, paths)

    assert counts(result) == (24, 0, 0)
    for path in paths:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
    assert leftovers(workdirs[0]) == leftovers(workdirs[1]) == []


@pytest.mark.usefixtures("few_batches")
def test_the_largest_batch_stays_within_the_descriptor_limit(directory: Path, tmp_path: Path) -> None:
    # Given more directories than files that are open at once, so that each of these files is in its own directory
    source = directory / "source"
    for n in range(40):
        (source / f"{n:02}").mkdir(parents=True)
        (source / f"{n:02}" / "state").write_bytes(b"paused")
    open_before, most = len(os.listdir("/proc/self/fd")), 0  # other tests of this process leave some open

    def count(progress: Progress) -> None:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))

    result, _ = campaign_with_ledger(source, destinations(directory, 128), tmp_path / "ledger", poll=count)

    assert counts(result) == (128, 0, 0)
    assert 128 < most - open_before < 240, most  # of 1,024


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_verify_and_sync_do_not_change_successful_forks(fresh: Fresh, kind: Kind) -> None:
    directory = fresh(kind)
    source = make_guest(directory / "source", SIZES)
    paths = destinations(directory, 9)

    result = campaign(source, paths, verify="content", durability="sync")

    assert counts(result) == (9, 0, 0)
    for path in paths:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_forks_are_in_flight_than_max_parallel(directory: Path, source: Path, most: int) -> None:
    in_flight: list[int] = []

    def count(progress: CampaignProgress) -> None:
        in_flight.append(len(list(directory.glob(".forkvm-*.*"))))

    for n in range(100):
        (source / f"file-{n}").touch()
    result = campaign(source, destinations(directory, 60), max_parallel=most, poll=count, processes=3)

    assert counts(result) == (60, 0, 0)
    assert 0 < max(in_flight) <= most


def test_a_campaign_of_one_fork_and_a_campaign_of_an_empty_source(directory: Path, source: Path) -> None:
    (directory / "empty").mkdir(mode=0o711)

    one = campaign(source, destinations(directory, 1))
    many = campaign(directory / "empty", [directory / f"e-{n}" for n in range(20)])

    assert (counts(one), counts(many)) == ((1, 0, 0), (20, 0, 0))
    assert_alike(source, directory / "vm-000", SKIPPED_BY_DEFAULT)
    assert all((directory / f"e-{n}").stat().st_mode & 0o7777 == 0o711 for n in range(20))


def test_the_options_apply_to_every_fork(directory: Path, source: Path) -> None:
    os.chmod(source / "state", 0o604)
    os.utime(source / "state", (1, 1))

    campaign(
        source,
        destinations(directory, 9),
        skip=("overlay.raw",),
        exclude=("*.json",),
        preserve=frozenset({"mode"}),
        reflink="never",
    )

    for path in destinations(directory, 9):
        names = {os.fsencode(entry.relative_to(path)) for entry in path.rglob("*")}
        assert b"logs/console.log" in names
        assert not names & {b"overlay.raw", b"metadata.json", b"config.json"}
        assert (path / "state").stat().st_mode & 0o777 == 0o604
        assert (path / "state").stat().st_mtime > 1


def test_destinations_that_are_not_utf8_are_used_byte_for_byte(directory: Path, source: Path) -> None:
    paths = [Path(os.fsdecode(os.fsencode(directory) + b"/vm-\xff-%d" % n)) for n in range(9)]

    result = campaign(source, paths)

    assert counts(result) == (9, 0, 0)
    for path in paths:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)


def test_no_campaign_leaks_a_descriptor_or_a_child(fresh: Fresh, directory: Path, source: Path) -> None:
    elsewhere = fresh("ext4")
    before = set(os.listdir("/proc/self/fd"))

    campaign(source, [*destinations(directory, 10), *destinations(elsewhere, 10)])
    campaign(source, destinations(directory, 10))
    campaign(source, [directory / "no" / "parent"])

    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_delayed_planner_does_not_make_batches_of_one_small_fork(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ficlone = syscalls.ficlone

    def late(dst_fd: int, src_fd: int) -> None:
        time.sleep(0.1)  # as on a busy machine
        ficlone(dst_fd, src_fd)

    source, paths = directory / "source", destinations(directory, 400)
    source.mkdir()
    (source / "state").write_bytes(b"paused")
    monkeypatch.setattr(syscalls, "ficlone", late)

    plan(source, paths)

    with holding(paths[0]) as found:
        assert found.plan.batch == 50
        found.staging.remove()


def test_the_plan_of_a_campaign_outlives_its_journal() -> None:
    spec = spec_of(Path("/a"), 7, max_parallel=3, on_error="abort", deadline=9.5, verify="content")

    assert type(spec).from_data(spec.to_data()) == spec


def test_the_forks_of_a_large_subvolume_are_snapshots(fresh: Fresh) -> None:
    directory = fresh("btrfs")
    source = make_subvolume(directory / "source")
    make_guest(source, SIZES)
    for n in range(1000):
        (source / f"block-{n}").write_bytes(b"%d" % n)
    forks = destinations(directory, 3)

    result = campaign(source, forks)

    assert counts(result) == (3, 0, 0)
    for fork in forks:
        assert fork.stat().st_ino == trees.SUBVOLUME_INODE
        assert_alike(source, fork, SKIPPED_BY_DEFAULT)
    assert len({os.stat(fork).st_dev for fork in [source, *forks]}) == 4
    assert leftovers(directory) == []


def test_the_forks_of_a_small_subvolume_are_cloned_file_by_file(fresh: Fresh) -> None:
    directory = fresh("btrfs")
    source = make_subvolume(directory / "source")
    make_guest(source, SIZES)
    forks = destinations(directory, 3)

    assert counts(campaign(source, forks)) == (3, 0, 0)

    assert trees.SUBVOLUME_INODE not in {fork.stat().st_ino for fork in forks}
    for fork in forks:
        assert_alike(source, fork, SKIPPED_BY_DEFAULT)
