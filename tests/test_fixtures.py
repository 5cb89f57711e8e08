"""The fixtures work as described: a test on a filesystem or a Redis that is not real would prove nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest
from celery import Celery

from tasks.copier.kernel.syscalls import rename_noreplace
from tests.fixtures.filesystems import Fresh, Kind, OverlayOver, SmallTmpfs, filesystem_type
from tests.fixtures.fuse import Bindfs, Passthrough
from tests.fixtures.processes import PublicProgram, RunForkvm, StartWorker, end_group, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.support.extents import (
    allocated_bytes,
    allocated_bytes_of_tree,
    data_extents,
    fiemap,
    set_nocow,
    sharing,
)
from tests.support.guests import MIB, SKIPPED_BY_DEFAULT, GuestSizes, make_guest, make_sparse_file
from tests.support.requirements import require
from tests.support.tree import snapshot

_FICLONE = 0x40049409

_FSTYPES: dict[Kind, str] = {"xfs_noreflink": "xfs", "overlayfs": "overlay"}


def test_each_filesystem_has_its_type_and_is_empty(fs: Path, fs_kind: Kind) -> None:
    assert filesystem_type(fs) == _FSTYPES.get(fs_kind, fs_kind)
    assert list(fs.iterdir()) == []


def test_cp_reflinks_on_xfs_and_btrfs_and_every_extent_is_shared(reflink_fs: Path) -> None:
    make_sparse_file(reflink_fs / "a", 8 * MIB, 2 * MIB)
    assert sharing(reflink_fs / "a").shared == 0

    assert _cp_reflink(reflink_fs / "a", reflink_fs / "b") == 0

    assert sharing(reflink_fs / "a").whole
    assert sharing(reflink_fs / "b").whole
    assert sharing(reflink_fs / "b").mapped >= 2 * MIB


@pytest.mark.parametrize("kind", ["xfs_noreflink", "ext4", "tmpfs"])
def test_cp_cannot_reflink_on_the_others(kind: Kind, fresh: Fresh) -> None:
    directory = fresh(kind)
    make_sparse_file(directory / "a", MIB, MIB)

    assert _cp_reflink(directory / "a", directory / "b") != 0


def test_reflink_between_two_filesystems_is_exdev(fresh: Fresh) -> None:
    source, destination = fresh("xfs") / "a", fresh("btrfs") / "b"
    make_sparse_file(source, MIB, MIB)

    assert _ficlone(source, destination) == errno.EXDEV


def test_reflink_of_a_nocow_file_is_einval_among_files_that_can(fresh: Fresh) -> None:
    directory = fresh("btrfs")
    (directory / "nocow").touch()
    set_nocow(directory / "nocow")
    (directory / "nocow").write_bytes(os.urandom(MIB))
    (directory / "cow").write_bytes(os.urandom(MIB))

    assert _ficlone(directory / "nocow", directory / "a") == errno.EINVAL
    assert _ficlone(directory / "cow", directory / "b") is None


def test_overlayfs_reflinks_only_files_that_were_copied_up(overlay_over: OverlayOver, fresh: Fresh) -> None:
    lower = fresh("ext4")
    make_guest(lower / "guest")
    guest = overlay_over(lower) / "guest"
    with (guest / "state").open("a") as copied_up:
        copied_up.write("running\n")

    assert _ficlone(guest / "overlay.raw", guest / "a") == errno.EXDEV
    assert _ficlone(guest / "state", guest / "b") is None


def test_small_tmpfs_can_be_filled(small_tmpfs: SmallTmpfs) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        make_sparse_file(small_tmpfs(MIB) / "a", 2 * MIB, 2 * MIB)


def test_passthrough_shows_its_backing_directory_and_reports_all_bytes_as_data(
    passthrough: Passthrough, fresh: Fresh
) -> None:
    backing = fresh("xfs")
    make_guest(backing / "guest")
    point = passthrough(backing)

    assert filesystem_type(point).startswith("fuse")
    assert snapshot(point / "guest") == snapshot(backing / "guest")
    size = (point / "guest/overlay.raw").stat().st_size
    assert data_extents(point / "guest/overlay.raw") == [(0, size)]
    assert len(data_extents(backing / "guest/overlay.raw")) > 4


def test_passthrough_that_folds_names_keeps_the_first_spelling(passthrough: Passthrough, fresh: Fresh) -> None:
    point = passthrough(fresh("xfs"), "fold")
    (point / "Logs").mkdir()
    (point / "Logs/State").write_text("a")

    (point / "LOGS/STATE").write_text("b")

    assert (point / "Logs/State").read_text() == "b"
    assert [path.name for path in point.iterdir()] == ["Logs"]
    with pytest.raises(FileExistsError):
        (point / "logs").mkdir()


@pytest.mark.parametrize("refused", [False, True])
def test_passthrough_that_refuses_flags_can_only_rename_without(
    refused: bool, passthrough: Passthrough, fresh: Fresh
) -> None:
    point = passthrough(fresh("xfs"), *(["refuse_flags"] if refused else []))
    (point / "a").touch()

    fd = os.open(point, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)) if refused else nullcontext():
            rename_noreplace(fd, "a", fd, "b")
    finally:
        os.close(fd)

    assert [path.name for path in point.iterdir()] == (["a"] if refused else ["b"])


def test_open_file_that_is_unlinked_on_fuse_gets_another_name(
    passthrough: Passthrough, bindfs: Bindfs, fresh: Fresh
) -> None:
    for point, stays in (
        (passthrough(fresh("xfs")), False),
        (passthrough(fresh("xfs"), "silly"), True),
        (bindfs(fresh("xfs")), True),
    ):
        with (point / "lock").open("w"):
            (point / "lock").unlink()
            assert [path.name[:12] for path in point.iterdir()] == ([".fuse_hidden"] if stays else [])
        wait_until(lambda: not os.listdir(point), "the removal of the hidden name")  # noqa: B023 (called in this round)


def test_mounts_are_seen_by_our_processes_and_by_nobody_else(xfs: Path) -> None:
    ours = subprocess.run(["cat", "/proc/self/mounts"], capture_output=True, text=True, check=True).stdout
    theirs = Path("/proc/1/mounts").read_text()

    assert str(xfs) in ours
    assert str(xfs) not in theirs


def test_guest_has_the_sizes_asked_for_and_is_sparse(fs: Path) -> None:
    sizes = GuestSizes(overlay=256 * MIB, overlay_data=8 * MIB, memory=64 * MIB, memory_data=4 * MIB)

    guest = make_guest(fs / "guest", sizes)

    overlay = guest / "overlay.raw"
    assert overlay.stat().st_size == sizes.overlay
    extents = data_extents(overlay)
    assert len(extents) > 4
    assert extents[-1][1] > sizes.overlay // 2  # spread over the file
    assert 0.8 * sizes.overlay_data < sum(end - start for start, end in extents) <= sizes.overlay_data
    assert allocated_bytes(overlay) < 2 * sizes.overlay_data
    assert allocated_bytes_of_tree(guest) < 16 * MIB
    assert set(snapshot(guest)) > SKIPPED_BY_DEFAULT
    assert snapshot(guest)[b"firecracker.socket"].kind == "socket"


def test_one_seed_makes_one_content_and_another_another(tmp_path: Path) -> None:
    a, b, c = (snapshot(make_guest(tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))

    assert a[b"overlay.raw"].sha256 == b[b"overlay.raw"].sha256
    assert a[b"overlay.raw"].sha256 != c[b"overlay.raw"].sha256


def test_snapshots_of_a_tree_and_its_cp_a_copy_are_equal(fs: Path) -> None:
    source = make_guest(fs / "source")
    os.link(source / "state", source / "state.linked")
    (source / "current").symlink_to("snapshots/snapshot-latest")
    (source / os.fsdecode(b"not-utf8-\xff")).write_text("")
    os.setxattr(source / "config.json", "user.origin", b"scheduler")

    subprocess.run(["cp", "-a", source, fs / "fork"], check=True)

    assert snapshot(fs / "fork") == snapshot(source)
    assert snapshot(source)[b"state"].links == (b"state", b"state.linked")


@pytest.mark.parametrize(
    ("path", "change"),
    [
        pytest.param("state", lambda path: path.chmod(0o600), id="mode"),
        pytest.param("state", lambda path: os.utime(path, ns=(0, 1)), id="mtime"),
        pytest.param("state", lambda path: os.setxattr(path, "user.a", b"b"), id="xattr"),
        pytest.param("overlay.raw", lambda path: os.truncate(path, path.stat().st_size + 1), id="size"),
        pytest.param("overlay.raw", lambda path: _flip_a_bit(path), id="content"),
        pytest.param("config.json", lambda path: os.unlink(path), id="missing"),
    ],
)
def test_a_snapshot_changes_with_any_change_of_the_tree(path: str, change: object, fresh: Fresh) -> None:
    assert callable(change)
    source = make_guest(fresh("xfs") / "source")
    before = snapshot(source)

    change(source / path)

    assert snapshot(source) != before


def test_holes_and_written_zeros_are_the_same_content(fs: Path) -> None:
    (fs / "zeros").write_bytes(bytes(MIB))
    make_sparse_file(fs / "hole", MIB, 0)

    entries = snapshot(fs)

    assert entries[b"zeros"].sha256 == entries[b"hole"].sha256
    assert data_extents(fs / "hole") == []


def test_fiemap_lists_more_extents_than_one_call_returns(fresh: Fresh) -> None:
    path = fresh("xfs") / "a"
    with path.open("wb") as file:
        for block in range(600):
            os.pwrite(file.fileno(), b"x" * 4096, block * 8192)

    written = [extent.logical for extent in fiemap(path) if not extent.unwritten]

    assert written == [block * 8192 for block in range(600)]
    assert sharing(path).mapped == 600 * 4096


def test_missing_requirement_is_skipped_on_a_laptop_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="missing: a"):
        require(None, "a", "b")

    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="missing: a"):
        require(False, "a", "b")

    assert require(1, "a", "b") == 1


def test_redis_keeps_its_data_over_a_stop_and_a_kill(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.set("a", "1", ex=60)
        redis_server.stop()
        redis_server.start()
        client.set("b", "2", ex=60)
        redis_server.kill()
        redis_server.start()

        assert client.mget("a", "b") == ["1", "2"]
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_keys_without_a_ttl_are_leaks_except_kombus(redis_server: RedisServer, foreign_client: Celery) -> None:
    foreign_client.send_task("no.such.task", queue="forkvm")
    with redis_server.client() as client:
        client.set("stays", "1")
        client.set("goes", "1", ex=60)

        assert redis_server.leaked_keys() == ["forkvm (list)", "stays (string)"]

        client.delete("forkvm", "stays")
    assert redis_server.leaked_keys() == []


def test_foreign_client_reaches_broker_and_backend(foreign_client: Celery, redis_server: RedisServer) -> None:
    foreign_client.backend.store_result("fork-1", {"status": "succeeded"}, "SUCCESS")

    result = foreign_client.send_task("no.such.task", queue="forkvm", task_id="fork-1")

    assert result.get(timeout=5) == {"status": "succeeded"}
    with redis_server.client() as client:
        assert client.llen("forkvm") == 1
        client.delete("forkvm")


def test_public_program_runs_for_a_user_without_rights(public_program: PublicProgram) -> None:
    script = (
        "import json, os, sys, celery, tasks; "
        "print(json.dumps([os.getuid(), os.getgroups(), list(sys.version_info[:3]), list(tasks.__path__)]))"
    )
    done = subprocess.run(
        [public_program.command[0], "-c", script],
        env=public_program.environment,
        cwd="/",
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    tasks = str(public_program.directory / "program" / "tasks")
    assert json.loads(done.stdout) == [65534, [], list(sys.version_info[:3]), [tasks]]


@pytest.mark.parametrize("command", ["celery", "forkvm"])
def test_worker_is_started_with_its_children_and_none_runs_after_a_kill(
    command: Literal["celery", "forkvm"], start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker(tmp_path, concurrency=3, command=command)
    assert len(worker.children) == 3

    worker.kill()

    assert not worker.running
    assert worker.children == []


#: A process that leaves a child behind, which has a second thread, much memory and a lock.
_LEADER = """
import fcntl, os, sys, threading, time
if os.fork() == 0:
    held = open(sys.argv[1], "w")
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    memory = bytearray(100 << 20)
    print("locked", flush=True)
time.sleep(100)
"""


def test_no_process_of_an_ended_group_holds_a_lock(tmp_path: Path) -> None:
    """A process whose main thread has ended is a zombie, even while its other threads still hold its open files."""
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", _LEADER, str(tmp_path / "lock")], stdout=subprocess.PIPE, start_new_session=True
        ) as leader:
            assert leader.stdout is not None
            assert leader.stdout.readline() == b"locked\n"

            end_group(leader)

        with (tmp_path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_command_line_runs_as_root_or_another_user(run_forkvm: RunForkvm, mounts: Path) -> None:
    for user in (None, 65534):
        done = run_forkvm("--help", user=user)

        assert done.returncode == 0, done.stderr
        assert "Usage: forkvm" in done.stdout


def _cp_reflink(source: Path, destination: Path) -> int:
    return subprocess.run(["cp", "--reflink=always", source, destination], capture_output=True).returncode


def _ficlone(source: Path, destination: Path) -> int | None:
    """FICLONE into a new file. Returns the errno."""
    with source.open("rb") as reader, destination.open("xb") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
        except OSError as error:
            return error.errno
    return None


def _flip_a_bit(path: Path) -> None:
    """Flip a bit in the middle of the file's data, and keep its times."""
    status = path.stat()
    extents = data_extents(path)
    position = extents[len(extents) // 2][0]
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, position)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), position)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
