"""Damage to the staging of running forks: to one of its files, or to the paths of its directories.

A damaged fork ends as a success that equals its source, or as a failure with a code. Its tree may stay until `forkvm
gc` removes it, since the record that names its tree may be damaged too.
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

#: The longest wait for a running fork that may be damaged, and the longest time that it runs before the damage, in
#: seconds.
_WAIT_SECONDS = 3.0
_LONGEST_HEAD_START = 0.04
#: The lock file is not damaged: it is the fence between the processes of a worker's user.
_LOCK = "lock"
_OUTSIDE = "outside of all staging"


class Damage:
    """Damages staging. Entries that it moves aside stay until `clear`."""

    def __init__(self, jobs: Callable[[], list[Job]], aside: tuple[Path, ...], rng: random.Random) -> None:
        """`jobs`: the running jobs that may be damaged; `aside`: a directory on each filesystem for moved entries."""
        self._jobs = jobs
        self._aside = aside
        self._rng = rng
        self._moved = 0
        #: Where planted symlinks lead.
        self._outside = aside[0].parent / "outside"
        self._outside.write_text(_OUTSIDE)

    def inject(self) -> str:
        """Damage one running fork or campaign. Returns a description of the damage."""
        kind = self._rng.choice(list(_KINDS))
        head_start = self._rng.uniform(0.0, _LONGEST_HEAD_START)
        control = self._running()
        if control is None:
            return "staging to damage not found"
        time.sleep(head_start)
        try:
            _KINDS[kind](self, control)
        except (FileNotFoundError, NotADirectoryError):  # the fork has ended
            return "staging gone before it was damaged"
        return kind

    def clear(self) -> None:
        """Remove the moved entries. Raises AssertionError if a planted symlink was followed."""
        assert self._outside.read_text() == _OUTSIDE
        for directory in self._aside:
            for moved in directory.iterdir():
                shutil.rmtree(moved)

    def _running(self) -> Path | None:
        """The control directory of one running job."""
        end = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < end:
            for job in self._jobs():
                if job.control.is_dir():
                    return job.control
            time.sleep(0.001)
        return None

    # -- damage to one file

    def _file(self, control: Path) -> Path:
        """One of its files. Each kind of file is chosen equally often, however many files it has."""
        kinds: dict[str, list[str]] = {}
        for name in sorted(os.listdir(control)):
            if stat.S_ISREG((control / name).lstat().st_mode):
                kinds.setdefault(name.partition("-")[0], []).append(name)
        kinds.pop(_LOCK, None)
        if not kinds:
            raise FileNotFoundError(control)
        return control / self._rng.choice(kinds[self._rng.choice(sorted(kinds))])

    def truncate(self, control: Path) -> None:
        path = self._file(control)
        os.truncate(path, self._rng.randint(0, path.stat().st_size))

    def garble(self, control: Path) -> None:
        path = self._file(control)
        with path.open("r+b") as file:
            file.seek(self._rng.randint(0, path.stat().st_size))
            file.write(self._rng.randbytes(self._rng.randint(1, 32)))

    def change_digit(self, control: Path) -> None:
        """The file keeps its expected format."""
        path = self._file(control)
        data = bytearray(path.read_bytes())
        digits = [at for at, byte in enumerate(data) if 0x30 <= byte <= 0x39]
        if digits:
            at = self._rng.choice(digits)
            data[at] = 0x30 + (data[at] - 0x30 + self._rng.randint(1, 9)) % 10
            with path.open("r+b") as file:
                file.write(data)

    def replace(self, control: Path) -> None:
        """Replace a file by a copy of another one."""
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

    # -- damage to its directories

    def move_control(self, control: Path) -> None:
        self._move_aside(control)

    def move_tree(self, control: Path) -> None:
        trees = sorted(path for path in control.parent.glob(f"{control.name}.*"))
        if not trees:
            raise FileNotFoundError(control)
        self._move_aside(self._rng.choice(trees))

    def _move_aside(self, path: Path) -> None:
        self._moved += 1
        aside = next(directory for directory in self._aside if directory.stat().st_dev == path.parent.stat().st_dev)
        path.rename(aside / f"moved-{self._moved}")


_KINDS: dict[str, Callable[[Damage, Path], None]] = {
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
