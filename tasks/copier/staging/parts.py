"""The files of a fork's parts in its control directory: manifests, and each chunk's lock, tries and report."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tasks.copier.report import Report
from tasks.copier.staging import proof
from tasks.copier.staging.control_directory import ControlDirectory

_MANIFEST = "manifest"
_CLOSING = "closing"
_STOP = "stop"
#: Digits of the number of tries of a chunk, at most.
_COUNT_DIGITS = 6


class Parts(ControlDirectory):
    """An open control directory, with the files that chunks need."""

    # -- the manifest

    def manifest(self, *, closing: bool = False) -> int:
        """Open the manifest of what chunks clone, or (`closing`) of what closes the fork. The caller closes it."""
        return self.open_file(_CLOSING if closing else _MANIFEST, create=True)

    # -- chunks

    @contextmanager
    def hold_chunk(self, number: int) -> Iterator[int | None]:
        """Hold chunk `number` exclusively. Yields how often it was begun, this time included; None if it is held.

        Two processes in one chunk would replace each other's files, and one could die half-way through a file that the
        other has already reported as done.
        """
        fd, is_new = self._open_chunk(f"chunk-{number}")
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # A power loss may leave the file empty: a chunk that was begun is never counted as new.
            count = os.pread(fd, _COUNT_DIGITS, 0)
            begun = 1 if is_new else 1 + int(count if count.isdigit() else b"1")
            try:
                os.pwrite(fd, b"%d" % begun, 0)
            except OSError:  # a full btrfs: what an earlier try left must still be found and ended
                if is_new:
                    raise
            yield begun
        finally:
            os.close(fd)

    def _open_chunk(self, name: str) -> tuple[int, bool]:
        """Open a chunk's lock file, and say whether this process made it. Raises OSError if the fork is gone."""
        while True:
            with suppress(FileExistsError):
                return self.create_file(name), True
            with suppress(FileNotFoundError):  # its holder removed it between the two calls
                return proof.open_file(self.fd, name, os.O_RDWR), False

    def chunk_lock(self, number: int) -> int | None:
        """Inode of the lock of chunk `number`, or None. A holder that finds another inode has lost the chunk."""
        try:
            return os.stat(f"chunk-{number}", dir_fd=self.fd, follow_symlinks=False).st_ino
        except FileNotFoundError:
            return None

    def seize_chunk(self, number: int) -> None:
        """Take the lock of chunk `number` from its holder: replace it by a new file with the same number of tries."""
        with suppress(FileNotFoundError):
            self.write_file(f"chunk-{number}", self.read_file(f"chunk-{number}"))

    def begun_chunks(self) -> set[int]:
        """The numbers of all chunks that have a lock file: they were begun and not forgotten."""
        names = [name.partition("-") for name in os.listdir(self.fd)]
        return {int(number) for kind, _, number in names if kind == "chunk" and number.isascii() and number.isdigit()}

    def forget_chunk(self, number: int) -> None:
        """Remove the lock file of chunk `number`, which is done."""
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
        """As `stop`, for a process that waits to hold the staging exclusively: the holders end first."""
        with cls.peek(parent_fd, fork_id) as staging, suppress(FileNotFoundError):  # removed meanwhile
            if staging is not None:
                staging.stop()

    def stop(self) -> None:
        """Signal the chunks of this fork to end."""
        os.close(self.open_file(_STOP, create=True))

    def is_stopped(self) -> bool:
        """Whether `stop` was called. Raises OSError."""
        return self.has_file(_STOP)
