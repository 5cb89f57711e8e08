"""How a fork is to be made: the caller's wishes, and the sizes of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from tasks.copier import validation

Reflink = Literal["auto", "always", "never"]
Snapshot = Literal["auto", "never"]
Preserve = Literal["mode", "ownership", "timestamps", "xattrs", "hardlinks"]
Durability = Literal["none", "sync"]
Verify = Literal["none", "content"]

#: Runtime leftovers of a guest: the top-level logs, half-written compressions, sockets.
DEFAULT_EXCLUDE = ("/logs/", "*.lz4.tmp", "*.zst.tmp", "*.sock")
PRESERVE_ALL: frozenset[Preserve] = frozenset({"mode", "ownership", "timestamps", "xattrs", "hardlinks"})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller wishes for one fork; the fields of the contract's ForkRequest."""

    #: auto: FICLONE where it works, else a sparse copy. always: a refusal fails the fork. never: real copies.
    reflink: Reflink = "auto"
    #: auto: a source that is a btrfs subvolume is cloned whole, by one snapshot, where that comes to the same.
    snapshot: Snapshot = "auto"
    #: Paths relative to the source to leave out, each with all below it.
    skip: tuple[str, ...] = ()
    #: Patterns to leave out; see `selection`.
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    preserve: frozenset[Preserve] = PRESERVE_ALL
    #: sync: data, tree, rename and parent directory are on the disk before the fork is called done.
    durability: Durability = "none"
    #: content: every byte is read back and compared before the fork is published.
    verify: Verify = "none"

    def to_data(self) -> dict[str, Any]:
        """As plain data for a journal."""
        return {**vars(self), "preserve": sorted(self.preserve)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Options:
        """From what `to_data` gave. Raises ForkError (Malformed) for anything else."""
        with validation.reading("the options"):
            return cls(
                **{
                    **data,
                    "reflink": validation.word(data["reflink"], get_args(Reflink)),
                    "snapshot": validation.word(data["snapshot"], get_args(Snapshot)),
                    "skip": tuple(validation.items(data["skip"], validation.text, _MOST)),
                    "exclude": tuple(validation.items(data["exclude"], validation.text, _MOST)),
                    "preserve": frozenset(validation.items(data["preserve"], _preserved, _MOST)),
                    "durability": validation.word(data["durability"], get_args(Durability)),
                    "verify": validation.word(data["verify"], get_args(Verify)),
                }
            )


#: Items of a list of a request, at most; the contract's bound.
_MOST = 10_000


def _preserved(value: Any) -> Preserve:
    preserved: Preserve = validation.word(value, get_args(Preserve))
    return preserved


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How the work is cut. Counts are entries, sizes are bytes of data (holes do not count)."""

    #: At most so many files are cloned in the task that planned the fork: about 80 ms of reflinks.
    inline_files: int = 2_000
    #: At most so many bytes are copied in the task that planned the fork: about 50 ms of copying.
    inline_bytes: int = 64 << 20
    #: Files a chunk, about 100 ms of reflinks.
    chunk_files: int = 2_500
    #: Bytes a chunk where bytes are copied, about 200 ms; a larger file is cut into ranges.
    chunk_bytes: int = 256 << 20
    #: At most so many chunks; past that, chunks grow.
    max_chunks: int = 500
