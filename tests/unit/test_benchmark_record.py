"""The benchmark's figures, which are measured in parts and kept in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import record
from benchmarks.report.tables import Finding
from benchmarks.rounds import Row

FIRST, LATER = "2026-11-01T00:00:00+00:00", "2026-11-02T00:00:00+00:00"


def row(filesystem: str, case: str, cp: float, measured_at: str) -> Row:
    seconds = {"engine": [cp / 2, cp / 2], "cp": [cp, cp]}
    return Row(case, filesystem, filesystem == "xfs", seconds, {"rsync": "it failed"}, measured_at)


def test_a_run_replaces_the_figures_that_it_measured_and_keeps_the_rest(tmp_path: Path) -> None:
    path = str(tmp_path / "figures.json")
    tree, inst = row("xfs", "tree", 1.0, FIRST), row("xfs", "inst", 2.0, FIRST)
    old = [Finding("memory", 64.0, "MiB", 150, FIRST), Finding("growth", 1.5, "", None, FIRST)]
    again, other = row("xfs", "tree", 3.0, LATER), row("ext4", "inst", 4.0, LATER)
    new = [Finding("growth", 1.25, "", 1.3, LATER)]

    record.add_to(path, record.read(path), [tree, inst], old)
    rows = record.add_to(path, record.read(path), [other, again], new)

    assert rows == [inst, again, other]
    assert record.read(path) == ([inst, again, other], [old[0], *new])
    assert json.loads(Path(path).read_text())["rows"][1]["ratio_to_cp"]["engine"] == 0.5


def test_figures_of_another_machine_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    record.add_to(str(path), record.read(None), [row("xfs", "tree", 1.0, FIRST)], [])
    data = json.loads(path.read_text())

    path.write_text(json.dumps({**data, "machine": {**data["machine"], "cores": 1024}}))

    assert record.read(str(path)) == ([], [])


@pytest.mark.parametrize("text", ["", "{}", '{"rows": 3}', '{"rows": [{}]}', "[]"])
def test_a_file_with_other_contents_is_refused_and_not_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "figures.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=r"not a file of benchmark figures|Expecting value"):
        record.read(str(path))

    assert path.read_text() == text
