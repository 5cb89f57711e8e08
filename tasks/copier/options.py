"""Options of a request, and limits for the size of chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from tasks.copier import validation

Reflink = Literal["auto", "always", "never"]
Snapshot = Literal["auto", "never"]
Preserve = Literal["mode", "ownership", "timestamps", "xattrs", "hardlinks"]
Durability = Literal["none", "sync"]
Verify = Literal["none", "content"]
SourceOpen = Literal["allow", "refuse"]
Cache = Literal["keep", "drop"]
#: Whether a campaign goes on after a fork failed.
OnError = Literal["continue", "abort"]

#: Files that a running guest leaves: logs at the top level, unfinished compressed files, sockets.
DEFAULT_EXCLUDE = ("/logs/", "*.lz4.tmp", "*.zst.tmp", "*.sock")
#: The most items in a list of a request, or entries in a mapping; the contract's limit.
MOST_ITEMS = 10_000
PRESERVE_ALL: frozenset[Preserve] = frozenset({"mode", "ownership", "timestamps", "xattrs", "hardlinks"})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one fork, as in the contract's ForkRequest."""

    #: auto: reflink where possible, else a sparse copy. always: a refused reflink fails the fork. never: copy.
    reflink: Reflink = "auto"
    #: auto: clone a btrfs subvolume with one snapshot if the result is the same. never: clone it file by file.
    snapshot: Snapshot = "auto"
    #: Paths to leave out, relative to the source, with everything below them.
    skip: tuple[str, ...] = ()
    #: Patterns of entries to leave out; see `tasks.copier.source.selection`.
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    preserve: frozenset[Preserve] = PRESERVE_ALL
    #: sync: data, tree, rename and parent directory are on disk before the fork is reported as succeeded.
    durability: Durability = "none"
    #: content: read back and compare every byte before the fork is published.
    verify: Verify = "none"
    #: The most bytes that the fork may copy. 0: reflinks only. None: no bound.
    max_copied_bytes: int | None = None
    #: refuse: fail if a file is open for writing while it is cloned.
    source_open: SourceOpen = "allow"
    #: drop: copied data does not stay in the page cache.
    cache: Cache = "keep"

    def to_data(self) -> dict[str, Any]:
        """JSON-ready data for the journal. A later option is left out at its default: earlier versions refuse it."""
        data = {**vars(self), "preserve": sorted(self.preserve)}
        return {name: value for name, value in data.items() if name not in _LATER or value != getattr(Options, name)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Options:
        """The options that `to_data` returned. Raises Malformed for anything else."""
        with validation.reading("the options"):
            return cls(
                **{
                    **data,
                    "reflink": validation.one_of(data["reflink"], get_args(Reflink)),
                    "snapshot": validation.one_of(data["snapshot"], get_args(Snapshot)),
                    "skip": tuple(validation.list_of(data["skip"], validation.text, MOST_ITEMS)),
                    "exclude": tuple(validation.list_of(data["exclude"], validation.text, MOST_ITEMS)),
                    "preserve": frozenset(validation.list_of(data["preserve"], _preserved, MOST_ITEMS)),
                    "durability": validation.one_of(data["durability"], get_args(Durability)),
                    "verify": validation.one_of(data["verify"], get_args(Verify)),
                    "max_copied_bytes": validation.optional(data.get("max_copied_bytes"), validation.integer),
                    "source_open": validation.one_of(data.get("source_open", cls.source_open), get_args(SourceOpen)),
                    "cache": validation.one_of(data.get("cache", cls.cache), get_args(Cache)),
                }
            )


#: The options that the first version did not have.
_LATER = frozenset({"max_copied_bytes", "source_open", "cache"})


def _preserved(value: Any) -> Preserve:
    preserved: Preserve = validation.one_of(value, get_args(Preserve))
    return preserved


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a fork is divided into chunks. Sizes are bytes of data; holes do not count."""

    #: The most files that the planning task clones itself: about 80 ms of reflinks.
    inline_files: int = 2_000
    #: The most bytes that the planning task copies itself: about 50 ms of copying.
    inline_bytes: int = 64 << 20
    #: Files in a chunk of reflinks: about 100 ms.
    chunk_files: int = 2_500
    #: Bytes in a chunk of copies: about 200 ms. A larger file is divided into ranges.
    chunk_bytes: int = 256 << 20
    #: The most chunks of a fork. Beyond that, chunks become larger.
    max_chunks: int = 500
