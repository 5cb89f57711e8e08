"""Symlink races: a process swaps directories for symlinks as fast as it can while forks are made within the roots."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.support.engine.forks import fork, leftovers
from tests.support.engine.local_campaigns import campaign
from tests.support.tree import snapshot

#: The number of swaps that each swapper must have made before a test may end.
SWAPS = 20_000
#: The minimum number of forks in each test.
FORKS = 60
#: Forks of one campaign.
FANNED_OUT = 8
#: A swapper pauses after so many swaps for so long, in seconds: some forks overlap with swaps, some do not.
SWAPS_PER_BURST, PAUSE_SECONDS = 1000, 0.05
SECRET = b"a secret"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    """`root`, the only root, with a guest and a directory for forks;

    `outside`, which looks the same and contains secrets.
    """
    workdir = fresh("xfs")
    for side, content in (("root", b"paused"), ("outside", SECRET)):
        deepest = workdir / side / "guests" / "source" / "a" / "b"
        deepest.mkdir(parents=True)
        for directory in (deepest, deepest.parent, deepest.parent.parent):
            (directory / "state").write_bytes(content)
        (workdir / side / "forks").mkdir()
    return workdir


class Swapper:
    """A process that repeatedly exchanges a directory and a symlink, and counts the swaps.

    renameat2(RENAME_EXCHANGE): at any time one of the two exists.
    """

    def __init__(self, directory: Path, target: Path) -> None:
        self._directory = directory
        self._link = directory.with_name(f"{directory.name}.swap")
        self._link.symlink_to(os.path.relpath(target, directory.parent))
        self._count = mmap.mmap(-1, 8)
        self._pid = os.fork()
        if self._pid == 0:
            self._swap_endlessly()

    @property
    def swaps(self) -> int:
        return int.from_bytes(self._count[:], "little")

    def _swap_endlessly(self) -> None:
        try:
            for done in itertools.count(1):
                self._exchange()
                self._count[:] = done.to_bytes(8, "little")
                if done % SWAPS_PER_BURST == 0:
                    time.sleep(PAUSE_SECONDS)
        finally:
            os._exit(1)

    def _exchange(self) -> None:
        ours, theirs = os.fsencode(self._directory), os.fsencode(self._link)
        if ctypes.CDLL(None).renameat2(_AT_FDCWD, ours, _AT_FDCWD, theirs, _RENAME_EXCHANGE) != 0:
            raise OSError("renameat2")

    def end(self) -> None:
        """End with the directory at its own path."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        if self._directory.is_symlink():
            self._exchange()
        self._link.unlink()


def _fork_while_swapped(workdir: Path, swapped: str) -> Counter[str]:
    """Make forks until enough of them overlapped with enough swaps. Returns their results."""
    source, destination = workdir / "root" / "guests" / "source", workdir / "root" / "forks" / "fork"

    def one(number: int) -> Counter[str]:
        result = fork(source, f"{destination}-{number}", roots=[workdir / "root"])
        return Counter([result["error"]["code"] if result["error"] else "succeeded"])

    return _while_swapped(workdir, swapped, one)


def _while_swapped(workdir: Path, swapped: str, make: Callable[[int], Counter[str]]) -> Counter[str]:
    """Call `make` until enough forks overlapped with enough swaps. Returns the results."""
    outside = snapshot(workdir / "outside")
    outcomes: Counter[str] = Counter()
    swapper = Swapper(workdir / "root" / swapped, workdir / "outside" / swapped)
    try:
        while outcomes.total() < FORKS or swapper.swaps < SWAPS:
            outcomes += make(outcomes.total())
    finally:
        swapper.end()
    assert snapshot(workdir / "outside") == outside
    forks = workdir / "root" / "forks"
    assert leftovers(forks) == []
    assert len(list(forks.iterdir())) == outcomes["succeeded"]
    secret = [path for path in forks.rglob("*") if path.name == "state" and SECRET in path.read_bytes()]
    assert secret == []
    return outcomes


@pytest.mark.parametrize("swapped", ["guests", "guests/source", "guests/source/a", "guests/source/a/b"])
def test_a_source_with_directories_swapped_for_symlinks_does_not_lead_out_of_the_roots(
    workdir: Path, swapped: str
) -> None:
    outcomes = _fork_while_swapped(workdir, swapped)

    # A directory below the source may be a symlink at the time of the walk: then the source contains a symlink.
    assert set(outcomes) <= {"succeeded", "source_changed", "outside_roots"}
    assert len(outcomes) > 1


def test_a_destination_with_a_parent_swapped_for_a_symlink_does_not_lead_out_of_the_roots(workdir: Path) -> None:
    assert set(_fork_while_swapped(workdir, "forks")) == {"succeeded", "outside_roots"}


def test_a_campaign_with_a_parent_swapped_for_a_symlink_does_not_lead_out_of_the_roots(workdir: Path) -> None:
    root = workdir / "root"

    def one(number: int) -> Counter[str]:
        paths = [root / "forks" / f"fork-{number}-{n}" for n in range(FANNED_OUT)]
        result = campaign(root / "guests" / "source", paths, roots=[root])
        codes = Counter(failure["error"]["code"] for failure in result["failures"])
        assert codes.total() == result["forks"]["failed"]
        return codes + Counter(succeeded=result["forks"]["succeeded"])

    outcomes = _while_swapped(workdir, "forks", one)

    assert set(outcomes) == {"succeeded", "outside_roots"}
