"""The outcome of a test's body, for the fixtures that are torn down after it."""

from __future__ import annotations

from pathlib import Path

import pytest

#: The log files of the processes that a test started; shown when it fails.
LOGS = pytest.StashKey[list[Path]]()
#: The outcome of the test's body; absent if it did not run.
CALL = pytest.StashKey[pytest.TestReport]()


def body_passed(item: pytest.Item) -> bool:
    report = item.stash.get(CALL, None)
    return report is not None and report.passed
