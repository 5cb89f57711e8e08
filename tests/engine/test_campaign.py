"""Campaigns: every fork of one is the source, entry by entry, and ends for itself."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from tasks.copier.campaigns import plan as campaign_plan
from tasks.copier.campaigns.spec import CampaignProgress, CampaignResult
from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel import syscalls, trees
from tasks.copier.progress import Progress
from tests.engine.campaigning import campaign, campaign_with_books, destinations, holding, plan, spec_of
from tests.engine.forking import assert_alike, leftovers
from tests.engine.sources import make_everything
from tests.fixtures.filesystems import Fresh, Kind, SmallTmpfs, make_subvolume
from tests.support.extents import sharing
from tests.support.guests import MIB, SKIPPED_BY_DEFAULT, GuestSizes, make_guest, make_sparse_file
from tests.support.tree import snapshot
from tests.system.books import check_books, check_fork_result, entries_of

SIZES = GuestSizes(overlay=8 * MIB, overlay_data=MIB, memory=4 * MIB, memory_data=MIB, config=64 << 10)
KINDS: list[Kind] = ["xfs", "btrfs", "ext4", "tmpfs"]
REFLINK: list[Kind] = ["xfs", "btrfs"]
COUNTED = ("succeeded", "failed", "cancelled")


@pytest.fixture
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small campaign is one batch, not eight."""
    monkeypatch.setattr(campaign_plan, "_LEAST_BATCHES", 1)
    monkeypatch.setattr(campaign_plan, "BATCH_SECONDS", 10.0)


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("xfs")


@pytest.fixture
def source(directory: Path) -> Path:
    return make_guest(directory / "source", SIZES)


def counts(result: CampaignResult) -> tuple[int, int, int]:
    """How many forks succeeded, failed, and were cancelled; they are all there are."""
    succeeded, failed, cancelled = (result["forks"][name] for name in COUNTED)
    assert result["forks"]["total"] == succeeded + failed + cancelled
    return succeeded, failed, cancelled


def codes(result: CampaignResult) -> dict[str, str]:
    """The codes of the failures by destination."""
    return {os.path.basename(failure["destination"]): failure["error"]["code"] for failure in result["failures"]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_fork_of_a_campaign_is_the_source_entry_by_entry(fresh: Fresh, kind: Kind) -> None:
    # Given everything that a directory can hold
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
    """Logical bytes of what was not reflinked; where something was, nothing was copied here."""
    return 0 if result["bytes"]["reflinked"] else result["bytes"]["logical"]


@pytest.mark.parametrize("kind", REFLINK)
def test_reflinked_forks_share_every_byte_with_the_source(fresh: Fresh, kind: Kind) -> None:
    directory = fresh(kind)
    source = make_guest(directory / "source", SIZES)
    paths = destinations(directory, 9)

    campaign(source, paths)

    assert all(sharing(path / "overlay.raw").whole for path in paths)


def test_a_sparse_copy_keeps_the_holes_in_every_fork(fresh: Fresh) -> None:
    directory = fresh("ext4")
    source = make_guest(directory / "source", SIZES)
    paths = destinations(directory, 9)

    result = campaign(source, paths)

    most = (source / "overlay.raw").stat().st_blocks
    assert all((path / "overlay.raw").stat().st_blocks <= most for path in paths)
    assert result["bytes"]["copied"] < result["bytes"]["logical"]


@pytest.mark.parametrize("batches", ["many", "one"])
def test_the_books_of_each_fork_balance_and_the_campaigns_are_their_sums(
    request: pytest.FixtureRequest, directory: Path, source: Path, tmp_path: Path, batches: str
) -> None:
    if batches == "one":
        request.getfixturevalue("few_batches")
    os.link(source / "state", source / "state.linked")
    (source / "link").symlink_to("state")
    paths = destinations(directory, 11)
    (directory / "vm-003").mkdir()

    result, books = campaign_with_books(source, paths, tmp_path / "books")

    assert (result["status"], counts(result)) == ("partial", (10, 1, 0))
    assert [fork["fork_id"] for fork in books.forks] == [f"fan.{n}" for n in range(1, 12)]
    assert [fork["destination"] for fork in books.forks] == [str(path) for path in paths]
    for n, fork in enumerate(books.forks):
        check_fork_result(fork)
        check_books(fork, books.files(n))
        if fork["status"] == "succeeded":
            assert {file["path"] for file in books.files(n)} == entries_of(source)
    for group in ("files", "bytes"):
        for name, value in result[group].items():
            assert value == sum(fork[group][name] for fork in books.forks)


def test_forks_go_into_several_parents_on_several_filesystems(fresh: Fresh, tmp_path: Path) -> None:
    # Given destinations that change their parent at every step, so that each batch has several
    places = [fresh("xfs"), fresh("ext4"), fresh("tmpfs"), fresh("xfs")]
    source = make_guest(places[0] / "source", SIZES)
    paths = [places[n % 4] / f"vm-{n}" for n in range(24)]

    # When
    result, books = campaign_with_books(source, paths, tmp_path / "books")

    # Then
    assert counts(result) == (24, 0, 0)
    for n, path in enumerate(paths):
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
        check_books(books.forks[n], books.files(n))
        same = path.parent in (places[0], places[3])
        assert (books.forks[n]["fallback"] is None) == same
        assert (books.forks[n]["files"]["copied"] == 0) == same


def test_a_campaign_with_children_goes_into_several_parents(fresh: Fresh) -> None:
    places = [fresh("xfs"), fresh("ext4")]
    source = make_guest(places[0] / "source", SIZES)
    paths = [places[n // 3 % 2] / f"vm-{n}" for n in range(24)]

    result = campaign(source, paths)

    assert counts(result) == (24, 0, 0)
    for path in paths:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
    assert leftovers(places[0]) == leftovers(places[1]) == []


@pytest.mark.usefixtures("few_batches")
def test_destinations_that_cannot_be_fail_alone_and_are_left_as_they_are(
    fresh: Fresh, directory: Path, source: Path
) -> None:
    # Given every way in which a destination can be taken or out of reach
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


def test_what_cannot_be_begun_fails_with_each_fork_and_makes_nothing(directory: Path, source: Path) -> None:
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


def test_reflink_always_fails_only_the_forks_that_lie_elsewhere(fresh: Fresh, directory: Path, source: Path) -> None:
    elsewhere = fresh("ext4")
    paths = [*destinations(directory, 4), elsewhere / "vm-a", elsewhere / "vm-b"]

    result = campaign(source, paths, reflink="always")

    assert counts(result) == (4, 2, 0)
    assert codes(result) == {"vm-a": "reflink_unsupported", "vm-b": "reflink_unsupported"}
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.usefixtures("few_batches")
def test_a_filesystem_that_gets_full_has_whole_forks_and_none_of_the_others(
    fresh: Fresh, small_tmpfs: SmallTmpfs, processes: int
) -> None:
    # Given room for about three forks of ten
    source = fresh("xfs") / "source"
    source.mkdir()
    for n in range(4):
        make_sparse_file(source / f"disk-{n}", MIB, MIB, seed=n)
    place = small_tmpfs(14 * MIB)

    # When
    result = campaign(source, destinations(place, 10), processes=processes)

    # Then
    succeeded, failed, cancelled = counts(result)
    assert (succeeded + failed, cancelled) == (10, 0)
    assert failed > 0
    assert set(codes(result).values()) == {"no_space"}
    assert {failure["error"]["errno"] for failure in result["failures"]} == {errno.ENOSPC}
    standing = sorted(place.iterdir())
    assert len(standing) == succeeded
    for path in standing:
        assert_alike(source, path)


@pytest.mark.usefixtures("every_beat", "few_batches")
@pytest.mark.parametrize("change", ["write", "truncate", "remove", "replace", "add", "rename the source"])
def test_a_source_that_changes_in_the_middle_gives_no_torn_fork(
    directory: Path, source: Path, tmp_path: Path, change: str
) -> None:
    # Given
    done: list[bool] = []

    def meddle(progress: Progress) -> None:
        if progress["files_done"] < 5 or done:
            return
        done.append(True)
        time.sleep(0.03)  # longer than a tick of the kernel's coarse clock
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
    result, books = campaign_with_books(source, destinations(directory, 6), tmp_path / "books", beat=meddle)

    # Then
    assert done
    if change == "rename the source":  # which takes nothing from who has it open: the forks are whole
        source = directory / "moved"
    standing = [path for path in destinations(directory, 6) if path.exists()]
    assert len(standing) == counts(result)[0]
    for path in standing:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
    if change != "rename the source":
        assert counts(result) == (0, 6, 0)
        assert set(codes(result).values()) == {"source_changed"}
    for n, fork in enumerate(books.forks):
        check_books(fork, books.files(n))


@pytest.mark.usefixtures("every_beat", "few_batches")
def test_a_file_that_changes_while_it_is_cloned_is_named_by_every_fork(
    directory: Path, source: Path, tmp_path: Path
) -> None:
    changed: list[bool] = []

    def append(progress: Progress) -> None:
        if progress["files_done"] == 8 and not changed:  # in the second of the trees
            changed.append(True)
            time.sleep(0.03)  # longer than a tick of the kernel's coarse clock
            with (source / "config.ext4").open("ab") as file:
                file.write(b"the machine goes on")

    result, books = campaign_with_books(source, destinations(directory, 4), tmp_path / "books", beat=append)

    assert counts(result) == (0, 4, 0)
    for n in range(4):
        assert [file["path"] for file in books.files(n) if file["error"]] == ["config.ext4"]


@pytest.mark.usefixtures("few_batches")
def test_the_largest_batch_needs_few_of_the_descriptors_that_a_process_has(directory: Path, tmp_path: Path) -> None:
    # Given more directories than files that are open at once, so that each of these lies in one of its own
    source = directory / "source"
    for n in range(40):
        (source / f"{n:02}").mkdir(parents=True)
        (source / f"{n:02}" / "state").write_bytes(b"paused")
    most = 0

    def count(progress: Progress) -> None:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))

    result, _ = campaign_with_books(source, destinations(directory, 128), tmp_path / "books", beat=count)

    assert counts(result) == (128, 0, 0)
    assert 128 < most < 256  # of 1,024


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_verify_and_sync_change_nothing_about_good_forks(fresh: Fresh, kind: Kind) -> None:
    directory = fresh(kind)
    source = make_guest(directory / "source", SIZES)
    paths = destinations(directory, 9)

    result = campaign(source, paths, verify="content", durability="sync")

    assert counts(result) == (9, 0, 0)
    for path in paths:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)


@pytest.mark.usefixtures("every_beat", "few_batches")
def test_a_corruption_of_one_fork_is_found_by_verify_and_fails_it_alone(
    directory: Path, source: Path, tmp_path: Path
) -> None:
    spoilt: list[str] = []

    def corrupt(progress: Progress) -> None:
        for path in sorted(directory.glob(".forkvm-*.*/config.ext4")):
            if path.stat().st_blocks and (not spoilt or spoilt == [path.parent.name]):
                spoilt[:] = [path.parent.name]
                with path.open("r+b") as file:
                    file.write(b"a flipped bit")

    result, _ = campaign_with_books(
        source, destinations(directory, 4), tmp_path / "books", beat=corrupt, reflink="never", verify="content"
    )

    assert spoilt
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


def test_a_deadline_cancels_what_is_not_published_by_then(directory: Path, source: Path) -> None:
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


def test_a_campaign_that_is_ended_keeps_what_is_published_and_leaves_nothing_else(
    directory: Path, source: Path
) -> None:
    seen: list[CampaignProgress] = []

    def end(progress: CampaignProgress) -> None:
        seen.append(progress)
        if any(directory.glob("vm-*")):
            raise ForkError(Code.CANCELLED, "ended by SIGTERM")

    result = campaign(source, destinations(directory, 600), beat=end)

    succeeded, failed, cancelled = counts(result)
    assert result["status"] == "cancelled"
    assert (failed, cancelled > 0, succeeded > 0) == (0, True, True)
    assert len(list(directory.glob("vm-*"))) == succeeded
    assert leftovers(directory) == []
    assert set(seen[-1]) == {"forks_done", "forks_total", "forks_failed", "eta_seconds"}


@pytest.mark.usefixtures("every_beat")
def test_a_campaign_that_is_ended_while_it_is_planned_has_made_nothing(directory: Path, source: Path) -> None:
    def end(progress: CampaignProgress) -> None:
        raise ForkError(Code.CANCELLED, "ended by SIGTERM")

    result = campaign(source, destinations(directory, 500), beat=end)

    assert result["status"] == "cancelled"
    assert counts(result) == (0, 0, 500)
    assert result["failures"] == []
    assert [path.name for path in directory.iterdir()] == ["source"]


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_forks_are_in_flight_than_max_parallel(directory: Path, source: Path, most: int) -> None:
    in_flight: list[int] = []

    def count(progress: CampaignProgress) -> None:
        in_flight.append(len(list(directory.glob(".forkvm-*.*"))))

    for n in range(100):
        (source / f"file-{n}").touch()
    result = campaign(source, destinations(directory, 60), max_parallel=most, beat=count, processes=3)

    assert counts(result) == (60, 0, 0)
    assert 0 < max(in_flight) <= most


def test_a_campaign_of_one_fork_and_one_of_an_empty_source(directory: Path, source: Path) -> None:
    (directory / "empty").mkdir(mode=0o711)

    one = campaign(source, destinations(directory, 1))
    many = campaign(directory / "empty", [directory / f"e-{n}" for n in range(20)])

    assert (counts(one), counts(many)) == ((1, 0, 0), (20, 0, 0))
    assert_alike(source, directory / "vm-000", SKIPPED_BY_DEFAULT)
    assert all((directory / f"e-{n}").stat().st_mode & 0o7777 == 0o711 for n in range(20))


def test_the_options_hold_for_every_fork(directory: Path, source: Path) -> None:
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


def test_destinations_that_are_not_utf8_are_taken_byte_by_byte(directory: Path, source: Path) -> None:
    paths = [Path(os.fsdecode(os.fsencode(directory) + b"/vm-\xff-%d" % n)) for n in range(9)]

    result = campaign(source, paths)

    assert counts(result) == (9, 0, 0)
    for path in paths:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)


def test_no_campaign_leaves_a_descriptor_or_a_child_behind(fresh: Fresh, directory: Path, source: Path) -> None:
    elsewhere = fresh("ext4")
    before = set(os.listdir("/proc/self/fd"))

    campaign(source, [*destinations(directory, 10), *destinations(elsewhere, 10)])
    campaign(source, destinations(directory, 10))
    campaign(source, [directory / "no" / "parent"])

    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_process_that_had_to_wait_while_it_planned_does_not_cut_small_forks_one_by_one(
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
