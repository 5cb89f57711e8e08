"""A worker with the documented rights, and another user who may write in the destination's parent."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.copier.staging.control_directory import control_name
from tests.faults.rights import worker_of_few_rights
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import PublicProgram, RunForkvm, Worker, program_environment
from tests.support.engine.child_processes import NOBODY, Child, in_child
from tests.support.engine.forks import assert_alike
from tests.support.guests import MIB, SKIPPED_BY_DEFAULT, make_guest, make_sparse_file
from tests.support.outcome import LOGS
from tests.support.system.scheduler import Scheduler
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import stopped_in_the_middle
from tests.support.tree import snapshot

ATTACKER = 1000
#: Seconds within which a fork or its cancellation must end. A lock holder counts as paused after 10 s.
END_SECONDS = 30.0


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    """The guests of root, a file that only root can read, and a parent in which everybody may write."""
    workdir = fresh("xfs_noreflink")
    workdir.chmod(0o755)
    make_guest(workdir / "source")
    make_sparse_file(workdir / "source" / "disk.raw", 64 * MIB, 32 * MIB, seed=9)
    make_guest(workdir / "outside")
    (workdir / "outside" / "shadow").write_text("secret")
    (workdir / "outside" / "shadow").chmod(0o600)
    (workdir / "parent").mkdir()
    (workdir / "parent").chmod(0o777)
    return workdir


@pytest.fixture
def worker(
    own_scheduler: Scheduler,
    public_program: PublicProgram,
    mounts: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Worker]:
    log = tmp_path / "worker.log"
    request.node.stash[LOGS].append(log)
    with worker_of_few_rights(own_scheduler.server, public_program, mounts, log, {"FORKVM_INLINE_FILES": "0"}) as it:
        yield it
        own_scheduler.wait_quiet()


def plant_directory(control: Path, program: Path) -> None:
    """A complete staging directory, with a journal that leads out of it; `hold` locks and touches its lock file."""
    control.mkdir(mode=0o700)
    (control / "lock").touch()
    journal = {"spec": {"fork_id": "x"}, "control": control.stat().st_ino, "attempt": "d/../../outside"}
    (control / "journal").write_text(json.dumps(journal))


PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "directory": plant_directory,
    "file": lambda control, _: control.write_text("theirs"),
    "fifo": lambda control, _: os.mkfifo(control),
    "symlink": lambda control, outside: control.symlink_to(outside),
    "loop": lambda control, _: control.symlink_to(control.name),
}


@contextmanager
def holding(lock: Path, user: int) -> Iterator[None]:
    """Another process of `user` that holds an exclusive lock on a file and touches it repeatedly."""
    reader, writer = os.pipe()

    def hold() -> None:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(writer, b"!")
        while True:
            os.utime(fd)
            time.sleep(0.1)

    child = Child(hold, user=user)
    try:
        assert os.read(reader, 1) == b"!"
        yield
    finally:
        child.kill()
        os.close(reader)
        os.close(writer)


def test_entries_planted_by_another_user_end_forks_and_campaigns_at_once_and_are_kept(
    worker: Worker, own_scheduler: Scheduler, workdir: Path
) -> None:
    parent, outside = workdir / "parent", workdir / "outside"
    for kind, plant in PLANTED.items():
        for job in ("fork", "campaign"):
            control = parent / control_name(f"{job}-{kind}")
            in_child(lambda plant=plant, control=control: plant(control, outside), user=ATTACKER)  # type: ignore[misc]
    before, planted = snapshot(outside), snapshot(parent)
    began = time.monotonic()

    with holding(parent / control_name("fork-directory") / "lock", ATTACKER):
        forks = [
            own_scheduler.send({"source": str(workdir / "source"), "destination": str(parent / kind)}, f"fork-{kind}")
            for kind in PLANTED
        ]
        campaigns = [
            own_scheduler.app.send_task(
                "forkvm.campaign",
                kwargs={
                    "request": {"source": str(workdir / "source"), "destinations": [str(parent / f"c-{kind}")]},
                },
                task_id=f"campaign-{kind}",
                queue="forkvm",
            )
            for kind in PLANTED
        ]
        for sent in forks:
            message, result = own_scheduler.wait_failed(sent, END_SECONDS)
            assert "not usable as staging" in message
            assert result["status"] == "failed"
        for sent in campaigns:
            with pytest.raises(Exception, match="not usable as staging"):
                sent.get(timeout=END_SECONDS)

    assert time.monotonic() - began < END_SECONDS
    assert snapshot(outside) == before
    after = snapshot(parent)
    assert after.keys() == planted.keys()
    assert all(after[path].sha256 == planted[path].sha256 for path in planted)


@pytest.mark.parametrize("cancels", [False, True])
def test_a_lock_held_by_another_program_of_the_workers_user_is_taken_over(
    worker: Worker, own_scheduler: Scheduler, workdir: Path, cancels: bool, run_forkvm: RunForkvm, mounts: Path
) -> None:
    control = workdir / "parent" / control_name("held")

    def plant() -> None:
        control.mkdir(mode=0o700)

    in_child(plant, user=NOBODY)
    with holding(control / "lock", NOBODY):
        sent = own_scheduler.send(
            {"source": str(workdir / "source"), "destination": str(workdir / "parent" / "fork")}, "held"
        )
        if cancels:
            done = run_forkvm("cancel", "held", env=program_environment(own_scheduler.server, mounts))
            assert done.returncode == 0, done.stderr
            _, result = own_scheduler.wait_failed(sent, END_SECONDS)
            assert result["status"] == "cancelled"
            assert not (workdir / "parent" / "fork").exists()
        else:
            assert own_scheduler.wait(sent, END_SECONDS)["status"] == "succeeded"
            assert_alike(workdir / "source", workdir / "parent" / "fork", SKIPPED_BY_DEFAULT)


@pytest.mark.parametrize("deed", ["the control directory", "the tree", "a copy of the control directory"])
def test_staging_moved_by_another_user_between_two_chunks_fails_the_fork(
    worker: Worker, own_scheduler: Scheduler, workdir: Path, deed: str
) -> None:
    parent, outside = workdir / "parent", workdir / "outside"
    before = snapshot(outside)
    view = StagingView(parent, "moved")
    sent = own_scheduler.send({"source": str(workdir / "source"), "destination": str(parent / "fork")}, "moved")

    with stopped_in_the_middle(worker, view):
        journal = view.journal()
        tree = parent / f"{view.control.name}.{journal['attempt']}"

        def move() -> None:
            moved = tree if deed == "the tree" else view.control
            moved.rename(parent / "aside")
            moved.mkdir(mode=0o700)
            (moved / "theirs").touch()
            if deed != "the tree":
                fields = {name: value for name, value in journal.items() if name != "check"}  # anyone can omit it
                (moved / "journal").write_text(json.dumps({**fields, "attempt": "d/../../outside"}))

        if deed == "a copy of the control directory":
            view.control.rename(parent / "aside")
            shutil.copytree(parent / "aside", view.control)
            for path in (view.control, *view.control.iterdir()):
                os.chown(path, NOBODY, NOBODY)
        else:
            in_child(move, user=ATTACKER)

    _, result = own_scheduler.wait_failed(sent, END_SECONDS)
    assert result["status"] == "failed"
    assert result["error"] is not None
    assert result["error"]["code"] == "io_error"
    assert not (parent / "fork").exists()
    assert snapshot(outside) == before
    assert (parent / "aside").exists()
