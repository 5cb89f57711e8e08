"""The journal: how far a fork or campaign is, in its control directory."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from tasks.copier import validation


class Phase(StrEnum):
    """How far a fork is. Each change is one atomic write of the journal, under the exclusive lock."""

    #: The source is walked; an inline fork is cloned in this phase too.
    PLANNING = "planning"
    #: The plan stands; chunks may work.
    CLONING = "cloning"
    #: The tree is complete and its identity written down: from here on the rename may have happened.
    PUBLISHING = "publishing"


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What any process needs to go on with a fork, or to end it."""

    #: The fork that was asked for, as `ForkSpec.to_data` gives it.
    spec: dict[str, Any]
    #: Inode of the control directory: a copy of it that others made is not ours to touch.
    control: int
    #: Names the tree; new with each attempt, so that nothing of an earlier one can be taken for it.
    attempt: str
    phase: Phase = Phase.PLANNING
    #: How often the fork was begun. Bounded, so that a fork which kills its worker ends as worker_lost.
    tries: int = 0
    #: How often closing it was begun; bounded too.
    closings: int = 0
    #: `trees.identity` of the finished tree. No device numbers, here and above: they change with a reboot or a host.
    tree: int | None = None
    #: What `plan` made, as plain data, and when (seconds since the epoch).
    plan: dict[str, Any] | None = None
    planned_at: float = 0.0
    #: The ForkResult that the rename makes true.
    result: dict[str, Any] | None = None

    @property
    def is_campaign(self) -> bool:
        """Whether the control directory is a campaign's: it has many trees, which only go with it."""
        return "campaign_id" in self.spec

    @property
    def job_id(self) -> str:
        """The id of the fork or campaign."""
        return str(self.spec["campaign_id"] if self.is_campaign else self.spec["fork_id"])

    def to_bytes(self) -> bytes:
        """As JSON, whose last field is a checksum of all before it.

        A damaged number is a number too: the bytes that one chunk copies, or the identity of a tree.
        """
        body = json.dumps(vars(self)).encode("ascii")[:-1]
        return b"%b%b%d}" % (body, _CHECK, zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> Journal | None:
        """What `to_bytes` gave; None for what was half written when a machine lost power, is damaged, or is no journal.

        A journal without a checksum is an earlier version's.
        """
        try:
            with validation.reading("the journal"):
                body, mark, check = data.rpartition(_CHECK)
                if mark and check != b"%d}" % zlib.crc32(body):
                    raise validation.Malformed("its checksum is another one")
                return cls(**_checked(validation.record(validation.load(body + b"}" if mark else data))))
        except validation.Malformed:
            return None


#: Stands between the fields of a journal and their checksum.
_CHECK = b', "check": '
_ATTEMPT = re.compile(r"[0-9a-f]{8}")
#: More tries than any fork has.
_MOST_TRIES = 1_000_000


def _checked(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a journal. Raises Malformed, and others: see `fields.reading`."""
    spec = validation.record(data["spec"])
    if ("fork_id" in spec) == ("campaign_id" in spec):
        raise validation.Malformed("it is neither a fork's nor a campaign's")
    validation.text(spec.get("fork_id", spec.get("campaign_id")))
    if not _ATTEMPT.fullmatch(data["attempt"]):
        raise validation.Malformed("its attempt is not named by eight hexadecimal digits")
    checked = {
        **data,
        "control": validation.number(data["control"], validation.U64),
        "phase": Phase(data["phase"]),
        "tries": validation.number(data["tries"], _MOST_TRIES),
        "closings": validation.number(data["closings"], _MOST_TRIES),
        "tree": validation.optional(data["tree"], partial(validation.number, end=validation.IDENTITY)),
        "plan": validation.optional(data["plan"], validation.record),
        "planned_at": validation.real(data["planned_at"]),
        "result": validation.optional(data["result"], validation.record),
    }
    if checked["phase"] is Phase.PUBLISHING and (checked["tree"] is None or checked["result"] is None):
        raise validation.Malformed("it publishes no tree")
    return checked
