"""Whether the benchmark detects that the host reclaims the machine's free memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.host import takes_memory_back


def _sys(root: Path, order: int, features: str) -> Path:
    module = root / "module" / "page_reporting" / "parameters"
    module.mkdir(parents=True)
    (module / "page_reporting_order").write_text(f"{order}\n")
    balloon = root / "bus" / "virtio" / "drivers" / "virtio_balloon" / "virtio0"
    balloon.mkdir(parents=True)
    (balloon / "features").write_text(f"{features}\n")
    return root


@pytest.mark.parametrize(
    ("order", "features", "taken"),
    [(9, "011001", True), (10, "000001", True), (11, "011001", False), (9, "011110", False), (9, "", False)],
)
def test_a_balloon_that_reports_free_pages(tmp_path: Path, order: int, features: str, taken: bool) -> None:
    assert takes_memory_back(_sys(tmp_path, order, features)) is taken


def test_a_machine_without_a_balloon(tmp_path: Path) -> None:
    assert not takes_memory_back(tmp_path)
