"""Prints a line for each check and computes the exit code."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Report:
    """Prints each check when it ends, and counts the failed ones."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Run the block as one check. An exception is its failure; later checks still run."""
        begin = time.monotonic()
        try:
            yield
        except Exception as error:
            self.failed += 1
            verdict, reason = "FAIL", f"\n     {type(error).__name__}: {error}".replace("\n", "\n     ")
        else:
            self.passed += 1
            verdict, reason = "ok  ", ""
        print(f"{verdict} {name} ({time.monotonic() - begin:.1f} s){reason}", flush=True)
