"""The warnings of an estimate: what would surprise somebody who expects a fork to cost nothing."""

from __future__ import annotations

from typing import Literal, TypedDict

from tasks.copier.estimate.counts import LOOK_SECONDS, Counts
from tasks.copier.options import Options

Surprise = Literal[
    "full_copy",
    "copied_files",
    "many_extents",
    "no_space",
    "no_inodes",
    "over_budget",
    "source_open",
    "outside_links",
    "compressed",
    "not_all_counted",
]

#: A file with more extents than this is worth a warning: FICLONE takes 0.2 s for them.
MANY_EXTENTS = 10_000
#: What FICLONE takes for each extent of a file on XFS, in seconds.
_EXTENT_SECONDS = 20e-6


class Warning(TypedDict):
    """One warning: a word for programs, and a sentence."""

    code: Surprise
    message: str


class Room(TypedDict):
    """What the destination's filesystem has free: bytes and inodes. Other forks will take `others` of the bytes.

    None: there is no limit.
    """

    free: int | None
    others: int
    inodes: int | None
    compresses: bool


def fits(counts: Counts, entries: int, room: Room) -> bool:
    """Whether there is room for what will be copied, and for the inodes of the entries and of their directory."""
    bytes_fit = room["free"] is None or room["compresses"] or counts.to_copy <= room["free"] - room["others"]
    return bytes_fit and (room["inodes"] is None or _inodes(counts, entries) <= room["inodes"])


def surprises(counts: Counts, entries: int, reason: str | None, options: Options, room: Room) -> list[Warning]:
    """The warnings about a fork of so many entries; `reason`: why files are copied."""
    return [*_of_copies(counts, reason, options), *_of_source(counts), *_of_room(counts, entries, room)]


def _of_copies(counts: Counts, reason: str | None, options: Options) -> list[Warning]:
    found: list[Warning] = []
    if counts.copied and not counts.reflinked:
        found.append(_warning("full_copy", f"all files will be copied, {counts.to_copy} bytes: {reason}"))
    elif counts.copied:
        where = f"the largest is {counts.largest_copied[1]!r}"
        message = f"{counts.copied} files will be copied, {counts.to_copy} bytes ({where}): {reason}"
        found.append(_warning("copied_files", message))
    most = options.max_copied_bytes
    if most is not None and counts.to_copy > most:
        found.append(_warning("over_budget", f"{counts.to_copy} bytes are more than max_copied_bytes ({most})"))
    return found


def _of_source(counts: Counts) -> list[Warning]:
    found: list[Warning] = []
    number, path = counts.most_extents
    if number > MANY_EXTENTS:
        seconds = number * _EXTENT_SECONDS
        message = f"{path!r} has {number} extents; a reflink takes about 20 us for each, {seconds:.1f} s"
        found.append(_warning("many_extents", message))
    if counts.open_file is not None:
        message = f"{counts.open_file!r} is open for writing; a fork fails if it is written meanwhile"
        found.append(_warning("source_open", message))
    if counts.names_missing:
        path = next(iter(counts.names_missing))
        message = f"{len(counts.names_missing)} files have hard links outside of the source; the first is {path!r}"
        found.append(_warning("outside_links", message))
    if not counts.is_complete:
        message = f"not all files were looked into within {LOOK_SECONDS:.0f} s; bytes and extents are approximate"
        found.append(_warning("not_all_counted", message))
    return found


def _of_room(counts: Counts, entries: int, room: Room) -> list[Warning]:
    found: list[Warning] = []
    free, inodes = room["free"], room["inodes"]
    if room["compresses"] and counts.copied:
        found.append(_warning("compressed", "the filesystem may compress; whether the copies fit cannot be known"))
    elif free is not None and counts.to_copy > free - room["others"]:
        others = f"; other forks will take {room['others']} of them" if room["others"] else ""
        message = f"{counts.to_copy} bytes will be copied, and the filesystem has {free} bytes free{others}"
        found.append(_warning("no_space", message))
    needed = _inodes(counts, entries)
    if inodes is not None and needed > inodes:
        message = f"the fork needs {needed} inodes, and the filesystem has {inodes} inodes free"
        found.append(_warning("no_inodes", message))
    return found


def _inodes(counts: Counts, entries: int) -> int:
    return entries - counts.without_inode + 1


def _warning(code: Surprise, message: str) -> Warning:
    return {"code": code, "message": message}
