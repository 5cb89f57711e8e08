"""The files of the notes, in the temporary directory; all workers of this user on this host share them.

Each note is one line, appended with one write(2). There is a file for each minute and each of 64 groups of ids, so that
old notes are removed by the file, and a reader opens only the files of its group. Nothing is synced: the notes are lost
when the host loses power. Lines that are torn or malformed are skipped; the callers check what they read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.copier.errors import ForkError
from tasks.copier.staging import proof

log = logging.getLogger(__name__)

#: How long a note is kept at least, in seconds. Redis must be back by then, and must have redelivered its messages.
KEPT_SECONDS = 300
#: For how long notes are appended to one file, in seconds.
_SLOT_SECONDS = 60
_SLOTS = KEPT_SECONDS // _SLOT_SECONDS
_GROUPS = 64
#: The most bytes of all files together. Above that, no notes are written until old files are removed.
_MOST_BYTES = 256 << 20
_NAME = re.compile(r"ended-([0-9]{1,12})-([0-9a-f]{2})")
_LINE = re.compile(rb"([0-9a-f]{64}) ([0-9]{1,9}) ([0-9]{1,9}) (\S+)")


class Note(NamedTuple):
    """A note about the forks `first` to `last` of a job."""

    first: int
    last: int
    data: bytes


@dataclass
class NoteFiles:
    """Notes by job id. Never raises OSError: when the files cannot be used, the program works without them."""

    #: The directory that contains that of the files; None for the temporary directory of this process.
    parent: str | None = None
    _purged_in: int = field(default=-1, init=False)
    _is_full: bool = field(default=False, init=False)
    _has_warned: bool = field(default=False, init=False)

    def add(self, job_id: str, note: Note) -> None:
        """Write a note about a job. Its `data` is ASCII without white space."""
        key, slot = _key(job_id), int(time.time()) // _SLOT_SECONDS
        line = b"\n%s %d %d %s\n" % (key.encode("ascii"), note.first, note.last, note.data)
        try:
            fd = self._open()
            try:
                if slot != self._purged_in:
                    self._purge(fd, slot)
                if not self._is_full:
                    _append(fd, f"ended-{slot}-{_group(key)}", line)
            finally:
                os.close(fd)
        except (OSError, ForkError) as error:
            self._warn(error)

    def find(self, job_id: str) -> Iterator[Note]:
        """Yield the notes about a job of the last minutes, the latest first."""
        key = _key(job_id)
        try:
            fd = self._open()
        except (OSError, ForkError) as error:
            self._warn(error)
            return
        try:
            for name in _files_of(fd, _group(key)):
                with suppress(OSError, ForkError):
                    yield from reversed(list(_notes(_read(fd, name), key.encode("ascii"))))
        finally:
            os.close(fd)

    def _open(self) -> int:
        """Open this user's directory, create it if needed, and check its owner and mode. Raises OSError, NotOurs."""
        name = f"forkvm-ended-{os.geteuid()}"
        parent_fd = os.open(self.parent or tempfile.gettempdir(), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(FileNotFoundError):
                return proof.open_directory(parent_fd, name)
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent_fd)
            return proof.open_directory(parent_fd, name)
        finally:
            os.close(parent_fd)

    def _purge(self, fd: int, slot: int) -> None:
        """Remove files that are older than `KEPT_SECONDS` or in the future, and measure the rest."""
        self._purged_in, total = slot, 0
        for name in os.listdir(fd):
            known = _NAME.fullmatch(name)
            with suppress(OSError):
                if known is None or not slot - _SLOTS <= int(known[1]) <= slot + 1:
                    os.unlink(name, dir_fd=fd)
                else:
                    total += os.stat(name, dir_fd=fd, follow_symlinks=False).st_size
        self._is_full = total > _MOST_BYTES

    def _warn(self, error: OSError | ForkError) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "notes about forks cannot be written; a fork whose result Redis loses may fail when redelivered: %s",
                error,
            )


def _key(job_id: str) -> str:
    return hashlib.sha256(job_id.encode("utf-8", "surrogatepass")).hexdigest()


def _group(key: str) -> str:
    return f"{int(key[:2], 16) % _GROUPS:02x}"


def _append(dir_fd: int, name: str, line: bytes) -> None:
    fd = proof.open_file(dir_fd, name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        if os.fstat(fd).st_size + len(line) <= proof.most_bytes(name):
            os.write(fd, line)  # a short write leaves a torn line, which readers skip
    finally:
        os.close(fd)


def _files_of(fd: int, group: str) -> list[str]:
    """The files of a group of ids that are not too old, the latest first."""
    now = int(time.time()) // _SLOT_SECONDS
    names = [known for known in map(_NAME.fullmatch, os.listdir(fd)) if known is not None and known[2] == group]
    fresh = [known for known in names if now - _SLOTS <= int(known[1]) <= now + 1]
    return [known[0] for known in sorted(fresh, key=lambda known: int(known[1]), reverse=True)]


def _read(dir_fd: int, name: str) -> bytes:
    fd = proof.open_file(dir_fd, name, os.O_RDONLY)
    with open(fd, "rb") as file:
        return file.read(proof.most_bytes(name))


def _notes(data: bytes, key: bytes) -> Iterator[Note]:
    for line in data.split(b"\n"):
        known = _LINE.fullmatch(line) if line.startswith(key) else None
        if known is not None:
            yield Note(int(known[2]), int(known[3]), known[4])
