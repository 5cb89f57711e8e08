"""Metadata that a destination cannot store is listed in the result, and its loss gives nobody access."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import Limits
from tests.fixtures.filesystems import Fresh, SmallExt4, idmapped_mounted
from tests.fixtures.fuse import Passthrough
from tests.fixtures.processes import ended_at_exit
from tests.support.engine import local_campaigns
from tests.support.engine.child_processes import NOBODY, in_child
from tests.support.engine.forks import CHUNKED, MIB, assert_alike, fork, forked, leftovers
from tests.support.engine.traced_forks import in_tree, trace_fork
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest, make_sparse_file
from tests.support.requirements import require_command
from tests.support.sources import (
    ACCESS_ACL,
    CAPABILITY,
    CAPABILITY_IN_NAMESPACE,
    CAPABILITY_TO_BIND,
    DEFAULT_ACL,
    acl,
    age,
)

_CLONE_NEWUSER = 0x10000000  # <linux/sched.h>
#: Not `NOBODY`: every owner that a user namespace does not map is shown as that.
_USER = 1000


def lost(result: ForkResult) -> set[tuple[str, str]]:
    """The losses of a fork; each is listed once, and counted."""
    pairs = [(one["path"], one["what"]) for one in result["metadata_lost"]]
    assert len(set(pairs)) == len(pairs) == result["metadata_lost_total"]
    return set(pairs)


def enter_user_namespace() -> None:
    """Put this process into a user namespace that maps only its own user and group (user_namespaces(7))."""
    user, group = os.getuid(), os.getgid()
    assert ctypes.CDLL(None).unshare(_CLONE_NEWUSER) == 0
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def modes(root: Path) -> dict[str, int]:
    """The permission bits of all entries except symlinks, by path."""
    paths = [path for path in [root, *root.rglob("*")] if not path.is_symlink()]
    return {str(path.relative_to(root)): path.stat().st_mode & 0o7777 for path in paths}


@pytest.fixture
def source_with_acls(fresh: Fresh) -> Path:
    """A source to which ACLs give a user access, and in which the group has none."""
    source = fresh("xfs") / "source"
    (source / "below").mkdir(parents=True)
    (source / "key").write_bytes(b"secret")
    make_sparse_file(source / "disk.raw", 4 * MIB, 3 * MIB)
    (source / "plain").write_bytes(b"x")
    (source / "plain").chmod(0o640)
    for path in (source, source / "below", source / "key", source / "disk.raw"):
        bits = 7 if path.is_dir() else 6
        os.setxattr(path, ACCESS_ACL, acl(bits, 0, 0, users=[(1000, bits)]))
    os.setxattr(source / "below", DEFAULT_ACL, acl(7, 0, 0, users=[(1000, 7)]))
    os.setxattr(source / "key", "user.origin", b"here")
    return source


WITHOUT_ACLS = {".": 0o700, "below": 0o700, "key": 0o600, "disk.raw": 0o600, "plain": 0o640}
ACLS_LOST = {(".", "acl"), ("below", "acl"), ("below", "default acl"), ("key", "acl"), ("disk.raw", "acl")}


@pytest.mark.parametrize("umask", [0o022, 0])
def test_a_destination_without_acls_gives_no_additional_access(
    source_with_acls: Path, ramfs: Path, limits: Limits, umask: int
) -> None:
    result = in_child(lambda: forked(source_with_acls, ramfs / "fork", limits=limits), umask=umask)

    assert modes(ramfs / "fork") == WITHOUT_ACLS
    assert lost(result) == ACLS_LOST | {("key", "xattr user.origin")}


@pytest.mark.usefixtures("every_poll")
def test_an_unfinished_file_does_not_have_the_mode_of_its_acls_mask(source_with_acls: Path, ramfs: Path) -> None:
    seen: set[int] = set()

    def poll(progress: object) -> None:
        seen.update(path.lstat().st_mode & 0o777 for path in ramfs.glob(".forkvm-*.*/disk.raw"))

    in_child(lambda: forked(source_with_acls, ramfs / "fork", poll=poll), umask=0)
    forked(source_with_acls, ramfs / "fork-2", poll=poll)

    assert seen == {0o600}


@pytest.mark.parametrize("preserve", [{"mode"}, {"mode", "ownership"}, {"ownership", "xattrs"}, set()])
def test_a_fork_that_drops_acls_gives_no_additional_access(
    source_with_acls: Path, limits: Limits, preserve: set[Any]
) -> None:
    workdir = source_with_acls.parent

    result = in_child(
        lambda: forked(source_with_acls, workdir / "fork", limits=limits, preserve=frozenset(preserve)), umask=0
    )

    assert modes(workdir / "fork") == WITHOUT_ACLS
    assert lost(result) == set()  # nobody requested them


def test_each_fork_of_a_campaign_lists_its_losses(source_with_acls: Path, ramfs: Path, tmp_path: Path) -> None:
    paths = local_campaigns.destinations(ramfs, 3)

    _, ledger = local_campaigns.campaign_with_ledger(source_with_acls, paths, tmp_path / "ledger")

    assert [modes(path) for path in paths] == [WITHOUT_ACLS] * 3
    assert [lost(result) for result in ledger.forks] == [ACLS_LOST | {("key", "xattr user.origin")}] * 3


@pytest.mark.parametrize("limits", [Limits(), CHUNKED], ids=["inline", "chunked"])
def test_the_first_hundred_losses_are_listed_and_all_are_counted(fresh: Fresh, ramfs: Path, limits: Limits) -> None:
    source = fresh("xfs") / "source"
    source.mkdir()
    for number in range(150):
        (source / f"{number:03}").write_bytes(b"x")
        os.setxattr(source / f"{number:03}", "user.origin", b"here")

    result = forked(source, ramfs / "fork", limits=limits)

    assert result["metadata_lost_total"] == 150
    assert len({one["path"] for one in result["metadata_lost"]}) == 100
    assert {one["what"] for one in result["metadata_lost"]} == {"xattr user.origin"}


def test_a_fork_that_preserves_everything_lists_no_loss(fs: Path, limits: Limits) -> None:
    source = make_guest(fs / "source")
    os.chown(source / "state", 1234, 5678)
    os.setxattr(source / "state", "user.origin", b"here")
    os.setxattr(source / "state", ACCESS_ACL, acl(6, 4, 0, users=[(1000, 6)]))
    (source / "config.json").chmod(0o6755)
    age(source)

    result = forked(source, fs / "fork", limits=limits)

    assert (result["metadata_lost"], result["metadata_lost_total"]) == ([], 0)


def test_metadata_that_an_ordinary_user_may_not_preserve_is_listed(fresh: Fresh, limits: Limits) -> None:
    home = fresh("xfs")
    os.chown(home, NOBODY, NOBODY)
    source = home / "source"
    source.mkdir()
    for name in ("set-id", "capable", "directory"):
        (source / name).mkdir() if name == "directory" else (source / name).write_bytes(b"x")
    (source / "set-id").chmod(0o6755)
    os.setxattr(source / "capable", CAPABILITY, CAPABILITY_TO_BIND)
    (source / "link").symlink_to("nowhere")
    (source / "own").write_bytes(b"x")
    os.chown(source / "own", NOBODY, NOBODY)

    result = in_child(lambda: forked(source, home / "fork", limits=limits), user=NOBODY)

    others = {(path, "ownership") for path in (".", "set-id", "capable", "directory", "link")}
    special = {("set-id", "mode: set-uid"), ("set-id", "mode: set-gid"), ("capable", f"xattr {CAPABILITY}")}
    assert lost(result) == others | special


def test_owners_that_a_user_namespace_does_not_map_are_skipped(fresh: Fresh, limits: Limits) -> None:
    home = fresh("xfs")
    source = make_guest(home / "source")
    (source / "theirs").write_bytes(b"x")
    (source / "link").symlink_to("nowhere")
    for path in [home, source, *source.rglob("*")]:
        os.chown(path, _USER, _USER, follow_symlinks=False)
    for name in ("theirs", "link"):
        os.chown(source / name, 4242, 4242, follow_symlinks=False)
    os.setxattr(source / "state", ACCESS_ACL, acl(6, 0, 0, users=[(4321, 6)]))
    (source / "ping").write_bytes(b"x")
    os.chown(source / "ping", _USER, _USER)
    os.setxattr(source / "ping", CAPABILITY, CAPABILITY_IN_NAMESPACE)

    def fork_in_namespace() -> ForkResult:
        enter_user_namespace()
        return forked(source, home / "fork", limits=limits)

    result = in_child(fork_in_namespace, user=_USER)

    refused = {("state", "acl"), ("ping", f"xattr {CAPABILITY}")}
    assert lost(result) == {("theirs", "ownership"), ("link", "ownership"), *refused}
    assert (home / "fork" / "state").stat().st_mode & 0o777 == 0o600


def test_owners_that_an_idmapped_mount_does_not_map_are_skipped(fresh: Fresh, limits: Limits) -> None:
    home = fresh("xfs")
    source = make_guest(home / "source")
    (source / "theirs").write_bytes(b"x")
    (source / "link").symlink_to("nowhere")
    for name in ("theirs", "link"):
        os.chown(source / name, _USER, _USER, follow_symlinks=False)
    (source / "theirs").chmod(0o4755)
    (home / "backing").mkdir()

    with idmapped_mounted(home / "backing", home / "machines", 100_000) as machines:
        result = forked(source, machines / "fork", limits=limits)

        assert (machines / "fork" / "theirs").stat().st_mode & 0o7777 == 0o755
    set_uid = ("theirs", "mode: set-uid")
    assert lost(result) == {("theirs", "ownership"), ("link", "ownership"), set_uid}


def test_an_attribute_that_the_destination_refuses_is_skipped(fresh: Fresh, limits: Limits) -> None:
    """btrfs does not compress a directory whose files are NOCOW."""
    workdir = fresh("btrfs")
    source, machines = workdir / "source", workdir / "machines"
    source.mkdir()
    machines.mkdir()
    subprocess.run([require_command("chattr", "NOCOW files"), "+C", machines], check=True)
    make_sparse_file(source / "disk.raw", 4 * MIB, 3 * MIB)
    os.setxattr(source / "disk.raw", "btrfs.compression", b"zstd")
    os.setxattr(source / "disk.raw", "user.origin", b"here")

    result = forked(source, machines / "fork", limits=limits)

    assert lost(result) == {("disk.raw", "xattr btrfs.compression")}
    assert os.getxattr(machines / "fork" / "disk.raw", "user.origin") == b"here"


def test_attributes_that_are_too_large_for_the_destination_are_skipped(fresh: Fresh, limits: Limits) -> None:
    source, workdir = fresh("xfs") / "source", fresh("ext4")
    source.mkdir()
    (source / "file").write_bytes(b"x")
    os.setxattr(source / "file", "user.large", b"x" * 60_000)
    os.setxattr(source / "file", "user.small", b"here")
    for number in range(4):  # each one fits, but not all of them
        os.setxattr(source, f"user.{number}", b"x" * 1500)

    result = forked(source, workdir / "fork", limits=limits)

    assert os.getxattr(workdir / "fork" / "file", "user.small") == b"here"
    kept = {name for name in os.listxattr(workdir / "fork") if name.startswith("user.")}
    assert len(kept) == 2
    missing = {(".", f"xattr user.{number}") for number in range(4) if f"user.{number}" not in kept}
    assert lost(result) == missing | {("file", "xattr user.large")}


def test_an_attribute_that_does_not_fit_on_a_full_filesystem_is_no_space(fresh: Fresh, small_ext4: SmallExt4) -> None:
    source, workdir = fresh("xfs") / "source", small_ext4("-m", "0", "-O", "ea_inode")
    source.mkdir()
    (source / "file").write_bytes(b"")
    os.setxattr(source / "file", "user.origin", b"x" * 60_000)
    filling = workdir / "filling"
    with filling.open("wb") as file:
        status = os.statvfs(workdir)
        os.posix_fallocate(file.fileno(), 0, (status.f_bavail - 1) * status.f_frsize)

    for _ in range(40):  # until there is room for the staging and none for the attribute
        error = fork(source, workdir / "fork")["error"]
        if error is None:
            break
        assert (error["code"], error["errno"]) == ("no_space", errno.ENOSPC)
        if "user.origin" in error["message"]:
            assert error["path"] == str(workdir / "fork" / "file")
            return
        os.truncate(filling, filling.stat().st_size - status.f_frsize)
    pytest.fail("with no amount of free space was the attribute the first to fail")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "ENOMEM", "EROFS"])
def test_a_failing_or_full_disk_is_an_error_that_names_the_attribute(fresh: Fresh, name: str) -> None:
    strace = require_command("strace", "the injection of errors")
    workdir = fresh("xfs")
    source = workdir / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    os.setxattr(source / "file", "user.origin", b"here")

    traced = trace_fork(strace, source, workdir / "fork", calls="fsetxattr", inject=[f"fsetxattr:error={name}"])

    assert traced.result is not None
    error = traced.result["error"]
    assert error is not None
    code = "no_space" if name in ("ENOSPC", "EDQUOT") else "io_error"
    assert (error["code"], error["errno"]) == (code, getattr(errno, name))
    assert (error["path"], "user.origin" in error["message"]) == (str(workdir / "fork" / "file"), True)
    assert leftovers(workdir) == []


@pytest.mark.parametrize("name", ["EPERM", "EACCES", "EOPNOTSUPP", "EINVAL", "E2BIG", "ERANGE", "ENAMETOOLONG"])
def test_a_refused_attribute_is_listed_and_the_others_are_preserved(fresh: Fresh, name: str) -> None:
    strace = require_command("strace", "the injection of errors")
    workdir = fresh("xfs")
    source = workdir / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    for attribute in ("user.a", "user.b"):
        os.setxattr(source / "file", attribute, b"here")

    traced = trace_fork(strace, source, workdir / "fork", calls="fsetxattr", inject=[f"fsetxattr:error={name}:when=1"])

    assert traced.result is not None
    assert traced.result["status"] == "succeeded"
    (kept,) = os.listxattr(workdir / "fork" / "file")
    assert lost(traced.result) == {("file", "xattr user.a"), ("file", "xattr user.b")} - {("file", f"xattr {kept}")}


@pytest.mark.parametrize("chunked", [False, True])
def test_an_attribute_that_is_removed_after_it_was_listed_is_a_change_of_the_source(
    fresh: Fresh, chunked: bool
) -> None:
    strace = require_command("strace", "the injection of errors")
    workdir = fresh("xfs")
    source = workdir / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    os.setxattr(source / "file", "user.origin", b"here")
    clone = in_tree(workdir / "fork", "file")
    script = f"until [ -e {clone} ]; do :; done; sleep 0.1; setfattr -x user.origin {source / 'file'}"
    with ended_at_exit(subprocess.Popen(["sh", "-c", script])) as remover:
        traced = trace_fork(
            strace,
            source,
            workdir / "fork",
            calls="fgetxattr",
            inject=["fgetxattr:delay_enter=500000"],
            chunked=chunked,
        )
        assert remover.wait() == 0

    assert traced.result is not None
    assert traced.result["error"] is not None
    assert (traced.result["error"]["code"], traced.result["error"]["path"]) == ("source_changed", str(source / "file"))


def test_an_attribute_that_is_listed_but_missing_is_skipped(fresh: Fresh) -> None:
    strace = require_command("strace", "the injection of errors")
    workdir = fresh("xfs")
    source = workdir / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    os.setxattr(source / "file", "user.origin", b"here")

    traced = trace_fork(strace, source, workdir / "fork", calls="fgetxattr", inject=["fgetxattr:error=ENODATA"])

    assert traced.result is not None
    assert (traced.result["status"], traced.result["metadata_lost"]) == ("succeeded", [])


def test_times_that_the_destination_rounds_are_listed(fresh: Fresh, small_ext4: SmallExt4, limits: Limits) -> None:
    source, workdir = fresh("xfs") / "source", small_ext4("-I", "128")
    source.mkdir()
    for name in ("fine", "whole"):
        (source / name).write_bytes(b"x")
    os.utime(source / "fine", ns=(1_500_000_000 * 10**9 + 1, 1_400_000_000 * 10**9 + 1))
    os.utime(source / "whole", ns=(1_500_000_000 * 10**9, 1_400_000_000 * 10**9))
    os.utime(source, ns=(1_500_000_000 * 10**9, 1_400_000_000 * 10**9))

    result = forked(source, workdir / "fork", limits=limits)

    assert lost(result) == {("fine", "timestamps")}


def test_a_time_that_the_destination_does_not_reach_is_listed(fresh: Fresh, small_ext4: SmallExt4) -> None:
    source, workdir = fresh("btrfs") / "source", small_ext4("-I", "128")
    source.mkdir()
    (source / "file").write_bytes(b"x")
    os.utime(source / "file", ns=(10**9 << 32, 10**9 << 32))
    os.utime(source, ns=(10**9, 10**9))

    assert lost(forked(source, workdir / "fork")) == {("file", "timestamps")}


def test_metadata_that_a_filesystem_accepts_and_drops_is_listed(
    fresh: Fresh, passthrough: Passthrough, limits: Limits
) -> None:
    source, backing = fresh("xfs") / "source", fresh("ext4")
    source.mkdir()
    (source / "file").write_bytes(b"x")
    (source / "file").chmod(0o751)
    (source / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        os.chown(source / name, 1234, 5678, follow_symlinks=False)
    workdir = passthrough(backing, "drop_metadata")

    result = forked(source, workdir / "fork", limits=limits)

    top = {(".", "mode"), (".", "timestamps")}
    both = {(name, what) for name in ("file", "link") for what in ("ownership", "timestamps")}
    assert lost(result) == top | both | {("file", "mode")}


@pytest.mark.parametrize("umask", [0o177, 0o777])
def test_a_umask_that_restricts_the_owner_does_not_affect_a_fork(fs: Path, limits: Limits, umask: int) -> None:
    home = fs / "home"
    home.mkdir()
    source = make_guest(home / "source")
    (source / "below").mkdir()
    os.setxattr(source / "state", "user.origin", b"here")
    make_sparse_file(source / "large", 8 * MIB, 4 * MIB)
    for path in [home, source, *source.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)

    in_child(lambda: forked(source, home / "fork", limits=limits), user=NOBODY, umask=umask)

    assert_alike(source, home / "fork", SKIPPED_BY_DEFAULT)


@pytest.mark.parametrize("bits", [5, 0])
def test_a_default_acl_that_restricts_the_owner_does_not_affect_a_fork(fs: Path, limits: Limits, bits: int) -> None:
    home = fs / "home"
    home.mkdir()
    source = make_guest(home / "source")
    for path in [home, source, *source.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    os.setxattr(home, DEFAULT_ACL, acl(bits, 5, 0, users=[(1000, 7)]))

    in_child(lambda: forked(source, home / "fork", limits=limits), user=NOBODY)

    assert_alike(source, home / "fork", SKIPPED_BY_DEFAULT)
