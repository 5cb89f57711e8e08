"""`forkvm gc` with damaged, foreign and unreadable entries: each is reported, and all other staging is removed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.copier.fork_spec import ForkSpec
from tasks.copier.staging.control_directory import control_name
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh, bind_mounted
from tests.fixtures.fuse import Passthrough
from tests.fixtures.processes import PublicProgram, RunForkvm, forkvm_script
from tests.support.journals import rewrite_spec
from tests.support.requirements import require_command

OTHER = 1000
OLD = (86_400, 86_400)


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    return fresh("xfs")


def make_abandoned(parent: Path, fork_id: str) -> Path:
    """Staging of a local fork whose process was killed. Returns its control directory."""
    parent.mkdir(exist_ok=True)
    fd = os.open(parent, os.O_RDONLY)
    try:
        with Staging.claim(fd, fork_id, wait=0) as staging:
            spec = ForkSpec(fork_id=fork_id, source="/guests/a", destination=f"{parent}/{fork_id}")
            journal = staging.begin(spec.to_data(), None)
            os.close(staging.make_tree(journal))
    finally:
        os.close(fd)
    (parent / f"{control_name(fork_id)}.{journal.attempt}" / "disk").write_text("half")
    return parent / control_name(fork_id)


def stagings(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.name.startswith(".forkvm-")}


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is limited to 107 bytes
        try:
            listening.bind(path.name)
        finally:
            os.chdir(here)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


#: Defects in the files of a control directory that is ours, and the message for each.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "journal is a FIFO": (lambda control: replaced(control / "journal", os.mkfifo), "FIFO"),
    "journal is a socket": (lambda control: replaced(control / "journal", make_socket), "socket"),
    "journal is a directory": (lambda control: replaced(control / "journal", os.mkdir), "directory"),
    "journal is a symlink": (
        lambda control: replaced(control / "journal", lambda path: path.symlink_to("/etc/passwd")),
        "symlink",
    ),
    "journal has two names": (lambda control: os.link(control / "journal", control / "stop"), "2 names"),
    "journal is huge": (lambda control: replaced(control / "journal", make_huge), "bytes"),
    "journal is another user's": (lambda control: os.chown(control / "journal", OTHER, OTHER), "user 1000"),
    "journal is another fork's": (
        lambda control: rewrite_spec(control / "journal", fork_id="another"),
        "another fork",
    ),
    "lock is a FIFO": (lambda control: replaced(control / "lock", os.mkfifo), "FIFO"),
    "lock is a symlink": (
        lambda control: replaced(control / "lock", lambda path: path.symlink_to("journal")),
        "symlink",
    ),
    "others may enter it": (lambda control: control.chmod(0o777), "0777"),
    "another user's": (lambda control: os.chown(control, OTHER, OTHER), "user 1000"),
}

#: Entries at the path of a control directory or of a tree.
IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("precious"),
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "symlink": lambda path: path.symlink_to("/etc"),
}


def found_by_gc(run_forkvm: RunForkvm, workdir: Path, *, code: int = 0) -> dict[str, dict[str, str]]:
    done = run_forkvm("gc", workdir, "--json", timeout=30)
    assert done.returncode == code, done.stderr
    assert done.stderr == ""
    return {finding["path"]: finding for finding in json.loads(done.stdout)}


def test_all_bad_entries_are_reported_and_all_other_staging_is_removed(run_forkvm: RunForkvm, workdir: Path) -> None:
    # Given all bad entries, with abandoned staging before, between and after them
    kept: dict[Path, str] = {}
    abandoned: set[Path] = set()
    for n, (what, (damage, reason)) in enumerate(DAMAGE.items()):
        abandoned.add(make_abandoned(workdir, f"dead-{n}"))
        control = make_abandoned(workdir, f"bad-{n}")
        damage(control)
        kept[control] = reason
        assert what
    for n, (kind, make) in enumerate(IN_THE_WAY.items()):
        for name in (f".forkvm-{n:016x}", f".forkvm-{n + 16:016x}.{n:08x}"):
            make(workdir / name)
            kept[workdir / name] = kind
    theirs = workdir / f".forkvm-{99:016x}.01234567"
    theirs.mkdir(mode=0o700)
    (theirs / "disk").write_text("theirs")
    os.chown(theirs, OTHER, OTHER)
    kept[theirs] = "user 1000"
    abandoned |= {
        make_abandoned(workdir / os.fsdecode(b"not-utf8-\xff"), "deep"),
        make_abandoned(workdir / "last", "last"),
    }

    # When
    found = found_by_gc(run_forkvm, workdir)

    # Then
    for path, reason in kept.items():
        assert found[str(path)]["verdict"] == "kept", found[str(path)]
        assert reason in found[str(path)]["reason"]
        assert os.path.lexists(path)
    removed = {path for path, finding in found.items() if finding["verdict"] == "removed"}
    assert removed == {str(path) for path in abandoned}
    assert not any(path.exists() for path in abandoned)
    assert (theirs / "disk").read_text() == "theirs"


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b"[" * 1_000_000, b"1" * 100_000, b'{"spec": {}}', b"\xff"]
)
def test_staging_with_an_invalid_journal_is_removed_when_it_is_old(
    data: bytes, run_forkvm: RunForkvm, workdir: Path
) -> None:
    control, other = make_abandoned(workdir, "damaged"), make_abandoned(workdir, "other")
    (control / "journal").write_bytes(data)

    fresh = found_by_gc(run_forkvm, workdir)
    for path in (control / "lock", control):
        os.utime(path, OLD)
    old = found_by_gc(run_forkvm, workdir)

    assert (fresh[str(control)]["verdict"], fresh[str(other)]["verdict"]) == ("kept", "removed")
    assert old[str(control)]["verdict"] == "removed"
    assert stagings(workdir) == set()


def test_control_directory_with_foreign_entries_is_kept(run_forkvm: RunForkvm, workdir: Path) -> None:
    control = workdir / f".forkvm-{7:016x}"
    control.mkdir(mode=0o700)
    (control / "vm.raw").write_text("precious")
    found_by_gc(run_forkvm, workdir)
    os.utime(control, OLD)

    found = found_by_gc(run_forkvm, workdir)

    assert found[str(control)]["verdict"] == "kept"
    assert "vm.raw" in found[str(control)]["reason"]
    assert (control / "vm.raw").read_text() == "precious"


@pytest.mark.parametrize(
    ("mode", "owner", "removed"),
    [(0o755, 0, True), (0o1777, 0, True), (0o777, 0, False), (0o775, 0, False), (0o755, OTHER, False)],
)
def test_private_directory_that_another_user_may_have_moved_is_kept(
    mode: int, owner: int, removed: bool, run_forkvm: RunForkvm, workdir: Path
) -> None:
    tree, control = workdir / f".forkvm-{1:016x}.01234567", workdir / f".forkvm-{2:016x}.01234567"
    for directory, name in ((tree, "disk"), (control, "lock")):
        directory.mkdir(mode=0o700)
        (directory / name).touch()
    workdir.chmod(mode)
    os.chown(workdir, owner, owner)

    found = found_by_gc(run_forkvm, workdir)

    assert found[str(tree)]["verdict"] == ("removed" if removed else "kept")
    assert found[str(control)]["verdict"] == "removed"  # it contains only the files of a control directory
    assert tree.exists() != removed


def test_tree_that_was_replaced_by_another_directory_is_kept(run_forkvm: RunForkvm, workdir: Path) -> None:
    control = make_abandoned(workdir, "f1")
    (tree,) = workdir.glob(f"{control.name}.*")
    tree.rename(workdir / "vm-2")
    tree.mkdir()
    (tree / "precious").write_text("theirs")

    found_by_gc(run_forkvm, workdir)

    assert (tree / "precious").read_text() == "theirs"
    assert (workdir / "vm-2/disk").read_text() == "half"


@pytest.fixture
def immutable() -> Iterator[Callable[[Path], None]]:
    """Make files immutable during a test."""
    chattr = require_command("chattr", "immutable files")
    paths: list[Path] = []

    def make(path: Path) -> None:
        subprocess.run([chattr, "+i", path], check=True)
        paths.append(path)

    yield make
    for path in paths:
        subprocess.run([chattr, "-i", path], check=True)


@pytest.mark.parametrize("what", ["", "journal", "tree"])
def test_immutable_staging_is_a_failure_and_the_rest_is_removed(
    what: str, run_forkvm: RunForkvm, workdir: Path, immutable: Callable[[Path], None]
) -> None:
    control, others = make_abandoned(workdir, "f1"), {make_abandoned(workdir, f"other-{n}") for n in range(5)}
    (tree,) = workdir.glob(f"{control.name}.*")
    immutable(tree / "disk" if what == "tree" else control / what)

    found = found_by_gc(run_forkvm, workdir, code=1)

    assert found[str(control)]["verdict"] == "failed"
    assert "EPERM" in found[str(control)]["reason"]
    assert {path for path, finding in found.items() if finding["verdict"] == "removed"} == {str(o) for o in others}


def test_mount_in_a_tree_is_a_failure_and_the_mounted_files_are_kept(
    run_forkvm: RunForkvm, workdir: Path, fresh: Fresh
) -> None:
    control, other = make_abandoned(workdir, "f1"), make_abandoned(workdir, "other")
    (tree,) = workdir.glob(f"{control.name}.*")
    precious = fresh("ext4")
    (precious / "disk").write_text("theirs")

    with bind_mounted(precious, tree / "mounted"):
        found = found_by_gc(run_forkvm, workdir, code=1)

    assert found[str(control)]["verdict"] == "failed"
    assert "mounted" in found[str(control)]["reason"]
    assert (precious / "disk").read_text() == "theirs"
    assert not other.exists()


def test_staging_with_an_open_file_on_fuse_is_a_failure_and_gc_ends(
    run_forkvm: RunForkvm, passthrough: Passthrough, workdir: Path
) -> None:
    workdir = passthrough(workdir, "silly")
    control, other = make_abandoned(workdir, "f1"), make_abandoned(workdir, "other")
    (tree,) = workdir.glob(f"{control.name}.*")

    with (tree / "disk").open():
        busy = found_by_gc(run_forkvm, workdir, code=1)
    free = found_by_gc(run_forkvm, workdir)

    assert (busy[str(control)]["verdict"], busy[str(other)]["verdict"]) == ("failed", "removed")
    assert "keeps files in it open" in busy[str(control)]["reason"]
    assert free[str(control)]["verdict"] == "removed"
    assert stagings(workdir) == set()


def test_unreadable_staging_is_reported_to_an_ordinary_user_and_the_users_own_is_removed(
    run_forkvm: RunForkvm, public_program: PublicProgram, workdir: Path
) -> None:
    theirs, closed = make_abandoned(workdir, "theirs"), workdir / "closed"
    closed.mkdir(mode=0o700)
    own = make_abandoned(workdir, "own")
    for path in (own, *own.iterdir(), *workdir.glob(f"{own.name}.*"), *workdir.glob(f"{own.name}.*/*")):
        os.chown(path, 65534, 65534)
    workdir.chmod(0o1777)

    done = run_forkvm("gc", workdir, "--json", user=65534)

    found = {finding["path"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1  # a directory was not searched
    assert (found[str(own)]["verdict"], found[str(theirs)]["verdict"]) == ("removed", "kept")
    assert found[str(closed)]["verdict"] == "failed"
    assert "EACCES" in found[str(closed)]["reason"]


@pytest.mark.parametrize(
    ("path", "inject", "verdict"),
    [
        ("{control}", "getdents64:error=EIO", "failed"),
        ("{sub}", "getdents64:error=EIO", "failed"),
        ("{sub}", "getdents64:error=ENOENT", None),
    ],
)
def test_disk_error_is_a_failure_of_one_entry(path: str, inject: str, verdict: str | None, workdir: Path) -> None:
    strace = require_command("strace", "the injection of errors")
    control, other, last = (
        make_abandoned(workdir, "f1"),
        make_abandoned(workdir, "other"),
        make_abandoned(workdir / "last", "last"),
    )
    make_abandoned(workdir / "sub", "sub")
    bad = path.format(control=control, sub=workdir / "sub")

    tracing = ["-o", "/dev/null", "-e", "trace=getdents64", "-e", f"inject={inject}", "-P", bad]
    done = subprocess.run(
        [strace, *tracing, forkvm_script(), "gc", workdir, "--json"],
        capture_output=True,
        text=True,
        timeout=30,
    )

    found = {finding["path"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == (1 if verdict == "failed" else 0)
    if verdict is not None:
        assert found[bad]["verdict"] == verdict
        assert "EIO" in found[bad]["reason"]
    assert not other.exists()
    assert not last.exists()


def test_root_that_cannot_be_opened_does_not_end_the_search_of_the_others(run_forkvm: RunForkvm, workdir: Path) -> None:
    abandoned = make_abandoned(workdir / "b", "f1")

    done = run_forkvm("gc", workdir / "a", workdir / "b")

    assert done.returncode == 1
    assert f"failed {workdir}/a: " in done.stdout
    assert "1 removed, 0 kept, 1 failed" in done.stdout
    assert not abandoned.exists()
