"""The format of a note: the directories and the results of some forks of one job, as one line of ASCII.

A note that is read back is validated as hostile input. The caller checks at the destination whether it is true.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tasks.copier import validation
from tasks.copier.report import pages_in

_encode = json.JSONEncoder(separators=(",", ":")).encode
#: Longer records, in bytes, are compressed: those of a campaign's batch, whose results are similar.
_SHORT = 4096
_PLAIN, _PACKED = b"p", b"z"
#: The largest record, in bytes.
_MOST_BYTES = 64 << 20
#: Most forks in one record, most parts and most pages of one fork.
_MOST_FORKS = 100_000
_MOST_PARTS = 10_000
_MOST_PAGES = 1_000_000


@dataclass(frozen=True)
class NotedFork:
    """One published fork."""

    #: The identity of its directory; see `trees.identity_of`.
    identity: int
    #: The birth time of that directory, in nanoseconds: an inode number is used again.
    birth: int
    #: The ForkResult as JSON.
    result: str
    #: Its FileResults by part; empty if they were too many.
    pages: dict[str, list[bytes]]


@dataclass(frozen=True)
class Record:
    """Some forks of one job, by number."""

    #: The digest of the request.
    digest: str
    #: st_dev of the directory that holds the forks.
    device: int
    forks: dict[int, NotedFork]

    def to_text(self) -> bytes:
        """The record as ASCII without white space."""
        head = {
            "digest": self.digest,
            "device": self.device,
            "forks": {
                number: [fork.identity, fork.birth, {part: [*map(len, pages)] for part, pages in fork.pages.items()}]
                for number, fork in self.forks.items()
            },
        }
        results = "\n".join([_encode(head), *(fork.result for fork in self.forks.values()), ""])
        pages = [page for fork in self.forks.values() for part in fork.pages.values() for page in part]
        data = b"".join((results.encode("ascii"), *pages))
        if len(data) <= _SHORT:
            return _PLAIN + base64.b64encode(data)
        return _PACKED + base64.b64encode(zlib.compress(data, 1))

    @classmethod
    def from_text(cls, text: bytes) -> Record:
        """The record that `to_text` wrote. Raises ForkError (Malformed) for anything else."""
        with validation.reading("the note about a fork that succeeded"):
            line, _, rest = _unpacked(text).partition(b"\n")
            head = validation.json_object(validation.load(line))
            numbers = {_number(number): value for number, value in validation.json_object(head["forks"]).items()}
            if len(numbers) > _MOST_FORKS:
                raise validation.Malformed("it has too many forks")
            *results, rest = rest.split(b"\n", len(numbers))
            forks: dict[int, NotedFork] = {}
            for (number, (identity, birth, lengths)), result in zip(numbers.items(), results, strict=True):
                by_part, rest = _pages(lengths, rest)
                forks[number] = NotedFork(
                    validation.integer(identity, validation.IDENTITY),
                    validation.integer(birth),
                    result.decode("ascii"),
                    by_part,
                )
            if rest:
                raise validation.Malformed("it has more bytes than its page lengths add up to")
            return cls(validation.text(head["digest"]), validation.integer(head["device"], validation.U64), forks)


def _unpacked(text: bytes) -> bytes:
    try:
        data = base64.b64decode(text[1:], validate=True)
        if text[:1] == _PLAIN:
            return data
        unpacking = zlib.decompressobj()
        unpacked = unpacking.decompress(data, _MOST_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise validation.Malformed(str(error)) from None
    if text[:1] != _PACKED or not unpacking.eof:
        raise validation.Malformed("it is incomplete")
    return unpacked


def _pages(lengths: Any, rest: bytes) -> tuple[dict[str, list[bytes]], bytes]:
    """The pages of one fork by part, and the bytes after them."""
    checked = validation.json_object(lengths)
    if len(checked) > _MOST_PARTS:
        raise validation.Malformed("a fork has too many parts")
    pages: dict[str, list[bytes]] = {}
    check: Callable[[Any], list[int]] = partial(validation.list_of, check=validation.integer, most=_MOST_PAGES)
    for part, some in checked.items():
        end = sum(check(some))
        pages[_part(part)] = pages_in(rest[:end], some)
        rest = rest[end:]
    return pages, rest


def _part(value: str) -> str:
    return value if value in ("all", "plan", "close") else str(_number(value))


def _number(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise validation.Malformed(f"{value!r:.80} is not a number")
    return int(value)
