"""What one try at a batch wrote down: its trees, and before the first of them is published, what each one will be.

A try leaves one record in the control directory, under a name of its own, so that a paused process that comes to life
again cannot replace the record of the one that took its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from tasks.copier.spec import ForkResult
from tasks.copier.staging import Staging

T = TypeVar("T")

_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True)
class Outcome:
    """How a fork of a campaign ended: its result, and its FileResults in compressed pages."""

    result: ForkResult
    pages: list[bytes]

    @cached_property
    def as_json(self) -> str:
        """The result as JSON, which both the record and the ledger keep."""
        return _encode(self.result)


@dataclass
class Record:
    """Forks are named by their index in the campaign."""

    #: Names of the trees, in the destinations' parent.
    trees: dict[int, str]
    #: Of the trees that are complete, what `trees.identity` says; from then on the renames may have happened.
    identities: dict[int, int] = field(default_factory=dict)
    #: What is true of each of these once it is published.
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As one file: lines of JSON, then the pages."""
        head = {
            "trees": self.trees,
            "identities": self.identities,
            "pages": {index: [len(page) for page in outcome.pages] for index, outcome in self.outcomes.items()},
        }
        results = [outcome.as_json for outcome in self.outcomes.values()]
        pages = [page for outcome in self.outcomes.values() for page in outcome.pages]
        return b"".join((_encode(head).encode("ascii"), b"\n", "\n".join([*results, ""]).encode("ascii"), *pages))

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The record that `to_bytes` wrote."""
        line, _, rest = data.partition(b"\n")
        head = json.loads(line)
        *results, rest = rest.split(b"\n", len(head["pages"]))
        outcomes: dict[int, Outcome] = {}
        at = 0
        for (index, lengths), result in zip(head["pages"].items(), results, strict=True):
            pages = []
            for length in lengths:
                pages.append(rest[at : at + length])
                at += length
            outcomes[int(index)] = Outcome(json.loads(result), pages)
        return cls(_by_index(head["trees"]), _by_index(head["identities"]), outcomes)


def write(staging: Staging, first: int, attempt: int, record: Record, *, sync: bool = False) -> None:
    """Keep the record of one try at the batch that begins with the fork `first`; `sync`: and have it on the disk."""
    staging.write_file(_name(first, attempt), record.to_bytes(), sync=sync)


def read_all(staging: Staging, first: int) -> Iterator[Record]:
    """The records of all tries at a batch, the latest first."""
    for name in reversed(_names(staging, first)):
        try:
            yield Record.from_bytes(staging.read_file(name))
        except (ValueError, KeyError):  # half written when a machine lost power: nothing of it was published
            continue


def has_any(staging: Staging, first: int) -> bool:
    """Whether a try at a batch left a record."""
    return bool(_names(staging, first))


def forget(staging: Staging, first: int) -> None:
    """Remove the records of all tries at a batch."""
    for name in _names(staging, first):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=staging.fd)


def _name(first: int, attempt: int) -> str:
    return f"batch-{first}-{attempt}"


def _names(staging: Staging, first: int) -> list[str]:
    prefix = f"batch-{first}-"
    names = [name for name in os.listdir(staging.fd) if name.startswith(prefix) and name[len(prefix) :].isdigit()]
    return sorted(names, key=lambda name: int(name.rpartition("-")[2]))


def _by_index(data: dict[str, T]) -> dict[int, T]:
    return {int(index): value for index, value in data.items()}
