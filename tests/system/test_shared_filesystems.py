"""Workers and doctors of several hosts on one filesystem: they start only if all see one another's locks.

Two mounts of bindfs that show one directory simulate two hosts: bindfs leaves flock to the kernel, which manages it per
mount. With lock forwarding they share locks, like hosts that use a server.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.staging.shared_filesystems import marked, prove
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh
from tests.fixtures.fuse import Bindfs, Passthrough
from tests.fixtures.processes import RunForkvm, StartWorker, Worker, program_environment, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.support.engine.forks import forked
from tests.support.processor import LoadFreeStopwatch
from tests.support.requirements import require_command
from tests.support.tree import snapshot

#: Each worker here has a second root, `usable`: a worker does not start if none of its roots can publish a fork, and
#: bindfs refuses RENAME_NOREPLACE.
FORWARDED = ("--multithreaded", "--enable-lock-forwarding")


def markers(directory: Path) -> list[Path]:
    return sorted(directory.glob(".forkvm-worker-*"))


def checks(run_forkvm: RunForkvm, server: RedisServer, root: Path) -> dict[str, dict[str, Any]]:
    done = run_forkvm("doctor", "--json", env=program_environment(server, root))
    assert "Traceback" not in done.stderr
    return {check["subject"]: check for check in json.loads(done.stdout)["checks"]}


def test_a_second_host_that_does_not_see_the_locks_of_the_first_does_not_start(
    start_worker: StartWorker, run_forkvm: RunForkvm, redis_server: RedisServer, fresh: Fresh, bindfs: Bindfs
) -> None:
    backing, usable = fresh("ext4"), fresh("tmpfs")
    one, other = bindfs(backing), bindfs(backing)
    first = start_worker([one, usable], 1)
    assert "shows whether its locks (flock) are shared" in first.output()

    second = start_worker([other, usable], 1, wait=False)
    by_command = start_worker([other, usable], 1, command="forkvm", wait=False)

    assert (second.wait(), by_command.wait()) == (1, 1)
    for refused in (second, by_command):
        line = refused.output().splitlines()[-1]
        assert line.startswith(f"forkvm: {other}: locks (flock) are not shared: a process on {os.uname().nodename}")
        assert "NFS: version 4, without nolock" in line
        assert "Traceback" not in refused.output()
    found = checks(run_forkvm, redis_server, other)[f"locks in {other}"]
    assert (found["verdict"], "are not shared" in found["found"]) == ("bad", True)
    assert "FUSE: a filesystem that forwards flock" in found["fix"]
    assert first.running
    assert len(markers(backing)) == 1
    first.term()
    first.wait()
    assert markers(backing) == []


def test_hosts_that_see_each_others_locks_start_and_doctor_reports_it(
    start_worker: StartWorker, run_forkvm: RunForkvm, redis_server: RedisServer, fresh: Fresh, bindfs: Bindfs
) -> None:
    backing, usable = fresh("ext4"), fresh("tmpfs")
    one, other = bindfs(backing, *FORWARDED), bindfs(backing, *FORWARDED)
    alone = checks(run_forkvm, redis_server, other)[f"locks in {other}"]
    start_worker([one, usable], 1)

    second = start_worker([other, usable], 1)

    assert "cannot be tried" not in second.output()
    found = checks(run_forkvm, redis_server, other)[f"locks in {other}"]
    assert (alone["verdict"], found["verdict"]) == ("warn", "ok")
    assert "are shared" in found["found"]
    assert len(markers(backing)) == 2


def test_a_mount_below_a_root_is_tested_too(
    start_worker: StartWorker, run_forkvm: RunForkvm, redis_server: RedisServer, fresh: Fresh, bindfs: Bindfs
) -> None:
    backing, usable = fresh("ext4"), fresh("tmpfs")
    one, other = bindfs(backing), bindfs(backing)
    start_worker([one, usable], 1)

    refused = start_worker([other.parent, usable], 1, wait=False)  # both mounts are below it

    assert refused.wait() == 1
    assert "locks (flock) are not shared" in refused.output().splitlines()[-1]


def test_workers_of_one_mount_start_and_the_marker_of_a_killed_one_is_removed(
    start_worker: StartWorker, fresh: Fresh, bindfs: Bindfs
) -> None:
    point, usable = bindfs(fresh("ext4")), fresh("tmpfs")
    first = start_worker([point, usable], 1)
    (of_first,) = markers(point)
    first.kill()

    workers: list[Worker] = []
    stopwatch = LoadFreeStopwatch(lambda: [pid for worker in workers for pid in (worker.pid, *worker.children)])
    workers.append(start_worker([point, usable], 1))
    workers.append(start_worker([point, usable], 1))

    assert len(markers(point)) == 2
    assert of_first not in markers(point)
    assert stopwatch.seconds() < 30  # nothing was recorded


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4", "tmpfs", "overlayfs"])
def test_a_filesystem_of_one_host_gets_no_marker_and_no_check(
    start_worker: StartWorker, run_forkvm: RunForkvm, redis_server: RedisServer, fresh: Fresh, kind: Any
) -> None:
    workdir = fresh(kind)
    if kind == "xfs":
        worker = start_worker(workdir, 1)
        assert "flock" not in worker.output()

    assert not [subject for subject in checks(run_forkvm, redis_server, workdir) if subject.startswith("locks in")]
    assert list(workdir.iterdir()) == []


def test_a_fork_skips_markers(fresh: Fresh, bindfs: Bindfs) -> None:
    backing = fresh("ext4")
    point = bindfs(backing)
    (point / "source").mkdir()
    (point / "source" / "disk").write_bytes(b"data")
    fd = os.open(point / "source", os.O_RDONLY)
    with marked(fd):
        assert len(markers(point / "source")) == 1
        assert (markers(point / "source")[0].stat().st_mode & 0o7777) == 0o600
        forked(point / "source", backing / "clone")
    os.close(fd)

    assert set(snapshot(backing / "clone")) == {b".", b"disk"}


def test_a_name_of_a_marker_is_refused_as_a_destination(fresh: Fresh, run_forkvm: RunForkvm) -> None:
    workdir = fresh("tmpfs")
    (workdir / "source").mkdir()

    done = run_forkvm("fork", workdir / "source", workdir / ".forkvm-worker-0123456789abcdef")

    assert done.returncode == 2
    assert "invalid_request" in done.stderr


def _plant_link(path: Path, outside: Path) -> None:
    outside.write_text("theirs")
    path.symlink_to(outside)


def _plant_foreign(path: Path, outside: Path) -> None:
    path.touch(mode=0o600)
    os.chown(path, 65534, 65534)


def _plant_writable(path: Path, outside: Path) -> None:
    path.touch()
    path.chmod(0o666)


def _plant_hard_link(path: Path, outside: Path) -> None:
    outside.write_text("theirs")
    outside.chmod(0o600)
    path.hardlink_to(outside)


@pytest.mark.parametrize(
    "plant",
    [_plant_link, _plant_foreign, _plant_writable, _plant_hard_link, lambda path, _: os.mkfifo(path, 0o600)],
    ids=["symlink", "foreign owner", "foreign mode", "hard link", "FIFO"],
)
def test_foreign_entries_with_names_of_markers_are_ignored(fresh: Fresh, bindfs: Bindfs, plant: Any) -> None:
    backing = fresh("ext4")
    point = bindfs(backing)
    path = backing / ".forkvm-worker-0123456789abcdef"
    plant(path, backing / "outside")
    os.utime(path, (0, 0), follow_symlinks=False)
    fd = os.open(point, os.O_RDONLY)
    stopwatch = LoadFreeStopwatch(list)

    with marked(fd) as marker:
        proof = prove(marker)
    os.close(fd)

    assert (proof.unfenced, proof.fenced) == ((), ())
    assert stopwatch.seconds() < 2
    assert path.is_symlink() or path.exists()


def test_hostile_contents_of_a_marker_are_escaped_and_truncated(
    start_worker: StartWorker, fresh: Fresh, bindfs: Bindfs
) -> None:
    """A process of our own user simulates a live worker of another host; its lock can be acquired here."""
    backing = fresh("ext4")
    path = backing / ".forkvm-worker-0123456789abcdef"
    path.touch(mode=0o600)
    path.write_bytes(b"\x1b[2J\xff" + b"x" * 900 + b"\nview\n" + b"more" * 100_000)

    worker = start_worker(bindfs(backing), 1, wait=False)
    wait_until(lambda: len(markers(backing)) == 2 or not worker.running, "the worker's own marker")
    while worker.running:
        os.utime(path)
        time.sleep(0.1)

    line = worker.output().splitlines()[-1]
    assert worker.wait() == 1
    assert "locks (flock) are not shared" in line
    assert "\x1b" not in line
    assert len(line) < 1500


def test_gc_removes_only_markers_of_ended_workers(
    run_forkvm: RunForkvm, fresh: Fresh, bindfs: Bindfs, redis_server: RedisServer
) -> None:
    backing = fresh("ext4")
    point = bindfs(backing)
    dead, young, held = (backing / f".forkvm-worker-{n:016}" for n in range(3))
    for path in (dead, young, held):
        path.touch(mode=0o600)
    os.utime(dead, (0, 0))
    os.utime(held, (0, 0))
    with (point / held.name).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        done = run_forkvm("gc", point, env=program_environment(redis_server))

    assert done.stdout.splitlines()[0] == f"removed {point}/{dead.name}: its worker ended"
    assert markers(backing) == [young, held]


def test_a_worker_that_cannot_create_a_marker_starts_with_a_warning(
    start_worker: StartWorker, run_forkvm: RunForkvm, redis_server: RedisServer, fresh: Fresh, bindfs: Bindfs
) -> None:
    backing = fresh("ext4")
    point = bindfs(backing)
    chattr = require_command("chattr", "a directory in which nothing can be made")
    subprocess.run([chattr, "+i", backing], check=True)
    try:
        worker = start_worker(point, 1)

        assert "its locks (flock) cannot be checked: Operation not permitted (EPERM)" in worker.output()
        assert checks(run_forkvm, redis_server, point)[f"locks in {point}"]["verdict"] == "warn"
    finally:
        subprocess.run([chattr, "-i", backing], check=True)


def test_a_read_only_filesystem_needs_no_locks(
    run_forkvm: RunForkvm, redis_server: RedisServer, fresh: Fresh, bindfs: Bindfs
) -> None:
    point = bindfs(fresh("ext4"), "-r")

    assert checks(run_forkvm, redis_server, point)[f"locks in {point}"]["verdict"] == "ok"


def test_gc_keeps_the_staging_of_a_host_that_does_not_share_its_locks(
    run_forkvm: RunForkvm, redis_server: RedisServer, fresh: Fresh, passthrough: Passthrough
) -> None:
    backing = fresh("ext4")
    one, other = passthrough(backing), passthrough(backing)
    fd = os.open(one, os.O_RDONLY)
    with Staging.claim(fd, "a fork", 0) as staging, staging.with_heartbeat():
        os.utime(backing / staging.name, (0, 0))  # from now on only its lock is touched

        live = run_forkvm("gc", other, env=program_environment(redis_server))

    os.utime(backing / staging.name, (0, 0))
    dead = run_forkvm("gc", other, env=program_environment(redis_server))
    os.close(fd)
    assert live.stdout.startswith(f"kept {other}/{staging.name}: a process that does not share locks with this host")
    assert dead.stdout.startswith(f"removed {other}/{staging.name}")
    assert list(backing.iterdir()) == []
