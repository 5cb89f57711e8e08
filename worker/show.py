"""How the command line says things: answers on stdout, everything else on stderr, JSON where it is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tasks.copier.errors import describe
from tasks.copier.progress import Progress
from tasks.copier.report import FileResult
from tasks.copier.spec import ForkResult

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


class ShowProgress(Protocol):
    """Takes the progress so far."""

    def __call__(self, progress: Progress) -> None:
        """Show it, or not."""


def answer(text: str) -> None:
    """Print one line of an answer; what a terminal must not get is escaped."""
    print(printable(text))


def say(text: str) -> None:
    """Print one line that is no answer."""
    print(f"forkvm: {printable(text)}", file=sys.stderr)


def answer_json(data: Any) -> None:
    """Print one JSON document on one line: ASCII, with surrogate escapes for bytes that are not UTF-8."""
    print(json.dumps(data), flush=True)


def printable(text: str) -> str:
    """`text` with control characters and bytes that are not UTF-8 as backslash escapes.

    File names come from guests; none of them may move a terminal's cursor or end a line.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def size(count: int) -> str:
    """A number of bytes for a person: 1.5 GiB."""
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def result_lines(result: ForkResult) -> Iterator[str]:
    """A ForkResult for a person."""
    files, count, seconds = result["files"], result["bytes"], result["seconds"]
    yield f"{result['status']}: {result['source']} -> {result['destination']} in {seconds['total']:.3f} s"
    yield f"  id        {result['fork_id']}"
    if result["subvolume"]:
        yield "  subvolume of btrfs, made by one snapshot: `btrfs subvolume delete` removes it at once"
    if result["error"] is not None:
        yield f"  error     {describe(result['error'])}"
    done = ", ".join(f"{number} {name}" for name, number in files.items() if name != "total" and number)
    yield f"  entries   {files['total']}" + (f": {done}" if done else "")
    yield (
        f"  bytes     {size(count['logical'])} logical, {size(count['reflinked'])} reflinked, "
        f"{size(count['copied'])} copied"
    )
    if result["fallback"] is not None:
        yield f"  fallback  {result['fallback']['reason']} (first at {result['fallback']['path']})"
    steps = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items() if name != "total")
    yield f"  seconds   {steps}; {result['chunks']} chunks"


def file_line(result: FileResult) -> str:
    """A FileResult for a person."""
    error = result["error"]
    what = f"FAILED {describe(error)}" if error is not None else result["method"]
    reason = f"  ({result['reason']})" if result["reason"] else ""
    copied = f", {size(result['copied_bytes'])} copied" if result["copied_bytes"] else ""
    return f"{what:<9} {size(result['bytes']):>11}{copied}  {result['path']}{reason}"


@contextmanager
def progress_bar() -> Iterator[ShowProgress]:
    """A bar on stderr where that is a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    # Imported here: it costs a script, which sees no bar, 50 ms.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    # No thread of its own: a local fork makes child processes meanwhile.
    with Bars(*columns, console=console, auto_refresh=False, transient=True) as bars:
        task = bars.add_task("plan", total=None)

        def show(progress: Progress) -> None:
            entries = f" {progress['files_done']}/{progress['files_total']} entries" if progress["files_total"] else ""
            bars.update(
                task,
                description=f"{progress['phase']}{entries}",
                completed=progress["bytes_done"],
                total=progress["bytes_total"] or None,
                refresh=True,
            )

        yield show
