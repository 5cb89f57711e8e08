"""The standard streams of a command: always open, always UTF-8, and never the reason that a command fails.

What a command has done is done whether or not its answer can be written, so an answer that cannot be written changes
no exit code: a reader that went away (`| head`) is silent, any other fault is one line on stderr.
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
    """A standard stream whose faults are noted instead of raised."""

    #: The first write that failed, if any.
    fault: OSError | None = None

    def write(self, data: object) -> int:
        """Write all of `data`, or note why that failed and drop it; returns the length in bytes."""
        left = memoryview(data).cast("B")  # type: ignore[arg-type]
        length = len(left)
        while left and self.fault is None:
            try:
                written = super().write(left)
            except OSError as error:
                self.fault = error
                break
            if written is None:  # a pipe or terminal that its other user set to non-blocking
                select.select([], [self], [])
                continue
            left = left[written:]
        return length


def use_utf8() -> None:
    """Run this program again in Python's UTF-8 mode where the locale's encoding is another one.

    Names are bytes. A legacy encoding (ISO-8859-1, BIG5) changes them on the way from the command line or a request to
    the kernel, or cannot express them (PEP 540). Returns where the encoding is UTF-8 already.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"  # for child processes too
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def open_streams() -> None:
    """Give the process its three standard streams, with /dev/null in place of a closed one.

    A descriptor that is closed would be taken by the next file that is opened, and then be written to or read from as
    if it were the terminal.
    """
    for fd in (0, _STDOUT, _STDERR):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = _stream(_STDOUT), _stream(_STDERR)


def _stream(fd: int) -> TextIO:
    # Names that are not UTF-8 are escaped, so nothing that is printed can raise.
    raw = _Output(fd, "w", closefd=False)
    buffered = fd == _STDOUT and not os.isatty(fd)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=not buffered
    )


def reader_is_gone() -> bool:
    """Whether what is still to be printed on stdout reaches nobody."""
    return _fault(sys.stdout) is not None


def close_streams() -> None:
    """Write out what is buffered, and report on stderr what could not be written to stdout."""
    sys.stdout.flush()
    fault = _fault(sys.stdout)
    if fault is not None and fault.errno not in (errno.EPIPE, errno.EBADF):
        print(f"forkvm: the answer could not be written to stdout: {fault.strerror}", file=sys.stderr)
    sys.stderr.flush()


def _fault(stream: TextIO) -> OSError | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.fault if isinstance(raw, _Output) else None
