"""`source_open: refuse`: a fork fails if a process has a file of the source open for writing."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.copier.errors import ErrorRecord
from tasks.copier.kernel.leases import LeasesUnknown, is_open_for_writing
from tasks.copier.progress import Progress
from tests.fixtures.filesystems import Fresh, Kind, make_subvolume
from tests.fixtures.fuse import Passthrough
from tests.support.engine.child_processes import NOBODY, in_child
from tests.support.engine.forks import CHUNKED, MIB, assert_alike, fork, forked, leftovers, refused
from tests.support.engine.local_campaigns import campaign, campaign_with_ledger, codes, counts, destinations
from tests.support.engine.openers import Opener, opener
from tests.support.guests import make_sparse_file
from tests.support.requirements import require_command

#: The filesystems on which a lease detects every writer.
KINDS: tuple[Kind, ...] = ("xfs", "btrfs", "ext4", "tmpfs")
#: How long an open for writing may wait for the end of a lease, in seconds.
_MOST_SECONDS = 0.05
#: Other load on the machine may make single opens slower.
_ROUNDS = 8


@pytest.fixture
def process() -> Iterator[Opener]:
    with opener() as process:
        yield process


def make_source(directory: Path) -> Path:
    source = directory / "source"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 8 * MIB, 3 * MIB)
    (source / "state").write_bytes(b"paused")
    return source


def quiet_fork(source: Path, destination: Path, **arguments: object) -> ErrorRecord | None:
    """The error of one fork with `source_open: refuse`."""
    result = fork(source, destination, source_open="refuse", **arguments)  # type: ignore[arg-type]
    assert leftovers(destination.parent) == []
    return result["error"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_open_for_writing_fails_the_fork_on_each_filesystem(
    kind: Kind, fresh: Fresh, process: Opener
) -> None:
    fs = fresh(kind)
    source = make_source(fs)
    reasons = {}

    process.read(source / "disk.raw")
    forked(source, fs / "read", source_open="refuse")
    for how in ("write", "map"):
        getattr(process, how)(source / "disk.raw")
        reasons[how] = quiet_fork(source, fs / how)

    for how, error in reasons.items():
        assert error is not None, how
        found = (error["code"], error["path"], error["errno"])
        assert found == ("source_in_use", str(source / "disk.raw"), errno.EAGAIN), how
        assert not (fs / how).exists()
    assert_alike(source, fs / "read")


def test_a_small_open_file_beside_the_disk_counts_too(fresh: Fresh, process: Opener) -> None:
    directory = fresh("xfs")
    source = make_source(directory)
    process.write(source / "state")

    error = refused(source, directory / "fork", source_open="refuse", limits=CHUNKED)

    assert (error["code"], error["path"]) == ("source_in_use", str(source / "state"))
    assert forked(source, directory / "allowed")["files"]["reflinked"] == 2


def test_a_loop_device_on_a_file_keeps_it_open(fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_source(directory)
    losetup = require_command("losetup", "a loop device")
    device = subprocess.check_output([losetup, "--find", "--show", source / "disk.raw"], text=True).strip()
    try:
        error = refused(source, directory / "fork", source_open="refuse")
    finally:
        subprocess.run([losetup, "--detach", device], check=True)

    assert (error["code"], error["path"]) == ("source_in_use", str(source / "disk.raw"))


def test_a_process_in_another_mount_namespace_is_found(fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_source(directory)
    with opener(require_command("unshare", "a mount namespace"), "--mount") as elsewhere:
        elsewhere.write(source / "disk.raw")

        error = refused(source, directory / "fork", source_open="refuse")

    assert error["code"] == "source_in_use"


class _OpenOnce:
    """A poll callback that has another process open a file for writing during the copy, and waits for the open."""

    def __init__(self, process: Opener, path: Path) -> None:
        self._process, self._path = process, path
        self.seconds: list[float] = []

    def __call__(self, progress: Progress) -> None:
        if not self.seconds and progress["phase"] == "copy" and progress["bytes_done"] > 0:
            self.seconds.append(self._process.write(self._path))


@pytest.mark.usefixtures("every_poll")
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_opens_a_file_in_the_middle_waits_for_milliseconds(
    kind: Kind, fresh: Fresh, process: Opener
) -> None:
    fs = fresh(kind)
    source, seconds = make_source(fs), []

    for _ in range(_ROUNDS):
        middle = _OpenOnce(process, source / "disk.raw")
        error = refused(source, fs / "fork", source_open="refuse", reflink="never", poll=middle)
        process.close()
        seconds += middle.seconds
        assert (error["code"], error["path"]) == ("source_in_use", str(source / "disk.raw"))
        if seconds[-1] < _MOST_SECONDS:
            break

    assert min(seconds) < _MOST_SECONDS


def test_a_large_file_is_copied_by_one_process_under_one_lease(fresh: Fresh) -> None:
    directory = fresh("ext4")
    source = directory / "source"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 16 * MIB, 9 * MIB)

    divided = forked(source, directory / "divided", limits=CHUNKED)
    whole = forked(source, directory / "whole", limits=CHUNKED, source_open="refuse")

    assert (divided["chunks"] > 4, whole["chunks"]) == (True, 1)
    assert_alike(source, directory / "whole")


def test_a_subvolume_is_cloned_file_by_file(fresh: Fresh, process: Opener) -> None:
    directory = fresh("btrfs")
    source = make_subvolume(directory / "source")
    make_sparse_file(source / "disk.raw", 2 * MIB, MIB)

    assert forked(source, directory / "snapshot")["subvolume"]
    assert not forked(source, directory / "files", source_open="refuse")["subvolume"]
    process.map(source / "disk.raw")
    assert refused(source, directory / "fork", source_open="refuse")["code"] == "source_in_use"


def test_every_fork_of_a_campaign_needs_a_quiet_source(fresh: Fresh, process: Opener) -> None:
    directory = fresh("xfs")
    source = make_source(directory)
    paths = destinations(directory, 6)

    quiet = campaign(source, paths[:3], source_open="refuse")
    process.write(source / "disk.raw")
    in_use = campaign(source, paths[3:], source_open="refuse")

    assert (counts(quiet), counts(in_use)) == ((3, 0, 0), (0, 3, 0))
    assert set(codes(in_use).values()) == {"source_in_use"}
    assert leftovers(directory) == []


@pytest.mark.usefixtures("every_poll", "few_batches")
def test_a_file_that_is_opened_while_a_batch_is_cloned_fails_all_of_the_batch(
    fresh: Fresh, process: Opener, tmp_path: Path
) -> None:
    directory = fresh("xfs")
    source = make_source(directory)
    seconds: list[float] = []

    def poll(progress: Progress) -> None:
        if not seconds and progress["files_done"] == 3:  # in the second of four forks
            seconds.append(process.write(source / "disk.raw"))

    result, _ = campaign_with_ledger(
        source, destinations(directory, 4), tmp_path / "ledger", poll=poll, source_open="refuse"
    )

    assert len(seconds) == 1
    assert counts(result) == (0, 4, 0)
    assert set(codes(result).values()) == {"source_in_use"}


def test_without_the_right_to_lease_the_fork_fails(fresh: Fresh) -> None:
    directory = fresh("xfs")
    directory.chmod(0o777)
    source = make_source(directory)

    error = in_child(lambda: refused(source, directory / "fork", source_open="refuse"), user=NOBODY)
    for path in (source, *source.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    in_child(lambda: forked(source, directory / "own", source_open="refuse"), user=NOBODY)

    assert (error["code"], error["errno"]) == ("source_open_unsupported", errno.EACCES)
    assert "CAP_LEASE" in error["message"]


def test_on_a_filesystem_where_leases_miss_writers_the_fork_fails(fresh: Fresh, passthrough: Passthrough) -> None:
    for directory in (passthrough(fresh("xfs")), fresh("overlayfs")):
        source = make_source(directory)

        error = refused(source, directory / "fork", source_open="refuse")

        assert (error["code"], error["errno"]) == ("source_open_unsupported", errno.EOPNOTSUPP)


def test_is_open_for_writing_detects_a_writer(fresh: Fresh, passthrough: Passthrough) -> None:
    workdir = fresh("xfs")
    (workdir / "file").write_bytes(b"x")
    fd = os.open(workdir / "file", os.O_RDONLY)
    elsewhere = os.open(passthrough(workdir) / "file", os.O_RDONLY)
    try:
        before = is_open_for_writing(fd)
        with (workdir / "file").open("r+b"):
            during = is_open_for_writing(fd)
        after = is_open_for_writing(fd)
        with pytest.raises(LeasesUnknown):
            is_open_for_writing(elsewhere)
    finally:
        os.close(fd)
        os.close(elsewhere)

    assert (before, during, after) == (False, True, False)
