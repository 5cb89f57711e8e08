"""A fork that does not fit fails before it copies, and forks on one host count one another's bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.copier.fork_spec import ForkResult
from tasks.copier.kernel.free_space import filesystem_id, free_bytes, may_compress
from tasks.copier.options import Limits
from tasks.copier.progress import Progress
from tasks.copier.space import reservation
from tests.fixtures.filesystems import Fresh, SmallTmpfs, make_subvolume
from tests.support.engine.forks import MIB, fork, forked, leftovers
from tests.support.engine.local_campaigns import campaign, codes, counts
from tests.support.extents import set_compressed
from tests.support.guests import make_sparse_file

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def reservations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate directory for reservations, since other tests run at the same time."""
    monkeypatch.setattr(reservation, "DIRECTORY", str(tmp_path))
    return tmp_path


def _source(directory: Path, megabytes: int) -> Path:
    source = directory / "source"
    (source / "layers").mkdir(parents=True)
    for n in range(2):
        make_sparse_file(source / "layers" / f"disk-{n}", megabytes * MIB, megabytes * MIB // 2, seed=n)
    return source


def _refused(result: ForkResult, destination: Path) -> str:
    """The message of a fork that must fail for lack of space before it copies anything."""
    assert result["error"] is not None
    assert (result["error"]["code"], result["bytes"]["copied"]) == ("no_space", 0)
    assert not destination.exists()
    return result["error"]["message"]


def test_a_fork_that_does_not_fit_fails_at_once_with_both_sizes(
    fresh: Fresh, small_tmpfs: SmallTmpfs, limits: Limits, reservations: Path
) -> None:
    source, workdir = _source(fresh("ext4"), 24), small_tmpfs(20 * MIB)
    free = os.statvfs(workdir).f_bavail * os.statvfs(workdir).f_frsize

    message = _refused(fork(source, workdir / "fork", limits=limits), workdir / "fork")

    assert str(24 * MIB) in message
    assert any(str(free - pages * 4096) in message for pages in range(16))  # staging takes a few pages
    assert leftovers(workdir) == []
    assert os.listdir(reservations) == []


def test_preallocated_blocks_need_no_space(
    fresh: Fresh, small_tmpfs: SmallTmpfs, limits: Limits, reservations: Path
) -> None:
    source, workdir = _source(fresh("xfs"), 8), small_tmpfs(20 * MIB)
    fd = os.open(source / "layers" / "disk-0", os.O_WRONLY)
    os.posix_fallocate(fd, 0, 64 * MIB)
    os.close(fd)

    result = forked(source, workdir / "fork", limits=limits)

    assert result["bytes"]["copied"] == 8 * MIB
    assert os.listdir(reservations) == []


@pytest.mark.usefixtures("every_poll")
def test_two_simultaneous_forks_do_not_both_start_if_only_one_fits(
    fresh: Fresh, small_tmpfs: SmallTmpfs, limits: Limits, reservations: Path
) -> None:
    # Given a fork that has copied a little of its 24 MiB into a filesystem of 40 MiB
    source, workdir = _source(fresh("ext4"), 24), small_tmpfs(40 * MIB)
    second: list[ForkResult] = []

    def poll(progress: Progress) -> None:
        if progress["phase"] == "copy" and not second:
            second.append(fork(source, workdir / "second", fork_id="fork-2"))

    # When
    first = fork(source, workdir / "first", limits=limits, poll=poll)

    # Then
    assert first["status"] == "succeeded", first["error"]
    message = _refused(second[0], workdir / "second")
    assert "other forks of this host" in message or limits.inline_files == 0
    assert leftovers(workdir) == os.listdir(reservations) == []


def test_forks_of_a_campaign_that_do_not_fit_fail_alone(
    fresh: Fresh, small_tmpfs: SmallTmpfs, reservations: Path
) -> None:
    source, workdir = _source(fresh("ext4"), 8), small_tmpfs(36 * MIB)

    result = campaign(source, [workdir / f"vm-{n}" for n in range(6)], processes=1)

    assert counts(result) == (4, 2, 0)
    assert set(codes(result).values()) == {"no_space"}
    assert "bytes free" in result["failures"][0]["error"]["message"]
    assert leftovers(workdir) == os.listdir(reservations) == []


def test_a_campaign_of_forks_that_never_fit_ends_before_it_begins(
    fresh: Fresh, small_tmpfs: SmallTmpfs, reservations: Path
) -> None:
    source, workdir = _source(fresh("ext4"), 24), small_tmpfs(20 * MIB)

    result = campaign(source, [workdir / f"vm-{n}" for n in range(3)])

    assert counts(result) == (0, 3, 0)
    assert result["error"] is not None
    assert result["error"]["code"] == "no_space"
    assert leftovers(workdir) == os.listdir(reservations) == []


def test_the_bytes_of_a_process_that_was_killed_do_not_count(reservations: Path) -> None:
    script = (
        "import sys, time; from tasks.copier.space import reservation as r; r.DIRECTORY = sys.argv[1]\n"
        "held = r.reserve('1-2', bytes(16), 1000, is_queued=False); held.set_copied(3, 300)\n"
        "print(flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, reservations], cwd=_ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    alive = _reserved()

    process.send_signal(signal.SIGKILL)
    process.wait()

    assert (alive, _reserved()) == (700, 0)
    assert os.listdir(reservations) == []
    process.stdout.close()


@pytest.mark.usefixtures("reservations")
def test_a_queued_fork_is_counted_between_its_chunks_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with reservation.reserving():
        planner = reservation.reserve("1-2", bytes(16), 100 * MIB, is_queued=True)
    assert planner is not None
    planner.close()
    between = _reserved()
    with reservation.counted(lambda count: None, "1-2", 1) as step:
        step(7 * MIB)
        step(MIB)
        during = _reserved()
        step(50)
        soon = _reserved()
    after = _reserved()

    monkeypatch.setattr(reservation, "GRACE_SECONDS", 0.0)
    with reservation.counted(lambda count: None, "1-2", 2):
        pass

    assert (between, during, soon, after, _reserved()) == (100 * MIB, 92 * MIB, 92 * MIB, 92 * MIB - 50, 0)


@pytest.mark.usefixtures("reservations")
def test_only_the_same_filesystem_and_other_jobs_count() -> None:
    held = reservation.reserve("1-2", b"a" * 16, 1000, is_queued=False)
    assert held is not None

    counted = [reservation.reserved_by_others(b"a" * 16, "9-9"), reservation.reserved_by_others(b"b" * 16, "9-9")]

    assert [*counted, reservation.reserved_by_others(b"a" * 16, "1-2")] == [1000, 0, 0]
    held.close()


def test_reservations_of_other_users_or_ended_processes_do_not_count(reservations: Path) -> None:
    (reservations / "forkvm-space-1-1-0").touch()
    (reservations / "forkvm-space-1-2-0").symlink_to("/etc/hostname")
    (reservations / "forkvm-space-1-3-0").mkdir()
    os.mkfifo(reservations / "forkvm-space-1-4-0")
    held = reservation.reserve("1-5", bytes(16), 1000, is_queued=True)
    assert held is not None
    os.fchown(held.fd, 1234, 1234)

    assert _reserved() == 0
    assert "forkvm-space-1-1-0" not in os.listdir(reservations)
    held.close()


def test_without_dev_shm_a_fork_is_made_all_the_same(
    fresh: Fresh, limits: Limits, reservations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservation, "DIRECTORY", str(reservations / "missing"))
    directory = fresh("ext4")

    forked(_source(directory, 4), directory / "fork", limits=limits)


def test_subvolumes_are_one_filesystem_and_compressed_ones_are_not_compared(fresh: Fresh) -> None:
    directory = fresh("btrfs")
    paths = [directory, make_subvolume(directory / "subvolume"), fresh("xfs")]
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        same = [filesystem_id(fd) == filesystem_id(fds[0]) for fd in fds]
        plain = [may_compress(fd) for fd in fds]
        set_compressed(paths[1])
        compressed = may_compress(fds[1])
        sizes = [free_bytes(fd) for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)

    assert same == [True, True, False]
    assert (plain, compressed) == ([False, False, False], True)
    assert all(size is not None and size > MIB for size in sizes)


def _reserved() -> int:
    with reservation.reserving():
        return reservation.reserved_by_others(bytes(16), "9-9")


def test_a_copy_takes_its_space_little_by_little(fresh: Fresh, every_poll: None) -> None:
    """What is allocated and not yet copied counts twice: as taken, and as still to be taken."""
    directory, ahead = fresh("ext4"), []
    (directory / "a").mkdir()
    (directory / "a" / "disk").write_bytes(bytes(range(256)) * (64 * MIB // 256))

    def poll(progress: Progress) -> None:
        for clone in directory.glob(".forkvm-*/disk"):
            ahead.append(clone.stat().st_blocks * 512 - progress["bytes_done"])

    forked(directory / "a", directory / "b", reflink="never", poll=poll)

    assert len(ahead) > 64
    assert max(ahead) <= 17 * MIB
