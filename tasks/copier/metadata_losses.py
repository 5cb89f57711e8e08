"""Metadata in `preserve` that a destination could not hold: the first losses by path, and the number of all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from tasks.copier import validation

#: The most losses listed in one result.
MOST_LISTED = 100
#: The most characters of all listed losses together. In a deep tree one path may be very long.
_MOST_CHARACTERS = 64 << 10


class Lost(TypedDict):
    """One loss of one entry; an item of the contract's `metadata_lost`."""

    path: str  # relative to the source; "." is its top
    #: "acl", "default acl", "ownership", "mode", "mode: set-uid", "mode: set-gid", "timestamps", "xattrs" (they
    #: cannot be listed) or "xattr NAME".
    what: str


@dataclass
class Losses:
    """The losses of one part of a fork, in the order in which they were found."""

    metadata_lost: list[Lost] = field(default_factory=list)
    metadata_lost_total: int = 0

    def add_loss(self, path: str, what: str) -> None:
        """Add a loss of the entry `path` (relative to the source; "" is its top)."""
        self.metadata_lost_total += 1
        self._list({"path": path or ".", "what": what})

    def move_losses_from(self, other: Losses) -> None:
        """Move all losses of `other` to this object."""
        if other.metadata_lost_total:
            self.metadata_lost_total += other.metadata_lost_total
            self.list_losses(other.metadata_lost)
            other.metadata_lost, other.metadata_lost_total = [], 0

    def list_losses(self, further: list[Lost]) -> None:
        """Append losses of a later part to the list, up to its limits. Does not change the number of losses."""
        for lost in further:
            self._list(lost)

    def _list(self, lost: Lost) -> None:
        if len(self.metadata_lost) < MOST_LISTED:
            listed = sum(len(one["path"]) + len(one["what"]) for one in self.metadata_lost)
            if listed + len(lost["path"]) + len(lost["what"]) <= _MOST_CHARACTERS:
                self.metadata_lost.append(lost)


def lost_of(value: Any) -> list[Lost]:
    """A list of losses from data. Raises Malformed for anything else."""
    return validation.list_of(value, _one_of, MOST_LISTED)


def _one_of(value: Any) -> Lost:
    data = validation.json_object(value)
    return {"path": validation.text(data["path"]), "what": validation.text(data["what"])}
