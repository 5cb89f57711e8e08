"""Results as text lines."""

from __future__ import annotations

import pytest

from tasks.copier.fork_spec import Clock, ForkSpec, succeeded
from tasks.copier.report import Totals
from worker.commands.output import progress_line, result_lines, size


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


@pytest.mark.parametrize(("total", "text"), [(1, "0 of 1 entry"), (2, "0 of 2 entries")])
def test_progress_has_its_noun_in_the_right_form(total: int, text: str) -> None:
    line = progress_line(
        "fork-1", {"files_done": 0, "files_total": total, "bytes_done": 0, "bytes_total": 1, "phase": "copy"}
    )

    assert line == f"fork-1: copy, {text}, 0 bytes of 1 byte"
