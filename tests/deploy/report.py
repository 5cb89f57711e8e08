"""A line for each check, and the exit code of all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Report:
    """Prints each check as it ends, and counts those that failed."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        """The block is one check. What it raises is its failure, and the checks after it go on."""
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
