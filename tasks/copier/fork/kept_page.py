"""The FileResults of a small fork, kept in its staging until they are stored together with its result.

Storing both at once saves a round trip to Redis before the fork is published. If the process dies or is paused in
between, the process that finds the fork published stores both.
"""

from __future__ import annotations

from contextlib import suppress

from tasks.copier.errors import ForkError
from tasks.copier.fork.attempt import Attempt, Ledger
from tasks.copier.report import Report
from tasks.copier.staging.journal import Journal
from tasks.copier.staging.parts import report_name
from tasks.copier.staging.staging import Staging

#: The part of the fork whose report has all FileResults.
_PART = "0"


def keep_page(attempt: Attempt) -> bool:
    """Keep the FileResults of a complete fork in its staging, for `attempt.take_end`. Returns whether they are there.

    They are not if no one takes the fork's end, if they do not fit into one page, if other processes took part, or if
    the fork must survive a power loss. Raises OSError.
    """
    if attempt.take_end is None or not attempt.alone or attempt.spec.options.durability == "sync":
        return False
    pages = Report.pages_of(attempt.reports.values())
    if len(pages) != 1:
        return False
    attempt.staging.write_report(_PART, Report(attempt.totals(), pages))
    attempt.page, attempt.page_files = pages[0], [report_name(_PART)]
    return True


def store_kept_page(staging: Staging, journal: Journal, ledger: Ledger) -> None:
    """Store the FileResults that the process which published a fork kept in its staging, if it did so.

    The fork is published. So if they cannot be read, or if Redis is full and refuses them, its result counts
    nevertheless. Raises RedisError.
    """
    with suppress(ForkError, OSError):
        if journal.plan is None and staging.has_report(_PART):
            ledger.keep_all_pages(staging.report(_PART).pages)
