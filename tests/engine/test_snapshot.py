"""A source that is a btrfs subvolume: cloned whole by one snapshot where that comes to the same, else as any other."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.lifecycle import start
from tasks.copier.fork_spec import ForkResult
from tasks.copier.kernel import syscalls
from tasks.copier.progress import Progress, Ticker
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import control_name
from tasks.copier.staging.gc import collect
from tasks.copier.staging.journal import Phase
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.takeover import take_over
from tests.engine.test_books import assert_balanced
from tests.fixtures.filesystems import Fresh, bind_mounted, make_subvolume
from tests.fixtures.processes import wait_until
from tests.support.engine.child_processes import NOBODY, Child, in_child
from tests.support.engine.forks import (
    INLINE,
    MIB,
    Books,
    assert_alike,
    fork,
    fork_with_books,
    forked,
    go_on,
    leftovers,
    refused,
    spec_of,
    statuses,
)
from tests.support.engine.traced_forks import control, in_tree, trace_fork
from tests.support.extents import set_lock, set_nocow, sharing
from tests.support.guests import SKIPPED_BY_DEFAULT, GuestSizes, make_guest, make_sparse_file
from tests.support.requirements import require_command
from tests.support.sources import ACCESS_ACL, DEFAULT_ACL, acl, age, make_everything
from tests.support.tree import snapshot

SIZES = GuestSizes(overlay=8 * MIB, overlay_data=2 * MIB, memory=8 * MIB, memory_data=MIB)


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("btrfs")


@pytest.fixture
def source(directory: Path) -> Path:
    """A guest directory that is a subvolume; its top is open to all."""
    source = make_subvolume(directory / "source")
    make_guest(source, SIZES).chmod(0o777)
    os.link(source / "state", source / "state.linked")
    os.sync()  # or the snapshot does it, each time
    return source


@pytest.fixture(scope="session")
def strace() -> str:
    return require_command("strace", "the injection of errors")


@pytest.fixture
def home(directory: Path) -> Path:
    """A directory of an ordinary user."""
    home = directory / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    return home


def is_subvolume(path: Path) -> bool:
    return path.stat().st_ino == 256


def by_snapshot(source: Path, destination: Path, **wishes: object) -> ForkResult:
    """One fork that must be made by a snapshot."""
    result = forked(source, destination, **wishes)
    assert result["subvolume"]
    assert is_subvolume(destination)
    return result


def file_by_file(source: Path, destination: Path, **wishes: object) -> ForkResult:
    """One fork that must be made without a snapshot."""
    result = forked(source, destination, **wishes)
    assert not result["subvolume"]
    assert not is_subvolume(destination)
    return result


def test_the_numbers_of_the_calls_are_the_kernels() -> None:
    assert syscalls.BTRFS_IOC_SNAP_CREATE_V2 == 0x50009417
    assert syscalls.BTRFS_IOC_SNAP_DESTROY == 0x5000940F
    assert syscalls.BTRFS_IOC_SNAP_DESTROY_V2 == 0x5000943F
    assert syscalls.BTRFS_IOC_GET_SUBVOL_INFO == 0x81F8943C


# -- what comes out


def test_a_snapshot_is_entry_by_entry_what_clones_of_all_entries_are(directory: Path) -> None:
    source = make_everything(make_subvolume(directory / "source"))
    os.setxattr(source, ACCESS_ACL, acl(7, 5, 1, users=[(1234, 7)]))
    os.setxattr(source, DEFAULT_ACL, acl(7, 5, 0, users=[(4321, 7)]))
    os.chown(source, 77, 88)
    source.chmod(0o2751)
    age(source)

    whole = fork_with_books(source, directory / "whole")
    by_files = fork_with_books(source, directory / "by-files", fork_id="fork-2", snapshot="never")

    assert _atimes(directory / "whole") == _atimes(directory / "by-files")  # first: to compare is to read
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


def test_what_is_left_out_goes_and_its_directories_times_stay(directory: Path, source: Path) -> None:
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


def test_a_source_that_changes_meanwhile_is_forked_as_it_was_at_one_moment(
    directory: Path, source: Path, every_beat: None
) -> None:
    before = snapshot(source)

    def change(progress: Progress) -> None:
        if progress["phase"] == "copy":
            (source / "overlay.raw").write_bytes(b"the machine goes on")
            (source / "metadata.json").unlink(missing_ok=True)
            (source / "new").touch()

    by_snapshot(source, directory / "fork", beat=change, exclude=[])

    after = snapshot(directory / "fork")
    sockets = {path for path, entry in before.items() if entry.kind == "socket"}
    assert after == {path: entry for path, entry in before.items() if path not in sockets}
    assert (source / "new").exists()


def test_the_progress_of_a_snapshot_never_runs_ahead_of_what_is_known(
    directory: Path, source: Path, every_beat: None
) -> None:
    told: list[Progress] = []

    result = by_snapshot(source, directory / "fork", beat=lambda progress: told.append(progress.copy()))

    assert all(progress["files_done"] <= progress["files_total"] for progress in told)
    assert all(progress["bytes_done"] <= progress["bytes_total"] for progress in told)
    assert told[-1] == {
        "phase": "publish",
        "files_done": result["files"]["total"],
        "files_total": result["files"]["total"],
        "bytes_done": result["bytes"]["logical"],
        "bytes_total": result["bytes"]["logical"],
    }


def test_the_result_of_a_verified_and_synced_snapshot(directory: Path, source: Path) -> None:
    by_snapshot(source, directory / "fork", verify="content", durability="sync")

    assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)


def test_a_durable_snapshot_is_on_its_disk_before_it_is_published_and_its_name_before_it_is_done(
    strace: str, directory: Path, source: Path
) -> None:
    traced = trace_fork(
        strace, source, directory / "fork", calls="ioctl,syncfs,fsync,renameat,renameat2", durability="sync"
    )

    steps = ["snapshot", "exchange", "tree", "journal", "journal", "publish", "parent"]
    assert traced.durable_steps(directory) == steps
    assert is_subvolume(directory / "fork")


@pytest.mark.parametrize(("quietly", "code"), [(False, "source_changed"), (True, "verify_failed")])
def test_verify_finds_what_differs_from_the_source(
    directory: Path, source: Path, quietly: bool, code: str, every_beat: None
) -> None:
    path = source / "snapshots" / "snapshot-latest" / "memory"

    def write(progress: Progress) -> None:
        if progress["phase"] == "copy" and progress["files_done"] == 1:
            before = path.stat()
            with path.open("r+b") as file:
                file.write(b"another machine")
            if quietly:
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    error = refused(source, directory / "fork", beat=write, verify="content")

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


# -- where the ladder goes on below


@pytest.mark.parametrize(
    "wishes",
    [
        {"snapshot": "never"},
        {"reflink": "never"},
        {"preserve": frozenset({"mode", "ownership", "timestamps", "xattrs"})},
        {"preserve": frozenset({"hardlinks"})},
    ],
    ids=["snapshot=never", "reflink=never", "without hard links", "hard links alone"],
)
def test_a_wish_that_a_snapshot_cannot_fulfil_is_fulfilled_without(
    directory: Path, source: Path, wishes: dict[str, object]
) -> None:
    result = file_by_file(source, directory / "fork", **wishes)

    assert result["files"]["copied" if "reflink" in wishes else "reflinked"] > 5


def test_always_a_reflink_is_one_by_snapshot_too(directory: Path, source: Path) -> None:
    assert by_snapshot(source, directory / "fork", reflink="always")["files"]["reflinked"] == 6


def test_a_plain_directory_of_a_subvolume_is_cloned_as_ever(directory: Path, source: Path) -> None:
    result = file_by_file(source / "snapshots", directory / "fork")

    assert result["files"]["directories"] == 1
    assert_alike(source / "snapshots", directory / "fork", [b"snapshot-latest/memory.lz4.tmp"])


def test_a_destination_on_another_filesystem_gets_a_copy(source: Path, fresh: Fresh) -> None:
    destination = fresh("xfs") / "fork"

    result = forked(source, destination)

    assert (result["subvolume"], result["files"]["reflinked"], result["files"]["copied"]) == (False, 0, 6)
    assert_alike(source, destination, SKIPPED_BY_DEFAULT)


@pytest.mark.parametrize("what", ["subvolume", "mount", "immutable", "immutable top", "append-only"])
def test_what_a_snapshot_would_have_otherwise_is_cloned_file_by_file(
    directory: Path, source: Path, fresh: Fresh, what: str
) -> None:
    with ExitStack() as undo:
        _add(what, source, fresh("xfs"), undo)

        result = file_by_file(source, directory / "fork")

        assert result["files"]["failed"] == 0
        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
        (directory / "fork" / "overlay.raw").write_bytes(b"the machine can write to its disk")


def _add(what: str, source: Path, elsewhere: Path, undo: ExitStack) -> None:
    """Put what a snapshot does not carry over as a reflink does into a source."""
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
def test_what_is_left_out_may_be_what_a_snapshot_does_not_carry_over(directory: Path, source: Path, kind: str) -> None:
    """A subvolume in it is an empty directory of the snapshot, which goes; an immutable file there cannot go."""
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


# -- what the kernel may answer

#: In the control directory: first whether a subvolume may be removed is asked, then the snapshot is made.
_ASKED, _MADE = 1, 2


@pytest.mark.parametrize("name", ["EPERM", "EXDEV", "EINVAL", "ETXTBSY", "EOPNOTSUPP", "EAGAIN"])
def test_a_refused_snapshot_falls_down_the_ladder(strace: str, directory: Path, source: Path, name: str) -> None:
    fork = directory / "fork"
    traced = trace_fork(
        strace, source, fork, calls="ioctl", inject=[f"ioctl:error={name}:when={_MADE}"], paths=[control(fork)]
    )

    assert traced.calls("SNAP_CREATE") == traced.calls("(INJECTED)") == 1
    assert {one["method"] for one in traced.files.values()} == {"reflink", "hardlink", "mkdir", "skip"}
    assert_alike(source, fork, SKIPPED_BY_DEFAULT)
    assert leftovers(directory) == []


def test_a_snapshot_is_not_written_to_without_need(strace: str, directory: Path) -> None:
    source, fork = make_subvolume(directory / "source"), directory / "fork"
    (source / "below").mkdir()
    make_sparse_file(source / "below" / "disk.raw", 8 * MIB, MIB)
    os.utime(source / "below", (86_400, 86_400))

    traced = trace_fork(
        strace,
        source,
        fork,
        calls="fchmod,fchmodat,utimensat,fsetxattr,fchown",
        paths=[control(fork, "snapshot"), control(fork, "snapshot") / "below", in_tree(fork)],
    )

    assert traced.result is not None
    assert traced.result["subvolume"]
    made, *written = [line for line in traced.trace if "exited" not in line]
    assert "0700" in made  # the empty tree, whose place the snapshot takes
    assert written == []
    assert_alike(source, fork)


@pytest.mark.parametrize(
    ("call", "when", "name", "code"),
    [
        ("ioctl", _MADE, "EIO", "io_error"),
        ("ioctl", _MADE, "ENOSPC", "no_space"),
        ("ioctl", _MADE, "EDQUOT", "no_space"),
        ("mkdirat", 1, "ENOSPC", "no_space"),
        ("fchmod", 1, "EIO", "io_error"),
        ("statx", 4, "EIO", "io_error"),
        ("getdents64", 1, "EIO", "io_error"),
        ("unlinkat", 2, "EIO", "io_error"),
        ("renameat2", 1, "EIO", "io_error"),
        ("renameat2", 1, "ENOENT", "io_error"),
    ],
)
def test_an_error_on_the_way_fails_the_fork_and_leaves_nothing(
    strace: str, directory: Path, source: Path, call: str, when: int, name: str, code: str
) -> None:
    fork = directory / "fork"
    control_directory = control(fork)
    if call == "fchmod":
        source.chmod(0o577)  # else it is not called
    traced = trace_fork(
        strace,
        source,
        fork,
        calls=call,
        inject=[f"{call}:error={name}:when={when}"],
        paths=[control_directory, control_directory / "snapshot", control_directory / "snapshot" / "snapshots"],
    )

    assert traced.calls("(INJECTED)") == 1
    assert traced.result is not None
    assert traced.result["error"] is not None
    assert traced.result["error"]["code"] == code
    assert sorted(path.name for path in directory.iterdir()) == ["source"]
    by_snapshot(source, fork)


def test_who_may_not_remove_a_subvolume_at_once_may_still_empty_it(strace: str, directory: Path, source: Path) -> None:
    fork = directory / "fork"
    traced = trace_fork(
        strace, source, fork, calls="ioctl", inject=[f"ioctl:error=EPERM:when={_ASKED}"], paths=[control(fork)]
    )

    assert traced.result is not None
    assert traced.result["subvolume"]
    assert_alike(source, fork, SKIPPED_BY_DEFAULT)


# -- whose it is


def test_an_ordinary_user_forks_his_subvolume_whole(home: Path) -> None:
    source = make_subvolume(home / "source")
    os.chown(source, NOBODY, NOBODY)

    def make_and_fork() -> None:
        make_guest(source, SIZES)
        (source / "read-only").mkdir()
        (source / "read-only" / "file").write_bytes(b"x")
        (source / "read-only").chmod(0o555)
        (source / "overlay.raw").chmod(0o4444)
        source.chmod(0o555)
        by_snapshot(source, home / "fork", verify="content")

    in_child(make_and_fork, user=NOBODY)

    assert_alike(source, home / "fork", SKIPPED_BY_DEFAULT)


def test_an_ordinary_users_snapshot_that_is_given_up_goes_too(home: Path, source: Path, every_beat: None) -> None:
    _give(source, NOBODY)

    def cancel(progress: Progress) -> None:
        if progress["phase"] == "copy" and progress["files_done"] > 3:
            assert os.path.isdir(home / control_name("fork-1") / "snapshot")
            raise ForkError(Code.CANCELLED, "cancelled on request")

    result = in_child(lambda: fork(source, home / "fork", beat=cancel), user=NOBODY)

    assert (result["status"], leftovers(home)) == ("cancelled", [])


@pytest.mark.parametrize("foreign", ["overlay.raw", "logs", ".", "vsock.sock"])
def test_what_an_ordinary_user_could_not_own_or_remove_is_cloned_file_by_file(
    home: Path, source: Path, foreign: str
) -> None:
    _give(source, NOBODY)
    os.chown(source / foreign, 0, 0)

    in_child(lambda: file_by_file(source, home / "fork"), user=NOBODY)

    assert {entry.uid for entry in snapshot(home / "fork").values()} == {NOBODY}


def _give(root: Path, user: int) -> None:
    for path, _ in statuses(root):
        os.chown(os.path.join(os.fsencode(root), path), user, user, follow_symlinks=False)


def test_nobody_else_gets_into_a_snapshot_before_it_is_published(
    directory: Path, source: Path, every_beat: None
) -> None:
    """Its top is 0777 from its first moment, as the source's."""
    seen = []

    def poll(progress: Progress) -> None:
        if progress["phase"] == "copy":
            names = leftovers(directory)
            seen.append((len(names), {stat.S_IMODE((directory / name).stat().st_mode) for name in names}))

    by_snapshot(source, directory / "fork", beat=poll)

    assert set(map(str, seen)) == {str((2, {0o700}))}
    assert (directory / "fork").stat().st_mode & 0o7777 == 0o777


# -- all or nothing


@pytest.mark.parametrize("phase", ["copy", "publish"])
@pytest.mark.parametrize("then", ["the id again", "gc"])
def test_a_fork_that_is_killed_on_the_way_leaves_nothing_for_long(
    directory: Path, source: Path, phase: str, then: str, every_beat: None
) -> None:
    def die(progress: Progress) -> None:
        if progress["phase"] == phase and progress["files_done"] > 3:
            os.kill(os.getpid(), signal.SIGKILL)

    child = Child(lambda: fork(source, directory / "fork", beat=die))
    with pytest.raises(AssertionError, match="the child ended with -9"):
        child.result()
    assert not (directory / "fork").exists()
    (tree,) = (name for name in leftovers(directory) if name.count(".") == 2)
    half_made = directory / (tree if phase == "publish" else f"{control_name('fork-1')}/snapshot")
    assert is_subvolume(half_made)

    if then == "gc":
        assert [finding.verdict for finding in collect(os.fspath(directory), lambda _: None)] == ["removed"]
    else:
        by_snapshot(source, directory / "fork")
        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)

    assert leftovers(directory) == []
    assert not half_made.exists()


class _DiesAtTheEnd(Books):
    """A ledger whose process is killed after the rename, before the result is kept."""

    def store_result(self, result: ForkResult) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def published(directory: Path, source: Path) -> Iterator[Path]:
    """A fork that was published by a process that died before it could tell."""
    destination = directory / "fork"
    child = Child(lambda: _deliver(source, destination, _DiesAtTheEnd()))
    with pytest.raises(AssertionError, match="the child ended with -9"):
        child.result()
    assert is_subvolume(destination)
    assert leftovers(directory) == [control_name("fork-1")]
    yield destination
    assert leftovers(directory) == []


def _deliver(source: Path, destination: Path, books: Books) -> Books:
    spec = spec_of(source, destination)
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, "fork-1", wait=0) as staging,
    ):
        start(ends, staging, spec, INLINE, Ticker(go_on), books)
    return books


def test_a_fork_that_was_published_is_known_again(source: Path, published: Path) -> None:
    before = published.stat()

    result = _deliver(source, published, Books()).result

    assert (result["error"], result["subvolume"]) == (None, True)
    assert published.stat() == before


def test_another_subvolume_at_the_destination_is_not_taken_for_the_fork(source: Path, published: Path) -> None:
    """The roots of all subvolumes have one inode."""
    published.rename(published.with_name("moved"))
    make_subvolume(published)
    (published / "theirs").touch()

    result = _deliver(source, published, Books()).result

    assert result["error"] is not None
    assert os.listdir(published) == ["theirs"]


def test_a_paused_fork_that_is_taken_over_ends_without_a_trace(directory: Path, source: Path, every_beat: None) -> None:
    (reader, writer), (resumed, resume) = os.pipe(), os.pipe()

    def pause(progress: Progress) -> None:
        if progress["phase"] == "copy" and progress["files_done"] == 4:
            os.write(writer, b"!")
            os.read(resumed, 1)

    paused = Child(lambda: fork(source, directory / "fork", beat=pause))
    assert os.read(reader, 1) == b"!"
    parent_fd = os.open(directory, os.O_RDONLY)
    heartbeat = (directory / control_name("fork-1") / "lock").stat().st_mtime_ns

    taken = take_over(parent_fd, "fork-1", heartbeat)

    assert taken is not None
    assert taken.journal is not None
    assert taken.journal.phase is Phase.PLANNING
    assert leftovers(directory) == []
    by_snapshot(source, directory / "fork")
    before = snapshot(directory / "fork")
    os.write(resume, b"!")
    ended = paused.result()
    assert ended["status"] == "failed"
    assert ended["error"] is not None
    assert ended["error"]["code"] == "io_error"
    assert snapshot(directory / "fork") == before
    assert leftovers(directory) == []
    for fd in (parent_fd, reader, writer, resumed, resume):
        os.close(fd)


def test_of_two_processes_with_one_id_one_makes_the_fork(directory: Path, source: Path) -> None:
    def deliver() -> ForkResult:
        wait_until((directory / "go").exists, "the start")
        return fork(source, directory / "fork")

    for turn in range(4):
        children = [Child(deliver) for _ in range(2)]
        (directory / "go").touch()
        results = [child.result() for child in children]

        assert "succeeded" in [result["status"] for result in results]
        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
        assert leftovers(directory) == []
        (directory / "go").unlink()
        (directory / "fork").rename(directory / f"done-{turn}")
