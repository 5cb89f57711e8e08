"""The journal: how far a fork or campaign is, in its control directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


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
        """As JSON."""
        return json.dumps(vars(self)).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes) -> Journal | None:
        """What `to_bytes` gave; None for what was half written when a machine lost power."""
        try:
            fields = json.loads(data)
            return cls(**{**fields, "phase": Phase(fields["phase"])})
        except (ValueError, TypeError, KeyError):
            return None
