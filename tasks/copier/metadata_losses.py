"""What of `preserve` a destination could not hold: the first cases by path, and the number of all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from tasks.copier import validation

#: At most so many losses are listed in one result.
MOST_LISTED = 100
#: Their paths and words have at most so many characters in all: a path may be as long as a tree is deep.
_MOST_CHARACTERS = 64 << 10


class Lost(TypedDict):
    """One thing that one entry of a fork lacks; an item of the contract's `metadata_lost`."""

    path: str  # relative to the source; "." is its top
    #: "acl", "default acl", "ownership", "mode", "mode: set-uid", "mode: set-gid", "timestamps", "xattrs" (they
    #: cannot be listed) or "xattr NAME".
    what: str


@dataclass
class Losses:
    """The losses of one part of a fork, in the order in which they were met."""

    metadata_lost: list[Lost] = field(default_factory=list)
    metadata_lost_total: int = 0

    def lose(self, path: str, what: str) -> None:
        """Note that the entry `path` (relative; "" is the top) lacks `what`."""
        self.metadata_lost_total += 1
        self._list({"path": path or ".", "what": what})

    def move_losses_from(self, other: Losses) -> None:
        """Take over all losses of `other`, which has none then."""
        if other.metadata_lost_total:
            self.metadata_lost_total += other.metadata_lost_total
            self.list_losses(other.metadata_lost)
            other.metadata_lost, other.metadata_lost_total = [], 0

    def list_losses(self, further: list[Lost]) -> None:
        """List the losses of a later part behind those that are listed, as far as there is room."""
        for lost in further:
            self._list(lost)

    def _list(self, lost: Lost) -> None:
        if len(self.metadata_lost) < MOST_LISTED:
            listed = sum(len(one["path"]) + len(one["what"]) for one in self.metadata_lost)
            if listed + len(lost["path"]) + len(lost["what"]) <= _MOST_CHARACTERS:
                self.metadata_lost.append(lost)


def lost_of(value: Any) -> list[Lost]:
    """A list of losses out of plain data. Raises ForkError (Malformed) for anything else."""
    return validation.items(value, _one_of, MOST_LISTED)


def _one_of(value: Any) -> Lost:
    data = validation.record(value)
    return {"path": validation.text(data["path"]), "what": validation.text(data["what"])}
