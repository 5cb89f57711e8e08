"""FileResults, pages, totals and errors survive serialization to files and messages, and add up."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict

import pytest

from tasks.copier.errors import Code, ErrorRecord, ForkError, describe, from_errno, from_record, from_source
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.options import Options
from tasks.copier.report import (
    PAGE_RESULTS,
    FileResult,
    Method,
    RangeDone,
    Report,
    Totals,
    join_ranges,
    unpack_pages,
)
from tests.support.pages import page_of

BROKEN: ErrorRecord = {"code": "io_error", "message": "it broke", "path": "/a", "errno": errno.EIO}


def result(path: str, method: Method = "copy", size: int = 10, error: ErrorRecord | None = None) -> FileResult:
    return {
        "path": path,
        "type": "file",
        "method": method,
        "bytes": size,
        "copied_bytes": size if method == "copy" else 0,
        "seconds": 0.25,
        "reason": None,
        "error": error,
    }


def test_a_page_carries_names_that_are_not_utf8_in_ascii_json() -> None:
    results = [result(os.fsdecode(bytes(range(1, 256)))), result("snö/日本")]

    assert list(unpack_pages([page_of(results)])) == results


def test_results_are_cut_into_pages_and_read_in_order() -> None:
    report, results = Report(), [result(f"file-{n}") for n in range(2 * PAGE_RESULTS + 1)]
    for one in results:
        report.add(one)

    pages = report.close()

    assert len(pages) == 3
    assert list(unpack_pages(pages)) == results
    assert report.close() == pages


def test_a_page_of_incompressible_long_paths_is_a_small_value() -> None:
    report = Report()
    names = ["/".join(os.urandom(120).decode("utf-8", "surrogateescape") for _ in range(32)) for _ in range(200)]
    for name in names:
        report.add(result(name))

    pages = report.close()

    assert max(map(len, pages)) < 1 << 20
    assert [one["path"] for one in unpack_pages(pages)] == names


def test_a_report_is_read_back_from_its_bytes() -> None:
    report = Report()
    report.add(result("a", "reflink"))
    report.add(result("b\udcff", error=BROKEN))
    report.totals.fallback = {"reason": "EXDEV: …", "errno": errno.EXDEV, "path": "a\udcfe"}
    report.ranges.append({"path": "c", "size": 5, "copied_bytes": 3, "seconds": 0.5, "error": None})

    again = Report.from_bytes(report.to_bytes())

    assert again.totals == report.totals
    assert again.ranges == report.ranges
    assert list(unpack_pages(again.pages)) == list(unpack_pages(report.pages))
    assert again.without_pages().totals == report.totals
    assert not again.without_pages().has_pages()


def test_totals_count_each_method_and_the_failed_as_failed_only() -> None:
    totals = Totals()
    for one in (
        result("a", "reflink", 100),
        result("b", "copy", 10),
        result("c", "hardlink", 0),
        result("d", "symlink", 0),
        result("e", "mkdir", 0),
        result("f", "skip", 0),
        result("g", "copy", 7, BROKEN),
    ):
        totals.count(one)

    assert totals.files() == {
        "total": 7,
        "reflinked": 1,
        "copied": 1,
        "hardlinked": 1,
        "symlinked": 1,
        "directories": 1,
        "skipped": 1,
        "failed": 1,
    }
    assert totals.bytes() == {"logical": 110, "reflinked": 100, "copied": 10}
    assert totals.error == BROKEN


def test_totals_of_parts_are_sums_with_the_first_error_and_fallback() -> None:
    later: ErrorRecord = {**BROKEN, "path": "/later"}
    a = Totals(total=1, copied=1, bytes_logical=5, error=BROKEN)
    b = Totals(total=2, reflinked=2, bytes_logical=7, bytes_reflinked=7, error=later)
    b.fallback = {"reason": "r", "errno": 22, "path": "p"}

    a.add(b)

    assert a == Totals(
        total=3,
        reflinked=2,
        copied=1,
        bytes_logical=12,
        bytes_reflinked=7,
        fallback={"reason": "r", "errno": 22, "path": "p"},
        error=BROKEN,
    )


def test_ranges_of_one_file_become_its_one_result() -> None:
    def part(path: str, copied: int, error: ErrorRecord | None = None) -> RangeDone:
        return {"path": path, "size": 100, "copied_bytes": copied, "seconds": 0.5, "error": error}

    joined = {one["path"]: one for one in join_ranges([part("a", 30), part("b", 1, BROKEN), part("a", 20)], "why")}

    assert joined["a"]["copied_bytes"] == 50
    assert joined["a"]["bytes"] == 100
    assert joined["a"]["seconds"] == 1.0
    assert joined["a"]["reason"] == "why"
    assert joined["a"]["error"] is None
    assert joined["b"]["error"] == BROKEN


def test_an_error_is_read_back_from_its_record() -> None:
    error = ForkError(Code.NO_SPACE, "writing: it is full", "/a/\udcff", errno.ENOSPC)

    again = from_record(json.loads(json.dumps(error.record())))

    assert again.record() == error.record()
    assert str(error) == "no_space: /a/\udcff: writing: it is full (ENOSPC)"
    assert describe({**error.record(), "errno": errno.EOPNOTSUPP}).endswith("(EOPNOTSUPP)")
    assert describe({**error.record(), "errno": None}).endswith("full")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, Code.NO_SPACE),
        (errno.EDQUOT, Code.NO_SPACE),
        (errno.EACCES, Code.PERMISSION_DENIED),
        (errno.EPERM, Code.PERMISSION_DENIED),
        (errno.EIO, Code.IO_ERROR),
        (errno.EROFS, Code.IO_ERROR),
        (errno.ENOMEM, Code.IO_ERROR),
        (errno.ENOENT, Code.IO_ERROR),
    ],
)
def test_each_errno_has_one_code(number: int, code: Code) -> None:
    error = from_errno(number, "writing", "/a")

    assert (error.code, error.path, error.errno) == (code, "/a", number)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ESTALE])
def test_a_missing_source_entry_is_source_changed(number: int) -> None:
    assert from_source(OSError(number, ""), "opening", "/a").code is Code.SOURCE_CHANGED


def test_a_fork_is_read_back_from_the_journal() -> None:
    spec = ForkSpec(
        fork_id="fork-1",
        source="/a\udcff",
        destination="/b",
        options=Options(
            reflink="never",
            skip=("x",),
            exclude=(),
            preserve=frozenset({"mode"}),
            durability="sync",
            verify="content",
        ),
        labels={"a": "b"},
        owner="queue",
        queued=1.5,
        started=12.25,
    )

    again = ForkSpec.from_data(json.loads(json.dumps(spec.to_data())))

    assert again == spec
    assert asdict(again) == asdict(spec)
