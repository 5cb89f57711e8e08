"""The journal in a control directory: how far its fork or campaign is, and what another process needs to go on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from typing import Any

from tasks.copier import validation


class Phase(StrEnum):
    """How far a fork is. Each change is one atomic write of the journal, under the exclusive lock."""

    #: The source is walked; a small fork is cloned in this phase too.
    PLANNING = "planning"
    #: The plan is complete; chunks may be done.
    CLONING = "cloning"
    #: The tree is complete and its identity is in the journal: the rename may have happened.
    PUBLISHING = "publishing"


class Request(dict[str, Any]):
    """A request as plain data that does not change. It keeps its JSON, which each journal of a fork contains."""

    @cached_property
    def json(self) -> str:
        """The request as JSON."""
        return json.dumps(self)


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What any process needs to resume a fork or to end it."""

    #: The request, as `ForkSpec.to_data` or `CampaignSpec.to_data` returns it.
    spec: dict[str, Any]
    #: Inode of the control directory. A copy of the directory has another inode, and is not touched.
    control: int
    #: Part of the tree's name; each attempt has another, so a tree of an earlier attempt is never mistaken for it.
    attempt: str
    phase: Phase = Phase.PLANNING
    #: How often the fork was begun. Limited, so that a fork that kills its worker ends as worker_lost.
    tries: int = 0
    #: How often closing was begun; limited too.
    closings: int = 0
    #: `trees.identity` of the finished tree. No device numbers here or above: they differ after a reboot or by host.
    tree: int | None = None
    #: The Plan or CampaignPlan as plain data, and when it was made (seconds since the epoch).
    plan: dict[str, Any] | None = None
    planned_at: float = 0.0
    #: The ForkResult that is true once the tree is renamed.
    result: dict[str, Any] | None = None

    @property
    def is_campaign(self) -> bool:
        """Whether the control directory belongs to a campaign: its many trees are removed only together with it."""
        return "campaign_id" in self.spec

    @property
    def job_id(self) -> str:
        """The id of the fork or campaign."""
        return str(self.spec["campaign_id"] if self.is_campaign else self.spec["fork_id"])

    def to_bytes(self) -> bytes:
        """JSON whose last field is a checksum of all before it."""
        fields = dict(vars(self))
        spec = fields.pop("spec")  # the first field
        request = spec.json if isinstance(spec, Request) else json.dumps(spec)
        return _SEAL.seal(f'{{"spec": {request}, {json.dumps(fields)[1:]}'.encode("ascii"))

    @classmethod
    def from_bytes(cls, data: bytes) -> Journal | None:
        """The journal that `to_bytes` returned.

        None for bytes that are damaged, or were half written when the machine lost power, or are not a journal.
        """
        try:
            with validation.reading("the journal"):
                return cls(**_checked(validation.json_object(validation.load(_SEAL.unseal(data)))))
        except validation.Malformed:
            return None


#: Makes the checksum the last field of the JSON object.
_SEAL = validation.Seal(mark=b', "check": ', digits=None, form=b"%d", end=b"}")
_ATTEMPT = re.compile(r"[0-9a-f]{8}")
#: More tries than any fork has.
_MOST_TRIES = 1_000_000


def _checked(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a journal. Raises Malformed and the errors that `validation.reading` translates."""
    spec = validation.json_object(data["spec"])
    if ("fork_id" in spec) == ("campaign_id" in spec):
        raise validation.Malformed("it has not exactly one of fork_id and campaign_id")
    validation.text(spec.get("fork_id", spec.get("campaign_id")))
    if not _ATTEMPT.fullmatch(data["attempt"]):
        raise validation.Malformed("its attempt is not eight hexadecimal digits")
    checked = {
        **data,
        "control": validation.integer(data["control"], validation.U64),
        "phase": Phase(data["phase"]),
        "tries": validation.integer(data["tries"], _MOST_TRIES),
        "closings": validation.integer(data["closings"], _MOST_TRIES),
        "tree": validation.optional(data["tree"], partial(validation.integer, end=validation.IDENTITY)),
        "plan": validation.optional(data["plan"], validation.json_object),
        "planned_at": validation.seconds(data["planned_at"]),
        "result": validation.optional(data["result"], validation.json_object),
    }
    if checked["phase"] is Phase.PUBLISHING and (checked["tree"] is None or checked["result"] is None):
        raise validation.Malformed("it is publishing, and names no tree or no result")
    return checked
