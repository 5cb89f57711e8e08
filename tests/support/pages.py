"""Pages of FileResults, as a fork makes them."""

from __future__ import annotations

from collections.abc import Iterable

from tasks.copier.report import FileResult, Report


def page_of(results: Iterable[FileResult]) -> bytes:
    """One page with these FileResults."""
    report = Report()
    for result in results:
        report.add(result)
    (page,) = report.close()
    return page
