"""Results of the work on a fork: one FileResult for each entry, in pages, and the totals of them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Literal, TypedDict

from tasks.copier import validation
from tasks.copier.errors import ErrorRecord, ForkError
from tasks.copier.metadata_losses import Losses, lost_of
from tasks.copier.source.walk import Entry, file_type

Method = Literal["snapshot", "reflink", "copy", "hardlink", "symlink", "mkdir", "skip"]

#: Limits of a page: FileResults, and characters of JSON. A page stays below 1 MiB even if paths do not compress.
PAGE_RESULTS = 4_000
PAGE_LENGTH = 768 << 10
_FASTEST = 1
#: Up to so many bytes, a page is compressed with memLevel 4 (zlib.h): 10 us in place of 17 for six files.
_SHORT, _FEW_TABLES = 8 << 10, 4


class FileResult(TypedDict):
    """The result of one entry of the source; the contract's FileResult."""

    path: str  # relative to the source
    type: str
    method: Method
    bytes: int  # logical size; 0 for anything but a regular file with its own data
    copied_bytes: int
    seconds: float
    reason: str | None  # why it was skipped or not reflinked
    error: ErrorRecord | None


class Fallback(TypedDict):
    """The first refused reflink of a fork; the contract's `fallback`."""

    reason: str
    errno: int
    path: str


_COUNTER = {
    "snapshot": "reflinked",
    "reflink": "reflinked",
    "copy": "copied",
    "hardlink": "hardlinked",
    "symlink": "symlinked",
    "mkdir": "directories",
    "skip": "skipped",
}


@dataclass
class Totals(Losses):
    """Sums over FileResults, and the metadata that the destination could not hold.

    `total` is the number of FileResults. A failed entry is counted in `total` and `failed` only.
    """

    total: int = 0
    reflinked: int = 0
    copied: int = 0
    hardlinked: int = 0
    symlinked: int = 0
    directories: int = 0
    skipped: int = 0
    failed: int = 0
    bytes_logical: int = 0
    bytes_reflinked: int = 0
    bytes_copied: int = 0
    fallback: Fallback | None = None
    error: ErrorRecord | None = None

    def count(self, result: FileResult) -> None:
        """Add one FileResult."""
        self.total += 1
        if result["error"] is not None:
            self.failed += 1
            self.error = self.error or result["error"]
            return
        counter = _COUNTER[result["method"]]
        vars(self)[counter] += 1
        self.bytes_logical += result["bytes"]
        self.bytes_copied += result["copied_bytes"]
        if counter == "reflinked":
            self.bytes_reflinked += result["bytes"]

    def add(self, other: Totals) -> None:
        """Add the totals of another part of the fork. Fallbacks, errors and losses of this part come first."""
        own, others = vars(self), vars(other)
        for name in _NUMBERS:
            own[name] += others[name]
        self.list_losses(other.metadata_lost)
        self.fallback = self.fallback or other.fallback
        self.error = self.error or other.error

    def files(self) -> dict[str, int]:
        """The contract's `files`."""
        own = vars(self)
        return {name: own[name] for name in _FILES}

    def bytes(self) -> dict[str, int]:
        """The contract's `bytes`."""
        return {"logical": self.bytes_logical, "reflinked": self.bytes_reflinked, "copied": self.bytes_copied}


class RangeDone(TypedDict):
    """The result of one byte range of a large file. `join_ranges` makes one FileResult of all ranges of a file."""

    path: str
    size: int  # of the whole file, in bytes
    copied_bytes: int
    seconds: float
    error: ErrorRecord | None


#: The fields of Totals that are sums, and the names in `files`.
_NUMBERS = tuple(name for name, value in vars(Totals()).items() if isinstance(value, int))
_FILES = ("total", *dict.fromkeys(_COUNTER.values()), "failed")


@dataclass
class Report:
    """The results of one part of a fork: its totals, and its FileResults in compressed pages."""

    totals: Totals = field(default_factory=Totals)
    pages: list[bytes] = field(default_factory=list)
    ranges: list[RangeDone] = field(default_factory=list)
    #: Whether the part began before the walk of the source ended; see `tasks.copier.fork.source_changes`.
    during_walk: bool = False
    #: Whether the part replaced entries of an earlier attempt; see `close.refuse_lost_entries`.
    replaced: bool = False
    #: The unfinished page: one line of JSON for each FileResult, and their total length.
    _lines: list[str] = field(default_factory=list)
    _length: int = 0

    def add(self, result: FileResult) -> None:
        """Add one FileResult."""
        self.totals.count(result)
        self._take(_as_json(result))

    def _take(self, line: str) -> None:
        if self._length + len(line) > PAGE_LENGTH or len(self._lines) == PAGE_RESULTS:
            self.close()
        self._lines.append(line)
        self._length += len(line)

    def close(self) -> list[bytes]:
        """Finish the last page. Returns all pages."""
        if self._lines:
            self.pages.append(_pack(self._lines))
            self._lines, self._length = [], 0
        return self.pages

    @classmethod
    def pages_of(cls, reports: Iterable[Report]) -> list[bytes]:
        """The pages of several reports together, with as few pages as possible."""
        whole = cls()
        for report in reports:
            if report.pages:
                whole.close()
                whole.pages += report.pages
            for line in report._lines:
                whole._take(line)
        return whole.close()

    def has_pages(self) -> bool:
        """Whether the report contains FileResults."""
        return bool(self.pages or self._lines)

    def without_pages(self) -> Report:
        """The report without its FileResults."""
        return Report(self.totals, [], self.ranges, self.during_walk, self.replaced)

    def to_bytes(self) -> bytes:
        """The content of the report's file: a line of JSON, the pages, and a checksum."""
        self.close()
        head: dict[str, Any] = {
            "totals": vars(self.totals),
            "ranges": self.ranges,
            "during_walk": self.during_walk,
            "replaced": self.replaced,
            "pages": [len(page) for page in self.pages],
        }
        return validation.FILE_SEAL.seal(b"".join((json.dumps(head).encode("ascii"), b"\n", *self.pages)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Report:
        """The report that `to_bytes` returned. Raises Malformed for anything else."""
        with validation.reading("a report"):
            line, _, rest = validation.FILE_SEAL.unseal(data).partition(b"\n")
            head = validation.json_object(validation.load(line))
            pages = pages_in(rest, head["pages"])
            ranges = validation.list_of(head["ranges"], _range_of, _MOST_RANGES)
            during_walk = validation.boolean(head["during_walk"])
            replaced = validation.boolean(head.get("replaced", False))
            return cls(_totals_of(validation.json_object(head["totals"])), pages, ranges, during_walk, replaced)


#: The most ranges in a report, and pages in a file of staging. Both are far above what is ever written.
_MOST_RANGES, _MOST_PAGES = 100_000, 1_000_000
#: The most bytes of an unpacked page. It is far above PAGE_LENGTH, because one long FileResult may exceed that.
_MOST_PAGE_BYTES = 64 << 20


def pages_in(data: bytes, lengths: Any) -> list[bytes]:
    """Split `data` into pages of the given lengths. Raises Malformed if it does not consist of them."""
    pages, at = [], 0
    for length in validation.list_of(lengths, validation.integer, _MOST_PAGES):
        pages.append(data[at : at + length])
        at += length
    if at != len(data):
        raise validation.Malformed(f"the pages have {len(data)} bytes instead of {at}")
    return pages


def fallback_of(value: Any) -> Fallback | None:
    """A `Fallback` from data. Raises Malformed for anything else."""
    if value is None:
        return None
    data = validation.json_object(value)
    errno = validation.errno_number(data["errno"])
    return {"reason": validation.text(data["reason"]), "errno": errno, "path": validation.text(data["path"])}


def _totals_of(data: dict[str, Any]) -> Totals:
    others = ("fallback", "error", "metadata_lost")
    totals = Totals(
        fallback=fallback_of(data["fallback"]), error=validation.optional(data["error"], validation.error_record)
    )
    totals.metadata_lost = lost_of(data.get("metadata_lost", []))
    for name, value in data.items():
        if name not in others and name in vars(totals):
            setattr(totals, name, validation.integer(value, validation.SUM))
    return totals


def _range_of(value: Any) -> RangeDone:
    data = validation.json_object(value)
    return {
        "path": validation.relative_path(data["path"]),
        "size": validation.integer(data["size"]),
        "copied_bytes": validation.integer(data["copied_bytes"]),
        "seconds": validation.seconds(data["seconds"]),
        "error": validation.optional(data["error"], validation.error_record),
    }


def file_result(
    path: str,
    kind: str,
    method: Method,
    size: int = 0,
    copied_bytes: int = 0,
    seconds: float = 0.0,
    reason: str | None = None,
    error: ErrorRecord | None = None,
) -> FileResult:
    """The only constructor of a FileResult; `kind` is a name that `file_type` gives, `size` the logical bytes."""
    return {
        "path": path,
        "type": kind,
        "method": method,
        "bytes": size,
        "copied_bytes": copied_bytes,
        "seconds": seconds,
        "reason": reason,
        "error": error,
    }


def failed(path: str, entry: Entry, error: ForkError) -> FileResult:
    """The FileResult of an entry that could not be cloned. Nothing of it is left in the fork."""
    return file_result(path, file_type(entry.mode), "copy", entry.size, error=error.record())


def join_ranges(ranges: Iterable[RangeDone], reason: str | None) -> Iterator[FileResult]:
    """Yield one FileResult for each file that was copied in ranges. `reason` says why it was not reflinked."""
    files: dict[str, FileResult] = {}
    for part in ranges:
        path = part["path"]
        result = files.setdefault(path, file_result(path, "file", "copy", part["size"], reason=reason))
        result["copied_bytes"] += part["copied_bytes"]
        result["seconds"] = round(result["seconds"] + part["seconds"], 6)
        result["error"] = result["error"] or part["error"]
    yield from files.values()


def _pack(lines: list[str]) -> bytes:
    """A page: zlib-compressed ASCII JSON. Names that are not UTF-8 contain surrogate escapes."""
    page = f"[{','.join(lines)}]".encode("ascii")
    if len(page) > _SHORT:
        return zlib.compress(page, _FASTEST)
    # The same format. The tables that zlib clears first are smaller: they take longer than a short page.
    compress = zlib.compressobj(_FASTEST, zlib.DEFLATED, zlib.MAX_WBITS, _FEW_TABLES)
    return compress.compress(page) + compress.flush()


def _as_json(result: FileResult) -> str:
    """A FileResult as JSON, in half the time of `json.dumps`."""
    reason, error = result["reason"], result["error"]
    return (
        f'{{"path":{quoted(result["path"])},"type":"{result["type"]}","method":"{result["method"]}",'
        f'"bytes":{result["bytes"]},"copied_bytes":{result["copied_bytes"]},"seconds":{result["seconds"]:.6f},'
        f'"reason":{"null" if reason is None else quoted(reason)},'
        f'"error":{"null" if error is None else json.dumps(error)}}}'
    )


def unpack_pages(pages: Iterable[bytes]) -> Iterator[FileResult]:
    """Yield the FileResults of the pages, in order."""
    for page in pages:
        unpacked = zlib.decompressobj().decompress(page, _MOST_PAGE_BYTES)
        yield from json.loads(unpacked)
