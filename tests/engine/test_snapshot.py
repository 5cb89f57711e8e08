"""A btrfs subvolume is forked by one snapshot where that gives the same fork, else file by file."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tasks.copier.kernel import syscalls
from tasks.copier.progress import Progress
from tests.fixtures.filesystems import Fresh, bind_mounted, make_subvolume
from tests.support.engine.file_results import assert_balanced
from tests.support.engine.forks import (
    MIB,
    assert_alike,
    fork_with_ledger,
    forked,
    leftovers,
    refused,
    statuses,
)
from tests.support.engine.snapshots import by_snapshot, file_by_file, is_subvolume, make_subvolume_guest
from tests.support.engine.traced_forks import trace_fork
from tests.support.extents import set_lock, set_nocow, sharing
from tests.support.guests import SKIPPED_BY_DEFAULT
from tests.support.requirements import require_command
from tests.support.sources import ACCESS_ACL, DEFAULT_ACL, acl, age, make_everything
from tests.support.tree import snapshot


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("btrfs")


@pytest.fixture
def source(directory: Path) -> Path:
    return make_subvolume_guest(directory)


@pytest.fixture(scope="session")
def strace() -> str:
    return require_command("strace", "the injection of errors")


def test_the_numbers_of_the_calls_are_the_kernels() -> None:
    assert syscalls.BTRFS_IOC_SNAP_CREATE_V2 == 0x50009417
    assert syscalls.BTRFS_IOC_SNAP_DESTROY == 0x5000940F
    assert syscalls.BTRFS_IOC_SNAP_DESTROY_V2 == 0x5000943F
    assert syscalls.BTRFS_IOC_GET_SUBVOL_INFO == 0x81F8943C


# -- the result


def test_a_snapshot_equals_a_fork_made_file_by_file(directory: Path) -> None:
    source = make_everything(make_subvolume(directory / "source"))
    os.setxattr(source, ACCESS_ACL, acl(7, 5, 1, users=[(1234, 7)]))
    os.setxattr(source, DEFAULT_ACL, acl(7, 5, 0, users=[(4321, 7)]))
    os.chown(source, 77, 88)
    source.chmod(0o2751)
    age(source)

    whole = fork_with_ledger(source, directory / "whole")
    by_files = fork_with_ledger(source, directory / "by-files", fork_id="fork-2", snapshot="never")

    assert _atimes(directory / "whole") == _atimes(directory / "by-files")  # first, since comparing reads the files
    assert (by_files.result["subvolume"], whole.result["subvolume"]) == (False, True)
    assert (is_subvolume(directory / "by-files"), is_subvolume(directory / "whole")) == (False, True)
    assert_alike(source, directory / "whole", SKIPPED_BY_DEFAULT)
    assert_alike(directory / "by-files", directory / "whole")
    assert_balanced(whole, snapshot(source))
    assert whole.result["files"] == by_files.result["files"]
    assert whole.result["bytes"] == by_files.result["bytes"]
    methods = {path: one["method"] for path, one in by_files.files.items()}
    found = {path: one["method"].replace("snapshot", "reflink") for path, one in whole.files.items()}
    assert found == methods
    assert {path: one["reason"] for path, one in whole.files.items()} == {
        path: one["reason"] for path, one in by_files.files.items()
    }
    assert leftovers(directory) == []


def _atimes(root: Path) -> dict[bytes, int]:
    return {path: status.st_atime_ns for path, status in statuses(root)}


def test_skipped_entries_are_removed_and_times_of_their_directories_are_preserved(
    directory: Path, source: Path
) -> None:
    for name in ("deep/kept/gone/far", "deep/empty"):
        (source / name).mkdir(parents=True)
    (source / "deep/kept/gone/far/file").touch()
    (source / "deep/kept/also-gone").touch()
    (source / "deep/empty/only.tmp").touch()
    os.link(source / "deep/kept/also-gone", source / "deep/kept/second-name")
    for path in ("deep/kept", "deep/empty", "deep", "."):
        age(source / path)

    result = by_snapshot(
        source,
        directory / "fork",
        skip=["deep/kept/gone", "deep/kept/also-gone"],
        exclude=["*.tmp", "/logs/", "*.sock"],
    )

    left_out = [b"deep/kept/gone", b"deep/kept/also-gone", b"deep/empty/only.tmp", *SKIPPED_BY_DEFAULT]
    assert_alike(source, directory / "fork", left_out)
    assert result["files"]["skipped"] == 7


def test_a_snapshot_shares_every_extent_and_keeps_nocow_files_so(directory: Path, source: Path) -> None:
    (source / "nocow").touch()
    set_nocow(source / "nocow")
    (source / "nocow").write_bytes(os.urandom(MIB))

    result = by_snapshot(source, directory / "fork")

    assert (result["files"]["copied"], result["fallback"]) == (0, None)
    assert all(sharing(directory / "fork" / name).whole for name in ("nocow", "overlay.raw"))


def test_a_source_that_changes_is_forked_as_it_was_at_one_moment(
    directory: Path, source: Path, every_poll: None
) -> None:
    before = snapshot(source)

    def change(progress: Progress) -> None:
        if progress["phase"] == "copy":
            (source / "overlay.raw").write_bytes(b"the machine goes on")
            (source / "metadata.json").unlink(missing_ok=True)
            (source / "new").touch()

    by_snapshot(source, directory / "fork", poll=change, exclude=[])

    after = snapshot(directory / "fork")
    sockets = {path for path, entry in before.items() if entry.kind == "socket"}
    assert after == {path: entry for path, entry in before.items() if path not in sockets}
    assert (source / "new").exists()


def test_the_progress_of_a_snapshot_never_exceeds_its_totals(directory: Path, source: Path, every_poll: None) -> None:
    records: list[Progress] = []

    result = by_snapshot(source, directory / "fork", poll=lambda progress: records.append(progress.copy()))

    assert all(progress["files_done"] <= progress["files_total"] for progress in records)
    assert all(progress["bytes_done"] <= progress["bytes_total"] for progress in records)
    assert records[-1] == {
        "phase": "publish",
        "files_done": result["files"]["total"],
        "files_total": result["files"]["total"],
        "bytes_done": result["bytes"]["logical"],
        "bytes_total": result["bytes"]["logical"],
    }


def test_the_result_of_a_verified_and_synced_snapshot(directory: Path, source: Path) -> None:
    by_snapshot(source, directory / "fork", verify="content", durability="sync")

    assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)


def test_a_durable_snapshot_is_synced_before_it_is_published_and_its_name_before_it_is_reported(
    strace: str, directory: Path, source: Path
) -> None:
    traced = trace_fork(
        strace, source, directory / "fork", calls="ioctl,syncfs,fsync,renameat,renameat2", durability="sync"
    )

    steps = ["snapshot", "exchange", "tree", "journal", "journal", "publish", "parent"]
    assert traced.durable_steps(directory) == steps
    assert is_subvolume(directory / "fork")


@pytest.mark.parametrize(("quietly", "code"), [(False, "source_changed"), (True, "verify_failed")])
def test_verify_finds_differences_from_the_source(
    directory: Path, source: Path, quietly: bool, code: str, every_poll: None
) -> None:
    path = source / "snapshots" / "snapshot-latest" / "memory"

    def write(progress: Progress) -> None:
        if progress["phase"] == "copy" and progress["files_done"] == 1:
            before = path.stat()
            with path.open("r+b") as file:
                file.write(b"another machine")
            if quietly:
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    error = refused(source, directory / "fork", poll=write, verify="content")

    assert error["code"] == code
    assert error["path"].endswith("snapshots/snapshot-latest/memory")


def test_a_fork_of_a_fork_of_a_mounted_subvolume_and_of_a_read_only_one(directory: Path, source: Path) -> None:
    by_snapshot(source, directory / "fork")
    by_snapshot(directory / "fork", directory / "fork-of-fork")
    with bind_mounted(source, directory / "mounted"):
        by_snapshot(directory / "mounted", directory / "fork-of-mount")
    subprocess.run(["btrfs", "property", "set", source, "ro", "true"], check=True)
    by_snapshot(source, directory / "fork-of-read-only")
    subprocess.run(["btrfs", "property", "set", source, "ro", "false"], check=True)

    for fork_of in ("fork", "mount", "read-only"):
        assert_alike(source, directory / f"fork-of-{fork_of}", SKIPPED_BY_DEFAULT)
        (directory / f"fork-of-{fork_of}" / "state").write_bytes(b"the machine can write")


# -- fallbacks


@pytest.mark.parametrize(
    "arguments",
    [
        {"snapshot": "never"},
        {"reflink": "never"},
        {"preserve": frozenset({"mode", "ownership", "timestamps", "xattrs"})},
        {"preserve": frozenset({"hardlinks"})},
    ],
    ids=["snapshot=never", "reflink=never", "without hard links", "hard links alone"],
)
def test_options_that_a_snapshot_does_not_support_are_honoured_file_by_file(
    directory: Path, source: Path, arguments: dict[str, object]
) -> None:
    result = file_by_file(source, directory / "fork", **arguments)

    assert result["files"]["copied" if "reflink" in arguments else "reflinked"] > 5


def test_reflink_always_is_satisfied_by_a_snapshot(directory: Path, source: Path) -> None:
    assert by_snapshot(source, directory / "fork", reflink="always")["files"]["reflinked"] == 6


def test_a_plain_directory_of_a_subvolume_is_cloned_file_by_file(directory: Path, source: Path) -> None:
    result = file_by_file(source / "snapshots", directory / "fork")

    assert result["files"]["directories"] == 1
    assert_alike(source / "snapshots", directory / "fork", [b"snapshot-latest/memory.lz4.tmp"])


def test_a_destination_on_another_filesystem_gets_a_copy(source: Path, fresh: Fresh) -> None:
    destination = fresh("xfs") / "fork"

    result = forked(source, destination)

    assert (result["subvolume"], result["files"]["reflinked"], result["files"]["copied"]) == (False, 0, 6)
    assert_alike(source, destination, SKIPPED_BY_DEFAULT)


@pytest.mark.parametrize("what", ["subvolume", "mount", "immutable", "immutable top", "append-only"])
def test_sources_that_a_snapshot_would_change_are_cloned_file_by_file(
    directory: Path, source: Path, fresh: Fresh, what: str
) -> None:
    with ExitStack() as undo:
        _add(what, source, fresh("xfs"), undo)

        result = file_by_file(source, directory / "fork")

        assert result["files"]["failed"] == 0
        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
        (directory / "fork" / "overlay.raw").write_bytes(b"the machine can write to its disk")


def _add(what: str, source: Path, elsewhere: Path, undo: ExitStack) -> None:
    """Add an entry to a source that a snapshot does not carry over as a reflink does."""
    (source / "in the way").mkdir()
    if what == "subvolume":
        make_subvolume(source / "in the way" / "nested")
        (source / "in the way" / "nested" / "file").write_bytes(b"not in a snapshot")
    elif what == "mount":
        (elsewhere / "file").write_bytes(b"not in a snapshot")
        undo.enter_context(bind_mounted(elsewhere, source / "in the way" / "a\tmount"))
    else:
        lock, _, of = what.partition(" ")
        path = source if of == "top" else source / "overlay.raw"
        set_lock(path, lock, on=True)
        undo.callback(set_lock, path, lock, on=False)


@pytest.mark.parametrize("kind", ["subvolume", "immutable"])
def test_skipped_entries_may_be_of_kinds_that_a_snapshot_does_not_preserve(
    directory: Path, source: Path, kind: str
) -> None:
    """A nested subvolume is an empty directory of the snapshot, which is removed; an immutable file there stays."""
    with ExitStack() as undo:
        if kind == "subvolume":
            make_subvolume(source / "logs" / "old")
        else:
            set_lock(source / "logs" / "console.log", "immutable", on=True)
            undo.callback(set_lock, source / "logs" / "console.log", "immutable", on=False)

        (by_snapshot if kind == "subvolume" else file_by_file)(source, directory / "fork")

    assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)


def test_a_fifo_fails_the_fork_and_nothing_of_the_snapshot_is_left(directory: Path, source: Path) -> None:
    os.mkfifo(source / "snapshots" / "fifo")

    error = refused(source, directory / "fork")

    assert (error["code"], error["path"]) == ("unsupported_file_type", str(source / "snapshots" / "fifo"))
