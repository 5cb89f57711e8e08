"""How a command prints: results on stdout, messages on stderr, and no control character in either."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tasks.copier.campaign.spec import CampaignProgress
    from tasks.copier.progress import Progress


class ShowProgress(Protocol):
    """A function that shows the progress of a fork or campaign to the user."""

    def __call__(self, progress: Progress | CampaignProgress) -> None:
        """Show `progress`."""


def print_line(text: str) -> None:
    """Print one line of a result on stdout."""
    print(printable(text))


def print_message(text: str) -> None:
    """Print one line on stderr that is not part of a result."""
    print(f"forkvm: {printable(text)}", file=sys.stderr)


def print_json(data: Any) -> None:
    """Print one JSON document on one line of stdout: ASCII, with surrogate escapes for bytes that are not UTF-8."""
    print(json.dumps(data), flush=True)


def printable(text: str) -> str:
    """`text` with control characters and bytes that are not UTF-8 as backslash escapes.

    Guests choose file names. Unescaped, a name could move the cursor of the terminal or end a line.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
