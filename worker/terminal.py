"""How a command writes: answers on stdout, everything else on stderr, with nothing in it that a terminal obeys."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol

from tasks.copier.campaign.spec import CampaignProgress
from tasks.copier.progress import Progress


class ShowProgress(Protocol):
    """Takes the progress so far."""

    def __call__(self, progress: Progress | CampaignProgress) -> None:
        """Show it, or not."""


def answer(text: str) -> None:
    """Print one line of an answer; what a terminal must not get is escaped."""
    print(printable(text))


def say(text: str) -> None:
    """Print one line that is no answer."""
    print(f"forkvm: {printable(text)}", file=sys.stderr)


def answer_json(data: Any) -> None:
    """Print one JSON document on one line: ASCII, with surrogate escapes for bytes that are not UTF-8."""
    print(json.dumps(data), flush=True)


def printable(text: str) -> str:
    """`text` with control characters and bytes that are not UTF-8 as backslash escapes.

    File names come from guests; none of them may move a terminal's cursor or end a line.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
