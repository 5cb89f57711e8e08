"""`forkvm fork` where the kernel gives less than usual: without /proc/meminfo, and as root without its rights."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh, make_subvolume
from tests.fixtures.processes import forkvm_script
from tests.support.engine.forks import MIB, assert_alike, leftovers
from tests.support.requirements import require_command
from tests.support.tree import snapshot

#: Of a user without root's rights.
_OTHER = 4242


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


def test_a_large_file_is_copied_without_meminfo(fresh: Fresh) -> None:
    """A container, or a unit with ProcSubset=pid, has no /proc/meminfo."""
    directory = fresh("ext4")
    (directory / "a").mkdir()
    (directory / "a" / "disk").write_bytes(os.urandom(20 * MIB))
    script = f"mount -t proc -o subset=pid none /proc && test ! -e /proc/meminfo && exec {forkvm_script()} fork $0 $1"

    done = _run(require_command("unshare", "a /proc"), "-pmf", "sh", "-c", script, directory / "a", directory / "b")

    assert done.returncode == 0, done.stderr
    assert_alike(directory / "a", directory / "b")


@pytest.mark.parametrize(
    "prefix",
    [
        ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"],
        ["unshare", "--user", "--map-user=0", "--map-group=0"],
    ],
    ids=["no capabilities", "user namespace"],
)
def test_root_without_its_rights_clones_a_subvolume_of_many_owners_file_by_file(
    fresh: Fresh, prefix: list[str]
) -> None:
    directory = fresh("btrfs")
    source, parent = make_subvolume(directory / "source"), directory / "parent"
    parent.mkdir()
    for name in ("logs", "data"):
        (source / name).mkdir()
        (source / name / "file").write_bytes(b"x")
    for path in (source / "data", source / "data" / "file"):
        os.chown(path, _OTHER, _OTHER)

    done = _run(require_command(prefix[0], "less rights"), *prefix[1:], forkvm_script(), "fork", source, parent / "b")

    assert done.returncode == 0, done.stderr
    assert {entry.uid for entry in snapshot(parent / "b").values()} == {0}
    assert leftovers(parent) == []
