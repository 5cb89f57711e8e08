"""What happens meanwhile, one line each, on stderr; stdout is for the figures."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print one line that is no figure."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
