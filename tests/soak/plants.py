"""Entries that another user puts at the path of a fork's control directory before the fork is sent."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.copier.staging.control_directory import control_name

#: The other user.
_OTHER_USER = 1000


@dataclass(frozen=True)
class Plant:
    """The entry at `path`: it must not change, and no fork may be made through it."""

    kind: str
    path: Path
    #: Its inode, mode and owner, and the names in it.
    seen: tuple[object, ...]

    def remove(self) -> None:
        """Remove the planted entry. Raises AssertionError if it has changed."""
        assert _seen(self.path) == self.seen, f"the {self.kind} at {self.path} was changed"
        if not self.path.is_dir() or self.path.is_symlink():
            self.path.unlink()
            return
        for name in os.listdir(self.path):
            (self.path / name).unlink()
        self.path.rmdir()


def plant(parent: Path, fork_id: str, rng: random.Random) -> Plant:
    """Put one of `_PLANTS` at the path of the fork's control directory."""
    kind, path = rng.choice(sorted(_PLANTS)), parent / control_name(fork_id)
    _PLANTS[kind](path)
    return Plant(kind, path, _seen(path))


def _seen(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    names = sorted(os.listdir(path)) if stat.S_ISDIR(status.st_mode) else []
    return status.st_ino, status.st_mode, status.st_uid, *names


def _plant_foreign_staging(path: Path) -> None:
    """A staging directory with a lock and a journal that leads out of it."""
    path.mkdir(mode=0o700)
    (path / "lock").touch()
    journal = {"spec": {"fork_id": "x"}, "control": path.stat().st_ino, "attempt": "d/../../outside"}
    (path / "journal").write_text(json.dumps(journal))
    for owned in (path, path / "lock", path / "journal"):
        os.chown(owned, _OTHER_USER, _OTHER_USER)


def _plant_open_directory(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def _plant_file(path: Path) -> None:
    path.write_text("theirs")
    os.chown(path, _OTHER_USER, _OTHER_USER)


_PLANTS: dict[str, Callable[[Path], object]] = {
    "directory of another user": _plant_foreign_staging,
    "directory of mode 0777": _plant_open_directory,
    "FIFO": os.mkfifo,
    "file": _plant_file,
    "symlink": lambda path: path.symlink_to(path.parent),
}
