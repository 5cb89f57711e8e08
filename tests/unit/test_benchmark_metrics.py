"""How the benchmarks measure the cost of metrics."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.contenders.timed_parts import read_parts
from benchmarks.measures.metrics import half_interval, processor_seconds
from tests.fixtures.processes import wait_until


def test_the_processor_time_of_a_process_is_read_from_its_own_clock() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            wait_until(lambda: processor_seconds(other.pid) > 0, "the processor time of a process that computes")
            first = processor_seconds(other.pid)
            wait_until(lambda: processor_seconds(other.pid) > first, "more of it")
        finally:
            other.kill()

    assert processor_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.1)


def test_the_median_of_twelve_values_is_known_to_be_between_the_third_and_the_tenth() -> None:
    assert half_interval([1, 2, 3, 5, 5, 5, 5, 5, 5, 10, 100, 1000]) == 3.5


def test_the_times_of_parts_are_averages_for_one_fork(tmp_path: Path) -> None:
    path = tmp_path / "parts"
    path.write_text("report 1000 1\nreport 3000 1\ncount 500 0\ncount 5500 4\n")

    assert read_parts(path) == {"report": pytest.approx(2e-6), "count": pytest.approx(1.5e-6)}
    assert read_parts(path) == {}
