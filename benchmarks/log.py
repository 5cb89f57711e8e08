"""Progress on stderr, one line each; stdout is for the figures."""

from __future__ import annotations

import sys


def log(text: str) -> None:
    """Print one line to stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
