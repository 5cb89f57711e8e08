"""One damaged byte in the files of staging is detected, wherever it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.campaign.batch_record import Record
from tasks.copier.errors import Code, ForkError
from tasks.copier.report import Report, file_result
from tasks.copier.source import manifest
from tasks.copier.source.walk import Block, Kind, entry_of


def _report() -> bytes:
    report = Report()
    report.add(file_result("disk.raw", "file", "copy", 4096, 4096, 0.5))
    return report.to_bytes()


def _record() -> bytes:
    return Record({1: ".forkvm-0123456789abcdef.01234567"}, {}, {}).to_bytes()


@pytest.mark.parametrize(
    ("data", "read"), [(_report(), Report.from_bytes), (_record(), Record.from_bytes)], ids=["report", "batch record"]
)
def test_a_changed_byte_of_a_report_or_record_is_detected(data: bytes, read: Callable[[bytes], object]) -> None:
    read(data)
    for at in range(len(data)):
        with pytest.raises(ForkError, match="damaged"):
            read(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_a_changed_byte_of_a_manifest_is_detected(tmp_path: Path) -> None:
    """The note of a hard link is the path of its first name. With one bit changed it would still be a valid path."""
    status = os.stat(tmp_path)
    entries = [entry_of("link", "a", Kind.HARDLINK, status), entry_of("file", "", Kind.FILE, status)]
    path = tmp_path / "manifest"
    with path.open("wb") as file:
        manifest.Writer(file).append(Block("directory", entries))
    data = path.read_bytes()

    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with path.open("rb") as file, pytest.raises(ForkError, match="damaged"):
            list(manifest.read(file.fileno(), manifest.whole(file.fileno())))


def test_a_report_with_any_error_message_is_read_back() -> None:
    report = Report()
    report.totals.error = ForkError(Code.IO_ERROR, "what the broker said: \0 \ud800", "/a").record()

    assert Report.from_bytes(report.to_bytes()).totals.error == report.totals.error
