"""The standard streams of a command: always open, always UTF-8, and never the reason that a command fails.

A command's work is done whether or not its result can be printed. So a failed write does not change the exit code. If
the reader closed the pipe (`| head`), nothing is reported; any other error is one line on stderr.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TextIO

_STDOUT, _STDERR = 1, 2


class _Output(io.FileIO):
    """A standard stream that records its first write error instead of raising it."""

    error: OSError | None = None

    def write(self, data: object) -> int:
        """Write all of `data`, or record the error and drop the data; returns the length in bytes."""
        left = memoryview(data).cast("B")  # type: ignore[arg-type]
        length = len(left)
        while left and self.error is None:
            try:
                written = super().write(left)
            except OSError as error:
                self.error = error
                break
            if written is None:  # another process set this pipe or terminal to non-blocking
                select.select([], [self], [])
                continue
            left = left[written:]
        return length


def use_utf8() -> None:
    """Execute this program again in Python's UTF-8 mode (PEP 540) if the locale's encoding is not UTF-8.

    File names are bytes. Another encoding (ISO-8859-1, BIG5) would change some of them between the command line or a
    request and the kernel, and cannot express others.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"  # for child processes too
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def open_streams() -> None:
    """Give the process its three standard streams, with /dev/null in place of a closed one.

    Otherwise the next opened file would get the number of the closed stream, and output would be written into it.
    """
    for fd in (0, _STDOUT, _STDERR):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `fd`
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = _stream(_STDOUT), _stream(_STDERR)


def _stream(fd: int) -> TextIO:
    # backslashreplace: a name that is not UTF-8 is escaped, and printing it does not raise.
    raw = _Output(fd, "w", closefd=False)
    buffered = fd == _STDOUT and not os.isatty(fd)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=not buffered
    )


def stdout_failed() -> bool:
    """Whether a write to stdout has failed: further output would be lost."""
    return _error(sys.stdout) is not None


def close_streams() -> None:
    """Flush both streams, and report on stderr if a write to stdout failed."""
    sys.stdout.flush()
    error = _error(sys.stdout)
    if error is not None and error.errno not in (errno.EPIPE, errno.EBADF):
        print(f"forkvm: the result could not be written to stdout: {error.strerror}", file=sys.stderr)
    sys.stderr.flush()


def _error(stream: TextIO) -> OSError | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Output) else None
