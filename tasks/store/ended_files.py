"""Short-lived files in the temporary directory in which all workers of this host and user note what has ended.

A line for each note, appended by one write(2), in a file for each minute and each 64th of the ids: so what is old is
removed by whole files, and a note about an id is found without reading all of them. Nothing is synced: a host that
loses power loses the notes. A line that is torn or not ours is left out; the callers check what they read.
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

#: Seconds that a note is kept at least: Redis must be back, and have delivered its messages again, by then.
KEPT_SECONDS = 300
#: Seconds that one file is written.
_SLOT_SECONDS = 60
_SLOTS = KEPT_SECONDS // _SLOT_SECONDS
_BUCKETS = 64
#: Most bytes of all files together; above that nothing is noted until old ones are removed.
_MOST_BYTES = 256 << 20
_NAME = re.compile(r"ended-([0-9]{1,12})-([0-9a-f]{2})")
_LINE = re.compile(rb"([0-9a-f]{64}) ([0-9]{1,9}) ([0-9]{1,9}) (\S+)")


class Note(NamedTuple):
    """What was noted of the forks `first` to `last` of a job."""

    first: int
    last: int
    data: bytes


@dataclass
class EndedStore:
    """Notes by job id. Never raises OSError: where the files cannot be had, the program goes on without them."""

    #: The directory that holds ours; None: the temporary directory of this process.
    parent: str | None = None
    _purged_in: int = field(default=-1, init=False)
    _is_full: bool = field(default=False, init=False)
    _has_warned: bool = field(default=False, init=False)

    def add(self, job_id: str, note: Note) -> None:
        """Note something of a job. `data` is ASCII without white space."""
        key, slot = _key(job_id), int(time.time()) // _SLOT_SECONDS
        line = b"\n%s %d %d %s\n" % (key.encode("ascii"), note.first, note.last, note.data)
        try:
            fd = self._open()
            try:
                if slot != self._purged_in:
                    self._purge(fd, slot)
                if not self._is_full:
                    _append(fd, f"ended-{slot}-{_bucket(key)}", line)
            finally:
                os.close(fd)
        except (OSError, ForkError) as error:
            self._warn(error)

    def find(self, job_id: str) -> Iterator[Note]:
        """Yield what was noted of a job in the last minutes, the latest first."""
        key = _key(job_id)
        try:
            fd = self._open()
        except (OSError, ForkError) as error:
            self._warn(error)
            return
        try:
            for name in _files_of(fd, _bucket(key)):
                with suppress(OSError, ForkError):
                    yield from reversed(list(_notes(_read(fd, name), key.encode("ascii"))))
        finally:
            os.close(fd)

    def _open(self) -> int:
        """Open this user's directory, made if need be, and prove that it is ours alone. Raises OSError, NotOurs."""
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
        """Remove the files that are older than `KEPT_SECONDS`, or of a time to come, and see how large the rest is."""
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
            log.warning("no notes of ended forks can be kept, so one that Redis forgets is not recognized: %s", error)


def _key(job_id: str) -> str:
    return hashlib.sha256(job_id.encode("utf-8", "surrogatepass")).hexdigest()


def _bucket(key: str) -> str:
    return f"{int(key[:2], 16) % _BUCKETS:02x}"


def _append(dir_fd: int, name: str, line: bytes) -> None:
    fd = proof.open_file(dir_fd, name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        if os.fstat(fd).st_size + len(line) <= proof.most_bytes(name):
            os.write(fd, line)  # a short one leaves a torn line, which is left out
    finally:
        os.close(fd)


def _files_of(fd: int, bucket: str) -> list[str]:
    """The files with notes of a bucket that are not too old, the latest first."""
    now = int(time.time()) // _SLOT_SECONDS
    names = [known for known in map(_NAME.fullmatch, os.listdir(fd)) if known is not None and known[2] == bucket]
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
