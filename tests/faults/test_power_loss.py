"""`durability: sync`: what was reported as done is there after the machine lost its power.

The filesystem's image is copied while it is mounted, at the moment of success: what had not reached the disk by then is
not in the copy. (That the calls come in the right order is held by tests/engine/test_injected_errors.py.)
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tests.engine.forking import CHUNKED, INLINE, assert_alike, forked
from tests.fixtures.filesystems import image_mounted
from tests.support.guests import MIB, SKIPPED_BY_DEFAULT, GuestSizes, make_guest
from tests.support.requirements import require_command

SIZES = GuestSizes(overlay=32 * MIB, overlay_data=4 * MIB, memory=16 * MIB, memory_data=4 * MIB)
#: How each filesystem is made, and mounted again from a copy of itself.
FILESYSTEMS: dict[str, tuple[list[str], list[str]]] = {
    "xfs": (["mkfs.xfs", "-q", "-m", "reflink=1"], ["nouuid"]),
    "btrfs": (["mkfs.btrfs", "-q"], []),
    "ext4": (["mkfs.ext4", "-q"], []),
}
#: The smallest that mkfs.xfs makes, and a bit.
_IMAGE_BYTES = 320 * MIB

PullPlug = Callable[[], Path]


@pytest.fixture(params=FILESYSTEMS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def disk(kind: str, mounts: Path, tmp_path: Path) -> Iterator[tuple[Path, PullPlug]]:
    """A mounted filesystem, and what shows it as it is after a loss of power at the moment of the call."""
    (mkfs, *options), mount_again = FILESYSTEMS[kind]
    image, copy, point = tmp_path / "image", tmp_path / "copy", mounts / "disk"
    with image.open("wb") as file:
        file.truncate(_IMAGE_BYTES)
    subprocess.run([require_command(mkfs, f"the loss of power on {kind}"), *options, image], check=True)
    with ExitStack() as before, ExitStack() as after:
        before.enter_context(image_mounted(image, point))

        def pull_plug() -> Path:
            subprocess.run(["cp", "--sparse=always", image, copy], check=True)
            before.close()
            return after.enter_context(image_mounted(copy, point, *mount_again))

        yield point, pull_plug


@pytest.mark.parametrize(("limits", "reflink"), [(INLINE, "auto"), (CHUNKED, "never")])
def test_a_durable_fork_is_whole_after_the_power_was_lost(
    disk: tuple[Path, PullPlug], limits: Limits, reflink: str, tmp_path: Path
) -> None:
    point, pull_plug = disk
    source = make_guest(point / "source", SIZES)
    pristine = tmp_path / "pristine"
    shutil.copytree(
        source, pristine, symlinks=True, ignore=shutil.ignore_patterns("*.sock", "*.socket", "*.tmp", "logs")
    )
    (point / "guests").mkdir()

    forked(source, point / "guests" / "fork", limits=limits, reflink=reflink, durability="sync")
    (point / "written later").write_bytes(b"and not synced" * 1000)
    after = pull_plug()

    assert_alike(after / "source", after / "guests" / "fork", SKIPPED_BY_DEFAULT)
    for path in (path for path in pristine.rglob("*") if path.is_file()):
        assert (after / "guests" / "fork" / path.relative_to(pristine)).read_bytes() == path.read_bytes()
    later = after / "written later"
    assert not later.exists() or later.read_bytes() != b"and not synced" * 1000, "the copy shows more than the disk had"
