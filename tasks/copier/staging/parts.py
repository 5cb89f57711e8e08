"""The parts of a fork in its control directory: the manifests, and each chunk's lock, count of tries and report."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tasks.copier.report import Report
from tasks.copier.staging.control_directory import ControlDirectory

_MANIFEST = "manifest"
_CLOSING = "closing"
_STOP = "stop"
#: Digits of the number of tries of a chunk, at most.
_COUNT_DIGITS = 6


class Parts(ControlDirectory):
    """A control directory, open, with what its chunks need."""

    # -- the manifest

    def manifest(self, *, closing: bool = False) -> int:
        """Open the manifest of what chunks clone, or of what closes the fork; the caller closes the descriptor."""
        return self.open_file(_CLOSING if closing else _MANIFEST, create=True)

    # -- chunks

    @contextmanager
    def hold_chunk(self, number: int) -> Iterator[int | None]:
        """Hold chunk `number` alone: yields how often it was begun, this time included, or None if another has it.

        Two who worked on one chunk at once would replace each other's files, and one of them could die half-way
        through a file that the other had already reported as done.
        """
        name = f"chunk-{number}"
        try:
            fd, is_new = self.create_file(name), True
        except FileExistsError:
            fd, is_new = self.open_file(name, create=True), False
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # A power loss may leave the file without its count: what was begun is never taken for new.
            count = os.pread(fd, _COUNT_DIGITS, 0)
            begun = 1 if is_new else 1 + int(count if count.isdigit() else b"1")
            os.pwrite(fd, b"%d" % begun, 0)
            yield begun
        finally:
            os.close(fd)

    def chunk_lock(self, number: int) -> int | None:
        """Inode of the lock of chunk `number`: who finds another one than before has lost the chunk. None: gone."""
        try:
            return os.stat(f"chunk-{number}", dir_fd=self.fd, follow_symlinks=False).st_ino
        except FileNotFoundError:
            return None

    def seize_chunk(self, number: int) -> None:
        """Take the lock of chunk `number` from whoever holds it, by a new one in its place that has the same count."""
        with suppress(FileNotFoundError):
            self.write_file(f"chunk-{number}", self.read_file(f"chunk-{number}"))

    def begun_chunks(self) -> set[int]:
        """The numbers of all chunks that were begun and not forgotten."""
        names = [name.partition("-") for name in os.listdir(self.fd)]
        return {int(number) for kind, _, number in names if kind == "chunk" and number.isascii() and number.isdigit()}

    def forget_chunk(self, number: int) -> None:
        """Remove the lock of chunk `number`, which is done."""
        with suppress(FileNotFoundError):
            os.unlink(f"chunk-{number}", dir_fd=self.fd)

    def write_report(self, part: str, report: Report) -> None:
        """Record that a part (a chunk's number, or `plan`) is done, and what it did."""
        self.write_file(f"report-{part}", report.to_bytes())

    def has_report(self, part: str) -> bool:
        """Whether a part is done. Raises OSError."""
        return self.has_file(f"report-{part}")

    def report(self, part: str) -> Report:
        """What a part did. Raises FileNotFoundError when it is not done."""
        return Report.from_bytes(self.read_file(f"report-{part}"))

    # -- stopping early

    @classmethod
    def stop_from_outside(cls, parent_fd: int, fork_id: str) -> None:
        """As `stop`, by someone who does not hold the staging: who wants to hold it alone must first have it idle."""
        with cls.peek(parent_fd, fork_id) as staging, suppress(FileNotFoundError):  # removed meanwhile
            if staging is not None:
                staging.stop()

    def stop(self) -> None:
        """Tell the chunks of this fork that their work is no longer wanted."""
        os.close(self.open_file(_STOP, create=True))

    def is_stopped(self) -> bool:
        """Whether someone called `stop`. Raises OSError."""
        return self.has_file(_STOP)
