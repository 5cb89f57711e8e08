"""`durability: sync`: what was reported as done exists after a power loss.

The filesystem's image is copied while it is mounted, at the moment of success: data that had not reached the disk by
then is not in the copy. (tests/engine/test_injected_errors.py checks the order of the calls.)
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tests.fixtures.filesystems import image_mounted, make_subvolume
from tests.support.engine.forks import CHUNKED, INLINE, assert_alike, forked
from tests.support.engine.local_campaigns import campaign, destinations
from tests.support.guests import MIB, SKIPPED_BY_DEFAULT, GuestSizes, make_guest
from tests.support.requirements import require_command

SIZES = GuestSizes(overlay=32 * MIB, overlay_data=4 * MIB, memory=16 * MIB, memory_data=4 * MIB)
#: How each filesystem is created, and how a copy of its image is mounted.
FILESYSTEMS: dict[str, tuple[list[str], list[str]]] = {
    "xfs": (["mkfs.xfs", "-q", "-m", "reflink=1"], ["nouuid"]),
    "btrfs": (["mkfs.btrfs", "-q"], []),
    "ext4": (["mkfs.ext4", "-q"], []),
}
#: A little more than the smallest size that mkfs.xfs accepts.
_IMAGE_BYTES = 320 * MIB

CutPower = Callable[[], Path]


@pytest.fixture(params=FILESYSTEMS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def disk(kind: str, mounts: Path, tmp_path: Path) -> Iterator[tuple[Path, CutPower]]:
    """A mounted filesystem, and a function that shows its state after a power loss at the moment of the call."""
    (mkfs, *options), mount_again = FILESYSTEMS[kind]
    image, copy, point = tmp_path / "image", tmp_path / "copy", mounts / "disk"
    with image.open("wb") as file:
        file.truncate(_IMAGE_BYTES)
    subprocess.run([require_command(mkfs, f"simulating a power loss on {kind}"), *options, image], check=True)
    with ExitStack() as before, ExitStack() as after:
        before.enter_context(image_mounted(image, point))

        def cut_power() -> Path:
            subprocess.run(["cp", "--sparse=always", image, copy], check=True)
            before.close()
            return after.enter_context(image_mounted(copy, point, *mount_again))

        yield point, cut_power


@pytest.mark.parametrize(("limits", "reflink"), [(INLINE, "auto"), (CHUNKED, "never")])
def test_a_durable_fork_is_complete_after_a_power_loss(
    disk: tuple[Path, CutPower], limits: Limits, reflink: str, tmp_path: Path
) -> None:
    point, cut_power = disk
    source = make_guest(point / "source", SIZES)
    pristine = _copy_of(source, tmp_path)
    (point / "guests").mkdir()

    forked(source, point / "guests" / "fork", limits=limits, reflink=reflink, durability="sync")
    after = _without_power(point, cut_power)

    _assert_whole(after / "guests" / "fork", after / "source", pristine)


@pytest.mark.parametrize("kind", ["btrfs"])
def test_a_durable_fork_of_a_subvolume_is_complete_after_a_power_loss(
    disk: tuple[Path, CutPower], tmp_path: Path
) -> None:
    point, cut_power = disk
    source = make_guest(make_subvolume(point / "source"), SIZES)
    pristine = _copy_of(source, tmp_path)
    (point / "guests").mkdir()

    result = forked(source, point / "guests" / "fork", durability="sync")
    after = _without_power(point, cut_power)

    assert result["subvolume"]
    _assert_whole(after / "guests" / "fork", after / "source", pristine)


@pytest.mark.parametrize("kind", ["xfs"])
def test_the_durable_forks_of_a_campaign_are_complete_after_a_power_loss(
    disk: tuple[Path, CutPower], tmp_path: Path
) -> None:
    point, cut_power = disk
    source = make_guest(point / "source", SIZES)
    pristine = _copy_of(source, tmp_path)
    (point / "guests").mkdir()

    result = campaign(source, destinations(point / "guests", 3), durability="sync")
    after = _without_power(point, cut_power)

    assert result["status"] == "succeeded"
    for fork in destinations(after / "guests", 3):
        _assert_whole(fork, after / "source", pristine)


def _copy_of(source: Path, directory: Path) -> Path:
    """The expected content of a fork of the source, on a disk that is not copied."""
    left_out = shutil.ignore_patterns("*.sock", "*.socket", "*.tmp", "logs")
    return Path(shutil.copytree(source, directory / "pristine", symlinks=True, ignore=left_out))


def _without_power(point: Path, cut_power: CutPower) -> Path:
    """The filesystem after a power loss. First checks that the copy shows no more than the disk had."""
    unsynced = b"and not synced" * 1000
    (point / "written later").write_bytes(unsynced)
    after = cut_power()
    later = after / "written later"
    assert not later.exists() or later.read_bytes() != unsynced, "the copy shows more than the disk had"
    return after


def _assert_whole(fork: Path, source: Path, pristine: Path) -> None:
    assert_alike(source, fork, SKIPPED_BY_DEFAULT)
    for path in (path for path in pristine.rglob("*") if path.is_file()):
        assert (fork / path.relative_to(pristine)).read_bytes() == path.read_bytes()
