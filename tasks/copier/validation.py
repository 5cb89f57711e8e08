"""Checks for records that are read back from staging, which are treated as hostile input.

Each check returns the value that it was given, or raises Malformed. It checks type and range only. The caller decides
whether the value is plausible.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

from tasks.copier.errors import Code, ErrorRecord, ForkError

T = TypeVar("T")

#: Exclusive upper bounds of numbers of 32 bits (user ids, devices), 63 bits (sizes) and 64 bits (inodes).
U32, S63, U64 = 1 << 32, 1 << 63, 1 << 64
#: Exclusive upper bound of a sum of sizes: sparse files of EiB exceed 63 bits together.
SUM = 1 << 127
#: Exclusive upper bound of a time in nanoseconds, from the seconds that `os.utime` accepts.
NANOSECONDS = S63 * 10**9
#: Exclusive upper bound of the identity of a tree. The UUID of a btrfs subvolume is the largest.
IDENTITY = 1 << 128
#: The longest text, in characters. The file that contains it has its own limit.
_MOST_TEXT = 16 << 20
#: The beginning of every message of Malformed.
_DAMAGED = "the staging directory is damaged: "


class Malformed(ForkError):
    """A record in staging does not have the form that this program writes. `what` says which part, and why."""

    def __init__(self, what: str) -> None:
        super().__init__(Code.IO_ERROR, f"{_DAMAGED}{what}")


@dataclass(frozen=True, kw_only=True)
class Seal:
    """How a file carries the CRC-32 of its content: after `mark`, before `end`.

    Only a checksum finds a number that was changed into another number.
    """

    mark: bytes
    #: Number of digits of the checksum, or None for any; and how it is written.
    digits: int | None
    form: bytes
    #: The last bytes of the data, which stay behind the checksum.
    end: bytes = b""

    def seal(self, data: bytes) -> bytes:
        """`data`, which ends with `end`, with its checksum."""
        body = data.removesuffix(self.end)
        return b"".join((body, self.mark, self.form % zlib.crc32(body), self.end))

    def unseal(self, data: bytes) -> bytes:
        """The bytes that were given to `seal`. Raises Malformed if the checksum does not match.

        Bytes without a checksum, as earlier versions wrote them, are returned as they are.
        """
        body, mark, check = data.rpartition(self.mark)
        if not mark or (self.digits is not None and len(check) != self.digits):
            return data
        if check != self.form % zlib.crc32(body) + self.end:
            raise Malformed("the checksum does not match")
        return body + self.end


#: The seal of reports and of the records of batches.
FILE_SEAL = Seal(mark=b"\nchecksum ", digits=8, form=b"%08x")


def load(data: bytes) -> Any:
    """Parse JSON. Raises Malformed for invalid JSON, and for a depth or a number that Python does not accept."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and integers of thousands of digits
        raise Malformed(f"invalid JSON: {error}") from None


def _refuse_constant(word: str) -> NoReturn:
    raise Malformed(f"invalid JSON: {word} is not allowed")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn every error that a malformed value causes into a Malformed whose message begins with `what`."""
    try:
        yield
    except Malformed as error:
        raise Malformed(f"{what}: {error.message.removeprefix(_DAMAGED)}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise Malformed(f"{what}: {error}") from None


def integer(value: Any, end: int = S63, start: int = 0) -> int:
    """An integer in [start, end)."""
    if type(value) is not int or not start <= value < end:
        raise Malformed(f"{_shown(value)} is not an integer from {start} to {end - 1}")
    return value


def seconds(value: Any) -> float:
    """A time or a duration in seconds: a finite number that is not negative."""
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value < S63:
        raise Malformed(f"{_shown(value)} is not a number of seconds")
    return cast(float, value)


def error_record(value: Any) -> ErrorRecord:
    """An error in the form of `ForkError.record`."""
    data = json_object(value)
    code = one_of(data["code"], list(Code))
    return {
        "code": str(code),
        "message": any_text(data["message"]),
        "path": text(data["path"]),
        "errno": optional(data["errno"], errno_number),
    }


def errno_number(value: Any) -> int:
    """A number of errno(3)."""
    return integer(value, 4096)


def boolean(value: Any) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise Malformed(f"{_shown(value)} is not true or false")
    return value


def text(value: Any) -> str:
    """A text that the kernel accepts as a name: without NUL, and with surrogates only as `os.fsdecode` makes them."""
    if type(value) is not str or len(value) > _MOST_TEXT or "\0" in value:
        raise Malformed(f"{_shown(value)} is not a valid string")
    os.fsencode(value)  # raises UnicodeEncodeError for a surrogate that os.fsdecode did not make
    return value


def labels(value: Any) -> Any:
    """The labels of a request: a list of strings, or an object of strings. They are returned unchanged."""
    if type(value) is list:
        return [any_text(item) for item in value]
    return {any_text(name): any_text(item) for name, item in json_object(value).items()}


def any_text(value: Any) -> str:
    """A string of any characters, such as a message."""
    if type(value) is not str:
        raise Malformed(f"{_shown(value)} is not a string")
    return value


def one_of(value: Any, words: Collection[T]) -> T:
    """One of `words`."""
    if type(value) is not str or value not in words:
        raise Malformed(f"{_shown(value)} is not one of {', '.join(map(str, words))}")
    return cast(T, value)


def json_object(value: Any) -> dict[str, Any]:
    """A JSON object."""
    if type(value) is not dict:
        raise Malformed(f"{_shown(value)} is not an object")
    return value


def list_of(value: Any, check: Callable[[Any], T], most: int) -> list[T]:
    """A list of at most `most` items that all pass `check`."""
    if type(value) not in (list, tuple) or len(value) > most:  # data that was not read from JSON may hold tuples
        raise Malformed(f"{_shown(value)} is not a list of at most {most} items")
    return [check(item) for item in value]


def optional(value: Any, check: Callable[[Any], T]) -> T | None:
    """None, or a value that passes `check`."""
    return None if value is None else check(value)


def relative_path(value: Any) -> str:
    """A path relative to a directory, without `..`. "" is the directory itself."""
    path = text(value)
    if path and not _NO_PARTS.isdisjoint(path.split("/")):
        raise Malformed(f"{_shown(path)} is not a relative path without '..'")
    return path


def absolute_path(value: Any) -> str:
    """An absolute path without `..`, or "" where the path is not known."""
    path = text(value)
    if path and (not path.startswith("/") or ".." in path.split("/")):
        raise Malformed(f"{_shown(path)} is not an absolute path without '..'")
    return path


#: Parts that a relative path must not have. An empty part comes from a leading, trailing or doubled slash.
_NO_PARTS = frozenset({"", ".", ".."})


def _shown(value: Any) -> str:
    shown = repr(value) if not isinstance(value, int) or abs(value) < 1 << 200 else "a huge integer"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
