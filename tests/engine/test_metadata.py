"""What a fork takes from its source, whatever its surroundings, and what an ordinary user can preserve."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tests.fixtures.filesystems import Fresh, Kind, bind_mounted
from tests.support.engine.child_processes import NOBODY, in_child
from tests.support.engine.forks import CHUNKED, MIB, assert_alike, fork, forked, leftovers, refused
from tests.support.engine.local_campaigns import campaign
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest, make_sparse_file
from tests.support.sources import (
    ACCESS_ACL,
    CAPABILITY,
    CAPABILITY_TO_BIND,
    DEFAULT_ACL,
    acl,
    age,
    make_everything,
    make_metadata,
)
from tests.support.tree import snapshot


@pytest.fixture
def home(fs: Path) -> Path:
    """A directory of an ordinary user, on each filesystem."""
    path = fs / "home"
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    return path


def test_the_destinations_parent_does_not_affect_a_fork(fs: Path, limits: Limits) -> None:
    source = make_everything(fs / "source")
    parent = fs / "parent"
    parent.mkdir()
    os.chown(parent, 77, 88)
    os.setxattr(parent, DEFAULT_ACL, acl(7, 7, 7, users=[(99, 7)]))
    parent.chmod(0o2777)

    forked(source, parent / "fork", limits=limits)

    assert_alike(source, parent / "fork", SKIPPED_BY_DEFAULT)


def test_an_ordinary_user_forks_an_own_source(home: Path, limits: Limits) -> None:
    source = home / "source"

    def make_and_fork() -> None:
        make_guest(source)
        for mode in (0o555, 0o500, 0o2755):
            directory = source / f"directory-{mode:o}"
            directory.mkdir()
            (directory / "file").write_bytes(b"x")
            (directory / "below").mkdir(mode=0o555)
            os.setxattr(directory, ACCESS_ACL, acl(mode >> 6 & 7, 5, 5, users=[(1, 7)]))
            directory.chmod(mode)
        for mode in (0o400, 0o444, 0o4755):
            path = source / f"mode-{mode:o}"
            path.write_bytes(b"x")
            os.setxattr(path, "user.origin", b"home")
            path.chmod(mode)
        make_sparse_file(source / "large", 8 * MIB, 4 * MIB)
        (source / "large").chmod(0o400)
        (source / "link").symlink_to("nowhere")
        age(source / "link")
        forked(source, home / "fork", limits=limits)

    in_child(make_and_fork, user=NOBODY)

    assert_alike(source, home / "fork", SKIPPED_BY_DEFAULT)


@pytest.mark.parametrize("kind", ["xfs", "ext4", "btrfs", "tmpfs"])
def test_attributes_of_an_entry_whose_acl_forbids_its_owner_to_write(fresh: Fresh, kind: Kind, limits: Limits) -> None:
    """An ordinary user may set user.* only with that right, and each filesystem lists the names in its own order."""
    home = fresh(kind)
    source = home / "source"
    (source / "directory").mkdir(parents=True)
    (source / "file").write_bytes(b"x")
    for path in (source / "directory", source / "file"):
        for name in ("user.a", ACCESS_ACL, "user.z"):
            os.setxattr(path, name, acl(5, 5, 0, users=[(1, 7)]) if name == ACCESS_ACL else b"home")
    for path in (home, source, *source.iterdir()):
        os.chown(path, NOBODY, NOBODY)

    result = in_child(lambda: forked(source, home / "fork", limits=limits), user=NOBODY)

    assert_alike(source, home / "fork")
    assert result["metadata_lost_total"] == 0


def test_a_source_with_a_read_only_top_is_forked_by_its_owner(home: Path) -> None:
    make_guest(home / "source")
    for path in [home / "source", *(home / "source").rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    (home / "source").chmod(0o555)

    in_child(lambda: forked(home / "source", home / "fork"), user=NOBODY)

    assert_alike(home / "source", home / "fork", SKIPPED_BY_DEFAULT)


def test_an_ordinary_users_fork_of_a_foreign_source_belongs_to_the_user_without_set_id_bits(
    home: Path, limits: Limits
) -> None:
    source = home / "source"
    source.mkdir(mode=0o755)
    for mode in (0o4755, 0o2755, 0o6755, 0o1644, 0o644):
        (source / f"{mode:o}").write_bytes(b"x")
        (source / f"{mode:o}").chmod(mode)
    (source / "directory").mkdir()
    (source / "directory").chmod(0o3775)
    (source / "link").symlink_to("nowhere")
    os.setxattr(source / "644", CAPABILITY, CAPABILITY_TO_BIND)
    os.setxattr(source / "644", "user.origin", b"root")

    in_child(lambda: forked(source, home / "fork", limits=limits), user=NOBODY)

    clones = snapshot(home / "fork")
    assert {(entry.uid, entry.gid) for entry in clones.values()} == {(NOBODY, NOBODY)}
    modes = {path.decode(): entry.mode for path, entry in clones.items() if entry.kind != "symlink"}
    assert modes == {
        ".": 0o755,
        "4755": 0o755,
        "2755": 0o755,
        "6755": 0o755,
        "1644": 0o1644,
        "644": 0o644,
        "directory": 0o1775,
    }
    assert clones[b"644"].xattrs == ((b"user.origin", b"root"),)


def test_an_ordinary_user_preserves_a_group_of_which_the_user_is_a_member(home: Path) -> None:
    source = home / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    for path in (source / "file", source):
        os.chown(path, NOBODY, 4242)
        path.chmod(0o2770)

    in_child(lambda: forked(source, home / "fork"), user=NOBODY, groups=[4242])

    assert_alike(source, home / "fork")


def test_no_other_user_can_read_a_fork_before_it_is_published(fresh: Fresh, every_poll: None) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source")
    for path in [source, *source.rglob("*")]:
        path.chmod(0o777)
    seen: set[int] = set()

    def poll(progress: object) -> None:
        seen.update(stat.S_IMODE((directory / name).lstat().st_mode) for name in leftovers(directory))

    forked(source, directory / "fork", poll=poll, reflink="never")

    # The tree gets its final mode immediately before the rename; until then only its owner can enter.
    assert seen <= {0o700, 0o777}
    assert 0o700 in seen


def test_unfinished_files_have_no_wider_mode_than_their_sources(fresh: Fresh, every_poll: None) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source")
    (source / "overlay.raw").chmod(0o600)
    seen: set[int] = set()

    def poll(progress: object) -> None:
        seen.update(stat.S_IMODE(path.lstat().st_mode) for path in directory.glob(".forkvm-*.*/overlay.raw"))

    in_child(lambda: (forked(source, directory / "fork", poll=poll, reflink="never"), seen)[1], umask=0)
    forked(source, directory / "fork-2", poll=poll, reflink="never")

    assert seen == {0o600}


def test_a_fork_that_failed_after_its_read_only_directories_were_made_leaves_nothing(
    home: Path, every_poll: None
) -> None:
    source = make_guest(home / "source")
    (source / "sealed").mkdir()
    for name in ("a", "b"):
        (source / "sealed" / name).mkdir()
        (source / "sealed" / name / "file").write_bytes(b"x")
        (source / "sealed" / name).chmod(0o555)
    (source / "sealed").chmod(0o555)
    for path in [source, *source.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)

    def act(progress: dict[str, object]) -> None:
        if progress["phase"] == "publish":
            (source / "new").touch()

    error = in_child(lambda: refused(source, home / "fork", poll=act), user=NOBODY)

    assert error["code"] == "source_changed"


def test_metadata_that_is_not_preserved_is_that_of_a_plain_copy(fs: Path, limits: Limits) -> None:
    source = fs / "source"
    source.mkdir(mode=0o751)
    make_metadata(source)
    age(source)

    in_child(lambda: forked(source, fs / "fork", limits=limits, preserve=frozenset()), umask=0o027)

    ours, theirs = snapshot(source), snapshot(fs / "fork")
    assert theirs.keys() == ours.keys()
    for path, entry in theirs.items():
        assert (entry.uid, entry.gid, entry.xattrs) == (0, 0, ()), path
        assert entry.mtime_ns != ours[path].mtime_ns or ours[path].mtime_ns > 1_600_000_000 * 10**9, path
        if entry.kind != "symlink":
            # The group bits of a file with an ACL are its mask: without the ACL the group keeps its own permissions, no
            # more.
            mode = {b"attributed": 0o640, b"inheriting": 0o751, b"inheriting/child": 0o640}.get(path, ours[path].mode)
            assert entry.mode == mode & 0o777 & ~0o027, path
        assert entry.sha256 == ours[path].sha256


@pytest.mark.parametrize("kept", ["mode", "ownership", "timestamps", "xattrs"])
def test_each_kind_of_metadata_is_preserved_by_itself(fs: Path, kept: str, limits: Limits) -> None:
    source = fs / "source"
    source.mkdir()
    path = source / "file"
    path.write_bytes(b"x")
    os.chown(path, 1234, 5678)
    path.chmod(0o751)
    os.setxattr(path, "user.origin", b"here")
    os.setxattr(path, ACCESS_ACL, acl(7, 5, 1, users=[(99, 7)]))
    age(path)
    ours = snapshot(source)[b"file"]

    in_child(lambda: forked(source, fs / "fork", limits=limits, preserve=frozenset({kept})), umask=0o022)

    clone = snapshot(fs / "fork")[b"file"]
    assert ((clone.uid, clone.gid) == (1234, 5678)) is (kept == "ownership")
    assert (clone.mtime_ns == ours.mtime_ns) is (kept == "timestamps")
    assert ((b"user.origin", b"here") in clone.xattrs) is (kept == "xattrs")
    # An ACL is preserved only together with the mode and the other attributes.
    assert not any(name.startswith((b"system.", b"trusted.")) for name, _ in clone.xattrs)
    assert ours.mode == 0o771  # 7 is the ACL's mask; the group has 5
    assert clone.mode == 0o751


def test_hard_links_become_separate_files_if_they_are_not_preserved(fs: Path, limits: Limits) -> None:
    source = fs / "source"
    source.mkdir()
    (source / "a").write_bytes(b"two names")
    os.link(source / "a", source / "b")

    result = forked(source, fs / "fork", limits=limits, preserve=frozenset({"mode"}))

    assert result["files"]["hardlinked"] == 0
    assert {(fs / "fork" / name).stat().st_nlink for name in "ab"} == {1}
    assert (fs / "fork" / "b").read_bytes() == b"two names"


@pytest.mark.parametrize("what", ["file", "directory", "parent"])
def test_forbidden_operations_of_an_ordinary_user_are_permission_denied_with_the_path(home: Path, what: str) -> None:
    source = make_guest(home / "source")
    source.chmod(0o755)
    if what == "file":
        path = source / "state"
        path.chmod(0o600)
    elif what == "directory":
        path = source / "snapshots"
        path.chmod(0o700)
    else:
        path = home / "fork"
        home.chmod(0o555)

    for limits in (Limits(), CHUNKED):
        error = in_child(lambda limits=limits: refused(source, home / "fork", limits=limits), user=NOBODY)  # type: ignore[misc]
        assert (error["code"], error["path"]) == ("permission_denied", str(path))

    for path in [home, *source.rglob("*")]:
        path.chmod(0o755)
    assert in_child(lambda: fork(source, home / "fork")["status"], user=NOBODY) == "succeeded"


def test_a_file_that_its_owner_may_not_read_is_permission_denied(home: Path) -> None:
    source = make_guest(home / "source")
    (source / "state").chmod(0)
    for path in [source, *source.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)

    error = in_child(lambda: refused(source, home / "fork"), user=NOBODY)

    assert (error["code"], error["path"]) == ("permission_denied", str(source / "state"))
    assert error["errno"] is not None


@pytest.mark.parametrize("preserve", [["timestamps"], ["mode", "timestamps"]])
def test_a_set_gid_parent_gives_its_group_to_a_fork_without_ownership(
    fs: Path, limits: Limits, preserve: list[str]
) -> None:
    source = make_guest(fs / "source")
    parent = fs / "parent"
    parent.mkdir()
    os.chown(parent, -1, 1234)
    parent.chmod(0o2775)

    forked(source, parent / "fork", limits=limits, preserve=preserve)
    assert campaign(source, [parent / "vm-1", parent / "vm-2"], preserve=preserve)["status"] == "succeeded"

    entries = [path for top in ("fork", "vm-1", "vm-2") for path in ((parent / top), *(parent / top).rglob("*"))]
    assert {path.lstat().st_gid for path in entries} == {1234}
    inherited = stat.S_ISGID if "mode" not in preserve else 0
    assert {path.stat().st_mode & stat.S_ISGID for path in entries if path.is_dir()} == {inherited}
    assert not any(path.stat().st_mode & stat.S_ISGID for path in entries if path.is_file())


def test_hard_links_that_a_bind_mount_shows_again_are_one_file(fresh: Fresh, limits: Limits) -> None:
    """As with `cp -a`, which knows the files by device and inode only."""
    source = fresh("xfs") / "source"
    (source / "one").mkdir(parents=True)
    (source / "one/a").write_text("data")
    (source / "one/b").hardlink_to(source / "one/a")

    with bind_mounted(source / "one", source / "two"):
        forked(source, source.parent / "fork", limits=limits)

    names = [source.parent / "fork" / name for name in ("one/a", "one/b", "two/a", "two/b")]
    assert len({path.stat().st_ino for path in names}) == 1
    assert names[0].stat().st_nlink == 4
