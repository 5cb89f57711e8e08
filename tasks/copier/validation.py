"""Reading back what a control directory holds as hostile input: JSON within bounds, and each field checked.

A check returns the value that it was given, or raises Malformed. What is checked here is the form: whether the value is
true is decided where it is used.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, cast

from tasks.copier.errors import Code, ErrorRecord, ForkError

T = TypeVar("T")

#: Exclusive bounds of what the kernel counts in 32, 63 and 64 bits (user ids and device numbers, sizes, inodes).
U32, S63, U64 = 1 << 32, 1 << 63, 1 << 64
#: Exclusive bound of a time in nanoseconds: the seconds that `os.utime` takes.
NANOSECONDS = S63 * 10**9
#: Exclusive bound of a btrfs subvolume's UUID, the largest identity of a tree.
IDENTITY = 1 << 128
#: Characters of a text: an id or a message may be long, and the file that holds it has a bound of its own.
_MOST_TEXT = 16 << 20


_DAMAGED = "its staging directory is damaged: "


class Malformed(ForkError):
    """What was read back is not what this program writes."""

    def __init__(self, what: str) -> None:
        super().__init__(Code.IO_ERROR, f"{_DAMAGED}{what}")


#: Stands between what was written and its checksum.
_SEAL = b"\nchecksum "


def seal(data: bytes) -> bytes:
    """`data` with a checksum: a damaged number is a number too, and passes every check of its form."""
    return b"%b%b%08x" % (data, _SEAL, zlib.crc32(data))


def unseal(data: bytes) -> bytes:
    """What was given to `seal`. Raises Malformed for another checksum; what has none is an earlier version's."""
    body, mark, check = data.rpartition(_SEAL)
    if not mark or len(check) != 8:
        return data
    if check != b"%08x" % zlib.crc32(body):
        raise Malformed("its checksum is another one")
    return body


def load(data: bytes) -> Any:
    """The value of a JSON text. Raises Malformed, also for a depth or a number that Python does not take."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and integers of thousands of digits
        raise Malformed(f"it is no JSON: {error}") from None


def _no_number(word: str) -> NoReturn:
    raise Malformed(f"{word} is no number")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Make a Malformed that names `what` of every error that a value of a wrong form causes."""
    try:
        yield
    except Malformed as error:
        raise Malformed(f"{what}: {error.message.removeprefix(_DAMAGED)}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise Malformed(f"{what}: {error}") from None


def number(value: Any, end: int = S63, start: int = 0) -> int:
    """An integer of at least `start` and below `end`."""
    if type(value) is not int or not start <= value < end:
        raise Malformed(f"{_shown(value)} is no integer from {start} to {end - 1}")
    return value


def real(value: Any) -> float:
    """A finite number that is not negative, such as a time or a duration in seconds."""
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value < S63:
        raise Malformed(f"{_shown(value)} is no time in seconds")
    return cast(float, value)


def error_record(value: Any) -> ErrorRecord:
    """An error as plain data; see `ForkError.record`."""
    data = record(value)
    code = word(data["code"], list(Code))
    return {
        "code": str(code),
        "message": any_text(data["message"]),
        "path": text(data["path"]),
        "errno": optional(data["errno"], errno_number),
    }


def errno_number(value: Any) -> int:
    """A number of errno(3)."""
    return number(value, 4096)


def flag(value: Any) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise Malformed(f"{_shown(value)} is neither true nor false")
    return value


def text(value: Any) -> str:
    """A text without NUL that stands for bytes."""
    if type(value) is not str or len(value) > _MOST_TEXT or "\0" in value:
        raise Malformed(f"{_shown(value)} is no text")
    os.fsencode(value)  # raises UnicodeEncodeError for a surrogate that stands for no byte
    return value


def labels(value: Any) -> Any:
    """Labels of a request: texts, or texts by name. They are echoed as they came, whatever they hold."""
    if type(value) is list:
        return [any_text(item) for item in value]
    return {any_text(name): any_text(item) for name, item in record(value).items()}


def any_text(value: Any) -> str:
    """A text of any characters, which stands for nothing but itself, such as a message."""
    if type(value) is not str:
        raise Malformed(f"{_shown(value)} is no text")
    return value


def word(value: Any, words: Collection[T]) -> T:
    """One of `words`."""
    if type(value) is not str or value not in words:
        raise Malformed(f"{_shown(value)} is none of {', '.join(map(str, words))}")
    return cast(T, value)


def record(value: Any) -> dict[str, Any]:
    """An object of JSON."""
    if type(value) is not dict:
        raise Malformed(f"{_shown(value)} is no object")
    return value


def items(value: Any, check: Callable[[Any], T], most: int) -> list[T]:
    """At most `most` items that `check` takes."""
    if type(value) not in (list, tuple) or len(value) > most:  # JSON has lists only
        raise Malformed(f"{_shown(value)} is no list of at most {most}")
    return [check(item) for item in value]


def optional(value: Any, check: Callable[[Any], T]) -> T | None:
    """None, or what `check` takes."""
    return None if value is None else check(value)


def only(value: dict[str, Any], names: Iterable[str]) -> None:
    """Raise Malformed for an object that has other fields than `names`."""
    unknown = value.keys() - set(names)
    if unknown:
        raise Malformed(f"unknown: {_shown(sorted(unknown))}")


def relative_path(value: Any) -> str:
    """A path below a directory: no way up, no absolute one; "" is the directory itself."""
    path = text(value)
    if path and not _NO_PARTS.isdisjoint(path.split("/")):
        raise Malformed(f"{_shown(path)} is no path below a directory")
    return path


def absolute_path(value: Any) -> str:
    """A path from the root of all directories, without a way up; "" where the source is not known."""
    path = text(value)
    if path and (not path.startswith("/") or ".." in path.split("/")):
        raise Malformed(f"{_shown(path)} is no absolute path")
    return path


#: What no part of a relative path is: nothing (a leading, trailing or doubled slash), itself, and the way up.
_NO_PARTS = frozenset({"", ".", ".."})


def _shown(value: Any) -> str:
    shown = repr(value) if not isinstance(value, int) or abs(value) < 1 << 200 else "a huge integer"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
