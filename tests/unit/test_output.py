"""Results as text lines."""

from __future__ import annotations

import pytest

from tasks.copier.estimate.estimate import Estimate
from tasks.copier.fork_spec import Clock, ForkSpec, succeeded
from tasks.copier.report import Totals
from worker.commands.output import estimate_lines, progress_line, result_lines, size


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1, "1 byte"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB")]
)
def test_size_has_a_unit(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("chunks", "text"), [(1, "; 1 chunk"), (2, "; 2 chunks")])
def test_number_of_chunks_has_its_noun_in_the_right_form(chunks: int, text: str) -> None:
    spec = ForkSpec(fork_id="fork-1", source="/a", destination="/b")

    *_, last = result_lines(succeeded(spec, Totals(), chunks, Clock(spec.started)))

    assert last.endswith(text)


@pytest.mark.parametrize(("number", "text"), [(1, "1 reflinked, 1 directory"), (2, "2 reflinked, 2 directories")])
def test_entries_by_kind_have_their_nouns_in_the_right_form(number: int, text: str) -> None:
    spec = ForkSpec(fork_id="fork-1", source="/a", destination="/b")
    totals = Totals(total=2 * number, reflinked=number, directories=number)

    lines = [*result_lines(succeeded(spec, totals, 1, Clock(spec.started)))]

    assert f"  entries   {2 * number}: {text}" in lines


@pytest.mark.parametrize(("number", "text"), [(1, "1 file with 1 extent"), (2, "2 files with 2 extents")])
def test_the_files_of_an_estimate_have_their_nouns_in_the_right_form(number: int, text: str) -> None:
    found = Estimate(
        source="/a",
        destination="/b",
        method="reflink",
        reason=None,
        entries=number,
        files=number,
        bytes={"logical": 0, "allocated": 0, "to_copy": 0},
        extents=number,
        free_bytes=None,
        fits=True,
        seconds={"low": 0.0, "high": 0.0},
        warnings=[],
    )

    assert f"  entries   {number}, {text}" in [*estimate_lines(found)]


@pytest.mark.parametrize(("total", "text"), [(1, "0 of 1 entry"), (2, "0 of 2 entries")])
def test_progress_has_its_noun_in_the_right_form(total: int, text: str) -> None:
    line = progress_line(
        "fork-1", {"files_done": 0, "files_total": total, "bytes_done": 0, "bytes_total": 1, "phase": "copy"}
    )

    assert line == f"fork-1: copy, {text}, 0 bytes of 1 byte"
