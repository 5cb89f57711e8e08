"""A directory whose own metadata changes fails the fork; skipped entries may change."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tasks.copier.progress import Progress
from tests.fixtures.filesystems import Fresh
from tests.support.engine import local_campaigns
from tests.support.engine.forks import forked, refused
from tests.support.engine.source_writers import ChangeOnce, closing, copying, wait_for_clock_tick
from tests.support.guests import make_guest
from tests.support.sources import ACCESS_ACL, DEFAULT_ACL, OLD_NS, acl

pytestmark = pytest.mark.usefixtures("every_poll")

CHANGES: dict[str, Callable[[Path], object]] = {
    "its mode": lambda path: path.chmod(0o2711),
    "its owner": lambda path: os.chown(path, 1234, -1),
    "its group": lambda path: os.chown(path, -1, 1234),
    "its times": lambda path: os.utime(path, ns=(OLD_NS, OLD_NS)),
    "a new attribute": lambda path: os.setxattr(path, "user.new", b"1"),
    "another value of an attribute": lambda path: os.setxattr(path, "user.origin", b"there"),
    "a removed attribute": lambda path: os.removexattr(path, "user.origin"),
    "an ACL of the same mode": lambda path: os.setxattr(path, ACCESS_ACL, acl(7, 5, 5, users=[(1000, 7)])),
    "a default ACL": lambda path: os.setxattr(path, DEFAULT_ACL, acl(7, 5, 0, users=[(1000, 7)])),
}


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("xfs")


@pytest.fixture
def source(directory: Path) -> Path:
    source = make_guest(directory / "source")
    for path in (source, source / "snapshots"):
        os.setxattr(path, "user.origin", b"here")
        os.setxattr(path, ACCESS_ACL, acl(7, 5, 5))
    wait_for_clock_tick()
    return source


@pytest.mark.parametrize("name", ["", "snapshots", "snapshots/snapshot-latest"])
@pytest.mark.parametrize("when", [copying, closing])
@pytest.mark.parametrize("change", ["its mode", "its times", "a new attribute"])
def test_a_directory_whose_metadata_changes_is_a_change_of_the_source(
    directory: Path, source: Path, name: str, when: Callable[[Progress], bool], change: str, limits: Limits
) -> None:
    writer = ChangeOnce(lambda: CHANGES[change](source / name), when)

    error = refused(source, directory / "fork", poll=writer, limits=limits)

    assert writer.done
    assert (error["code"], error["path"]) == ("source_changed", str(source / name))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_each_kind_of_directory_metadata_is_detected(directory: Path, source: Path, change: str) -> None:
    writer = ChangeOnce(lambda: CHANGES[change](source / "snapshots"), copying)

    error = refused(source, directory / "fork", poll=writer)

    assert writer.done
    assert (error["code"], error["path"]) == ("source_changed", str(source / "snapshots"))


@pytest.mark.parametrize("change", ["its mode", "its owner", "a new attribute"])
def test_a_change_after_changes_of_skipped_entries_is_detected(directory: Path, source: Path, change: str) -> None:
    def act() -> None:
        (source / "new.sock").touch()
        wait_for_clock_tick()
        CHANGES[change](source)

    assert refused(source, directory / "fork", poll=ChangeOnce(act, copying))["code"] == "source_changed"


@pytest.mark.parametrize("change", ["its mode", "its owner"])
def test_a_change_before_changes_of_skipped_entries_is_detected(directory: Path, source: Path, change: str) -> None:
    def act() -> None:
        CHANGES[change](source)
        wait_for_clock_tick()
        (source / "new.sock").touch()

    assert refused(source, directory / "fork", poll=ChangeOnce(act, copying))["code"] == "source_changed"


def test_a_published_directory_matches_the_source_at_one_moment(directory: Path, source: Path) -> None:
    """An attribute is set, then a skipped entry is created: the clone has the attribute and the newest mtime."""

    def act() -> None:
        os.setxattr(source, "user.new", b"1")
        wait_for_clock_tick()
        (source / "new.sock").touch()

    forked(source, directory / "fork", poll=ChangeOnce(act, copying))

    assert os.getxattr(directory / "fork", "user.new") == b"1"
    assert (directory / "fork").stat().st_mtime_ns == source.stat().st_mtime_ns


@pytest.mark.parametrize("when", [copying, closing])
def test_skipped_entries_may_come_and_go_on_every_filesystem(
    fs: Path, when: Callable[[Progress], bool], limits: Limits
) -> None:
    source = make_guest(fs / "source")
    wait_for_clock_tick()

    def live() -> None:
        (source / "vsock.sock").unlink(missing_ok=True)
        (source / "new.sock").touch()
        (source / "state.zst.tmp").touch()
        (source / "state.zst.tmp").rename(source / "snapshots" / "state.zst.tmp")

    writer = ChangeOnce(live, when)
    forked(source, fs / "fork", poll=writer, limits=limits)

    assert writer.done


@pytest.mark.parametrize("name", ["", "snapshots"])
@pytest.mark.parametrize("change", ["its mode", "its owner", "its times", "a new attribute"])
def test_a_campaign_makes_no_fork_of_a_directory_whose_metadata_changes(
    directory: Path, source: Path, tmp_path: Path, name: str, change: str
) -> None:
    paths = local_campaigns.destinations(directory, 3)
    local_campaigns.plan(source, paths)
    wait_for_clock_tick()
    CHANGES[change](source / name)
    ledger = local_campaigns.Ledger(tmp_path)

    local_campaigns.make_batches(paths[0], ledger)
    local_campaigns.end(paths[0], ledger)

    errors = [result["error"] for result in ledger.forks]
    assert [error and (error["code"], error["path"]) for error in errors] == [
        ("source_changed", str(source / name))
    ] * 3
    assert not any(path.exists() for path in paths)


def test_a_campaign_continues_while_skipped_entries_come_and_go(directory: Path, source: Path, tmp_path: Path) -> None:
    paths = local_campaigns.destinations(directory, 3)
    local_campaigns.plan(source, paths)
    wait_for_clock_tick()
    (source / "new.sock").touch()
    ledger = local_campaigns.Ledger(tmp_path)

    local_campaigns.make_batches(paths[0], ledger)
    local_campaigns.end(paths[0], ledger)

    assert [result["status"] for result in ledger.forks] == ["succeeded"] * 3
