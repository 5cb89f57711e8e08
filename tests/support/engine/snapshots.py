"""Forks of btrfs subvolumes, made by a snapshot or file by file."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.copier.fork_spec import ForkResult
from tests.fixtures.filesystems import make_subvolume
from tests.support.engine.forks import (
    MIB,
    forked,
)
from tests.support.guests import GuestSizes, make_guest

SIZES = GuestSizes(overlay=8 * MIB, overlay_data=2 * MIB, memory=8 * MIB, memory_data=MIB)


def make_subvolume_guest(directory: Path) -> Path:
    """Make a guest directory that is a subvolume, and whose mode lets everyone write to it."""
    source = make_subvolume(directory / "source")
    make_guest(source, SIZES).chmod(0o777)
    os.link(source / "state", source / "state.linked")
    os.sync()  # otherwise each snapshot writes the new data to the disk
    return source


def is_subvolume(path: Path) -> bool:
    return path.stat().st_ino == 256


def by_snapshot(source: Path, destination: Path, **arguments: object) -> ForkResult:
    """One fork that must be made by a snapshot."""
    result = forked(source, destination, **arguments)
    assert result["subvolume"]
    assert is_subvolume(destination)
    return result


def file_by_file(source: Path, destination: Path, **arguments: object) -> ForkResult:
    """One fork that must be made without a snapshot."""
    result = forked(source, destination, **arguments)
    assert not result["subvolume"]
    assert not is_subvolume(destination)
    return result
