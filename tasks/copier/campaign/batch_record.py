"""The record of one try at a batch: its trees, and their outcomes, which are written before the first rename.

Each try has one record in the control directory, with its own name: so a paused process that resumes cannot replace the
record of the process that took its place.
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

#: An index of a fork, or the number of a try, as text.
_NUMBER = re.compile(r"[0-9]{1,18}")
#: Most pages of one fork; far more than are ever written.
_MOST_PAGES = 1_000_000
_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True)
class Outcome:
    """How a fork of a campaign ended: its result, and its FileResults in compressed pages."""

    result: ForkResult
    pages: list[bytes]

    @cached_property
    def as_json(self) -> str:
        """The result as JSON, which is both in the record and in the ledger."""
        return _encode(self.result)


@dataclass
class Record:
    """The record of one try. Forks are identified by their index in the campaign."""

    #: Names of the trees in the parent of the destinations.
    trees: dict[int, str]
    #: `trees.identity` of the complete trees; once they are written, renames may have happened.
    identities: dict[int, int] = field(default_factory=dict)
    #: The outcome of each complete tree once it is published.
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
            head = validation.json_object(validation.load(line))
            names = _by_index(head["trees"], _tree_name)
            identities = _by_index(head["identities"], partial(validation.integer, end=validation.IDENTITY))
            lengths = _by_index(head["pages"], lambda value: validation.list_of(value, validation.integer, _MOST_PAGES))
            if not identities.keys() == lengths.keys() <= names.keys():
                raise validation.Malformed("trees, identities and results are not of the same forks")
            *results, rest = rest.split(b"\n", len(lengths))
            pages = pages_in(rest, [length for some in lengths.values() for length in some])
            outcomes: dict[int, Outcome] = {}
            at = 0
            for (index, some), result in zip(lengths.items(), results, strict=True):
                checked = cast(ForkResult, validation.json_object(validation.load(result)))
                outcomes[index] = Outcome(checked, pages[at : at + len(some)])
                at += len(some)
            return cls(names, identities, outcomes)


def write(staging: Staging, first: int, attempt: int, record: Record, *, sync: bool = False) -> None:
    """Write the record of one try at the batch that begins with the fork `first`; `sync`: to the disk."""
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
    """Whether there is a record of any try at a batch."""
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
    for index, value in validation.json_object(data).items():
        if not _NUMBER.fullmatch(index):
            raise validation.Malformed(f"{index!r:.80} is not the index of a fork")
        checked[int(index)] = check(value)
    return checked


def _tree_name(value: Any) -> str:
    name = validation.text(value)
    if "." not in name.removeprefix(".") or not STAGING_NAME.fullmatch(name):
        raise validation.Malformed(f"{name!r:.80} is not the name of a tree")
    return name
