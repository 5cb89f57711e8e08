"""Damage to the staging of running forks: to one of its files, or to where its directories stand.

A fork that is hit ends as a success that is equal to its source, or as a failure with a code. Its tree may stay until
`forkvm gc` removes it, since the record of which tree is its own may be what was damaged.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.soak.jobs import Job

#: Longest time to wait for a running fork that may be damaged, and for how far it gets before it is, in seconds.
_WAIT_SECONDS = 3.0
_LONGEST_HEAD_START = 0.04
#: The lock file is not damaged: it is the fence between the processes of one worker's user.
_LOCK = "lock"
_OUTSIDE = "outside of all staging"


class Damage:
    """Damages staging. What it moves aside stays until `clear`."""

    def __init__(self, jobs: Callable[[], list[Job]], aside: tuple[Path, ...], dice: random.Random) -> None:
        """`jobs`: those at work that may be damaged; `aside`: a directory on each filesystem, for what is moved."""
        self._jobs = jobs
        self._aside = aside
        self._dice = dice
        self._moved = 0
        #: Where planted symlinks lead.
        self._outside = aside[0].parent / "outside"
        self._outside.write_text(_OUTSIDE)

    def strike(self) -> str:
        """Damage one running fork or campaign; returns what was done, in words."""
        deed = self._dice.choice(list(_DEEDS))
        head_start = self._dice.uniform(0.0, _LONGEST_HEAD_START)
        control = self._running()
        if control is None:
            return "staging to damage not found"
        time.sleep(head_start)
        try:
            _DEEDS[deed](self, control)
        except (FileNotFoundError, NotADirectoryError):  # the fork has ended
            return "staging gone before it was damaged"
        return deed

    def clear(self) -> None:
        """Remove what was moved aside. Raises AssertionError when a planted symlink was followed."""
        assert self._outside.read_text() == _OUTSIDE
        for directory in self._aside:
            for moved in directory.iterdir():
                shutil.rmtree(moved)

    def _running(self) -> Path | None:
        """The control directory of one job at work."""
        end = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < end:
            for job in self._jobs():
                if job.control.is_dir():
                    return job.control
            time.sleep(0.001)
        return None

    # -- what is done to one file

    def _file(self, control: Path) -> Path:
        """One of its files; those that there are few of are chosen as often as those that there are many of."""
        kinds: dict[str, list[str]] = {}
        for name in sorted(os.listdir(control)):
            if stat.S_ISREG((control / name).lstat().st_mode):
                kinds.setdefault(name.partition("-")[0], []).append(name)
        kinds.pop(_LOCK, None)
        if not kinds:
            raise FileNotFoundError(control)
        return control / self._dice.choice(kinds[self._dice.choice(sorted(kinds))])

    def truncate(self, control: Path) -> None:
        path = self._file(control)
        os.truncate(path, self._dice.randint(0, path.stat().st_size))

    def garble(self, control: Path) -> None:
        path = self._file(control)
        with path.open("r+b") as file:
            file.seek(self._dice.randint(0, path.stat().st_size))
            file.write(self._dice.randbytes(self._dice.randint(1, 32)))

    def change_digit(self, control: Path) -> None:
        """The file stays of the form that is expected."""
        path = self._file(control)
        data = bytearray(path.read_bytes())
        digits = [at for at, byte in enumerate(data) if 0x30 <= byte <= 0x39]
        if digits:
            at = self._dice.choice(digits)
            data[at] = 0x30 + (data[at] - 0x30 + self._dice.randint(1, 9)) % 10
            with path.open("r+b") as file:
                file.write(data)

    def replace(self, control: Path) -> None:
        """Another one of its files takes the place of a file."""
        path, other = self._file(control), self._file(control)
        copy = self._aside[0] / "copy"
        copy.write_bytes(other.read_bytes())
        copy.chmod(0o600)
        path.unlink()
        shutil.move(copy, path)

    def remove(self, control: Path) -> None:
        self._file(control).unlink()

    def plant_fifo(self, control: Path) -> None:
        path = self._file(control)
        path.unlink()
        with suppress(FileExistsError):
            os.mkfifo(path)

    def plant_symlink(self, control: Path) -> None:
        path = self._file(control)
        path.unlink()
        with suppress(FileExistsError):
            path.symlink_to(self._outside)

    # -- what is done to its directories

    def move_control(self, control: Path) -> None:
        self._move_aside(control)

    def move_tree(self, control: Path) -> None:
        trees = sorted(path for path in control.parent.glob(f"{control.name}.*"))
        if not trees:
            raise FileNotFoundError(control)
        self._move_aside(self._dice.choice(trees))

    def _move_aside(self, path: Path) -> None:
        self._moved += 1
        aside = next(place for place in self._aside if place.stat().st_dev == path.parent.stat().st_dev)
        path.rename(aside / f"moved-{self._moved}")


_DEEDS: dict[str, Callable[[Damage, Path], None]] = {
    "staging file truncated": Damage.truncate,
    "staging file garbled": Damage.garble,
    "staging file with another digit": Damage.change_digit,
    "staging file replaced": Damage.replace,
    "staging file removed": Damage.remove,
    "staging file made a FIFO": Damage.plant_fifo,
    "staging file made a symlink": Damage.plant_symlink,
    "control directory moved": Damage.move_control,
    "tree moved": Damage.move_tree,
}
