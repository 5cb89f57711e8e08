"""What one try at a batch wrote down: its trees, and before the first of them is published, what each one will be.

A try leaves one record in the control directory, under a name of its own, so that a paused process that comes to life
again cannot replace the record of the one that took its place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar, cast

from tasks.copier import validation
from tasks.copier.fork_spec import ForkResult
from tasks.copier.report import pages_in
from tasks.copier.source.selection import STAGING_NAME
from tasks.copier.staging.staging import Staging

T = TypeVar("T")

#: An index of a fork, or the number of a try.
_NUMBER = re.compile(r"[0-9]{1,18}")
#: Pages of one fork, at most; far above what is ever written.
_MOST_PAGES = 1_000_000
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
        """As one file: lines of JSON, then the pages, then a checksum."""
        head = {
            "trees": self.trees,
            "identities": self.identities,
            "pages": {index: [len(page) for page in outcome.pages] for index, outcome in self.outcomes.items()},
        }
        results = [outcome.as_json for outcome in self.outcomes.values()]
        pages = [page for outcome in self.outcomes.values() for page in outcome.pages]
        lines = "\n".join([_encode(head), *results, ""]).encode("ascii")
        return validation.FILE_SEAL.seal(b"".join((lines, *pages)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The record that `to_bytes` wrote. Raises ForkError (Malformed) for anything else."""
        with validation.reading("the record of a batch"):
            line, _, rest = validation.FILE_SEAL.unseal(data).partition(b"\n")
            head = validation.record(validation.load(line))
            names = _by_index(head["trees"], _tree_name)
            identities = _by_index(head["identities"], partial(validation.number, end=validation.IDENTITY))
            lengths = _by_index(head["pages"], lambda value: validation.items(value, validation.number, _MOST_PAGES))
            if not identities.keys() == lengths.keys() <= names.keys():
                raise validation.Malformed("it does not identify each complete tree")
            *results, rest = rest.split(b"\n", len(lengths))
            pages = pages_in(rest, [length for some in lengths.values() for length in some])
            outcomes: dict[int, Outcome] = {}
            at = 0
            for (index, some), result in zip(lengths.items(), results, strict=True):
                checked = cast(ForkResult, validation.record(validation.load(result)))
                outcomes[index] = Outcome(checked, pages[at : at + len(some)])
                at += len(some)
            return cls(names, identities, outcomes)


def write(staging: Staging, first: int, attempt: int, record: Record, *, sync: bool = False) -> None:
    """Keep the record of one try at the batch that begins with the fork `first`; `sync`: and have it on the disk."""
    staging.write_file(_name(first, attempt), record.to_bytes(), sync=sync)


def read_all(staging: Staging, first: int) -> Iterator[Record]:
    """The records of all tries at a batch, the latest first."""
    for name in reversed(_names(staging, first)):
        try:
            record = Record.from_bytes(staging.read_file(name))
        except validation.Malformed:  # half written when a machine lost power: nothing of it was published
            continue
        if all(name.startswith(f"{staging.name}.") for name in record.trees.values()):
            yield record


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
    tries = [name.removeprefix(prefix) for name in os.listdir(staging.fd) if name.startswith(prefix)]
    return [f"{prefix}{number}" for number in sorted(map(int, filter(_NUMBER.fullmatch, tries)))]


def _by_index(data: Any, check: Callable[[Any], T]) -> dict[int, T]:
    checked: dict[int, T] = {}
    for index, value in validation.record(data).items():
        if not _NUMBER.fullmatch(index):
            raise validation.Malformed(f"{index!r:.80} is no index of a fork")
        checked[int(index)] = check(value)
    return checked


def _tree_name(value: Any) -> str:
    name = validation.text(value)
    if "." not in name.removeprefix(".") or not STAGING_NAME.fullmatch(name):
        raise validation.Malformed(f"{name!r:.80} is no tree's name")
    return name
