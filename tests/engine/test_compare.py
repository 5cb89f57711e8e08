"""`forkvm verify`: every difference that a fork must not have is found, and every unreadable entry is reported."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.clone.compare import Comparison, compare
from tasks.copier.kernel.contents import first_difference
from tasks.copier.options import DEFAULT_EXCLUDE
from tasks.copier.source.selection import Selection
from tests.fixtures.filesystems import Fresh, bind_mounted, make_subvolume
from tests.support.engine.forks import MIB, forked
from tests.support.requirements import require_command
from tests.support.sources import make_everything


def compared(source: Path, clone: Path) -> Comparison:
    source_fd, clone_fd = os.open(source, os.O_RDONLY), os.open(clone, os.O_RDONLY)
    try:
        return compare(source_fd, clone_fd, Selection((), DEFAULT_EXCLUDE))
    finally:
        os.close(source_fd)
        os.close(clone_fd)


def differences(source: Path, clone: Path) -> dict[str, str]:
    found = compared(source, clone)
    assert found.unread.count == 0
    assert found.same is (found.differences.count == 0)
    by_path: dict[str, str] = {}
    for path, what in found.differences.first:
        by_path[path] = f"{by_path[path]}; {what}" if path in by_path else what
    return by_path


def make_source(directory: Path) -> Path:
    source = directory / "source"
    (source / "below").mkdir(parents=True)
    (source / "disk").write_bytes(b"data" * 20_000)
    (source / "below" / "disk").write_bytes(b"more")
    (source / "one").write_text("two names")
    (source / "two").hardlink_to(source / "one")
    (source / "apart").write_text("one name")
    (source / "link").symlink_to("disk")
    return source


def _in_place(path: Path, change: Callable[[Path], object]) -> None:
    """Change an entry, and restore its mtime."""
    before = path.lstat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns), follow_symlinks=False)


def _another_target(clone: Path) -> None:
    before = (clone / "link").lstat()
    (clone / "link").unlink()
    (clone / "link").symlink_to("DISK")
    os.utime(clone / "link", ns=(before.st_atime_ns, before.st_mtime_ns), follow_symlinks=False)
    _keep_top(clone)


def _keep_top(clone: Path) -> None:
    """Restore the mtime of the top directory, which is compared too: adding an entry changes it."""
    for path in (clone, clone / "below"):
        status = (clone.parent / "source" / path.relative_to(clone)).stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _add(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(clone: Path) -> None:
        make(clone / "below" / "new")
        _keep_top(clone)

    return change


def _listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _link_out(clone: Path) -> None:
    (clone.parent / "outside").hardlink_to(clone / "apart")


def _split(clone: Path) -> None:
    (clone / "two").unlink()
    subprocess.run(["cp", "-p", clone / "one", clone / "two"], check=True)
    _keep_top(clone)


def _join(clone: Path) -> None:
    status = (clone / "apart").stat()
    (clone / "disk").unlink()
    (clone / "disk").hardlink_to(clone / "apart")
    os.truncate(clone / "apart", status.st_size)
    _keep_top(clone)


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(clone: Path) -> None:
        (clone / "disk").unlink()
        make(clone / "disk")
        _keep_top(clone)

    return change


def _fill(clone: Path) -> None:
    def write_zeros(path: Path) -> None:
        with path.open("r+b") as file:
            file.write(bytes(4 * MIB))

    _in_place(clone / "holes", write_zeros)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(70_000)
        file.write(b"X")


#: The change to the clone, the path at which it is found, and a part of the message.
CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "mode of the top": (lambda clone: clone.chmod(0o700), ".", "mode 0755, in the clone 0700"),
    "owner of the top": (lambda clone: os.chown(clone, 7, 8), ".", "owner 0:0, in the clone 7:8"),
    "mtime of the top": (lambda clone: os.utime(clone, ns=(1, 1)), ".", "in the clone at 0.000000001"),
    "attribute of the top": (lambda clone: os.setxattr(clone, "user.a", b"1"), ".", "extended attribute user.a"),
    "ACL of the top": (
        lambda clone: subprocess.run([require_command("setfacl", "ACLs"), "-d", "-m", "u:7:rwx", clone], check=True),
        ".",
        "default ACL",
    ),
    "set-id bit": (lambda clone: (clone / "disk").chmod(0o4644), "disk", "mode 0644, in the clone 4644"),
    "owner of a file": (lambda clone: os.chown(clone / "disk", 7, -1), "disk", "owner 0:0, in the clone 7:0"),
    "one nanosecond": (
        lambda clone: os.utime(clone / "disk", ns=(1, (clone / "disk").stat().st_mtime_ns + 1)),
        "disk",
        "modified at",
    ),
    "attribute's value": (lambda clone: os.setxattr(clone / "disk", "user.known", b"2"), "disk", "user.known: differs"),
    "attribute removed": (lambda clone: os.removexattr(clone / "disk", "user.known"), "disk", "only in the source"),
    "one byte": (lambda clone: _in_place(clone / "disk", _flip), "disk", "different contents from byte 70000"),
    "size": (lambda clone: _in_place(clone / "disk", lambda path: os.truncate(path, 9)), "disk", "in the clone 9"),
    "holes": (_fill, "holes", "holes are filled"),
    "symlink's target": (_another_target, "link", "a different symlink target"),
    "symlink's owner": (lambda clone: os.lchown(clone / "link", 7, 7), "link", "owner 0:0"),
    "symlink's mtime": (
        lambda clone: os.utime(clone / "link", ns=(1, 1), follow_symlinks=False),
        "link",
        "modified at",
    ),
    "symlink's attribute": (
        lambda clone: os.setxattr(clone / "link", "trusted.a", b"1", follow_symlinks=False),
        "link",
        "extended attribute trusted.a: only in the clone",
    ),
    "an added file": (_add(Path.touch), "below/new", "only in the clone: a file"),
    "an added directory": (_add(Path.mkdir), "below/new", "only in the clone: a directory"),
    "an added FIFO": (_add(os.mkfifo), "below/new", "only in the clone: a fifo"),
    "an added socket": (_add(_listen), "below/new", "only in the clone: a socket"),
    "an added symlink": (_add(lambda path: path.symlink_to("/etc")), "below/new", "only in the clone: a symlink"),
    "a name that forks skip": (
        _add(lambda path: path.with_name("a.sock").touch()),
        "below/a.sock",
        "only in the clone: a file",
    ),
    "staging": (
        _add(lambda path: path.with_name(".forkvm-0123456789abcdef").mkdir()),
        "below/.forkvm-0123456789abcdef",
        "only in the clone: a directory",
    ),
    "a file for a FIFO": (_replace(os.mkfifo), "disk", "a file in the source, a fifo in the clone"),
    "a file for a directory": (_replace(Path.mkdir), "disk", "a file in the source, a directory in the clone"),
    "a file for a symlink": (_replace(lambda path: path.symlink_to("x")), "disk", "a symlink in the clone"),
    "a missing file": (_replace(lambda path: None), "disk", "only in the source"),
    "a hard link out of the clone": (_link_out, "apart", "a hard link out of the clone: the file has 2 names, 1"),
    "two files for one": (_split, "two", "not the same hard links"),
    "one file for two": (_join, "disk", "not the same hard links"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_exactly_the_differences_are_found(fresh: Fresh, change: str) -> None:
    alter, path, what = CHANGES[change]
    directory = fresh("xfs")
    source = make_source(directory)
    os.setxattr(source / "disk", "user.known", b"1")
    (source / "holes").touch()
    os.truncate(source / "holes", 8 * MIB)
    forked(source, directory / "clone")
    assert differences(source, directory / "clone") == {}

    alter(directory / "clone")

    found = differences(source, directory / "clone")
    assert what in found.pop(path)
    assert found == {}


def test_a_fork_of_everything_is_the_same_on_each_filesystem(fs: Path) -> None:
    source = make_everything(fs / "source")

    forked(source, fs / "clone")

    assert differences(source, fs / "clone") == {}


def test_skipped_entries_are_a_difference_only_if_the_clone_has_them(fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_source(directory)
    (source / "logs").mkdir()
    _listen(source / "vm")
    forked(source, directory / "clone")
    assert differences(source, directory / "clone") == {}

    (directory / "clone" / "logs").mkdir()
    _listen(directory / "clone" / "vm")
    _keep_top(directory / "clone")

    assert differences(source, directory / "clone") == {
        "logs": "only in the clone: a directory; in the source it is left out (excluded by /logs/)",
        "vm": "only in the clone: a socket; in the source it is left out (socket)",
    }


def test_the_source_is_not_a_clone_of_itself_under_any_path(fresh: Fresh, tmp_path: Path) -> None:
    directory = fresh("xfs")
    source = make_source(directory)
    forked(source, directory / "clone")

    with bind_mounted(source, tmp_path / "view") as view:
        assert differences(source, view) == {".": "the clone is the source itself"}
    (directory / "clone" / "below" / "disk").unlink()
    (directory / "clone" / "below").rmdir()
    with bind_mounted(source / "below", directory / "clone" / "below"):
        assert differences(source, directory / "clone")["below"] == "a mount point in the clone"


def test_a_subvolume_in_the_clone_only_is_a_difference(fresh: Fresh) -> None:
    directory = fresh("btrfs")
    source = make_subvolume(directory / "source")
    (source / "disk").write_bytes(b"data")
    forked(source, directory / "clone")
    forked(source, directory / "plain", snapshot="never")

    assert differences(source, directory / "clone") == differences(source, directory / "plain") == {}
    assert differences(directory / "plain", directory / "clone") == {".": "a btrfs subvolume in the clone only"}


def test_the_bytes_of_hard_links_are_counted_once(fresh: Fresh) -> None:
    source = fresh("xfs") / "source"
    source.mkdir()
    (source / "disk").write_bytes(b"data" * 16_384)
    for number in range(3):
        (source / f"name-{number}").hardlink_to(source / "disk")
    forked(source, source.parent / "fork")
    os.sync()

    found = compared(source, source.parent / "fork")

    assert found.same
    assert found.entries == 4
    assert found.bytes_logical == found.bytes_mapped == found.bytes_shared == 65_536


def test_comparing_changes_no_atime(fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_source(directory)
    forked(source, directory / "clone")
    paths = sorted(directory.rglob("*"))
    for path in paths:
        # So old that relatime would update it.
        os.utime(path, ns=(0, path.lstat().st_mtime_ns), follow_symlinks=False)

    assert compared(source, directory / "clone").same

    assert [path for path in paths if path.lstat().st_atime_ns] == []


def test_thousands_of_differences_are_counted_and_the_first_are_listed(fresh: Fresh) -> None:
    directory = fresh("tmpfs")
    (directory / "source").mkdir()
    (directory / "clone").mkdir()
    for number in range(10_050):
        (directory / "clone" / f"{number:05}").touch()

    found = compared(directory / "source", directory / "clone").differences

    assert found.count >= 10_050
    assert len(found.first) == 10_000


def test_bytes_beyond_the_end_of_both_files_do_not_count_as_compared(tmp_path: Path) -> None:
    """Two files that were truncated during the comparison are not reported as equal up to their former size."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 10)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("rb") as b:
        assert first_difference(a.fileno(), b.fileno(), 0, 10) is None
        assert first_difference(a.fileno(), b.fileno(), 5, 20) == 10
