"""The tables of `forkvm queues` and `forkvm top`, as terminals of several sizes show them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from worker.commands.watch.tables import tables, title
from worker.overview import Job, Overview, Queue, Worker

_PROGRESS = {"files_done": 3, "files_total": 9, "bytes_done": 1 << 30, "bytes_total": 3 << 30, "phase": "copy"}
_CAMPAIGN = {"forks_done": 12, "forks_total": 1000, "forks_failed": 1, "eta_seconds": 4.0}
BUSY = Overview(
    queue="forkvm.nvme-a",
    queues=[
        Queue("forkvm.nvme-a", 12_345, 2, 7300.0),
        *(Queue(f"forkvm.nvme-a#{name}", 0, 0, None) for name in ("batch", "chunk", "finish")),
    ],
    forks=2,
    campaigns=1,
    jobs=[
        Job("fork-1", "fork", "PROGRESS", _PROGRESS, "/guests/vm-1"),
        Job("fan-out", "campaign", "PROGRESS", _CAMPAIGN, "/guests"),
        Job("new\x1b[2J\n[red]", "fork", "STARTED", None, "/guests/\x1b]0;vm"),
    ],
    workers=[
        Worker("a@host", "0.1.0", ["forkvm.nvme-a"], 4, 3, 0.4),
        Worker("b@host", "0.1.0", ["forkvm.nvme-a"], 4, 0, 75.0),
    ],
)
LOST = Worker("lost@host", "0.1.0", ["forkvm.nvme-a"], 4, None, 180.0, "host", answers=False)


def _shown(overview: Overview, width: int, height: int | None = None) -> list[str]:
    console = Console(width=width, height=height or 100, color_system=None)
    with console.capture() as captured:
        console.print(tables(overview, width, height))
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_the_tables_show_the_state_of_the_domain(width: int) -> None:
    lines = [" ".join(line.split()) for line in _shown(BUSY, width)]
    destination = " /guests/vm-1" if width == 200 else ""

    assert "forkvm.nvme-a client requests 12,345 2 2.0 h" in lines
    assert "Workers: 2, 3 of 8 children busy" in lines
    assert "b@host 0.1.0 0 4 75 s ago" in lines
    assert "In progress: 2 forks, 1 campaign" in lines
    assert f"fork-1 fork copy 1.0 GiB 3.0 GiB{destination}" in lines
    assert any(line.startswith("fan-out campaign copy 12 (1 failed) 1,000 forks") for line in lines)


@pytest.mark.parametrize("width", [80, 200])
def test_lines_fit_the_terminal_and_columns_keep_their_names(width: int) -> None:
    lines = _shown(BUSY, width)

    assert max(map(len, lines)) <= width
    assert "waiting" in lines[1]
    assert "oldest" in lines[1]


def test_long_names_are_cut_and_numbers_are_not() -> None:
    queue = "forkvm.a-domain-with-a-long-name"
    host = "forkvm-0123456789@ip-10-20-30-40.eu-central-1.compute.example.com"
    many = {"forks_done": 1234, "forks_total": 10_000, "forks_failed": 12, "eta_seconds": 4.0}
    overview = replace(
        BUSY,
        queues=[Queue(f"{queue}{end}", 1_234_567, 123_456, 1e5) for end in ("", "#batch", "#chunk", "#finish")],
        jobs=[Job("0" * 36, "campaign", "PROGRESS", many, "/guests/vm" * 30)],
        workers=[replace(LOST, name=host, children=64)],
    )

    for width in (80, 120):
        lines = _shown(overview, width)
        assert max(map(len, lines)) <= width
        text = "\n".join(" ".join(line.split()) for line in lines)
        assert "1,234,567 123,456 27.8 h" in text
        assert "0.1.0 ? ? no answer, 3 min ago" in text
        assert "campaign copy 1,234 (12 failed) 10,000 forks" in text


def test_all_lines_of_a_terminal_are_used_before_jobs_are_cut() -> None:
    jobs = [replace(BUSY.jobs[0], id=f"fork-{n}") for n in range(10)]

    lines = _shown(replace(BUSY, jobs=jobs, forks=10, campaigns=0), 80, 23)

    assert len(lines) == 23


@pytest.mark.parametrize("height", [24, 40])
def test_many_workers_and_jobs_are_truncated_to_the_height_and_counted(height: int) -> None:
    jobs = [replace(BUSY.jobs[0], id=f"fork-{n}") for n in range(100)]
    many = replace(BUSY, jobs=jobs, workers=BUSY.workers * 20, forks=5000, campaigns=0)

    lines = _shown(many, 80, height)

    assert len(lines) <= height
    shown = sum(line.startswith(" fork-") for line in lines)
    assert f" and {5000 - shown:,} more" in [line.rstrip() for line in lines]


def test_a_worker_that_does_not_answer_comes_first_with_its_last_heartbeat_and_counts_as_neither_busy_nor_idle() -> (
    None
):
    ending = replace(LOST, name="ending@host", ending=True)
    lines = [" ".join(line.split()) for line in _shown(replace(BUSY, workers=[*BUSY.workers, LOST, ending]), 80)]

    assert "Workers: 2, 3 of 8 children busy; 2 without an answer" in lines
    first = lines.index("lost@host 0.1.0 ? ? no answer, 3 min ago")
    assert lines[first + 1] == "ending@host 0.1.0 ? ? ending, 3 min ago"
    assert lines[first + 2].startswith("a@host")


def test_the_row_of_a_worker_that_does_not_answer_is_bold_and_red_unless_it_ends() -> None:
    def escapes(worker: Worker) -> int:
        console = Console(width=80, color_system="standard", force_terminal=True)
        with console.capture() as captured:
            console.print(tables(replace(BUSY, workers=[worker]), 80))
        return captured.get().count("\x1b[1;31m")

    assert escapes(LOST) == 5
    assert escapes(replace(LOST, ending=True)) == escapes(BUSY.workers[0]) == 0


@pytest.mark.parametrize("height", [24, 40])
def test_a_worker_that_does_not_answer_is_not_cut_off(height: int) -> None:
    many = replace(BUSY, workers=[*BUSY.workers * 20, LOST])

    lines = _shown(many, 80, height)

    assert len(lines) <= height
    assert any("lost@host" in line for line in lines)


def test_hostile_names_are_escaped() -> None:
    text = "\n".join(_shown(BUSY, 200))

    assert "\x1b" not in text
    assert "new\\x1b[2J\\n[red]" in text
    assert "\x1b" not in title("forkvm", "Redis: \x1b[2J").plain
